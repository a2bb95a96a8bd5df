"""Log-probabilities read block by block against the definition, in value, gradient, precision and memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax.train import vocabulary

pytestmark = pytest.mark.usefixtures("strict_dtypes")
B, C, D, R = 2, 6, 16, 3


def inputs(V=300, dtype=jnp.float32, seed=0):
    """Hidden states and a table, an adapter's two halves, targets."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    targets_BC = jnp.asarray(random.integers(0, V, (B, C)), jnp.int32)
    return (draw(B, C, D), draw(V, D), draw(B, C, R), draw(V, R)), targets_BC


def by_definition(arrays, targets_BC, cap):
    y, w, a, b = arrays
    logits_BCV = y @ w.T + a @ b.T
    logits_BCV = logits_BCV if cap is None else cap * jnp.tanh(logits_BCV / cap)
    log_BCV = jax.nn.log_softmax(logits_BCV)
    chosen_BC = jnp.take_along_axis(log_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return chosen_BC, log_BCV.argmax(axis=-1) == targets_BC, log_BCV.mean(axis=-1)


def in_blocks(arrays, targets_BC, cap, held=B * C * 128):
    y, w, a, b = arrays
    return vocabulary.log_probs([(y, w), (a, b)], targets_BC, cap, held)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("V", [100, 128, 300])  # less than a block, one, and two and a part of a third
def test_equals_the_definition(V, cap):
    arrays, targets_BC = inputs(V)

    def scalar(way):
        def loss(arrays):
            chosen_BC, correct_BC, mean_BC = way(arrays, targets_BC, cap)
            return jnp.sum(jnp.sin(chosen_BC) + 0.3 * mean_BC**2), (chosen_BC, correct_BC, mean_BC)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    ((_, found), gradients), ((_, expected), by_hand) = scalar(in_blocks), scalar(by_definition)
    for a, b in zip((*found, *gradients), (*expected, *by_hand), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_products_are_summed_in_float32():
    """bfloat16 logits of this size are a sixteenth apart, and lose what is found here."""
    random = np.random.default_rng(0)
    y, w = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in ((B, C, 256), (300, 256)))
    targets_BC = jnp.asarray(random.integers(0, 300, (B, C)), jnp.int32)
    logits_BCV = np.asarray(y, np.float64) @ np.asarray(w, np.float64).T
    norm_BC = np.log(np.exp(logits_BCV).sum(axis=-1))
    expected = np.take_along_axis(logits_BCV, np.asarray(targets_BC)[..., None], axis=-1)[..., 0] - norm_BC
    found, _, mean_BC = vocabulary.log_probs([(y, w)], targets_BC, None, B * C * 128)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(mean_BC, logits_BCV.mean(axis=-1) - norm_BC, atol=1e-4)
    gradient = jax.grad(lambda w: vocabulary.log_probs([(y, w)], targets_BC, None, B * C * 128)[0].sum())(w)
    assert gradient.dtype == jnp.bfloat16


def temporaries(way, V, held=0) -> int:
    """Bytes of a compiled gradient beside its arguments and results."""

    def loss(y, w, targets_BC):
        log_probs_BC, _, _ = way(y, w, targets_BC, held)
        return -log_probs_BC.sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 64, D), (V, D))]
    compiled: Any = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, jax.ShapeDtypeStruct((8, 64), jnp.int32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_block_and_not_with_the_vocabulary():
    blocks = lambda y, w, t, held: vocabulary.log_probs([(y, w)], t, None, held)
    whole = lambda y, w, t, held: (jax.nn.log_softmax(y @ w.T)[..., 0], held, t)
    held = 8 * 64 * 256
    small, large = temporaries(blocks, 2048, held), temporaries(blocks, 16384, held)
    assert large <= 1.02 * small  # the table's gradient is written in place, where it is handed back
    assert temporaries(whole, 16384) - temporaries(whole, 2048) >= 4 * 8 * 64 * (16384 - 2048)
    assert temporaries(blocks, 16384, 4 * held) - large >= 4 * 3 * held


def test_a_mesh_changes_neither_values_nor_gradients():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    script = Path(__file__).parent / "vocabulary_on_a_mesh.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"all axes", "vocabulary that does not divide", "rows that do not divide"}
    for case in found.values():
        assert case["apart"] < 2e-5
        assert case["gathered"] <= case["block"]  # never the table: a block of it at once
