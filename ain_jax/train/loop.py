"""The only loop: step, log, evaluate, save, resume. It never learns the name of its stage."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from ain_jax.launching import TOLD, Interrupted, processes, signals
from ain_jax.launching.processes import fetch
from ain_jax.train import measures
from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.metrics import Log, numbers
from ain_jax.train.profile import Profile
from ain_jax.train.state import TrainState
from ain_jax.train.step import Update
from ain_jax.train.watch import Watcher

__all__ = ["Interrupted", "Trainer", "train"]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """How long a stage trains, on how much at once, and how often it saves."""

    steps: int  # 0: as many as a mixture by "epochs" makes
    rows: int = 8  # rows of a batch, over all devices and accumulated parts
    accumulate: int = 1
    save_seconds: float = 60.0  # a checkpoint at the first step after so many seconds; the last step always saves
    keep: int = 2  # checkpoints kept
    keep_every: int = 0  # steps: each so manieth is saved as well, and kept for good; 0: none
    # A step whose loss or gradients are not finite changes nothing and is counted; more of them than so many in a row,
    # or in all, stop the run. 0 stops at the first one; a long run should bear a few.
    bad_steps: int = 0
    bad_steps_in_all: int = 50
    peak_tflops: float = 0.0  # of one device, which MFU is a share of; 0: what the table of devices says

    def __post_init__(self):
        low = {name: getattr(self, name) for name in ("keep_every", "bad_steps", "bad_steps_in_all", "peak_tflops")}
        if low := [f"{name} = {value}" for name, value in low.items() if value < 0]:
            raise ValueError(f"{', '.join(low)}: expected 0 or more")
        if self.steps < 0 or self.rows < 1 or self.accumulate < 1 or self.keep < 1:
            raise ValueError("rows, accumulate and keep: expected 1 or more each; steps 1 or more, or 0 with epochs")
        if self.rows % self.accumulate:
            raise ValueError(f"rows = {self.rows} cannot be cut into accumulate = {self.accumulate} equal parts")


SAVE, STOP = 1, 2  # what may be asked of a run at a step


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
    profile: Path | None = None,
    watch: Watcher | None = None,
) -> TrainState:
    """The state after the last step. `batches(step)` yields (batch, its count of tokens) from a step onwards.

    `changes` says what is done to the state before a step, counted from 1: rows of a vocabulary that begin there.
    `watch` measures held-out texts on what is trained; a run that it stops (`watch.Risen`) is saved at that step.

    The numbers of a step are fetched after the next one has been dispatched, so that the device never waits for
    the host. Where a checkpoint exists, the run goes on from it. All processes of a run save and stop at one step.
    """
    state = checkpoints.newest(state, marks) or state
    start = int(state.step)
    if start > trainer.steps:
        raise ValueError(f"{checkpoints.folder} is at step {start}, beyond Trainer.steps = {trainer.steps}")
    if watch is not None:
        watch.begin(start)
    if start == trainer.steps:
        return state
    several = jax.process_count() > 1
    log_lines = log(start)
    clock, trace = log_lines.clock, Profile(profile, start)
    pending: tuple[int, Any, Any] | None = None
    in_a_row, saved_at = 0, time.monotonic()

    def settle(waiting: tuple[int, Any, Any]) -> int:
        """Write down a step that was dispatched before; what was asked of the run until then."""
        nonlocal in_a_row
        step, batch, outcome = waiting
        with clock.timed("device"):
            sums, norm, facts = fetch(outcome)
        good = bool(np.isfinite(sums.loss) and np.isfinite(norm))
        values = numbers(sums, groups) | {"gradient_norm": float(norm)} if good else {"skipped": 1.0}
        in_a_row = 0 if good else in_a_row + 1
        log_lines.write(step, values, float(facts.tokens), float(facts.patches))
        if in_a_row > trainer.bad_steps or log_lines.bad > trainer.bad_steps_in_all:
            fault = FloatingPointError(
                f"step {step}: loss {float(sums.loss)}, gradient norm {float(norm)}; {in_a_row} such steps in a row "
                f"and {log_lines.bad} in all were skipped, where Trainer.bad_steps allows {trainer.bad_steps} and "
                f"bad_steps_in_all {trainer.bad_steps_in_all}. Its batch is in {_keep_batch(log_lines, step, batch)}, "
                f"the last good checkpoint in {checkpoints.folder}. Look at the batch, lower "
                "Optimizer.learning_rate, warm up for longer, or let Trainer.bad_steps skip more"
            )
            fault.add_note(TOLD)  # every process has these numbers
            raise fault
        return int(facts.flag)

    try:
        with signals.at_safe_points() as stop:

            def asked(step: int) -> int:
                if stop.is_set() or signals.noticed(step):
                    return STOP
                due = time.monotonic() - saved_at >= trainer.save_seconds
                return SAVE if due and processes.is_first() else 0

            if watch is not None and not watch.first:
                with clock.timed("watch"):
                    watch.add(0, state.params, frozen, log_lines)
            stream = batches(start)
            for step in range(start + 1, trainer.steps + 1):
                with clock.timed("data"):
                    batch, _ = next(stream)
                if step in changes:
                    state = changes[step](state)
                trace.before(step, state)
                state, sums, norm = update(state, frozen, batch, key)
                wanted = asked(step)
                outcome = sums, norm, measures.count(batch, wanted)
                known = settle(pending) if pending is not None else 0
                pending = (step, batch, outcome)
                # Several processes act on what all of them know, which is what was asked at the step before.
                wanted = known if several else wanted
                risen = None
                if watch is not None and watch.due(step, trainer.steps):
                    wanted, pending = max(wanted, settle(pending)), None
                    with clock.timed("watch"):
                        risen = watch.add(step, state.params, frozen, log_lines)
                permanent = trainer.keep_every and step % trainer.keep_every == 0
                if wanted or permanent or risen or step == trainer.steps:
                    if pending is not None:
                        wanted, pending = max(wanted, settle(pending)), None
                    with clock.timed("checkpoint"):
                        checkpoints.save(state, marks, wait=wanted == STOP or bool(risen) or step == trainer.steps)
                    saved_at = time.monotonic()
                if risen:
                    raise risen
                if wanted == STOP:
                    raise Interrupted(f"saved at step {step} of {trainer.steps}")
            # Asked since: the state is saved, and the stages that follow are not to begin.
            signals.stop_together(stop, f"saved at step {trainer.steps} of {trainer.steps}")
    finally:
        trace.close()
        log_lines.close()
    return state


def _keep_batch(log: Log, step: int, batch: Any) -> Path:
    """The file that a batch was written to, its arrays named as the fields of `Batch`."""
    path = log.path.with_name(f"bad_step_{step}.npz")
    arrays = {
        jax.tree_util.keystr(where, simple=True, separator="/"): array
        for where, array in jax.tree.leaves_with_path(fetch(batch))
    }
    if processes.is_first():
        np.savez(path, **arrays)
    return path
