"""The mesh, and the one table from array axes to mesh axes.

    slice     copies of the model on several slices, joined by the slow network: gradients alone cross it
    data      copies of the model, each with rows of its own
    fsdp      rows as well, and each parameter and its optimiser state cut in as many parts, gathered when it is used
    sequence  the positions of a row; parameters are cut as by fsdp
    tensor    heads, the MLP's width and the vocabulary

A parameter is laid out by the names of its axes (`models.multimodal.axis_names`), an activation by `constrain`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Axis of an array (as `models` names it) -> axis of the mesh. An axis that is not named here is whole on every device.
RULES: Mapping[str, str | tuple[str, ...]] = {
    # activations
    "rows": ("slice", "data", "fsdp"),
    "positions": "sequence",
    "tiles": ("slice", "data", "fsdp", "sequence"),  # rows and the tiles in a row, joined
    "readers": ("slice", "data"),  # rows of all that share a table of embeddings, and the width that each reads of it
    "read": "fsdp",
    # parameters, stored
    "embed": ("fsdp", "sequence"),
    "vision_embed": ("fsdp", "sequence"),
    "vision_merged": ("fsdp", "sequence"),
    # both
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
}
STORED = ("embed", "vision_embed", "vision_merged")  # cut in memory alone: gathered when the parameter is used
# So many numbers of a model may be computed with by every device alike because their axes do not divide.
REPEATED = 2**28


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes all that are left. The product is the number of devices."""

    slice: int = 1
    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(f"{self}: expected sizes of 1 or more, and -1 at most once")


AXES = tuple(f.name for f in dataclasses.fields(Mesh))


def make_mesh(settings: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over all devices of this run, or over those given: neighbours of the inner axes lie close together.

    Devices that say on which slice they lie are taken slice by slice, so that the axis `slice` alone crosses between
    slices. ValueError: the sizes do not multiply to the number of devices, or `slice` is not the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = list(dataclasses.astuple(settings))
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -math.prod(sizes))
    if math.prod(sizes) != len(devices):
        raise ValueError(f"{settings} asks for {math.prod(sizes)} devices; {len(devices)} are here: change Mesh")
    slices = {getattr(device, "slice_index", None) for device in devices}
    if None not in slices and len(slices) != sizes[0]:
        raise ValueError(f"{settings}: the devices lie on {len(slices)} slices: set Mesh.slice = {len(slices)}")
    # Auto on purpose: Explicit, make_mesh's default, covers fewer operations today.
    kinds = (AxisType.Auto,) * len(AXES)
    # Two axes share an axis of the torus only where no other way is left: 32 x 2 on 4 x 4 x 4 chips.
    if None in slices or len(slices) == 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        across = (sizes[0], *[1] * len(sizes[1:]))
        placed = mesh_utils.create_hybrid_device_mesh((1, *sizes[1:]), across, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=kinds)


def one_device() -> jax.sharding.Mesh:
    """A mesh of this process' first device alone."""
    return jax.sharding.Mesh(np.array(jax.local_devices()[:1]).reshape((1,) * len(AXES)), AXES)


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Where the axes of an array lie. A mesh axis is used once, and only where it divides the array's axis.

    A mesh axis that does not divide its own axis of a parameter is taken for the one that is cut in memory alone, so
    that 30 heads on 4 devices are at least stored in 4 parts.
    """
    entries: list[list[str]] = []
    used: set[str] = set()
    left: list[str] = []
    for axis, size in zip(axes, shape, strict=True):
        entries.append([])
        for name in _rule(axis):
            if name in used or name in left:
                raise ValueError(f"axes {tuple(axes)}: mesh axis {name!r} would be used twice; change sharding.RULES")
            if mesh.shape[name] == 1:
                continue
            if size % (mesh.shape[name] * _parts(entries[-1], mesh)):
                left.append(name)
                continue
            used.add(name)
            entries[-1].append(name)
    for entry, axis, size in zip(entries, axes, shape, strict=True):
        for name in left if axis in STORED else ():
            if name not in used and size % (mesh.shape[name] * _parts(entry, mesh)) == 0:
                used.add(name)
                entry.append(name)
    return PartitionSpec(*(tuple(entry) or None for entry in entries))


def _rule(axis: str | None) -> tuple[str, ...]:
    return _names(RULES.get(axis) if axis else None)


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _parts(names: Sequence[str], mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in names)


def shardings(axes: Any, shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """A NamedSharding for each leaf of `shapes`, from the tree of axis names beside it.

    ValueError: so much of the model does not divide that the mesh would do the same work many times.
    """
    repeated = [r for r in undivided(axes, shapes, mesh) if r.axis != "kv_heads"]  # few, and read by all query heads
    if sum(r.count for r in repeated) > REPEATED:
        faults = sorted({f"{r.axis} = {r.size} by {r.mesh_axis} = {mesh.shape[r.mesh_axis]}" for r in repeated})
        raise ValueError(
            f"Mesh cannot divide {', '.join(faults)}: every device of the axis would compute with the same "
            f"{sum(r.count for r in repeated):,} parameters; give the axis a size that divides"
        )
    is_axes = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda a, s: NamedSharding(mesh, spec(a, s.shape, mesh)), axes, shapes, is_leaf=is_axes)


@dataclasses.dataclass(frozen=True)
class Undivided:
    """A parameter with an axis that the mesh does not divide, though `RULES` would have it divided."""

    path: str
    axis: str
    size: int
    mesh_axis: str
    count: int  # numbers of the parameter


def undivided(axes: Any, shapes: Any, mesh: Any) -> Iterator[Undivided]:
    """The parameters that some axis of the mesh does not divide where it should; most are small."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf), its_axes in zip(leaves, names, strict=True):
        found = spec(its_axes, leaf.shape, mesh)
        for axis, size, entry in zip(its_axes, leaf.shape, found, strict=True):
            for name in _rule(axis):
                if mesh.shape[name] > 1 and name not in _names(entry):
                    where = "/".join(str(getattr(part, "key", part)) for part in path)
                    yield Undivided(where, str(axis), size, name, math.prod(leaf.shape))


def layout(axes: Any, shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """`shapes` as ShapeDtypeStructs that say where each array lies."""
    placed = shardings(axes, shapes, mesh)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, placed)


def placed(tree: Any, like: Any) -> Any:
    """The arrays of a tree where a layout of the same shape says."""
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), tree, like)


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of every array of a batch: rows first, spread over the axes that have rows of their own."""
    return NamedSharding(mesh, PartitionSpec(RULES["rows"]))


def constrain(x: Any, axes: Sequence[str | None]) -> Any:
    """`x`, an activation, laid over the mesh that is set (`jax.set_mesh`) by the names of its axes; without one, `x`.

    The partitioner is left to find the layout of what lies between two such places.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not _automatic(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def gathered(weight: Any, axes: Sequence[str | None]) -> Any:
    """`weight`, a parameter in the compute dtype, gathered over what is cut in memory alone; its gradient is scattered.

    Said at each use, so that weights travel and not activations, in the compute dtype, one layer at a time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not _automatic(mesh):
        return weight
    return _gathered(weight, tuple(axes))


def _whole(weight, axes):
    return constrain(weight, [None if axis in STORED else axis for axis in axes])


_gathered = jax.custom_vjp(_whole, nondiff_argnums=(1,))


def _forward(weight, axes):
    return _whole(weight, axes), None


def _backward(axes, _, gradient):
    return (constrain(gradient, axes),)


_gathered.defvjp(_forward, _backward)


def _automatic(mesh: Any) -> bool:
    """Whether the partitioner decides here: inside a shard_map each device already has its part."""
    return all(kind == AxisType.Auto for kind in mesh.axis_types)


def parameters_are_cut() -> bool:
    """Whether the mesh that is set has axes over which parameters are gathered when they are used."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(_parts(_rule(axis), mesh) > 1 for axis in STORED)


def row_parts() -> int:
    """Over how many devices the mesh that is set spreads the rows of a batch; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _parts(RULES["rows"], mesh)


def spread(**sizes: int) -> dict[str, dict[str, int]]:
    """Axis of an array -> the axes of the mesh that is set which it is cut over by hand, with their sizes.

    For `jax.shard_map`: axes of the mesh of size 1, and those that do not divide the array's, are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _automatic(mesh):
        return {axis: {} for axis in sizes}
    taken = {axis: _names(spec((axis,), (size,), mesh)[0]) for axis, size in sizes.items()}
    return {axis: {name: mesh.shape[name] for name in names} for axis, names in taken.items()}
