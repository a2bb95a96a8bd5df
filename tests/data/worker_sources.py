"""What test_loader and test_hosts take to other processes; nothing here imports jax, for the workers must not."""

import dataclasses
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Large:
    """Arrays beyond what goes through a pipe, and which libraries the worker has imported."""

    held: Any = None
    size: int = 100_000

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        names = [name for name in ("jax", "jaxlib", "grain", "tensorflow", "torch") if name in sys.modules]
        one = np.full((3, self.size), number, np.float32)
        return {"one": one, "two": np.arange(7), "none": np.zeros((0, 4)), "names": np.array(names, "U16")}


@dataclasses.dataclass(frozen=True)
class Dies:
    """Its process ends without a word at one number."""

    at: int

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        if number == self.at:
            os._exit(7)
        return Large()[number]


class Odd(Exception):
    """An exception that cannot be unpickled: it wants two arguments and hands on one."""

    def __init__(self, number: int, why: str):
        super().__init__(f"{number} {why}")


class Raises:
    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        raise Odd(number, "is odd")


def host(payload: Path, rows_per_batch: int, own: tuple[int, ...], steps: tuple[int, ...], out: Path) -> None:
    """One host of several: the arrays of its rows of these steps, as a file."""
    from ain_jax.data.rows import Steps

    made = Steps(pickle.loads(payload.read_bytes()), rows_per_batch, own)
    assert "jax" not in sys.modules
    np.savez(out, **{f"{step}/{name}": array for step in steps for name, array in made[step].items()})  # pyright: ignore[reportArgumentType]
