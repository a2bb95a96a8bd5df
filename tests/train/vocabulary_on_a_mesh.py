"""Prints, as JSON, how far log-probabilities on eight simulated devices are from one: run by test_vocabulary.py."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ain_jax import sharding
from ain_jax.train import vocabulary

NAMES = ("slice", "data", "fsdp", "sequence", "tensor")
CASES = {  # B, C, V, D
    "all axes": (2, 6, 1024, 16),
    "vocabulary that does not divide": (2, 6, 1023, 16),
    "rows that do not divide": (3, 6, 1024, 16),
}
HELD = 12 * 128


def main() -> None:
    # The table as a mesh of these five axes has it.
    rules = {"rows": ("slice", "data", "fsdp"), "positions": "sequence", "embed": ("fsdp", "sequence")}
    sharding.RULES = {**sharding.RULES, **rules}
    mesh = jax.make_mesh((1, 1, 2, 2, 2), NAMES, axis_types=(jax.sharding.AxisType.Auto,) * 5)
    found = {}
    for name, (B, C, V, D) in CASES.items():
        random = np.random.default_rng(0)
        y, w = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((B, C, D), (V, D)))
        targets_BC = jnp.asarray(random.integers(0, V, (B, C)), jnp.int32)

        def loss(y, w, targets_BC=targets_BC):
            log_probs_BC, correct_BC, mean_BC = vocabulary.log_probs([(y, w)], targets_BC, 9.0, HELD)
            return jnp.sum(jnp.sin(log_probs_BC) + mean_BC), (log_probs_BC, correct_BC, mean_BC)

        step = lambda: jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        expected = jax.tree.leaves(step()(y, w))
        with jax.set_mesh(mesh):
            where = lambda axes, x: NamedSharding(mesh, sharding.spec(axes, x.shape, mesh))
            placed = (
                jax.device_put(y, where(("rows", "positions", None), y)),
                jax.device_put(w, where(("vocab", "embed"), w)),
            )
            text = step().lower(*placed).compile().as_text()
            results = jax.tree.leaves(step()(*placed))
        apart = max(float(np.abs(np.asarray(a, np.float64) - b).max()) for a, b in zip(results, expected, strict=True))
        gathered = [int(a) * int(b) for a, b in re.findall(r"= f32\[(\d+),(\d+)\]\S* all-gather\(", text)]
        found[name] = {"apart": apart, "gathered": max(gathered, default=0), "block": 512 * D}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
