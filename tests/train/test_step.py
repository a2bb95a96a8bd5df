"""One update: 8 rows at once and 8 times 1 row are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worked

from ain_jax.data.packing import Packing
from ain_jax.train import losses, optimizer, state
from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.optimizer import Optimizer
from ain_jax.train.step import make_update, rounded

TEXT = Packing(row_tokens=24, row_targets=24)
ROWS = worked.examples([worked.example(i, 1 + 2 * i, group=("ar", "en")[i % 2]) for i in range(8)])


def made(loss, params, settings, accumulate=1):
    rates = optimizer.rate_tree(params, settings.rates)
    transform = optimizer.make(settings, params, 10)
    return make_update(loss, transform, rates, accumulate), state.create(jax.tree.map(jnp.array, params), transform)


def batch_of_rows():
    rows = [[dataclasses.replace(s, group=int(ROWS.group_E[e])) for s in worked.segments(ROWS, e)] for e in range(8)]
    return worked.batch(rows, TEXT)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulated_parts_give_the_update_of_the_whole(accumulate):
    params, batch = worked.table(), batch_of_rows()
    assert len(set((batch.target_segments_BC > 0).sum(axis=1))) > 3  # a mean of means would be another number
    results = []
    for parts in (1, accumulate):
        update, begun = made(losses.next_token(worked.Bigram(), 2), params, Optimizer(0.1, clip=0.05), parts)
        results.append(update(begun, {}, batch, jax.random.key(0)))
    (one, one_sums, one_norm), (other, other_sums, other_norm) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one_sums, other_sums)
    assert float(one_norm) == pytest.approx(float(other_norm), rel=1e-5)
    np.testing.assert_allclose(one.params["table"], other.params["table"], atol=1e-6)
    assert float(jnp.abs(one.params["table"] - params["table"]).max()) > 0.05
    assert int(one.step) == int(other.step) == 1


def test_each_part_takes_every_so_manieth_row():
    # ... so that it lies spread over the devices as the whole batch does
    seen = []

    def loss(params, frozen, batch, key):
        jax.debug.callback(lambda rows: seen.append(rows.tolist()), batch["row"])
        return losses.Sums(params["w"] * 0.0 + batch["row"].sum().astype(jnp.float32), jnp.float32(1), {})

    update, begun = made(loss, {"w": jnp.float32(1)}, Optimizer(0.1), 2)
    update(begun, {}, {"row": jnp.arange(6)}, jax.random.key(0))
    jax.effects_barrier()
    assert sorted(seen) == [[0, 2, 4], [1, 3, 5]]


def test_the_norm_is_of_the_mean_gradient_before_it_is_clipped():
    params, batch = worked.table(), batch_of_rows()
    loss = losses.next_token(worked.Bigram(), 2)
    update, begun = made(loss, params, Optimizer(0.1, clip=0.01))
    gradient = jax.grad(lambda p: loss(p, {}, batch, None).loss / loss(p, {}, batch, None).count)(params)
    _, sums, norm = update(begun, {}, batch, jax.random.key(0))
    assert float(norm) == pytest.approx(float(jnp.linalg.norm(gradient["table"])), rel=1e-5)
    assert float(norm) > 0.01
    assert float(sums.count) == (batch.target_segments_BC > 0).sum()


def test_frozen_parameters_take_no_part_in_the_norm():
    def loss(params, frozen, batch, key):
        return losses.Sums((params["a"] + 3 * params["b"]) * batch["row"].sum(), jnp.float32(1), {})

    params = {"a": jnp.float32(1), "b": jnp.float32(1)}
    for rates, expected in (({}, 10**0.5), ({"b": 0.0}, 1.0)):
        update, begun = made(loss, params, Optimizer(0.1, rates=rates))
        _, _, norm = update(begun, {}, {"row": jnp.ones(1)}, jax.random.key(0))
        assert float(norm) == pytest.approx(expected)


def test_the_key_follows_the_step_and_the_part():
    seen = []

    def loss(params, frozen, batch, key):
        jax.debug.callback(lambda bits: seen.append(int(bits)), jax.random.bits(key))
        return losses.Sums(params["w"] * batch["row"].sum(), jnp.float32(1), {})

    update, begun = made(loss, {"w": jnp.float32(1)}, Optimizer(0.1), 2)
    batch = {"row": jnp.arange(4, dtype=jnp.float32)}
    again = jax.tree.map(jnp.array, begun)
    one, _, _ = update(begun, {}, batch, jax.random.key(0))
    update(one, {}, batch, jax.random.key(0))
    jax.effects_barrier()
    assert len(set(seen)) == 4
    update(again, {}, batch, jax.random.key(0))
    jax.effects_barrier()
    assert sorted(seen[4:]) == sorted(seen[:2])


def test_rounding_goes_up_as_often_as_keeps_the_mean():
    step = 2.0**-7  # of bfloat16 between 1 and 2
    for value, share in ((1.0 + 0.128 * step, 0.128), (-1.0 - 0.75 * step, 0.75), (1.0, 0.0), (1.0 + step, 1.0)):
        x = jnp.full((200_000,), value, jnp.float32)
        found = np.asarray(jax.jit(rounded, static_argnums=1)(x, jnp.bfloat16, jax.random.key(3)), np.float64)
        lower, upper = np.sign(value), np.sign(value) * (1 + step)
        assert set(np.unique(found)) <= {lower, upper}
        deviation = (share * (1 - share) / x.size) ** 0.5
        assert abs((found == upper).mean() - share) <= 4 * deviation + 1e-9
    odd = rounded(jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0], jnp.float32), jnp.bfloat16, jax.random.key(0))
    assert odd[:2].tolist() == [jnp.inf, -jnp.inf] and jnp.isnan(odd[2]) and odd[3] == 0
    with pytest.raises(ValueError, match="parameters of float16, updates of float32: expected bfloat16 and float32"):
        rounded(jnp.ones(2), jnp.float16, jax.random.key(0))


def slope(params, frozen, batch, key):
    """A loss whose gradient is each row's number, for every entry of w."""
    del frozen, key
    return losses.Sums((params["w"].astype(jnp.float32) * batch["row"].sum()).sum(), jnp.float32(1), {})


def test_updates_too_small_for_bfloat16_add_up_and_a_resumed_run_has_the_same_bits(tmp_path):
    # 40 steps of 1e-4 from 1: to the nearest, none would move it (half a step of bfloat16 below 1 is 2e-3)
    params, batch = {"w": jnp.ones((40_000,), jnp.bfloat16)}, {"row": jnp.ones(2)}
    update, begun = made(slope, params, Optimizer(1e-4, schedule="flat", clip=0.0))
    assert {leaf.dtype for leaf in jax.tree.leaves(begun.opt_state) if leaf.ndim} == {jnp.dtype("float32")}
    checkpoints, now = Checkpoints(tmp_path), begun
    for _ in range(40):
        now, _, _ = update(now, {}, batch, jax.random.key(0))
        if int(now.step) == 20:
            checkpoints.save(now, {}, wait=True)
    w = np.asarray(now.params["w"], np.float64)
    assert now.params["w"].dtype == jnp.bfloat16
    # Each entry is a sum of 40 draws, each of variance step^2 p (1 - p), p = 1e-4 / step.
    step = 2.0**-8
    deviation = (40 * step * 1e-4 * (1 - 1e-4 / step) / w.size) ** 0.5
    assert w.mean() == pytest.approx(1 - 40e-4, abs=5 * deviation)
    again = checkpoints.load(20, jax.tree.map(jnp.zeros_like, now), {})
    checkpoints.close()
    for _ in range(20):
        again, _, _ = update(again, {}, batch, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), now, again)


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    # 256 + 7 times 1 is 256 in bfloat16, whose steps there are of 2
    update, begun = made(slope, {"w": jnp.ones((), jnp.bfloat16)}, Optimizer(0.1), accumulate=8)
    _, _, norm = update(begun, {}, {"row": jnp.array([256.0, 1, 1, 1, 1, 1, 1, 1])}, jax.random.key(0))
    assert float(norm) == 263 / 8  # the mean of eight
