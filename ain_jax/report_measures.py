"""A run's summary -> what was measured after each stage, and the verdicts on what it claims."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

BEFORE, BASELINE = "untrained", "baseline"  # the first and the last column
LANGUAGES = {
    "ar": "Arabic",
    "en": "English",
    "arz": "Egyptian Arabic",
    "ary": "Moroccan Arabic",
    "arq": "Algerian Arabic",
}
EXTENDED = "ar"  # the language that a tokenizer is extended for
FALL = 0.4  # the share by which its tokens per word are to fall


class Verdict(NamedTuple):
    """One claim about a run, the number it rests on, the bound that number is held against, and whether it holds."""

    claim: str
    value: float
    bound: float
    holds: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """One measure, by column: what was there before any training, what each stage made of it, the baseline."""

    measure: str
    values: Mapping[str, float]
    lower: bool  # whether lower is better
    form: str = ".3f"  # how a value is written
    baseline: str = ""  # what the baseline is
    verdicts: Sequence[Verdict] = ()
    target: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether every claim holds; None where nothing is claimed."""
        return all(v.holds for v in self.verdicts) if self.verdicts else None

    def text(self, column: str) -> str:
        """The value of a column as shown, empty where nothing was measured."""
        value = self.values.get(column)
        return "" if value is None else format(value, self.form)


def heading(column: str) -> str:
    """What stands over a column."""
    return "base, untrained" if column == BEFORE else column.replace("_", " ")


def language(code: str) -> str:
    """The English name of a language, or its code where we have none."""
    return LANGUAGES.get(code, code)


def verdicts(summary: Mapping[str, Any]) -> list[Verdict]:
    """(claim, value, bound, holds) for every target whose numbers the run has."""
    return [verdict for row in table(summary) for verdict in row.verdicts]


def table(summary: Mapping[str, Any]) -> list[Row]:
    """The rows of the last table; measures that the run did not take are left out."""
    stages = summary.get("stages") or {}
    fertility = (stages.get("extend_tokenizer") or {}).get("fertility") or {}
    models = (stages.get("evaluate") or {}).get("models") or {}
    baselines = models.get("baselines") or {}
    trained = [name for name in stages if name in models]
    measured = {name: models[name] for name in (BEFORE, *trained) if name in models}
    rows = (_fertility(fertility), _likelihood(measured, baselines), _answers(measured, baselines), _pairs(measured))
    return [row for part in rows for row in part]


def columns(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The columns that hold anything, in the order of the stages."""
    used = {name for row in rows for name in row.values}
    return [name for name in (BEFORE, *(summary.get("stages") or {}), BASELINE) if name in used]


def _fertility(fertility: Mapping[str, Any]) -> Iterator[Row]:
    for code, pair in fertility.items():
        before, after = pair["before"]["tokens_per_word"], pair["after"]["tokens_per_word"]
        claims, target = [], ""
        if code == EXTENDED and before:
            fall = 1 - after / before
            claim = f"{language(code)} tokens per word fall by at least {FALL:.0%}"
            claims, target = [Verdict(claim, fall, FALL, fall >= FALL)], f"falls by {FALL:.0%}: {fall:.1%}"
        values = {BEFORE: before, "extend_tokenizer": after}
        yield Row(f"tokens per word, {language(code)}", values, True, ".2f", "", claims, target)


def _likelihood(measured: Mapping[str, Any], baselines: Mapping[str, Any]) -> Iterator[Row]:
    """Bits per byte, judged after pretraining: later stages are not trained on documents."""
    for code in _keys(model.get("bits_per_byte") for model in measured.values()):
        values = _present({name: (model.get("bits_per_byte") or {}).get(code) for name, model in measured.items()})
        constant = (baselines.get("bits_per_byte") or {}).get(code)
        after = "pretrain" if "pretrain" in values else None
        order = baselines.get("ngram") or "n"
        yield _judged(f"bits per byte, {language(code)}", values, after, True, constant, f"a byte {order}-gram")


def _answers(measured: Mapping[str, Any], baselines: Mapping[str, Any]) -> Iterator[Row]:
    """Reading and naming, judged after the last stage measured: its weights are the ones handed on."""
    for name in _keys(measured.values()):
        sets = {model: numbers[name] for model, numbers in measured.items() if isinstance(numbers.get(name), Mapping)}
        if not any("cer" in scores or "accuracy" in scores for scores in sets.values()):
            continue  # bits per byte, preferences
        constants = (baselines.get("constant") or {}).get(name) or {}
        reading = any("cer" in scores for scores in sets.values())
        languages = [k for k in _keys(sets.values()) if k not in ("accuracy", "cer", "exact", "count")]
        for key in ["cer"] if reading else ["accuracy", *languages]:
            values = _present({model: scores.get(key) for model, scores in sets.items()})
            task, _, on = name.partition("_")  # "reading_unseen_words"
            what = [f"{task} {'CER' if reading else 'accuracy'}", on.replace("_", " ")]
            measure = ", ".join(filter(None, [*what, language(key) if key in languages else ""]))
            after = next((model for model in reversed(values) if model != BEFORE), None)
            form = ".3f" if reading else ".1%"
            yield _judged(measure, values, after, reading, constants.get(key), "the best constant", form)


def _pairs(measured: Mapping[str, Any]) -> Iterator[Row]:
    """Preference accuracy, judged after the stage prefer against what was measured last before it."""
    for kind in _keys(model.get("preference") for model in measured.values()):
        values = _present(
            {
                name: ((model.get("preference") or {}).get(kind) or {}).get("accuracy")
                for name, model in measured.items()
            }
        )
        claims, target, names = [], "", list(values)
        measure = f"preference accuracy, {kind.replace('_', ' ')}"
        if "prefer" in names[1:]:
            start = names[names.index("prefer") - 1]
            claims = [_beats(measure, "prefer", values["prefer"], start, values[start], False)]
            target = f"prefer above {start}"
        yield Row(measure, values, False, ".1%", "", claims, target)


def _judged(
    measure: str,
    values: dict[str, float],
    after: str | None,
    lower: bool,
    constant: float | None,
    baseline: str,
    form: str = ".3f",
) -> Row:
    """A row whose stage `after` is to beat the untrained model and the baseline, as far as both are known."""
    claims, beaten = [], []
    if after is not None:
        for name, bound in ((BEFORE, values.get(BEFORE)), (baseline, constant)):
            if bound is not None:
                claims.append(_beats(measure, after, values[after], name, bound, lower))
                beaten.append(name)
    target = f"{after} {'below' if lower else 'above'} {' and '.join(beaten)}" if claims else ""
    values = values if constant is None else values | {BASELINE: constant}
    return Row(measure, values, lower, form, "" if constant is None else baseline, claims, target)


def _beats(measure: str, after: str, value: float, name: str, bound: float, lower: bool) -> Verdict:
    claim = f"{measure}: {after} {'below' if lower else 'above'} {name}"
    return Verdict(claim, value, bound, value < bound if lower else value > bound)


def _keys(mappings: Any) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping or ()))


def _present(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if v is not None}


def held(claims: Sequence[Verdict]) -> str:
    """How many of the claims hold, in words."""
    return f"{sum(v.holds for v in claims)} of {len(claims)} targets hold"


def duration(seconds: float) -> str:
    """13.3 -> "13.3 s", 245 -> "4 min 05 s"."""
    if seconds < 119.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
