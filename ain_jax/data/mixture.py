"""Which example comes when: weights over sources -> one fixed draw."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ain_jax.experiment import nearest


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Shares of the sources that a stage trains on.

    `weights` need not sum to one. By "tokens" a share counts tokens of text and pictures alike; by "examples" it
    counts examples, so that a source of long ones takes more of the row.
    """

    weights: Mapping[str, float]
    by: Literal["tokens", "examples"] = "examples"

    def __post_init__(self):
        bad = {k: v for k, v in self.weights.items() if not v > 0}
        if bad or not self.weights:
            raise ValueError(f"weights = {dict(self.weights)}: expected one source or more, each with a share above 0")


def example_shares(mixture: Mixture, mean_tokens: Mapping[str, float]) -> dict[str, float]:
    """The share of examples of each source, summing to 1; `mean_tokens` is tokens per example of a source."""
    unknown = sorted(set(mixture.weights) - set(mean_tokens))
    if unknown:
        raise ValueError(f"Mixture.weights names {unknown[0]!r}: {nearest(unknown[0], list(mean_tokens))}")
    raw = {k: w / (mean_tokens[k] if mixture.by == "tokens" else 1.0) for k, w in mixture.weights.items()}
    total = sum(raw.values())
    return {k: v / total for k, v in raw.items()}


def draw(sizes: Sequence[int], shares: Sequence[float], seed: int, count: int) -> np.ndarray:
    """The first `count` draws as (source, example) rows: each source shuffled anew each epoch, sources interleaved.

    A source of share p has its j-th example at time (j + 1/2) / p, and the draw is the order of those times: any
    stretch of it holds each source in its share, and a longer draw begins with the shorter one. (A grain mix of
    shuffled and repeated sources gives the same guarantees, at about 2 ms an item; planning draws millions.)
    """
    assert len(sizes) == len(shares), "one share per source"
    times, draws = [], []
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if not size:
            raise ValueError(f"source {source} of the mixture has no examples; take it out of Mixture.weights")
        # By time count + sources / 2 all draws asked for have come: each source is behind by half a draw at most.
        needed = int(np.ceil(share * (count + len(sizes) / 2))) + 1
        epochs = [np.random.default_rng([seed, source, e]).permutation(size) for e in range(-(-needed // size))]
        times.append((np.arange(needed) + 0.5) / share)
        draws.append(np.stack([np.full(needed, source), np.concatenate(epochs)[:needed]], axis=1))
    order = np.argsort(np.concatenate(times), kind="stable")[:count]
    return np.concatenate(draws)[order]
