import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax.models import attention_xla
from ain_jax.models.attention import attention


def inputs(B=2, L=12, N=4, K=2, H=8, seed=0):
    rng = np.random.default_rng(seed)
    arrays = (rng.normal(size=(B, L, heads, H)).astype(np.float32) for heads in (N, K, K))
    return tuple(map(jnp.asarray, arrays))


def by_hand(q_BLNH, k_BSKH, v_BSKH, segments_BL, causal, window=99, scale=None, softcap=None):
    """Position by position, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BLNH, k_BSKH, v_BSKH))
    B, L, N, H = q.shape
    out = np.zeros_like(q)
    for b, i, n in np.ndindex(B, L, N):
        key = n // (N // k.shape[2])
        near = [j for j in range(L) if (i - window < j <= i or not causal)]
        seen = [j for j in near if segments_BL[b, j] == segments_BL[b, i]]
        scores = np.array([q[b, i, n] @ k[b, j, key] for j in seen]) * (scale or H**-0.5)
        weights = np.exp(softcap * np.tanh(scores / softcap) if softcap else scores)
        out[b, i, n] = sum(w * v[b, j, key] for w, j in zip(weights, seen, strict=True)) / weights.sum()
    return out


SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 0, 0], [1, 1, 2, 2, 2, 2, 3, 0, 0, 0, 0, 0]], np.int32)
WAYS = {"at once": {}, "in bands": {"longest": 4}, "in chunks": {"chunk": 5}}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_sum_by_hand(way, causal):
    q, k, v = inputs()
    out = attention(q, k, v, jnp.asarray(SEGMENTS), causal=causal, **WAYS[way])
    expected = by_hand(q, k, v, SEGMENTS, causal)
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=2e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("rules", [{"window": 2}, {"window": 3, "scale": 0.7}, {"softcap": 0.8}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_rules_equal_the_sum_by_hand(way, rules):
    q, k, v = inputs()
    out = attention(q, k, v, jnp.asarray(SEGMENTS), causal=True, **WAYS[way], **rules)
    expected = by_hand(q, k, v, SEGMENTS, True, **rules)
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=2e-6)
    assert np.abs(expected[real] - by_hand(q, k, v, SEGMENTS, True)[real]).max() > 0.01


def test_a_window_needs_its_own_row():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="a window counts back from a query in its own row"):
        attention(q, k, v, jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), causal=False, window=2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_all_ways_have_the_same_gradients(causal):
    seen = jnp.asarray(SEGMENTS > 0)[:, :, None, None].astype(jnp.float32)

    def gradients(way):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(attention(q, k, v, jnp.asarray(SEGMENTS), causal=causal, **WAYS[way])) * seen)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs())

    at_once, *others = (gradients(way) for way in WAYS)
    for other in others:
        for a, b in zip(at_once, other, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("length", [11, 12])
@pytest.mark.parametrize("rules", [{}, {"window": 9}], ids=str)
def test_parts_of_a_row_equal_the_whole_and_leave_out_later_keys(rules, length, monkeypatch):
    def computed():
        q, k, v = (x[:, :length] for x in inputs())
        segments_BL = jnp.asarray(np.where(np.arange(12) < 9, 1, 2)[None, :length].repeat(2, 0), jnp.int32)
        loss = lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, segments_BL, causal=True, **rules)))
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, v).compile(), (q, k, v)

    whole, given = computed()
    monkeypatch.setattr(attention_xla, "SHORTEST_PART", 2)
    parts, _ = computed()
    for a, b in zip(jax.tree.leaves(whole(*given)), jax.tree.leaves(parts(*given)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=3e-6)
    assert parts.cost_analysis()["flops"] < 0.9 * whole.cost_analysis()["flops"]


def test_a_segment_does_not_see_another():
    q, k, v = inputs()
    segments = jnp.asarray(SEGMENTS)
    for way in WAYS.values():
        before = attention(q, k, v, segments, causal=False, **way)
        after = attention(q, k.at[0, 3:5].set(9.0), v.at[0, 3:5].set(9.0), segments, causal=False, **way)
        changed = np.abs(np.asarray(before - after)).max(axis=(2, 3)) > 0
        assert changed.tolist() == (SEGMENTS == [[2], [9]]).tolist()


def test_a_segment_longer_than_promised_gives_nan_in_its_row_only():
    q, k, v = inputs()
    out = attention(q, k, v, jnp.asarray(SEGMENTS), causal=True, longest=3)  # both rows hold a segment of 4
    assert np.isnan(out).all()
    shorter = SEGMENTS.copy()
    shorter[0, 8] = 9
    out = attention(q, k, v, jnp.asarray(shorter), causal=True, longest=3)
    assert np.isnan(out).any(axis=(1, 2, 3)).tolist() == [False, True]


def test_keys_of_another_row_take_no_causal_order():
    q, k, v = inputs()
    segments = jnp.asarray(SEGMENTS)
    out = attention(q[:, :1], k, v, segments[:, :1], segments, causal=False)
    np.testing.assert_allclose(out[:, 0], by_hand(q, k, v, SEGMENTS, False)[:, 0], atol=2e-6)
    with pytest.raises(ValueError, match="causal and longest speak of one row"):
        attention(q[:, :1], k, v, segments[:, :1], segments, causal=True)


def test_bfloat16_values_are_weighed_in_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    out = attention(q, k, v, jnp.asarray(SEGMENTS), causal=True)
    assert out.dtype == jnp.bfloat16
    expected = by_hand(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), SEGMENTS, True)
    np.testing.assert_allclose(np.asarray(out, np.float32)[SEGMENTS > 0], expected[SEGMENTS > 0], atol=0.05)
