"""State and data position, saved and restored together.

The data position is the step inside the state plus the fingerprint of the pack plan beside it; there is no iterator
state. orbax writes into a temporary folder and renames, so an interrupted save is never mistaken for a checkpoint, and
deletes an older one only then. Every array travels with a digest of its bits, made on the devices: it is the same on
any mesh, and what comes back from the disk otherwise is no checkpoint either.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from ain_jax.launching import processes
from ain_jax.train.state import TrainState

for _name in ("absl", "orbax"):  # orbax reports every file that it touches
    logging.getLogger(_name).setLevel(logging.ERROR)


DIGESTS = "digests"  # in a checkpoint's own metadata, beside the marks
TOGETHER = 2**26  # bytes of parameters that are read at once where one is asked for


class OtherMarks(ValueError):
    """The checkpoint belongs to other data or to another tokenizer."""


class Damaged(ValueError):
    """The checkpoint is not what was saved."""


class Checkpoints:
    """The checkpoints of one stage, in one folder; saving goes on in the background.

    The newest `keep` stay, and with `keep_every` those of every so manieth step for good.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0):
        self.folder = Path(folder).absolute()
        processes.of_first(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        policies: Any = ocp.training
        kept = policies.preservation_policies
        preserved = [kept.LatestN(keep), *([kept.EveryNSteps(keep_every)] if keep_every else [])]
        self._checkpointer = policies.Checkpointer(
            self.folder,
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=kept.AnyPreservationPolicy(preserved),
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
        own = {**marks, DIGESTS: digests(parts)}
        self._checkpointer.save_checkpointables_async(step, parts, custom_metadata=own)
        if wait:
            self.wait()

    def newest(self, like: TrainState, marks: Mapping[str, str]) -> TrainState | None:
        """The state of the newest checkpoint that is whole, laid out as `like`; None where none was ever saved.

        A damaged one is told and set aside under another name, and the one before it is taken. Where none is left,
        ValueError; so too where the run has since got other data or another tokenizer. Of several processes one may see
        damage that the others do not: RuntimeError then, and the run has to be started again.
        """
        damaged: list[str] = []
        while (step := self.latest()) is not None:
            try:
                return self.load(step, like, marks)
            except Damaged as fault:
                aside = self._set_aside(step)
                damaged.append(f"{fault}; it lies in {aside} now")
                if jax.process_count() > 1:  # only this process may have seen it
                    before = [other for other in self.steps() if other != step]
                    went_on = f"from step {before[-1]}" if before else "nowhere: none is left"
                    raise RuntimeError(f"{damaged[-1]}. Started again, the run goes on {went_on}") from fault
                self._checkpointer.reload()
                print(f"{damaged[-1]}: going on from the checkpoint before it", file=sys.stderr)
        odd = damaged or [f"{path} is damaged" for path in sorted(self.folder.glob("damaged-*"))]
        if odd:
            raise ValueError(
                "no checkpoint is left: " + "; ".join(odd) + f". Delete {self.folder.parent} to begin this stage anew"
            )
        return None

    def _set_aside(self, step: int) -> Path:
        here, aside = self.folder / str(step), self.folder / f"damaged-{step}"
        with contextlib.suppress(FileNotFoundError):  # another process has done it
            if here.exists():
                shutil.rmtree(aside, ignore_errors=True)
                here.rename(aside)
        return aside

    def load(self, step: int, like: TrainState, marks: Mapping[str, str]) -> TrainState:
        """The state at `step`, laid out as `like` (arrays or ShapeDtypeStructs with shardings).

        Raises OtherMarks where the run has since got other data or another tokenizer, Damaged where the checkpoint is
        not what was saved.
        """
        self.refuse_others(step, marks)
        abstract = jax.tree.map(_abstract, {"params": like.params, "opt_state": like.opt_state})
        parts = self._whole(step, lambda: self._checkpointer.load_checkpointables(step, abstract))
        return TrainState(jnp.asarray(step, jnp.int32), parts["params"], parts["opt_state"])

    def _whole(self, step: int, load: Callable[[], Any]) -> Any:
        """What `load` reads of a checkpoint, if it is what was saved."""
        try:
            parts = load()
        except MemoryError:
            raise
        except Exception as error:  # whatever the many layers below make of files that are cut short or gone
            raise Damaged(f"{self.folder / str(step)} is damaged ({_in_short(error)})") from error
        saved, found = self._own(step).get(DIGESTS, {}), digests(parts)
        odd = sorted(name for name, digest in found.items() if saved.get(name, digest) != digest)
        if odd:
            raise Damaged(f"{self.folder / str(step)} is damaged ({', '.join(odd[:3])} came back with other bits)")
        return parts

    def _own(self, step: int) -> Mapping[str, Any]:
        """What was saved beside the arrays: marks and digests."""
        try:
            own = self._checkpointer.checkpointables_metadata(step).custom_metadata
        except Exception as error:
            raise Damaged(f"{self.folder / str(step)} is damaged ({_in_short(error)})") from error
        if not isinstance(own, dict) or not own:
            raise Damaged(f"{self.folder / str(step)} is damaged (its own metadata are gone)")
        return own

    def refuse_others(self, step: int, marks: Mapping[str, str]) -> None:
        """Raise OtherMarks where the state at `step` was written with other marks than these."""
        saved = self._own(step)
        for name, mark in marks.items():
            if saved.get(name) != mark:
                raise OtherMarks(
                    f"{self.folder}/{step} was written with {name} {saved.get(name)}, and this run has {mark}: it "
                    f"would go on with other data. Give another --run_dir, or delete {self.folder.parent} to begin anew"
                )

    def load_params(self, step: int, like: Any) -> Any:
        """The parameters at `step`, laid out as `like`; the optimiser state is not read."""
        abstract = jax.tree.map(_abstract, like)
        load = lambda: {"params": self._checkpointer.load(step, abstract, checkpointable_name="params")}
        return self._whole(step, load)["params"]

    def leaves(self, step: int, like: Any) -> Any:
        """The parameters at `step` as the same tree of `Leaf`: each is read when it is asked for.

        Small ones are read together, up to `TOGETHER` bytes, since every read takes a time of its own; they are held
        until others are read together.
        """
        flat: dict[tuple[str, ...], Any] = flatten_dict(like)
        size = {path: math.prod(shape.shape) * np.dtype(shape.dtype).itemsize for path, shape in flat.items()}
        groups: list[list[tuple[str, ...]]] = [[]]
        for path in sorted(flat, key=lambda path: (size[path], path)):
            if groups[-1] and sum(size[one] for one in groups[-1]) + size[path] > TOGETHER:
                groups.append([])
            groups[-1].append(path)
        held: dict[tuple[str, ...], Any] = {}

        def read(path: tuple[str, ...], group: Sequence[tuple[str, ...]]) -> Any:
            if len(group) == 1:
                return self._part(step, {path: flat[path]})[path]
            if path not in held:
                held.clear()
                held.update(self._part(step, {one: flat[one] for one in group}))
            return held[path]

        leaf = lambda path, group: Leaf(flat[path].shape, np.dtype(flat[path].dtype), lambda: read(path, group))
        return unflatten_dict({path: leaf(path, group) for group in groups for path in group})

    def _part(self, step: int, like: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            tree = unflatten_dict({path: _abstract(shape) for path, shape in like.items()})
            load = lambda: {"params": self._checkpointer.load(step, tree, checkpointable_name="params")}
            return flatten_dict(self._whole(step, load)["params"])

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
        return np.asarray(processes.fetch(self.read()), dtype)


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
    except Damaged as fault:
        raise ValueError(
            f"{fault}. Delete {folder.parent / 'result.json'}, and the stage goes on from the checkpoint before it"
        ) from fault
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


def digests(tree: Any) -> dict[str, int]:
    """A number for each array of a tree, by its path, that changes with any of its bits: see `_digest`."""
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }
    return {name: int(digest) for name, digest in processes.fetch(_digests(flat)).items()}


@jax.jit
def _digests(flat: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(_digest, flat)


def _digest(array: Any) -> Any:
    """The sum of (2 i + 1) x (the bits of element i as an integer), modulo 2**32.

    Sums of integers do not depend on how an array is spread, and an odd factor keeps a change of one element visible.
    """
    width = array.dtype.itemsize
    bits = array.astype(jnp.uint8) if array.dtype == bool else jax.lax.bitcast_convert_type(array, f"uint{8 * width}")
    places, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        places += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits.astype(jnp.uint32) * (2 * places + 1), dtype=jnp.uint32)


def _in_short(error: Exception) -> str:
    """The first line of a long message, and no more than fits on one."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}".rstrip(": ")


def _abstract(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)
