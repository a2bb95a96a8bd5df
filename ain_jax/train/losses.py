"""Loss functions: (params, others, batch, key) -> sums and counts. Nothing is divided here.

`others` are further collections that the model reads beside its parameters: {}, or {"lora": ...}. Division happens
once, by the global count, in `step.py`: so accumulation, packing and the number of devices leave the loss as it is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ain_jax.data.batch import Batch, PairBatch
from ain_jax.train import vocabulary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """A loss before division. `parts` maps a name to sums and counts per group (G groups of the batch)."""

    loss: Any  # scalar, what the gradient is taken of
    count: Any  # scalar, what it is divided by
    parts: dict[str, tuple[Any, Any]]  # name -> (sum_G, count_G)
    # Further parts, told once all is summed: name -> parts and what they are multiplied by, added up.
    derived: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )


Loss = Callable[[Any, Any, Any, Any], Sums]


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Settings of the next-token loss."""

    label_smoothing: float = 0.0  # share of each target given to the whole vocabulary evenly

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: expected 0 or more and below 1")


PLAIN = NextToken()

NONE: Mapping[str, Any] = MappingProxyType({})
HELD_LOGITS = 2**25  # so many logits are held at once, on a device: 128 MiB in float32


def target_log_probs(
    model: Any, params: Any, batch: Batch, others: Mapping[str, Any] = NONE
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Three (B, C) arrays: log-probability in nats of each target, whether the model's first choice is it, and the
    mean log-probability of the whole vocabulary there (for label smoothing).

    The head runs on learnt positions only. Where their logits are more than HELD_LOGITS, the vocabulary is read in
    blocks whose logits are made anew in the backward pass (`vocabulary.py`).
    """
    variables = {"params": params, **others}
    hidden_BLD = model.apply(
        variables,
        tokens_BL=batch.tokens_BL,
        positions_3BL=jnp.moveaxis(batch.positions_B3L, 1, 0),
        segments_BL=batch.segments_BL,
        feature_index_BL=batch.feature_index_BL,
        patches_BPK=batch.patches_BPK,
        patch_positions_BP2=batch.patch_positions_BP2,
        patch_segments_BP=batch.patch_segments_BP,
        method="hidden",
    )
    hidden_BCD = jnp.take_along_axis(hidden_BLD, batch.predict_at_BC[..., None], axis=1)
    logits = jax.eval_shape(functools.partial(model.apply, method="logits"), variables, hidden_BCD)
    if logits.size <= HELD_LOGITS:
        return _score(model, variables, hidden_BCD, batch.targets_BC)
    pairs, cap = model.apply(variables, hidden_BCD, method="head")
    return vocabulary.log_probs(pairs, batch.targets_BC, cap, HELD_LOGITS)


def _score(model: Any, variables: Any, hidden_BCD: jax.Array, targets_BC: jax.Array):
    """What `target_log_probs` returns, of these positions."""
    logits_BCV = model.apply(variables, hidden_BCD, method="logits")
    chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    norm_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    correct_BC = chosen_BC >= logits_BCV.max(axis=-1)
    return chosen_BC - norm_BC, correct_BC, logits_BCV.mean(axis=-1) - norm_BC


def group_sums(values: jax.Array, weights: jax.Array, groups: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Sums of `values` and of `weights` within each of `count` groups: two (G,) arrays.

    values 1 2 3   weights 1 1 0   groups 0 1 1   ->   sums 1 2, counts 1 1
    """
    flat = groups.reshape(-1)
    sums = jax.ops.segment_sum((values * weights).reshape(-1), flat, count)
    return sums, jax.ops.segment_sum(weights.reshape(-1), flat, count)


def next_token(model: Any, groups: int, settings: NextToken = PLAIN, token_bytes_V: np.ndarray | None = None) -> Loss:
    """Cross-entropy of the learnt tokens, in nats; reported by group as `loss` and `accuracy`.

    With the bytes that each id stands for, `bits_per_byte` is reported beside them: it compares runs whose tokenizers
    differ, as nats per token do not.

    Label smoothing (arXiv 1512.00567, section 7) gives a share of each target to the whole vocabulary evenly. In a
    large vocabulary most pieces never occur in a small corpus; the share keeps them unlikely rather than impossible.
    The reported `loss` is the plain cross-entropy.
    """

    def loss(params: Any, others: Mapping[str, Any], batch: Batch, key: Any) -> Sums:
        del key
        log_probs_BC, correct_BC, mean_BC = target_log_probs(model, params, batch, others)
        weights_BC = (batch.target_segments_BC > 0).astype(jnp.float32)
        parts = {
            "loss": group_sums(-log_probs_BC, weights_BC, batch.target_groups_BC, groups),
            "accuracy": group_sums(correct_BC.astype(jnp.float32), weights_BC, batch.target_groups_BC, groups),
        }
        if token_bytes_V is not None:
            bits = group_sums(-log_probs_BC / math.log(2), weights_BC, batch.target_groups_BC, groups)
            bytes_BC = jnp.asarray(token_bytes_V)[batch.targets_BC].astype(jnp.float32)
            size = group_sums(bytes_BC, weights_BC, batch.target_groups_BC, groups)
            parts["bits_per_byte"] = (bits[0], size[0])
        aims_BC = log_probs_BC
        if settings.label_smoothing:
            aims_BC += settings.label_smoothing * (mean_BC - log_probs_BC)
        return Sums(-(aims_BC * weights_BC).sum(), weights_BC.sum(), parts)

    return loss


def pair_log_probs(
    model: Any, params: Any, batch: PairBatch, others: Mapping[str, Any] = NONE
) -> tuple[jax.Array, jax.Array]:
    """Log-probability in nats of the two answers of each place (see `PairBatch`), and their lengths in tokens.

    Both are (B, N, 2); an unused place has 0 and 0.
    """
    log_probs_BC, _, _ = target_log_probs(model, params, batch.rows, others)
    segments_BC = batch.rows.target_segments_BC
    pairs = batch.pair_groups_BN.shape[1]
    # Segment 0 collects the unused places and is cut off; segments 1, 2 are pair 0, 3, 4 pair 1, ...
    by_answer = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, 2 * pairs + 1))
    sums_BS, lengths_BS = (by_answer(v, segments_BC) for v in (log_probs_BC, jnp.ones_like(log_probs_BC)))
    shape = (-1, pairs, 2)
    return sums_BS[:, 1:].reshape(shape), lengths_BS[:, 1:].reshape(shape)
