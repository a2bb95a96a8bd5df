"""Prints, as JSON, how far attention on eight simulated devices is from one: run by test_attention_backends.py."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ain_jax import sharding
from ain_jax.models import attention as front
from ain_jax.models import attention_tpu

attention: Any = front.attention
CASES = {
    "decoder": ((4, 2, 16), {"causal": True, "softcap": 2.0}),
    "window": ((4, 2, 16), {"causal": True, "window": 37}),
    "tower": ((2, 2, 80), {"causal": False}),
    "tower of short segments": ((2, 2, 16), {"causal": False, "longest": 100}),
    "one key head": ((4, 1, 16), {"causal": True}),  # repeated, so that each device has its own
    "heads that do not divide": ((3, 3, 16), {"causal": True}),
    "in chunks": ((4, 2, 16), {"causal": True, "chunk": 48}),
}


class Interpreted:
    """Splash without a TPU."""

    refusal = staticmethod(lambda call: attention_tpu.refusal(dataclasses.replace(call, platform=None)))
    prepare = staticmethod(lambda call: attention_tpu.prepare(call, interpret=True))


def results(name: str, backend: str, rows: int = 2, length: int = 256) -> list[np.ndarray]:
    (N, K, H), rules = CASES[name]
    random = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(random.normal(size=(rows, length, n, H)), jnp.float32) for n in (N, K, K))
    segments = jnp.asarray([np.searchsorted([70, 160, 230], np.arange(length) + b, "right") + 1 for b in range(rows)])
    segments = jnp.where(segments == 4, 0, segments).astype(jnp.int32)
    real = (segments > 0)[:, :, None, None]

    def loss(*arrays):
        out = attention(*arrays, segments, backend=backend, **rules)
        return jnp.sum(jnp.where(real, jnp.sin(out), 0.0)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return [np.where(real, out, 0.0), *map(np.asarray, gradients)]


def main() -> None:
    front.BACKENDS["splash"] = Interpreted()
    names = ("slice", "data", "fsdp", "sequence", "tensor")
    # The table as a mesh of these five axes has it.
    sharding.RULES = {**sharding.RULES, "rows": ("slice", "data", "fsdp"), "positions": "sequence"}
    mesh = jax.make_mesh((1, 1, 2, 2, 2), names, axis_types=(jax.sharding.AxisType.Auto,) * 5)
    with jax.set_mesh(mesh):
        spread = sharding.spread(rows=2, positions=256, heads=4)
    found: dict = {"spread": {axis: math.prod(over.values()) for axis, over in spread.items()}}
    for name in CASES:
        expected = results(name, "xla")
        for backend in ("xla", "splash") if name != "in chunks" else ("xla",):
            with jax.set_mesh(mesh):
                apart = [np.abs(a - b).max() for a, b in zip(results(name, backend), expected, strict=True)]
            found[f"{name}, {backend}"] = float(np.max(apart))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
