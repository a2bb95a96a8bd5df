"""Sums and counts -> numbers -> the progress bar, JSON lines, TensorBoard."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ain_jax.launching import processes
from ain_jax.train.losses import Sums
from ain_jax.train.measures import Clock, Work, peak_memory

# What differs between two equal runs, with every name that begins with "mfu/".
TIMES = (
    "step_seconds",
    "tokens_per_second",
    "targets_per_second",
    "patches_per_second",
    "goodput",
    "compile_seconds",
    "data_seconds",
    "checkpoint_seconds",
    "watch_seconds",
    "seconds",
    "peak_memory_gib",
)


def is_time(name: str) -> bool:
    """Whether a number of a line is one of the machine, and not of what was learnt."""
    return name in TIMES or name.startswith("mfu/")


def numbers(sums: Sums, groups: Sequence[str]) -> dict[str, float]:
    """Means from sums and counts: `loss` over everything, and `loss/read/ar` for a group that occurred.

    A loss without a part of that name (a smoothed one has such a part: the plain cross-entropy) is itself the `loss`.
    """
    count = float(sums.count)
    result = {"loss": float(sums.loss) / max(count, 1.0), "targets": count}
    parts = {k: (np.asarray(t, np.float64), np.asarray(c, np.float64)) for k, (t, c) in sums.parts.items()}
    for name, terms in sums.derived:
        parts[name] = np.sum([factor * parts[part][0] for part, factor in terms], axis=0), parts[terms[0][0]][1]
    for name, (total_G, count_G) in parts.items():
        if count_G.sum():
            result[name] = float(total_G.sum() / count_G.sum())
        for group, total, seen in zip(groups, total_G, count_G, strict=True):
            if seen:
                result[f"{name}/{group}"] = float(total / seen)
    return result


class Log:
    """The written record of one stage: `metrics.jsonl`, TensorBoard events, and a bar on the terminal.

    A run that goes on from step n drops the lines after n first, so that no step stands twice. Of several processes
    the first writes; the others keep count.
    """

    def __init__(self, folder: Path, stage: str, steps: int, start: int, filled: float, work: Work | None = None):
        self.path = folder / "metrics.jsonl"
        self.clock = Clock()
        self._writes = processes.is_first()
        self._filled, self._work = filled, work
        self._bar = tqdm(
            total=steps,
            initial=start,
            desc=f"{stage:16}",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not self._writes,
        )
        kept = lambda: map(json.loads, keep_up_to(self.path, start))
        self._stage = stage
        self.bad = processes.of_first(lambda: sum("skipped" in line for line in kept()))
        if self._writes:
            from tensorboardX import SummaryWriter  # where torch is installed it takes seconds to import that too

            self._file = self.path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        if work is not None and self._writes:
            tqdm.write(
                f"{stage:16} MFU is a share of {work.peak / 1e12:,.6g} TFLOP/s: {work.peak_name}", file=sys.stderr
            )

    def write(self, step: int, values: Mapping[str, float], tokens: float, patches: float = 0) -> None:
        """Record step `step` (counted from 1), which took in so many tokens and patches that are not padding.

        Of a step that was skipped there are no numbers: `values` holds those that are finite, and `skipped`.
        """
        self.bad += "skipped" in values
        times = self.clock.step(tokens, values.get("targets", 0.0), patches)
        if self._work is not None and times["step_seconds"]:
            reached = {name: flops / times["step_seconds"] for name, flops in self._work.flops.items()}
            times |= {f"mfu/{name}": flops / self._work.peak for name, flops in reached.items()}
        if (peak := peak_memory()) is not None:
            times["peak_memory_gib"] = peak / 2**30
        if not self._writes:
            return
        numbers = {k: round(v, 6) for k, v in values.items()}
        written = {name: _short(name, value) for name, value in times.items()}
        self._file.write(json.dumps({"step": step, **numbers, "filled": round(self._filled, 4), **written}) + "\n")
        self._file.flush()
        for name, value in (
            *values.items(),
            *((name if "/" in name else f"speed/{name}", times[name]) for name in times),
        ):
            self._events.add_scalar(name, value, step)
        self._bar.set_postfix_str(self._shown(values, times), refresh=False)
        self._bar.update(1)

    def watched(self, step: int, values: Mapping[str, float], first: Mapping[str, float]) -> None:
        """Tell bits per byte of the texts that are watched (`watch.py`), beside those before the first step."""
        if not self._writes:
            return
        for name, value in values.items():
            self._events.add_scalar(f"watch/{name}", value, step)
        rises = {name: f" ({value / first[name] - 1:+.1%})" if step else "" for name, value in values.items()}
        told = ", ".join(f"{name} {value:.4f}{rises[name]}" for name, value in values.items())
        tqdm.write(f"{self._stage:16} step {step}: bits per byte of {told}", file=sys.stderr)

    def _shown(self, values: Mapping[str, float], times: Mapping[str, float]) -> str:
        shown = [f"loss {values['loss']:.3f}" if "loss" in values else "skipped"]
        shown += [f"{times['tokens_per_second']:,.0f} tokens/s", f"{self._filled:.1%} filled"]
        shown += [f"{value:.1%} {name}" for name, value in times.items() if name.startswith("mfu/")]
        shown += [f"{self.bad} skipped"] if self.bad else []
        return ", ".join(shown)

    def close(self) -> None:
        self._bar.close()
        if self._writes:
            self._file.close()
            self._events.close()


def _short(name: str, value: float) -> float:
    return round(value) if name.endswith("_per_second") else round(value, 4)


def keep_up_to(path: Path, step: int) -> list[str]:
    """The lines up to a step, which alone stay in the file."""
    if not path.exists():
        return []
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    beside.replace(path)
    return kept


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, a torn last one (a kill in the middle of a write) left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if _step_of(line) < np.inf]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return np.inf
