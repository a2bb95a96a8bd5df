"""The mesh, and the one table from array axes to mesh axes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Axis of an array (as `models` names it) -> axis of the mesh. An axis that is not named here is whole on every device.
RULES: Mapping[str, str | tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "vision_merged": "fsdp",
}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes all that are left. The product is the number of devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(f"{self}: expected sizes of 1 or more, and -1 at most once")


def make_mesh(settings: Mesh) -> jax.sharding.Mesh:
    """The mesh over all devices of this run."""
    names = tuple(f.name for f in dataclasses.fields(settings))
    sizes = list(dataclasses.astuple(settings))
    devices = jax.device_count()
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // -int(np.prod(sizes)))
    if int(np.prod(sizes)) != devices:
        raise ValueError(f"{settings} asks for {int(np.prod(sizes))} devices; {devices} are here: change Mesh")
    # Auto on purpose: Explicit, make_mesh's default, covers fewer operations today.
    return jax.make_mesh(tuple(sizes), names, axis_types=(AxisType.Auto,) * len(names))


def one_device() -> jax.sharding.Mesh:
    """A mesh of this process' first device alone."""
    names = tuple(f.name for f in dataclasses.fields(Mesh))
    return jax.sharding.Mesh(np.array(jax.local_devices()[:1]).reshape((1,) * len(names)), names)


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Where the axes of an array lie. A mesh axis is used once, and only where it divides the array's axis."""
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        rule = RULES.get(axis, ()) if axis else ()
        wanted: tuple[str, ...] = (rule,) if isinstance(rule, str) else rule
        twice = used.intersection(wanted)
        if twice:
            raise ValueError(f"axes {axes}: mesh axis {sorted(twice)[0]!r} would be used twice; change sharding.RULES")
        parts = math.prod(mesh.shape[w] for w in wanted)
        if parts > 1 and size % parts == 0:
            used.update(wanted)
            entries.append(wanted)
        else:
            entries.append(None)
    return PartitionSpec(*entries)


def shardings(axes: Any, shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for each leaf of `shapes`, from the tree of axis names beside it."""
    is_axes = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda a, s: NamedSharding(mesh, spec(a, s.shape, mesh)), axes, shapes, is_leaf=is_axes)


def layout(axes: Any, shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """`shapes` as ShapeDtypeStructs that say where each array lies."""
    placed = shardings(axes, shapes, mesh)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, placed)


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of every array of a batch: rows first, spread over the data axes."""
    return NamedSharding(mesh, PartitionSpec(RULES["rows"]))
