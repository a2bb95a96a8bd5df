"""Sums and counts -> numbers -> the progress bar, JSON lines, TensorBoard."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ain_jax.train.losses import Sums

TIMES = ("tokens_per_second", "seconds")  # what differs between two equal runs


def numbers(sums: Sums, groups: Sequence[str]) -> dict[str, float]:
    """Means from sums and counts: `loss` over everything, and `loss/read/ar` for a group that occurred.

    A loss without a part of that name (a smoothed one has such a part: the plain cross-entropy) is itself the `loss`.
    """
    count = float(sums.count)
    result = {"loss": float(sums.loss) / max(count, 1.0), "targets": count}
    for name, (total_G, count_G) in sums.parts.items():
        total_G, count_G = np.asarray(total_G, np.float64), np.asarray(count_G, np.float64)
        if count_G.sum():
            result[name] = float(total_G.sum() / count_G.sum())
        for group, total, seen in zip(groups, total_G, count_G, strict=True):
            if seen:
                result[f"{name}/{group}"] = float(total / seen)
    return result


class Log:
    """The written record of one stage: `metrics.jsonl`, TensorBoard events, and a bar on the terminal.

    A run that goes on from step n drops the lines after n first, so that no step stands twice.
    """

    def __init__(self, folder: Path, stage: str, steps: int, start: int, filled: float):
        self.path = folder / "metrics.jsonl"
        self._keep_up_to(start)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        self._bar = tqdm(
            total=steps, initial=start, desc=f"{stage:16}", unit="step", dynamic_ncols=True, mininterval=0.5
        )
        self._filled, self._begun, self._tokens = filled, time.monotonic(), 0
        self._first: float | None = None

    def _keep_up_to(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        beside = self.path.with_suffix(".tmp")
        beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        beside.replace(self.path)

    def write(self, step: int, values: Mapping[str, float], tokens: int) -> None:
        """Record step `step` (counted from 1), which took in `tokens` tokens that are not padding."""
        seconds = time.monotonic() - self._begun
        if self._first is None:  # the step that compiles is no measure of speed
            self._first = seconds
        else:
            self._tokens += tokens
        speed = self._tokens / max(seconds - self._first, 1e-9)
        line = {"step": step, **{k: round(v, 6) for k, v in values.items()}, "filled": round(self._filled, 4)}
        self._file.write(json.dumps({**line, "tokens_per_second": round(speed), "seconds": round(seconds, 2)}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        shown = f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s, {self._filled:.1%} filled"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._events.close()


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


def fetch(sums: Sums) -> Sums:
    """The sums on the host; waits for the step that makes them."""
    return jax.device_get(sums)
