"""Compiles attention, forwards and backwards, for TPUs that are not here, and prints, as JSON, the kernels in each.

Run by test_attention_backends.py, because libtpu is loaded once by a process. Needs the libtpu wheel, and no TPU.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from ain_jax import sharding
from ain_jax.models.attention import attention

NAMES = ("slice", "data", "fsdp", "sequence", "tensor")
# B, L, N, K, H: Qwen2-7B's decoder, Gemma's wide heads, Qwen2-VL's image tower, and Qwen2.5-VL's windows in it.
CASES = {
    "decoder": ((2, 4096, 28, 4, 128), {"causal": True}),
    "window and soft cap": ((2, 4096, 8, 4, 256), {"causal": True, "window": 1024, "softcap": 50.0}),
    "tower": ((2, 2048, 16, 16, 80), {"causal": False}),
    "tower's windows": ((2, 2048, 16, 16, 80), {"causal": False, "longest": 64}),
}
MESHES = {"one chip": (1, 1, 1, 1, 1), "four chips": (1, 1, 1, 2, 2)}
# Each generation by its own block sizes; what is cut over four chips, and what one chip's vector memory must hold.
COMPILED = (
    ("v5e:2x2", "decoder", "four chips"),
    ("v5e:2x2", "tower", "four chips"),
    ("v5e:2x2", "tower's windows", "one chip"),
    ("v5p:2x2x1", "decoder", "one chip"),
    ("v6e:2x2", "window and soft cap", "one chip"),
)


def kernels(devices, sizes, shape, rules) -> int:
    """Pallas kernels in the compiled forward and backward pass."""
    used = np.array(devices[: int(np.prod(sizes))]).reshape(sizes)
    mesh = jax.sharding.Mesh(used, NAMES, axis_types=(jax.sharding.AxisType.Auto,) * len(NAMES))
    (B, L, N, K, H), where = shape, NamedSharding(mesh, PartitionSpec())
    placed = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    arrays = [placed((B, L, heads, H), jnp.bfloat16) for heads in (N, K, K)]
    loss = lambda q, k, v, segments: jnp.sum(
        attention(q, k, v, segments, backend="splash", **rules).astype(jnp.float32)
    )
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1, 2)))
        return str(step.lower(*arrays, placed((B, L), jnp.int32)).compile().as_text()).count("tpu_custom_call")


def main() -> None:
    sharding.RULES = {**sharding.RULES, "rows": ("slice", "data", "fsdp"), "positions": "sequence"}
    found = {}
    for topology, name, mesh in COMPILED:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        label = f"{topology.split(':')[0]}, {name}, {mesh}"
        found[label] = kernels(devices, MESHES[mesh], *CASES[name])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
