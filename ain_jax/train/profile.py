"""A trace of some steps for XProf: `tensorboard --logdir STAGE/profile`, or `xprof STAGE/profile`."""

import sys
from pathlib import Path
from typing import Any

import jax

from ain_jax.launching import processes

WARM, STEPS = 5, 5  # steps before the trace, compiling among them, and steps in it


class Profile:
    """The trace of STEPS steps of a stage, behind the first WARM ones; the first process takes it.

    Nothing with no folder. A stage that ends sooner leaves a shorter trace, or none and says so.
    """

    def __init__(self, folder: Path | None, start: int):
        self._folder = folder if folder is not None and processes.is_first() else None
        self._first, self._running = start + WARM + 1, False

    def before(self, step: int, state: Any) -> None:
        """Begin or end the trace, as it is due before `step`; what is running then belongs to the trace it began in."""
        if self._folder is None or step not in (self._first, self._first + STEPS):
            return
        jax.block_until_ready(state)
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        else:
            self.close()

    def close(self) -> None:
        """End the trace if it runs, and say where it lies."""
        if self._folder is None:
            return
        if self._running:
            jax.profiler.stop_trace()
            print(f"profile  {self._folder}", file=sys.stderr)
        else:
            print(f"no profile: the stage ended before its step {self._first}", file=sys.stderr)
        self._folder, self._running = None, False
