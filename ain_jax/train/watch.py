"""Whether a run forgets: bits per byte of held-out texts before its first step, while it trains, and after its last.

    step 0    documents/ar 2.310            documents/en 1.102
    step 200  documents/ar 1.740 (-24.7%)   documents/en 1.119 (+1.5%)

The values lie in `watch.jsonl` of the stage, a line for each time, so that the first of them outlives an interruption.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ain_jax.experiment import nearest
from ain_jax.launching import TOLD, processes
from ain_jax.train import metrics

FILE = "watch.jsonl"
DIGITS = 6  # of a value, compared as it is written


@dataclasses.dataclass(frozen=True)
class Watch:
    """Which held-out texts a stage is measured on while it trains, and which of them stop it.

    Watch.texts = ("documents/ar", "documents/en")     sources as a mixture names them, their records held apart
    Watch.stop_rise = {"documents/en": 0.05}           it stops where bits per byte are 5% above those at step 0
    """

    texts: tuple[str, ...] = ()  # texts, or conversations, whose answers are measured; none: nothing is watched
    every: int = 0  # steps; 0: before the first and after the last alone, which always are
    rows: int = 64  # of each text, at most; 0: all that is held out
    # At most so many tokens of a text are read together; 0: a row of the stage. Stages whose rows differ compare where
    # it is the same for all.
    row_tokens: int = 0
    # By text; with every = 0 it is looked at behind the last step alone.
    stop_rise: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if min(self.every, self.rows, self.row_tokens) < 0:
            numbers = f"every = {self.every}, rows = {self.rows}, row_tokens = {self.row_tokens}"
            raise ValueError(f"{numbers}: expected 0 or more each")
        set_ = [f.name for f in dataclasses.fields(self) if f.name not in ("texts", "stop_rise")]
        ignored = [f"{n} = {getattr(self, n)}" for n in set_ if getattr(self, n) != getattr(type(self), n)]
        if ignored and not self.texts:
            raise ValueError(f"{' and '.join(ignored)}, and nothing is watched: give texts, or leave it out")
        if double := sorted({text for text in self.texts if self.texts.count(text) > 1}):
            raise ValueError(f"texts names {', '.join(double)} more than once")
        for text, share in self.stop_rise.items():
            if text not in self.texts:
                raise ValueError(f"stop_rise names {text!r}, which texts does not: {nearest(text, self.texts)}")
            if not share > 0:
                raise ValueError(f"stop_rise = {{{text!r}: {share}}}: expected a share above 0; leave it out for none")


class Risen(ValueError):
    """A watched text has become so much less likely that the run stops; its state is saved."""


class Watcher:
    """The values of one stage. `measure(trained, frozen)` gives bits per byte by text; every process calls it."""

    def __init__(self, settings: Watch, folder: Path, measure: Callable[[Any, Any], Mapping[str, float]]):
        self.settings, self.path = settings, folder / FILE
        self._measure = measure
        self.first: dict[str, float] = {}  # the values at step 0

    def begin(self, step: int) -> None:
        """Go on behind a step: what was written of later ones is dropped, and what stopped the run there stops it.

        ValueError: nothing says what the values were before the first step.
        """
        lines = processes.of_first(lambda: list(map(json.loads, metrics.keep_up_to(self.path, step))))
        if step and not lines:
            raise ValueError(
                f"{self.path} does not say what was measured before the first step, and the stage is at step {step}: "
                f"delete {self.path.parent} to begin it anew, or leave Watch.texts out"
            )
        if lines:
            self.first = _values(lines[0])
            if lines[-1]["step"] == step and (fault := self.risen(step, _values(lines[-1]))):
                raise fault

    def due(self, step: int, last: int) -> bool:
        """Whether the texts are measured behind a step, counted from 1."""
        return step == last or bool(self.settings.every and step % self.settings.every == 0)

    def add(self, step: int, trained: Any, frozen: Any, log: metrics.Log) -> Risen | None:
        """Measure, write down and tell. What this stops the run for is given back, so that its state is saved first."""
        values = {name: round(float(value), DIGITS) for name, value in self._measure(trained, frozen).items()}
        self.first = self.first or values
        if processes.is_first():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        log.watched(step, values, self.first)
        return self.risen(step, values)

    def risen(self, step: int, values: Mapping[str, float]) -> Risen | None:
        """The fault of a step where a text is above what its share allows, or no number."""
        told = []
        for text, share in self.settings.stop_rise.items():
            before, now = self.first[text], values[text]
            if not now <= before * (1 + share):
                told.append(
                    f"bits per byte of {text} rose from {before:g} before the first step to {now:g} "
                    f"({now / before - 1:+.2%}), where Watch.stop_rise allows {share:+.2%}"
                )
        if not told:
            return None
        fault = Risen(
            f"step {step}: {'; '.join(told)}. The state of this step is saved. To go on from it, raise Watch.stop_rise "
            "or leave the text out of it, and give the same command; otherwise begin anew in another --run_dir with a "
            "larger share of this language in Mixture.weights, or a lower Optimizer.learning_rate"
        )
        fault.add_note(TOLD)  # every process has these numbers
        return fault


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage, each with its step and bits per byte by text; none where nothing was watched."""
    return metrics.read(folder / FILE)


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step"}
