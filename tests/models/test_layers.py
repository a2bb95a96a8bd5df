from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax.models.layers import (
    Einsum,
    Embedding,
    Norm,
    check_remat,
    product,
    rotate,
    run_layers,
    text_rotary,
    vision_rotary,
)


def test_pairs_turn_with_time_then_height_then_width():
    positions_3BL = jnp.array([[[1]], [[10]], [[100]]], jnp.int32)
    cos_BLh, sin_BLh = text_rotary(positions_3BL, 16, 10_000.0, (2, 3, 3))
    axis = np.array([1, 1, 10, 10, 10, 100, 100, 100])
    angles = axis / 10_000.0 ** (np.arange(8) / 8)
    np.testing.assert_allclose(cos_BLh[0, 0], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin_BLh[0, 0], np.sin(angles), atol=1e-5)


def test_patches_turn_half_with_their_row_and_half_with_their_column():
    cos_BPh, _ = vision_rotary(jnp.array([[[3, 5]]], jnp.int32), 8)
    rates = np.array([1.0, 0.01])
    np.testing.assert_allclose(cos_BPh[0, 0], np.cos([3 * 1.0, 3 * 0.01, 5 * 1.0, 5 * 0.01]), atol=1e-6)
    assert rates.tolist() == [1.0, 0.01]


def test_a_quarter_turn_takes_the_first_half_to_the_second():
    x_BLNH = jnp.array([1.0, 2.0, 3.0, 4.0])[None, None, None]
    quarter = (jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2)))
    assert rotate(x_BLNH, quarter)[0, 0, 0].tolist() == [-3.0, -4.0, 1.0, 2.0]


def test_scores_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = [text_rotary(jnp.full((3, 1, 1), p, jnp.int32), 16, 10_000.0, None) for p in (i, j)]
        return float(jnp.sum(rotate(q, at[0]) * rotate(k, at[1])))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_norms_equal_the_formula():
    x = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 8)).astype(np.float32)
    weight, bias = np.linspace(0.5, 2, 8, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)
    rms = Norm(8, 1e-6).apply({"params": {"weight": weight}}, x)
    np.testing.assert_allclose(rms, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight, atol=1e-5)
    layer = Norm(8, 1e-6, center=True).apply({"params": {"weight": weight, "bias": bias}}, x)
    centered = x - x.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6) * weight + bias
    np.testing.assert_allclose(layer, expected, atol=1e-5)


def test_layer_norm_is_rounded_once():
    """In bfloat16 it gives the bfloat16 nearest to its float32 result: twice rounded, some values would lie beside."""
    rng = np.random.default_rng(0)
    x, weight, bias = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((4, 16, 64), (64,), (64,)))
    params = {"params": {"weight": weight, "bias": bias}}
    whole = Norm(64, 1e-6, center=True).apply(params, x)
    half = Norm(64, 1e-6, center=True, dtype=jnp.bfloat16).apply(params, x)
    assert half.dtype == jnp.bfloat16 and np.array_equal(half, whole.astype(jnp.bfloat16))


def test_a_projection_starts_with_outputs_of_the_size_of_its_inputs():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 256)), jnp.float32)
    layer = Einsum("BLD,DNH->BLNH", (256, 4, 32), ("embed", "heads", "head"), bias=True)
    boxed = layer.init(jax.random.key(0), x)["params"]
    assert boxed["weight"].names == ("embed", "heads", "head")
    assert boxed["bias"].names == ("heads", "head")
    assert float(jnp.std(layer.apply({"params": boxed}, x))) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("shape, axes", [((6, 3, 2), 1), ((3, 2, 9), 2), ((6, 4), 1)], ids=str)
def test_products_have_the_gradients_of_tensordot(shape, axes):
    rng = np.random.default_rng(0)
    x, weight = (
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, *((6,) if axes == 1 else (3, 2))), shape)
    )

    def gradients(multiply):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(multiply(x, w, axes))), (0, 1)))(x, weight)

    for a, b in zip(gradients(product), gradients(jnp.tensordot), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learnt, kept", [("x", "weight"), ("weight", "x")])
def test_products_keep_the_operand_that_a_gradient_needs_alone(learnt, kept):
    given = {"x": jnp.ones((2, 3, 4)), "weight": jnp.ones((4, 5))}

    def of(value):
        return product(**(given | {learnt: value}), axes=1)

    _, pull = jax.vjp(of, given[learnt])
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [given[kept].shape]
    jaxpr = jax.make_jaxpr(lambda value: jax.grad(lambda v: jnp.sum(of(v)))(value))(given[learnt]).jaxpr
    assert str(jaxpr).count("dot_general") == 2  # the product and one gradient


def test_an_id_outside_the_table_is_no_other_row():
    table = Embedding(4, 2)
    params = {"weight": jnp.arange(8.0).reshape(4, 2)}
    rows = table.apply({"params": params}, jnp.array([[3, 4]], jnp.int32))
    assert rows[0, 0].tolist() == [6.0, 7.0]
    assert np.isnan(rows[0, 1]).all()


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match="remat='some': expected one of none, full, offload, .*, dots"):
        run_layers({}, [], None, None, "some")


def test_offloading_is_refused_where_the_host_lends_no_memory(monkeypatch):
    device = SimpleNamespace(platform="npu", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    check_remat("full")
    with pytest.raises(ValueError, match="remat='offload' keeps .* platform npu have device alone: take none, full"):
        check_remat("offload")
