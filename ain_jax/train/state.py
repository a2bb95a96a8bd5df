"""What training changes: one tree of arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ain_jax.train.optimizer import path_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds; the data position is `step`, and no random key needs saving."""

    step: Any  # int32 scalar, updates done
    params: Any
    opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; what the optimiser keeps is made where it belongs, on no device whole."""
    like = layout(params, optimizer)
    where = jax.tree.map(lambda leaf: leaf.sharding, like.opt_state)
    opt_state = jax.jit(lambda p: optimizer.init(float32(p)), out_shardings=where)(params)
    return TrainState(jnp.zeros((), jnp.int32, device=like.step.sharding), params, opt_state)


def layout(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of the state, of parameters that are arrays or ShapeDtypeStructs with shardings.

    What the optimiser keeps of a parameter lies as the parameter does, in float32; the rest is whole on every device.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    placed = {path_name(path): leaf for path, leaf in leaves}
    first = leaves[0][1].sharding
    whole = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first

    def place(path, leaf):
        name = path_name(path)
        same = [n for n, p in placed.items() if name.endswith("/" + n) and p.shape == leaf.shape]
        where = placed[max(same, key=len)].sharding if same else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
    kept = jax.eval_shape(lambda p: optimizer.init(float32(p)), params)
    opt_state = jax.tree_util.tree_map_with_path(place, kept)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), abstract, opt_state)


def float32(tree: Any) -> Any:
    """The tree with every array in float32, as an optimiser sees it."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
