"""Parameters + held-out rows -> bits per byte, and which answer of a pair a model finds likelier."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ain_jax.launching import processes
from ain_jax.train.losses import group_sums, next_token, pair_log_probs


def nats(model: Any, params: Any, groups: Sequence[str], batches: Iterator[tuple[Any, int]]) -> dict[str, float]:
    """Summed nats of the learnt tokens of each group."""
    score = _token_nats(model, len(groups))
    total_G = np.zeros(len(groups))
    for batch, _ in batches:
        total_G += np.asarray(processes.fetch(score(params, batch)), np.float64)
    return dict(zip(groups, total_G.tolist(), strict=True))


def pair_choices(
    model: Any, params: Any, groups: Sequence[str], batches: Iterator[tuple[Any, int]]
) -> dict[str, dict[str, float]]:
    """By kind of pair: the share of pairs whose better answer is likelier, and the mean margin in nats.

    The log-probability of a whole answer is compared, so that a shorter worse answer has an advantage.
    """
    score = _pair_sums(model, len(groups))
    totals = np.zeros((3, len(groups)))
    for batch, _ in batches:
        totals += np.stack([np.asarray(part, np.float64) for part in processes.fetch(score(params, batch))])
    right_G, count_G, margin_G = totals
    return {
        group: {"accuracy": right_G[g] / count_G[g], "margin": margin_G[g] / count_G[g], "pairs": int(count_G[g])}
        for g, group in enumerate(groups)
        if count_G[g]
    }


@functools.lru_cache(maxsize=16)  # one compilation for all the models and texts that are compared
def _token_nats(model: Any, groups: int) -> Any:
    loss = next_token(model, groups)
    return jax.jit(lambda params, batch: loss(params, {}, batch, None).parts["loss"][0])


@functools.lru_cache(maxsize=16)
def _pair_sums(model: Any, groups: int) -> Any:
    def score(params, batch):
        log_probs_BN2, _ = pair_log_probs(model, params, batch)
        margin_BN = log_probs_BN2[..., 0] - log_probs_BN2[..., 1]
        weights_BN = (batch.pair_groups_BN >= 0).astype(margin_BN.dtype)
        kinds_BN = batch.pair_groups_BN * (batch.pair_groups_BN >= 0)
        chosen = group_sums((margin_BN > 0).astype(margin_BN.dtype), weights_BN, kinds_BN, groups)
        return *chosen, group_sums(margin_BN, weights_BN, kinds_BN, groups)[0]

    return jax.jit(score)
