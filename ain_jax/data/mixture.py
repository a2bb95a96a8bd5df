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
    counts examples, so that a source of long ones takes more of the row. A mixture that changes in training has
    `phases`, their shares of the rows, and may give a source one weight for each of them, 0 where it takes no part:

        phases = (0.25, 0.75)    weights = {"letters": (1.0, 0.2), "words": (0.0, 0.8)}
    """

    weights: Mapping[str, float | tuple[float, ...]]
    by: Literal["tokens", "examples"] = "examples"
    phases: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if not self.phases or not min(self.phases) > 0:
            raise ValueError(f"phases = {self.phases}: expected one share of the rows or more, each above 0")
        for name, weight in self.weights.items():
            if isinstance(weight, tuple) and len(weight) != len(self.phases):
                raise ValueError(
                    f"weights[{name!r}] = {weight}: expected one number, or {len(self.phases)}, one for each of "
                    f"phases = {self.phases}"
                )
        table = [self.phase_weights(phase) for phase in range(len(self.phases))]
        bad = [n for n in self.weights if min(w[n] for w in table) < 0 or not max(w[n] for w in table) > 0]
        if bad or not self.weights or not all(any(weights.values()) for weights in table):
            raise ValueError(
                f"weights = {dict(self.weights)}: expected one source or more, each with a share above 0, and one at "
                "least in every phase"
            )

    def phase_weights(self, phase: int) -> dict[str, float]:
        """The weight of each source in a phase, counted from 0."""
        return {name: w[phase] if isinstance(w, tuple) else w for name, w in self.weights.items()}

    def phase_rows(self, rows: int) -> list[int]:
        """How many of `rows` rows each phase takes."""
        ends = np.round(np.cumsum(self.phases) / sum(self.phases) * rows).astype(int)
        return np.diff(ends, prepend=0).tolist()


def example_shares(mixture: Mixture, mean_tokens: Mapping[str, float], phase: int = 0) -> dict[str, float]:
    """The share of examples of each source, summing to 1; `mean_tokens` is tokens per example of a source."""
    unknown = sorted(set(mixture.weights) - set(mean_tokens))
    if unknown:
        raise ValueError(f"Mixture.weights names {unknown[0]!r}: {nearest(unknown[0], list(mean_tokens))}")
    weights = mixture.phase_weights(phase)
    raw = {k: w / (mean_tokens[k] if mixture.by == "tokens" else 1.0) for k, w in weights.items()}
    total = sum(raw.values())
    return {k: v / total for k, v in raw.items()}


def draw(
    sizes: Sequence[int], shares: Sequence[float], seed: int, count: int, begin: Sequence[int] | None = None
) -> np.ndarray:
    """The first `count` draws as (source, example) rows: each source shuffled anew each epoch, sources interleaved.

    A source of share p has its j-th example at time (j + 1/2) / p, and the draw is the order of those times: any
    stretch of it holds each source in its share, and a longer draw begins with the shorter one. (A grain mix of
    shuffled and repeated sources gives the same guarantees, at about 2 ms an item; planning draws millions.)
    `begin` says how many of each source an earlier phase has drawn; its epochs go on from there.
    """
    assert len(sizes) == len(shares), "one share per source"
    times, draws = [], []
    for source, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if not size:
            raise ValueError(f"source {source} of the mixture has no examples; take it out of Mixture.weights")
        if not share:
            continue
        first = begin[source] if begin is not None else 0
        # By time count + sources / 2 all draws asked for have come: each source is behind by half a draw at most.
        needed = int(np.ceil(share * (count + len(sizes) / 2))) + 1
        epochs = range(first // size, -(-(first + needed) // size))
        shuffled = [np.random.default_rng([seed, source, e]).permutation(size) for e in epochs]
        examples = np.concatenate(shuffled)[first % size :][:needed]
        times.append((np.arange(needed) + 0.5) / share)
        draws.append(np.stack([np.full(needed, source), examples], axis=1))
    order = np.argsort(np.concatenate(times), kind="stable")[:count]
    return np.concatenate(draws)[order]
