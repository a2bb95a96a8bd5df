"""State and data position, saved and restored together.

The data position is the step inside the state plus the fingerprint of the pack plan beside it; there is no iterator
state. orbax writes into a temporary folder and renames, so an interrupted save is never mistaken for a checkpoint.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from ain_jax.train.state import TrainState

for _name in ("absl", "orbax"):  # orbax reports every file that it touches
    logging.getLogger(_name).setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one stage, in one folder; saving goes on in the background."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        policies: Any = ocp.training
        self._checkpointer = policies.Checkpointer(
            self.folder,
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def latest(self) -> int | None:
        """The step of the newest finished checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, in their order."""
        return sorted(one.step for one in self._checkpointer.checkpoints)

    def save(self, state: TrainState, marks: Mapping[str, str], wait: bool = False) -> None:
        """Begin to write the state; `marks` (fingerprints of the data and the tokenizer) travel with it."""
        step = int(state.step)
        if self.latest() == step:
            return
        parts = {"params": state.params, "opt_state": state.opt_state}
        self._checkpointer.save_checkpointables_async(step, parts, custom_metadata=dict(marks))
        if wait:
            self.wait()

    def load(self, step: int, like: TrainState, marks: Mapping[str, str]) -> TrainState:
        """The state at `step`, laid out as `like` (arrays or ShapeDtypeStructs with shardings).

        Raises ValueError where the run has since got other data or another tokenizer.
        """
        self.refuse_others(step, marks)
        abstract = jax.tree.map(_abstract, {"params": like.params, "opt_state": like.opt_state})
        parts = self._checkpointer.load_checkpointables(step, abstract)
        return TrainState(jnp.asarray(step, jnp.int32), parts["params"], parts["opt_state"])

    def refuse_others(self, step: int, marks: Mapping[str, str]) -> None:
        """Raise ValueError where the state at `step` was written with other marks than these."""
        saved: Any = self._checkpointer.metadata(step).custom_metadata or {}
        for name, mark in marks.items():
            if saved.get(name) != mark:
                raise ValueError(
                    f"{self.folder}/{step} was written with {name} {saved.get(name)}, and this run has {mark}: it "
                    f"would go on with other data. Give another --run_dir, or delete {self.folder.parent} to begin anew"
                )

    def load_params(self, step: int, like: Any) -> Any:
        """The parameters at `step`, laid out as `like`; the optimiser state is not read."""
        return self._checkpointer.load(step, jax.tree.map(_abstract, like), checkpointable_name="params")

    def leaves(self, step: int, like: Any) -> Any:
        """The parameters at `step` as the same tree of `Leaf`: each is read when it is asked for."""

        def leaf(path: tuple[str, ...], shape: Any) -> Leaf:
            return Leaf(shape.shape, np.dtype(shape.dtype), lambda: self._part(step, path, shape))

        flat = {path: leaf(path, shape) for path, shape in flatten_dict(like).items()}
        return unflatten_dict(flat)

    def _part(self, step: int, path: tuple[str, ...], like: Any) -> Any:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            tree = unflatten_dict({path: _abstract(like)})
            (leaf,) = jax.tree.leaves(self._checkpointer.load(step, tree, checkpointable_name="params"))
        return leaf

    def wait(self) -> None:
        """Return when every save begun is finished, or raise what went wrong with it."""
        self._checkpointer.wait()

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter in a checkpoint. numpy takes it for an array, and reads it then."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Any]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


@contextmanager
def opened(
    folder: Path, step: int | None = None, marks: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[Checkpoints, int]]:
    """The checkpoints of a folder, and the step asked for, or the newest; refused where its marks are others."""
    checkpoints = Checkpoints(folder) if folder.is_dir() else None
    steps = checkpoints.steps() if checkpoints else []
    if checkpoints is None or not steps:
        raise ValueError(f"{folder} holds no checkpoint; run the stage that writes it first")
    try:
        if step is not None and step not in steps:
            raise ValueError(f"{folder} holds no checkpoint of step {step}; kept are {', '.join(map(str, steps))}")
        found = steps[-1] if step is None else step
        checkpoints.refuse_others(found, marks)
        yield checkpoints, found
    finally:
        checkpoints.close()


def load_params(
    folder: Path, like: Any, step: int | None = None, marks: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """The parameters of the checkpoint at a step, or of the newest, laid out as `like`.

    The optimiser state is not read. Refused where the checkpoint's marks are others.
    """
    with opened(folder, step, marks) as (checkpoints, found):
        return checkpoints.load_params(found, like)


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)
