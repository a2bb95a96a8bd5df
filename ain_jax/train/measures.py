"""What a step took in, and where the time of a run went: counted on the devices and on the host's clock."""

import dataclasses
import functools
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 20  # steps that a speed is the mean of
COMPILING = "/jax/core/compile/"  # how jax names the durations of tracing, lowering and compiling


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step asks of the devices, and what they could do: the share of the two is the MFU.

    `flops` holds the model's FLOPs of one step over all devices by the convention that counts them; `peak` is the
    FLOP/s of all devices together, `peak_name` says whose figure that is.
    """

    flops: Mapping[str, float]
    peak: float
    peak_name: str


class Facts(NamedTuple):
    """What is known of a step when it is done: over the rows of all processes, and the largest flag of any of them."""

    tokens: Any
    patches: Any
    flag: Any


@jax.jit
def _count(batch: Any, flags: Any) -> Facts:
    rows = getattr(batch, "rows", batch)
    patches = jnp.int32(0)
    if rows.patch_segments_BP is not None:
        patches = jnp.sum(rows.patch_segments_BP > 0)
    elif rows.patches_BPK is not None:  # tiles, whose unused places hold zeros
        patches = jnp.sum(jnp.any(rows.patches_BPK != 0, axis=-1))
    return Facts(jnp.sum(rows.segments_BL > 0), patches, jnp.max(flags))


def count(batch: Any, flag: int) -> Facts:
    """The tokens and patches of a batch that are not padding, and the largest `flag` of all processes.

    Only dispatched: the numbers are fetched with those of the step, so that no process waits for another.
    """
    if jax.process_count() == 1:
        return _count(batch, np.array([flag], np.int32))
    rows = getattr(batch, "rows", batch)
    mesh = rows.tokens_BL.sharding.mesh
    one_each = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    flags = jax.make_array_from_callback((mesh.size,), one_each, lambda _: np.array([flag], np.int32))
    return _count(batch, flags)


class Clock:
    """Seconds of this process' run by what they went to, and the speed over the last steps.

    Compiling, saving and measuring held-out texts hold the devices up. Waiting for data does as far as it is longer
    than the wait for the step before, which runs meanwhile. What is left is goodput.
    """

    def __init__(self):
        self.begun = time.monotonic()
        self.lost = {"compile": 0.0, "data": 0.0, "checkpoint": 0.0}
        self._waited: defaultdict[str, float] = defaultdict(float)
        self._recent: deque[tuple[float, float, float, float]] = deque(maxlen=WINDOW + 1)
        _listen()
        self._compiled = _compiled["seconds"]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time inside as "data", "checkpoint", "watch" or "device" (waiting for a step)."""
        began, compiled = time.monotonic(), _compiled["seconds"]
        try:
            yield
        finally:
            self._waited[what] += max(time.monotonic() - began - (_compiled["seconds"] - compiled), 0.0)

    def step(self, tokens: float, targets: float, patches: float) -> dict[str, float]:
        """The times and speeds as of the end of a step; 0 for a speed before the second one."""
        now = time.monotonic()
        waited, self._waited = self._waited, defaultdict(float)
        self.lost["checkpoint"] += waited["checkpoint"]
        if "watch" in waited:
            self.lost["watch"] = self.lost.get("watch", 0.0) + waited["watch"]
        self.lost["data"] += max(waited["data"] - waited["device"], 0.0)
        self.lost["compile"] = _compiled["seconds"] - self._compiled
        self._recent.append((now, tokens, targets, patches))
        first, *rest = self._recent
        seconds = max(now - first[0], 1e-9)
        speeds = [sum(step[i] for step in rest) / seconds for i in (1, 2, 3)]
        whole = max(now - self.begun, 1e-9)
        return {
            "step_seconds": seconds / len(rest) if rest else 0.0,
            "tokens_per_second": speeds[0],
            "targets_per_second": speeds[1],
            "patches_per_second": speeds[2],
            "goodput": min(max(1 - sum(self.lost.values()) / whole, 0.0), 1.0),
            **{f"{name}_seconds": seconds for name, seconds in self.lost.items()},
            "seconds": whole,
        }


def peak_memory() -> int | None:
    """The most bytes that any device of this process has held at once, where its runtime says so."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)


_compiled = {"seconds": 0.0}


@functools.cache
def _listen() -> None:
    """Sum up what jax says of its compiling from now on; tracing inside tracing is counted once."""
    spans: list[tuple[float, float]] = []

    def add(event: str, duration_secs: float, **_: Any) -> None:
        if not event.startswith(COMPILING):
            return
        begun = time.monotonic() - duration_secs
        while spans and spans[-1][0] >= begun:
            _compiled["seconds"] -= spans.pop()[1]
        spans.append((begun, duration_secs))
        _compiled["seconds"] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
