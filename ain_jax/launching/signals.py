"""Requests to stop: Ctrl-C, SIGTERM (a preemption, a scheduler's end) and SIGUSR1 (a time limit that draws near).

Between safe points a request waits; elsewhere it ends the run at once, which loses nothing that was finished.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

from ain_jax.launching import Interrupted

AGAIN_SECONDS = 0.1
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


@contextmanager
def at_once() -> Iterator[None]:
    """Here a request stops the run where it is, as Ctrl-C does."""

    def request(number, frame):
        raise KeyboardInterrupt(signal.Signals(number).name)

    with _handled(request), _never_dropped():
        yield


@contextmanager
def _never_dropped() -> Iterator[None]:
    """Python drops what is raised in a destructor or in a callback of the garbage collector, and jax has one: a request
    that comes just then is made again."""
    before, main, timers = sys.unraisablehook, threading.main_thread().ident, list[threading.Timer]()

    def hook(told):
        if told.exc_type is not KeyboardInterrupt or main is None:
            return before(told)
        name = str(told.exc_value) or "SIGINT"
        timers.append(threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, signal.Signals[name])))
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:  # what it would say is known by now, or comes when nothing is left to stop
            timer.cancel()


@contextmanager
def at_safe_points() -> Iterator[threading.Event]:
    """An event that a request sets, so that a step ends and is saved; a second one stops at once."""
    event = threading.Event()

    def request(number, frame):
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    with _handled(request):
        yield event


@contextmanager
def _handled(request) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: jax's preemption service had put a handler there that is no Python function.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def noticed(step: int) -> bool:
    """Whether jax's preemption service, where it is on, says that this is the step to stop at."""
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # it is off
        return False


def stop_together(event: threading.Event, done: str) -> None:
    """Raise Interrupted in every process when one of them was asked to stop; each calls this at its safe points."""
    asked = event.is_set()
    if jax.process_count() > 1:
        asked = bool(multihost_utils.process_allgather(asked).any())
    if asked:
        raise Interrupted(done)
