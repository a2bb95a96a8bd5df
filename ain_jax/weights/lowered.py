"""Head rows of new pieces, lowered so that the pieces take little probability from text in the known languages.

The head has no bias that could do it, and a published architecture gets none. But there is a direction u with h·u near
1 for every hidden state h (SmolLM2-135M: 0.99 on English and 0.97 on Arabic, give or take 0.08), since the states
behind the last norm share a large mean. So each new row w becomes w - s u, and all its logits fall by s nats. A tied
row is also what the piece is read as; u is so short beside a row (0.09 to 3.2 there) that this changes next to nothing.

u is the least-squares solution: the mean over h of (h·u - 1)^2, and ridge |u|^2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.special import logsumexp

from ain_jax.models.config import ModelConfig
from ain_jax.tokenizer.align import align
from ain_jax.train.rows import TABLES
from ain_jax.weights.states import text_states

BLOCK = 512  # hidden states whose logits are held at once
HIGHEST = 64.0  # nats; a piece lowered by so much is never chosen


@dataclass(frozen=True)
class Lowered:
    """How far the head rows of new pieces are lowered."""

    rise: float | None = None  # share of its value by which the loss on known text may rise (0.0005: 0.05%); None: free
    texts: int = 64  # parts of texts to measure on, at most
    tokens: int = 128  # of a part
    ridge: float = 0.1  # of the mean square of a hidden state's component

    def __post_init__(self):
        if self.rise is not None and not self.rise > 0:
            raise ValueError(f"rise = {self.rise}: expected a share above 0, such as 0.0005, or None")
        if self.texts < 1 or self.tokens < 2 or not self.ridge > 0:
            raise ValueError(
                f"texts = {self.texts}, tokens = {self.tokens}, ridge = {self.ridge}: expected 1, 2 and above 0 or more"
            )


def lower(
    params: Mapping[str, Any],
    config: ModelConfig,
    first: int,
    count: int,
    tokenizer: tokenizers.Tokenizer,
    kept: Sequence[str],
    first_token: int,
    settings: Lowered,
) -> dict[str, Any]:
    """`params` with the head rows of the `count` new pieces lowered just so far that the loss on `kept` rises by
    `settings.rise` at most; unchanged where it does not rise by more.

    `kept` are texts in the languages known before, `tokenizer` is the extended one. Tokens that are new pieces
    themselves are not counted.
    """
    assert settings.rise is not None, "nothing to lower"
    if not kept:
        raise ValueError(f"lowered.rise = {settings.rise}, but no text in the languages known before; expected some")
    chosen = align(tokenizer, tokenizer, kept, first_token, settings.tokens, settings.texts)
    hidden_TD, targets_T = text_states(config, params, chosen.new_tokens_NM, chosen.new_lengths_N)
    hidden_TD, targets_T = hidden_TD[targets_T < first], targets_T[targets_T < first]
    flat = dict(flatten_dict(dict(params)))
    path = next(path for path in reversed(TABLES) if path in flat)  # the head's own table, else the tied one
    table_VD = np.asarray(flat[path])
    head_VD, down_D = table_VD.astype(np.float32), direction(hidden_TD, settings.ridge)
    cap = config.text.logit_softcap
    nats = lowest(hidden_TD, targets_T, head_VD, first, count, down_D, settings.rise, cap)
    lowered_VD = table_VD.copy()
    lowered_VD[first : first + count] = (head_VD[first : first + count] - nats * down_D).astype(table_VD.dtype)
    return unflatten_dict(flat | {path: lowered_VD})


def direction(hidden_TD: np.ndarray, ridge: float) -> np.ndarray:
    """(D,) the u of this file's head.

    Of the states (2, 1) and (2, -1) it is (1/2, 0) but for the ridge.
    """
    T, D = hidden_TD.shape
    square_DD = hidden_TD.T.astype(np.float64) @ hidden_TD / T
    ridge_DD = ridge * np.trace(square_DD) / D * np.eye(D)
    return np.linalg.solve(square_DD + ridge_DD, hidden_TD.mean(axis=0, dtype=np.float64)).astype(np.float32)


def lowest(
    kept_TD: np.ndarray,
    targets_T: np.ndarray,
    head_VD: np.ndarray,
    first: int,
    count: int,
    direction_D: np.ndarray,
    rise: float,
    cap: float | None = None,
) -> float:
    """The fewest nats s, to 1/100, at which the loss of old targets rises by the share `rise` at most.

    With new pieces of logits z the loss of each target rises by log(1 + sum exp(z - s h·u) / sum over old pieces).
    """
    bend = (lambda z: z) if cap is None else (lambda z: cap * np.tanh(z / cap))
    blocks = []
    for start in range(0, len(kept_TD), BLOCK):
        hidden_TD = kept_TD[start : start + BLOCK]
        logits_TV = hidden_TD @ head_VD[: first + count].T
        old_TV = bend(logits_TV[:, :first])
        whole_T = logsumexp(old_TV, axis=1)
        nll_T = whole_T - old_TV[np.arange(len(hidden_TD)), targets_T[start : start + BLOCK]]
        blocks.append((logits_TV[:, first:].astype(np.float32), whole_T, nll_T, hidden_TD @ direction_D))
    loss = sum(float(nll_T.sum()) for _, _, nll_T, _ in blocks)

    def risen(nats: float) -> float:
        new = (logsumexp(bend(z_TN - nats * u_T[:, None]), axis=1) - whole_T for z_TN, whole_T, _, u_T in blocks)
        return sum(float(np.logaddexp(0, share_T).sum()) for share_T in new) / loss

    if risen(0.0) <= rise:
        return 0.0
    low, high = 0.0, 1.0
    while risen(high) > rise:
        low, high = high, 2 * high
        if high > HIGHEST:
            raise ValueError(
                f"the loss rises by {risen(low):.4%} even {low:g} nats lower, and rise = {rise:.4%} was asked for: "
                "the hidden states of this text share no direction; ask for more, or shrink the rows"
            )
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if risen(middle) > rise else (low, middle)
    return high
