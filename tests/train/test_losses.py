"""Losses against sums done by hand, and against themselves: packed or alone, whole or in chunks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worked
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.data.batch import Batch
from ain_jax.data.packing import Packing, pack
from ain_jax.models.multimodal import MultimodalModel, init_params
from ain_jax.train import losses
from ain_jax.train.metrics import numbers
from ain_jax.train.preferences import Preference, preference

pytestmark = pytest.mark.usefixtures("strict_dtypes")
TEXT = Packing(row_tokens=48, row_targets=24)
TALKS = worked.examples(
    [
        worked.example(1, 9, [(16, 8)], group="ar"),
        worked.example(2, 12, group="en"),
        worked.example(3, 6, [(8, 8), (16, 16)], group="ar"),
    ]
)
TEXTS = worked.examples([worked.example(4, 9), worked.example(5, 20, group="en"), worked.example(6, 7)])
PAIRS = worked.examples(
    [
        worked.example(7, 4, [(8, 8)], pair=True, group="kind a"),
        worked.example(8, 3, pair=True, group="kind b"),
        worked.example(9, 3, [(8, 16)], pair=True, group="kind a"),
    ]
)


@pytest.fixture(scope="module")
def params():
    # Larger than at the start of training, so that a neighbour that is seen by mistake is felt.
    return jax.tree.map(lambda x: 1.5 * x + 0.05, init_params(worked.CONFIG, jax.random.key(0)))


def with_gradient(loss):
    def scalar(p, batch):
        sums = loss(p, {}, batch, None)
        return sums.loss, sums

    return jax.jit(jax.value_and_grad(scalar, has_aux=True))


def assert_same(one, other, atol=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def test_bits_per_byte_divide_by_the_bytes_of_the_learnt_tokens_and_change_nothing_else(params):
    model, bytes_V = MultimodalModel(worked.CONFIG), np.arange(worked.CONFIG.text.vocabulary, dtype=np.int32) % 5
    batch = worked.batch([[s for e in range(3) for s in worked.segments(TEXTS, e)]], TEXT)
    plain = losses.next_token(model, 2)(params, {}, batch, None)
    found = losses.next_token(model, 2, token_bytes_V=bytes_V)(params, {}, batch, None)
    bits_G, size_G = found.parts["bits_per_byte"]
    learnt_BC = np.asarray(batch.target_segments_BC) > 0
    for group in (0, 1):
        ours_BC = learnt_BC & (np.asarray(batch.target_groups_BC) == group)
        assert float(size_G[group]) == bytes_V[np.asarray(batch.targets_BC)[ours_BC]].sum() > 0
    np.testing.assert_allclose(np.asarray(bits_G) * math.log(2), plain.parts["loss"][0], rtol=1e-6)
    assert found.loss == plain.loss and found.count == plain.count


def test_packed_texts_have_the_loss_and_gradients_that_they_have_alone(params):
    """Pictures, videos and pairs: tests/data/test_packed_equals_alone.py."""
    loss = with_gradient(losses.next_token(MultimodalModel(worked.CONFIG), 2))
    made = [s for e in range(3) for s in worked.segments(TEXTS, e)]
    made = [dataclasses.replace(s, group=int(TEXTS.group_E[e])) for e, s in enumerate(made)]
    (_, packed), packed_gradient = loss(params, worked.batch([made, [], []], TEXT))
    (_, alone), alone_gradient = loss(params, worked.batch([[s] for s in made], TEXT))
    assert float(packed.count) == float(alone.count) == sum(s.learn_L[1:].sum() for s in made)
    assert_same(packed, alone, atol=1e-4)  # sums of some tens of nats
    assert_same(packed_gradient, alone_gradient)


def test_a_policy_that_is_its_own_reference_pays_log_2():
    params, model = worked.table(), worked.Bigram()
    pairs = worked.pair_batch(PAIRS, [[1], [0, 2]], 2, Packing(row_tokens=64, row_patches=64, row_targets=40))
    same = dataclasses.replace(pairs, reference_BN2=np.asarray(losses.pair_log_probs(model, params, pairs)[0]))
    (value, sums), gradient = with_gradient(preference(model, 2, Preference(beta=0.5)))(params, same)
    assert float(value) / float(sums.count) == pytest.approx(math.log(2), abs=1e-6)
    for name, expected in {"margin": 0.0, "drift": 0.0, "accuracy": 0.0, "loss": math.log(2)}.items():
        total_G, count_G = sums.parts[name]
        np.testing.assert_allclose(total_G / count_G, [expected] * 2, atol=1e-5)
    assert float(jnp.abs(gradient["table"]).max()) > 1e-3  # and yet there is something to learn


def random_batch(seed, B=2, L=40, C=24, V=30, groups=3):
    rng = np.random.default_rng(seed)
    count = rng.integers(0, C + 1, B)
    used_BC = np.arange(C)[None, :] < count[:, None]
    integers = lambda high, shape: rng.integers(0, high, shape).astype(np.int32)
    return Batch(
        tokens_BL=integers(V, (B, L)),
        segments_BL=np.ones((B, L), np.int32),
        positions_B3L=np.zeros((B, 3, L), np.int32),
        predict_at_BC=integers(L, (B, C)) * used_BC,
        targets_BC=integers(V, (B, C)) * used_BC,
        target_segments_BC=(integers(3, (B, C)) + np.int32(1)) * used_BC,
        target_groups_BC=integers(groups, (B, C)) * used_BC,
    )


@pytest.mark.parametrize("held", [0, losses.HELD_LOGITS], ids=["blocks", "whole"])
@pytest.mark.parametrize("C", [1, 24, 64, 65, 150])
def test_log_probabilities_do_not_depend_on_the_blocks(C, held, monkeypatch):
    monkeypatch.setattr(losses, "HELD_LOGITS", held)
    batch, params = random_batch(C, C=C, V=192), worked.table()
    log_probs_BC, correct_BC, mean_BC = losses.target_log_probs(worked.Bigram(), params, batch)
    last_BC = np.take_along_axis(batch.tokens_BL, batch.predict_at_BC, axis=1)
    expected_BC = worked.log_table(params)[last_BC, batch.targets_BC]
    np.testing.assert_allclose(log_probs_BC, expected_BC, atol=2e-5)
    best_BC = np.asarray(params["table"])[last_BC].argmax(axis=-1)
    np.testing.assert_array_equal(correct_BC, best_BC == batch.targets_BC)
    np.testing.assert_allclose(mean_BC, worked.log_table(params)[last_BC].mean(axis=-1), atol=2e-5)


def test_gradients_do_not_depend_on_the_blocks(params, monkeypatch):
    loss, batch = (
        losses.next_token(MultimodalModel(worked.CONFIG), 2),
        worked.batch([[s for e in range(3) for s in worked.segments(TEXTS, e)]], TEXT),
    )
    whole = with_gradient(loss)(params, batch)
    monkeypatch.setattr(losses, "HELD_LOGITS", 0)
    assert_same(with_gradient(loss)(params, batch), whole)


def test_next_token_by_hand():
    # Tokens 0 1 2 0, learnt: 1 (of group 0), 2 and 0 (of group 1). p(next | last) is a row of the table.
    probabilities = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.25, 0.25, 0.5]])
    batch = Batch(
        tokens_BL=np.array([[0, 1, 2, 0]], np.int32),
        segments_BL=np.ones((1, 4), np.int32),
        positions_B3L=np.zeros((1, 3, 4), np.int32),
        predict_at_BC=np.array([[0, 1, 2, 0]], np.int32),
        targets_BC=np.array([[1, 2, 0, 0]], np.int32),
        target_segments_BC=np.array([[1, 1, 1, 0]], np.int32),
        target_groups_BC=np.array([[0, 1, 1, 0]], np.int32),
    )
    loss = losses.next_token(worked.Bigram(), 2)
    sums = loss({"table": jnp.log(jnp.asarray(probabilities, jnp.float32))}, {}, batch, None)
    assert float(sums.count) == 3
    assert float(sums.loss) == pytest.approx(-math.log(0.5 * 0.8 * 0.25), abs=1e-5)
    np.testing.assert_allclose(sums.parts["loss"][0], [-math.log(0.5), -math.log(0.8 * 0.25)], atol=1e-5)
    np.testing.assert_array_equal(sums.parts["loss"][1], [1, 2])
    np.testing.assert_array_equal(sums.parts["accuracy"][0], [1, 1])

    # A tenth of each target goes to the three tokens evenly; what is reported stays the plain cross-entropy.
    smooth = losses.next_token(worked.Bigram(), 2, losses.NextToken(label_smoothing=0.1))
    smoothed = smooth({"table": jnp.log(jnp.asarray(probabilities, jnp.float32))}, {}, batch, None)
    aims = [[0.1 / 3 + 0.9 * (t == target) for t in range(3)] for target in (1, 2, 0)]
    expected = -sum(
        a * math.log(p) for aim, row in zip(aims, probabilities, strict=True) for a, p in zip(aim, row, strict=True)
    )
    assert float(smoothed.loss) == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(smoothed.parts["loss"], sums.parts["loss"])


def test_preference_by_hand():
    params, beta = worked.table(), 0.3
    pairs = worked.pair_batch(PAIRS, [[1], [0, 2]], 2, Packing(row_tokens=64, row_patches=64, row_targets=40))
    pairs.reference_BN2[:] = np.random.default_rng(1).normal(-20, 2, (2, 2, 2))
    logs = worked.log_table(params)

    def answer(example, which):
        made = worked.segments(PAIRS, example)[which]
        steps = zip(made.tokens_L, made.tokens_L[1:], made.learn_L[1:], strict=False)
        return sum(logs[a, b] for a, b, learnt in steps if learnt)

    places = {1: (0, 0), 0: (1, 0), 2: (1, 1)}
    ratio = {e: [answer(e, w) - pairs.reference_BN2[*places[e], w] for w in (0, 1)] for e in places}
    margin = {e: beta * (r[0] - r[1]) for e, r in ratio.items()}
    cost = {e: math.log1p(math.exp(-m)) for e, m in margin.items()}
    sums = preference(worked.Bigram(), 2, Preference(beta=beta))(params, {}, pairs, None)
    assert float(sums.loss) == pytest.approx(sum(cost.values()), abs=1e-4)
    assert float(sums.count) == 3
    for name, values in {"loss": cost, "margin": margin, "drift": {e: r[0] for e, r in ratio.items()}}.items():
        np.testing.assert_allclose(sums.parts[name][0], [values[0] + values[2], values[1]], atol=1e-4)
        np.testing.assert_array_equal(sums.parts[name][1], [2, 1])
    told = numbers(sums, ("kind a", "kind b"))
    assert told["drift_worse"] == pytest.approx(sum(r[1] for r in ratio.values()) / 3, abs=1e-4)
    assert told["drift_worse/kind b"] == pytest.approx(ratio[1][1], abs=1e-4)
    nll = {e: -answer(e, 0) / worked.segments(PAIRS, e)[0].learn_L[1:].sum() for e in places}
    np.testing.assert_allclose(sums.parts["nll"][0], [nll[0] + nll[2], nll[1]], atol=1e-4)
    added = preference(worked.Bigram(), 2, Preference(beta=beta, sft=0.7))(params, {}, pairs, None)
    assert float(added.loss) == pytest.approx(sum(cost.values()) + 0.7 * sum(nll.values()), abs=1e-4)
    np.testing.assert_array_equal(added.parts["loss"][0], sums.parts["loss"][0])
    right = {e: float(m > 0) for e, m in margin.items()}
    np.testing.assert_array_equal(sums.parts["accuracy"][0], [right[0] + right[2], right[1]])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.booleans(), st.integers(0, 3)), min_size=12, max_size=12))
def test_group_sums_are_sums_by_group(items):
    values, weights, groups = (np.array(column) for column in zip(*items, strict=True))
    weights = weights.astype(np.float32)
    sums, counts = losses.group_sums(jnp.asarray(values, jnp.float32), jnp.asarray(weights), groups.astype(np.int32), 4)
    for g in range(4):
        assert float(sums[g]) == (values * weights)[groups == g].sum()
        assert float(counts[g]) == weights[groups == g].sum()


def test_rematerialised_layers_have_the_same_loss_and_gradients(params):
    made = worked.batch([[s for e in range(3) for s in worked.segments(TEXTS, e)], [], []], TEXT)
    plain, again = (
        with_gradient(losses.next_token(MultimodalModel(worked.CONFIG, remat=remat), 2))(params, made)
        for remat in ("none", "full")
    )
    assert_same(plain, again)


def test_more_learnt_tokens_than_the_capacity_stop_the_plan():
    expected = "example 1 has 4 tokens, 0 patches and 3 learnt tokens; a row holds 8, 0 and 2"
    with pytest.raises(ValueError, match=expected):
        list(pack([(4, 0, 2), (4, 0, 3)], Packing(row_tokens=8, row_targets=2)))
