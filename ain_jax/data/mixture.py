"""How much of each source and language a stage sees: weights -> shares of one fixed draw (`draw.py`)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ain_jax.data.draw import draw
from ain_jax.experiment import nearest

__all__ = ["Counts", "Mixture", "Stratum", "draw", "example_shares", "strata"]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Shares of the sources that a stage trains on, and of the languages inside them.

    `weights` need not sum to one. By "tokens" a share counts tokens of text and pictures alike; by "examples" it
    counts examples, so that a source of long ones takes more of the row. By "epochs" a weight says how many times the
    source is gone through: 2.5 is twice all of it and half of it once more, and the length of the stage follows.

    A mixture that changes in training has `phases`, their shares of the rows, and may give a source one weight for
    each of them, 0 where it takes no part:

        phases = (0.25, 0.75)    weights = {"letters": (1.0, 0.2), "words": (0.0, 0.8)}

    Languages come as the weights of the sources alone bring them, unless `shares` fixes some, or `temperature` T
    makes the share of each of the others go with the T-th root of what it would be: 1 leaves them, more brings them
    closer together. Both hold over the whole stage, the sources keeping their proportions within a language; or
    inside each source, whose weight then stays what it is (a source of one language stays as it is). Pangea
    (arXiv 2410.16153) gives English 40%:

        shares = {"en": 0.4}    temperature = 2.0
        Arabic 90 and Urdu 10 of 200 examples, English 100: the other 60% go as 3 to 1, to Arabic 45%, to Urdu 15%
    """

    weights: Mapping[str, float | tuple[float, ...]]
    by: Literal["tokens", "examples", "epochs"] = "examples"
    phases: tuple[float, ...] = (1.0,)
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of languages
    temperature: float = 1.0
    over: Literal["stage", "source"] = "stage"  # what shares and temperature hold over

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
        if self.by == "epochs" and len(self.phases) > 1:
            raise ValueError(f'phases = {self.phases}: by = "epochs" makes one stretch, all sources spread over it')
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: expected above 0; 1 leaves the languages as they come")
        wrong = [name for name, share in self.shares.items() if not 0 < share < 1]
        if wrong or not sum(self.shares.values()) < 1 + 1e-9:
            raise ValueError(
                f"shares = {dict(self.shares)}: expected shares of languages, each above 0 and below 1, together 1 at "
                "most; a language is left out by leaving its part out of weights"
            )

    @property
    def by_language(self) -> bool:
        """Whether languages are drawn apart."""
        return bool(self.shares) or self.temperature != 1

    def phase_weights(self, phase: int) -> dict[str, float]:
        """The weight of each source in a phase, counted from 0."""
        return {name: w[phase] if isinstance(w, tuple) else w for name, w in self.weights.items()}

    def phase_rows(self, rows: int, multiple: int = 1) -> list[int]:
        """How many of `rows` rows each phase takes; of batches of `multiple` rows, whole ones."""
        ends = np.round(np.cumsum(self.phases) / sum(self.phases) * (rows // multiple)).astype(int) * multiple
        ends[-1] = rows
        return np.diff(ends, prepend=0).tolist()


def example_shares(mixture: Mixture, mean_tokens: Mapping[str, float], phase: int = 0) -> dict[str, float]:
    """The share of examples of each source, summing to 1; `mean_tokens` is tokens per example of a source."""
    assert mixture.by != "epochs", "epochs need the sizes of the sources: see strata"
    _refuse_unknown(mixture, list(mean_tokens))
    weights = mixture.phase_weights(phase)
    raw = {k: w / (mean_tokens[k] if mixture.by == "tokens" else 1.0) for k, w in weights.items()}
    total = sum(raw.values())
    return {k: v / total for k, v in raw.items()}


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a mixture has to know of a source: examples and tokens of each of its languages."""

    examples: Mapping[str, int]
    tokens: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Stratum:
    """Examples that are drawn in a share of their own: a source, or one language of it."""

    source: str
    language: str  # "" for all of them
    size: int  # examples
    shares: tuple[float, ...]  # of the examples of each phase
    draws: float  # by epochs, how many examples of it are drawn in all; else 0


def strata(mixture: Mixture, sources: Mapping[str, Counts]) -> list[Stratum]:
    """What is drawn apart, source by source: the shares of each phase sum to 1.

    Raises ValueError for a source or a language that is not there, and for shares that cannot be met.
    """
    _refuse_unknown(mixture, list(sources))
    empty = sorted(name for name in sources if not sum(sources[name].examples.values()))
    if empty:
        raise ValueError(f"source {empty[0]!r} has no examples: take it out of Mixture.weights")
    if not mixture.by_language:
        return _whole_sources(mixture, sources)
    languages = sorted({language for counts in sources.values() for language in counts.examples})
    absent = [language for language in mixture.shares if language not in languages]
    if absent:
        raise ValueError(f"Mixture.shares names {absent[0]!r}: {nearest(absent[0], languages)}")
    # S sources, L languages.
    table = lambda field: np.array([[getattr(c, field).get(lang, 0) for lang in languages] for c in sources.values()])
    examples_SL, tokens_SL = table("examples"), table("tokens")
    amounts_SL = (tokens_SL if mixture.by == "tokens" else examples_SL).astype(float)
    by_phase, draws_SL = [], np.zeros_like(amounts_SL)
    for phase in range(len(mixture.phases)):
        weights = mixture.phase_weights(phase)
        weights_S = np.array([weights.get(name, 0.0) for name in sources], float)
        if mixture.by == "epochs":
            weights_S = weights_S * examples_SL.sum(axis=1)
        base_SL = weights_S[:, None] / weights_S.sum() * amounts_SL / amounts_SL.sum(axis=1, keepdims=True)
        if mixture.over == "stage":
            wanted_L = _languages(mixture, base_SL.sum(axis=0), languages)
            shares_SL = base_SL * _ratio(wanted_L, base_SL.sum(axis=0))
        else:
            own_SL = _ratio(base_SL, base_SL.sum(axis=1, keepdims=True))
            own_SL = np.stack([_languages(mixture, own_L, languages, inside=True) for own_L in own_SL])
            shares_SL = base_SL.sum(axis=1, keepdims=True) * own_SL
        if mixture.by == "tokens":  # from shares of tokens to shares of examples
            shares_SL = shares_SL * _ratio(examples_SL, tokens_SL)
        by_phase.append(shares_SL / shares_SL.sum())
        if mixture.by == "epochs":
            draws_SL = by_phase[0] * weights_S.sum()
    return [
        Stratum(name, language, int(examples_SL[s, k]), tuple(float(p[s, k]) for p in by_phase), float(draws_SL[s, k]))
        for s, name in enumerate(sources)
        for k, language in enumerate(languages)
        if examples_SL[s, k] and any(p[s, k] for p in by_phase)
    ]


def _whole_sources(mixture: Mixture, sources: Mapping[str, Counts]) -> list[Stratum]:
    sizes = {name: sum(counts.examples.values()) for name, counts in sources.items()}
    if mixture.by == "epochs":
        draws = {name: float(weight) * sizes[name] for name, weight in mixture.phase_weights(0).items()}
        by_phase = [{name: count / sum(draws.values()) for name, count in draws.items()}]
    else:
        draws = {}
        means = {name: sum(counts.tokens.values()) / sizes[name] for name, counts in sources.items()}
        by_phase = [example_shares(mixture, means, phase) for phase in range(len(mixture.phases))]
    return [
        Stratum(name, "", size, tuple(shares.get(name, 0.0) for shares in by_phase), draws.get(name, 0.0))
        for name, size in sizes.items()
    ]


def _languages(mixture: Mixture, own_L: np.ndarray, languages: Sequence[str], inside: bool = False) -> np.ndarray:
    """The shares of languages, summing to 1, which without this setting would be own_L."""
    fixed_L = np.array([mixture.shares.get(language, 0.0) for language in languages]) * (own_L > 0)
    free_L = np.where((fixed_L == 0) & (own_L > 0), own_L, 0.0)
    if not free_L.any():
        if not inside and abs(fixed_L.sum() - 1) > 1e-6:
            raise ValueError(
                f"shares = {dict(mixture.shares)} fix {fixed_L.sum():.4g} of the stage, and no other language takes "
                "the rest: let them sum to 1"
            )
        return _ratio(fixed_L, fixed_L.sum())
    roots_L = np.where(free_L > 0, (free_L / free_L.max()) ** (1 / mixture.temperature), 0.0)
    rest = 1 - fixed_L.sum()
    if rest <= 1e-9:
        other = [language for language, free in zip(languages, free_L, strict=True) if free]
        raise ValueError(
            f"shares = {dict(mixture.shares)} leave nothing for {', '.join(other)}: lower them, or take the parts in "
            "these languages out of weights"
        )
    return fixed_L + rest * roots_L / roots_L.sum()


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where below is 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=np.asarray(below) != 0)


def _refuse_unknown(mixture: Mixture, known: Sequence[str]) -> None:
    unknown = sorted(set(mixture.weights) - set(known))
    if unknown:
        raise ValueError(f"Mixture.weights names {unknown[0]!r}: {nearest(unknown[0], known)}")
