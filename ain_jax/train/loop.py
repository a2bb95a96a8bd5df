"""The only loop: step, log, save, resume. It never learns the name of its stage."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.metrics import Log, fetch, numbers
from ain_jax.train.state import TrainState
from ain_jax.train.step import Update


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How long a stage trains, on how much at once, and how often it saves."""

    steps: int  # 0: as many as a mixture by "epochs" makes
    rows: int = 8  # rows of a batch, over all devices and accumulated parts
    accumulate: int = 1
    save_seconds: float = 60.0  # a checkpoint at the first step after so many seconds; the last step always saves
    keep: int = 2  # checkpoints kept

    def __post_init__(self):
        if self.steps < 0 or self.rows < 1 or self.accumulate < 1 or self.keep < 1:
            raise ValueError("rows, accumulate and keep: expected 1 or more each; steps 1 or more, or 0 with epochs")
        if self.rows % self.accumulate:
            raise ValueError(f"rows = {self.rows} cannot be cut into accumulate = {self.accumulate} equal parts")


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and the state has been saved; the same command goes on from there."""


def train(
    *,
    update: Update,
    state: TrainState,
    frozen: Any,
    batches: Callable[[int], Iterator[Any]],
    trainer: Trainer,
    key: jax.Array,
    checkpoints: Checkpoints,
    marks: Mapping[str, str],
    groups: Sequence[str],
    log: Callable[[int], Log],
    changes: Mapping[int, Callable[[TrainState], TrainState]] = MappingProxyType({}),
) -> TrainState:
    """The state after the last step. `batches(step)` yields (batch, its count of tokens) from a step onwards.

    `changes` says what is done to the state before a step, counted from 1: rows of a vocabulary that begin there.

    The numbers of a step are fetched after the next one has been dispatched, so that the device never waits for
    the host. Where a checkpoint exists, the run goes on from it.
    """
    newest = checkpoints.latest()
    if newest is not None:
        state = checkpoints.load(newest, state, marks)
    start = int(state.step)
    if start > trainer.steps:
        raise ValueError(f"{checkpoints.folder} is at step {start}, beyond Trainer.steps = {trainer.steps}")
    if start == trainer.steps:
        return state
    log_lines = log(start)
    pending: tuple[int, Any, int] | None = None
    saved_at = time.monotonic()

    def write(waiting: tuple[int, Any, int]) -> None:
        step, (sums, norm), tokens = waiting
        values = numbers(fetch(sums), groups) | {"gradient_norm": float(norm)}
        if not np.isfinite(values["loss"]) or not np.isfinite(values["gradient_norm"]):
            raise FloatingPointError(
                f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}; the last good "
                f"checkpoint is in {checkpoints.folder}. Lower Optimizer.learning_rate, or warm up for longer"
            )
        log_lines.write(step, values, tokens)

    try:
        with _stop_requests() as stop:
            stream = batches(start)
            for step in range(start + 1, trainer.steps + 1):
                batch, tokens = next(stream)
                if step in changes:
                    state = changes[step](state)
                state, sums, norm = update(state, frozen, batch, key)
                if pending is not None:
                    write(pending)
                pending = (step, (sums, norm), tokens)
                due = time.monotonic() - saved_at >= trainer.save_seconds
                if stop.is_set() or due or step == trainer.steps:
                    write(pending)  # a state with a loss that is not finite is never saved
                    pending = None
                    checkpoints.save(state, marks, wait=stop.is_set() or step == trainer.steps)
                    saved_at = time.monotonic()
                if stop.is_set():  # at the last step too: the stages that follow are not to begin
                    raise Interrupted(f"saved at step {step} of {trainer.steps}")
    finally:
        log_lines.close()
    return state


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that a step ends and is saved; a second signal stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
