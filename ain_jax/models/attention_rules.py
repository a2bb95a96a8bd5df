"""What one call of `attention` asks for, and what a backend answers: the vocabulary of all backends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class Rules:
    """Who sees whom, and how scores are bent; see `attention`."""

    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    longest: int | None = None  # positions of a segment
    chunk: int = 1024  # queries that XLA takes at once


@dataclass(frozen=True)
class Call:
    """One call: its rules, and the sizes and the place of what it is given. Everything a backend decides by."""

    rules: Rules
    B: int
    L: int
    S: int
    N: int
    K: int
    H: int
    dtype: Any
    own_row: bool = True  # keys and queries are the same positions
    parts: int = 1  # devices that share the queries of a row
    platform: str | None = None  # "cpu", "gpu", "tpu"; None where no mesh is set
    device_kind: str | None = None  # "TPU v5 lite", "NVIDIA H200" ...

    @property
    def band(self) -> int | None:
        """No query sees a key that lies this far away or farther; None where nothing bounds it."""
        return min((reach for reach in (self.rules.longest, self.rules.window) if reach is not None), default=None)


@dataclass(frozen=True)
class Run:
    """A backend made ready for a call.

    `apply(extra, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, first)` gives out_BLNH; `first` is the place in
    the row of the first query at hand. Rows are padded to `length` before, with segment -1. `extra` are arrays that
    the backend wants placed as `specs(mesh, axes of the mesh along the row)` says, a tree of PartitionSpec.
    """

    extra: Any
    specs: Callable[..., Any]
    length: int
    apply: Callable[..., Any]


def promised(out_BLNH, key_segments_BS, longest: int):
    """`out_BLNH`, or NaN in rows where a segment is longer than was promised."""
    too_long_B = jnp.any(
        (key_segments_BS[:, longest:] == key_segments_BS[:, :-longest]) & (key_segments_BS[:, longest:] > 0), axis=1
    )
    return jnp.where(too_long_B[:, None, None, None], jnp.nan, out_BLNH)
