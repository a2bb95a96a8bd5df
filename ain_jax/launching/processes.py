"""What the processes of one run agree on: the first makes and writes what all read, and each is told how it went.

Messages go through jax's coordination service and not through the devices, so that waiting for hours is no timeout of
a collective. With a single process every function here does nothing but what it is asked to make.
"""

import contextvars
import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the client of the coordination service has no public name
from jax.experimental import multihost_utils

from ain_jax import sharding
from ain_jax.launching import TOLD, Interrupted, OtherProcess

T = TypeVar("T")

PART_MS = 10 * 60 * 1000  # of a wait; the service ends it at once when the first process dies
_messages = itertools.count()
_alone = contextvars.ContextVar("alone", default=False)  # what runs now does so in one process, or in each by itself


def is_first() -> bool:
    """Whether this process writes the run's folder."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether other processes do what this one does now."""
    return jax.process_count() > 1 and not _alone.get()


def of_first(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first process, a value that JSON holds; the others wait for it.

    Every process of the run calls this. A fault of the first process is raised in all of them.
    """
    if not several():
        return make()
    key = f"ain_jax/{next(_messages)}"
    if not is_first():
        told = json.loads(_wait(key))
        if "stopped" in told:
            raise Interrupted(told["stopped"])
        if "fault" in told:
            raise OtherProcess(told["fault"])
        return told["value"]
    try:
        value = _by_itself(make)
    except KeyboardInterrupt as stop:
        _tell(key, {"stopped": str(stop)})
        raise Interrupted(str(stop)) from stop
    except BaseException as fault:
        _tell(key, {"fault": str(fault) or repr(fault)})
        fault.add_note(TOLD)
        raise
    _tell(key, {"value": value})
    return value


def first(make: Callable[[], T]) -> T:
    """What `make` gives, made by the first process before the others make it: these find on disk what it wrote."""
    if not several():
        return make()
    kept: list[T] = []
    of_first(lambda: kept.append(make()))
    return kept[0] if kept else _by_itself(make)


def wait_for_all(name: str) -> None:
    """Return when every process is here."""
    if several():
        _client().wait_at_barrier(f"ain_jax/{next(_messages)}/{name}", PART_MS)


def fetch(tree: Any) -> Any:
    """The arrays of a tree on this host, whole, wherever their parts lie. Every process of the run calls this."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree) if jax.process_count() > 1 else jax.device_get(tree)


def own_mesh() -> jax.sharding.Mesh:
    """A mesh of this process' devices alone, for what one process does by itself: parameters lie over all of them."""
    return sharding.make_mesh(sharding.Mesh(data=1, fsdp=-1), jax.local_devices())


def _by_itself(make: Callable[[], T]) -> T:
    before = _alone.set(True)
    try:
        return make()
    finally:
        _alone.reset(before)


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None, "several processes, and none of them joined a coordination service"
    return client


def _tell(key: str, message: dict[str, Any]) -> None:
    _client().key_value_set(key, json.dumps(message))


def _wait(key: str) -> str:
    while True:
        try:
            return _client().blocking_key_value_get(key, PART_MS)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
