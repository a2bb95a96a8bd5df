"""A request to stop ends the run, also one that comes where Python drops what is raised."""

import gc
import os
import signal
import time

import pytest

from ain_jax.launching import signals


def ask():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        pass  # the handler is called between two instructions


def in_a_callback_of_the_collector():
    def callback(phase, info):
        gc.callbacks.remove(callback)
        ask()

    gc.callbacks.append(callback)
    gc.collect()


class InADestructor:
    def __del__(self):
        ask()


@pytest.mark.parametrize("ask", [ask, in_a_callback_of_the_collector, InADestructor])
def test_a_request_is_never_dropped(ask):
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), signals.at_once():
        ask()
        for _ in range(100):
            time.sleep(0.02)
        raise AssertionError("the run went on")
