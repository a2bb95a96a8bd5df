"""Prints, as JSON, the collectives of a small program on 64 chips, and of one on two slices: run by test_tpu.py.

A process of its own, because libtpu is loaded once by a process. Needs the libtpu wheel, and no TPU.
"""

import dataclasses
import json
import os

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ain_jax import sharding
from ain_jax.plan import chips, hlo
from ain_jax.plan import compile as compiler

LAYERS, D, F = 3, 1024, 512
POD = chips.read("v5e-64")
MESH = sharding.make_mesh(sharding.Mesh(data=1, fsdp=-1), compiler.devices(POD))


def gathered(part_DF, axis):
    """By hand, so that both matrices are gathered over one channel."""
    local = lambda part: jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True)
    cut = PartitionSpec(*[None] * axis, "fsdp")
    return jax.shard_map(local, mesh=MESH, in_specs=cut, out_specs=PartitionSpec(), check_vma=False)(part_DF)


def loss(up_NDF, down_NFD, x_BD):
    def layer(x_BD, weights):
        up_DF, down_FD = (gathered(weight.astype(jnp.bfloat16), axis) for axis, weight in enumerate(weights))
        return jnp.tanh(x_BD @ up_DF) @ down_FD, None

    keep_nothing = jax.checkpoint(layer, prevent_cse=False)
    return jax.lax.scan(keep_nothing, x_BD, (up_NDF, down_NFD))[0].astype(jnp.float32).sum()


def laid(shape, *axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, PartitionSpec(*axes)))


up_NDF, down_NFD = laid((LAYERS, D, F), None, "fsdp"), laid((LAYERS, F, D), None, None, "fsdp")
x_BD = laid((64 * 128, D), "fsdp", dtype=jnp.bfloat16)
with jax.set_mesh(MESH):
    places = (up_NDF.sharding, down_NFD.sharding)
    compiled = jax.jit(jax.grad(loss, (0, 1)), out_shardings=places).lower(up_NDF, down_NFD, x_BD).compile()
told = lambda compiled, chips: [dataclasses.asdict(c) for c in hlo.Module(compiled.as_text()).collectives(chips)]
found = {"one": told(compiled, 0)}

PODS = chips.read("2xv5e-16")
MESH = sharding.make_mesh(sharding.Mesh(slice=2, data=1, fsdp=-1), compiler.devices(PODS))
up_DF, x_BD = laid((D, F), "fsdp"), laid((32 * 128, D), ("slice", "fsdp"), dtype=jnp.bfloat16)
with jax.set_mesh(MESH):
    one_layer = lambda up_DF, x_BD: jnp.tanh(x_BD @ up_DF.astype(jnp.bfloat16)).astype(jnp.float32).sum()
    compiled = jax.jit(jax.grad(one_layer), out_shardings=up_DF.sharding).lower(up_DF, x_BD).compile()

# Two axes of a mesh on one axis of the torus, of one slice and of two.
meshes = []
for name, sizes in (("v5p-128", {"fsdp": 32, "tensor": 2}), ("2xv5p-128", {"slice": 2, "fsdp": 8, "sequence": 8})):
    shape = sharding.make_mesh(sharding.Mesh(**{"data": 1} | sizes), compiler.devices(chips.read(name))).shape
    meshes.append([name, {axis: size for axis, size in shape.items() if size > 1}])
print(json.dumps(found | {"meshes": meshes, "two": told(compiled, 16)}))
