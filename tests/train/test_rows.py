"""Rows of new pieces as a tree of their own: taken, put back, made from others, their optimiser state forgotten."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ain_jax.train import rows

TABLE_VD = np.arange(24, dtype=np.float32).reshape(8, 3)


def params(head=True):
    tied = {"model": {"embed_tokens": {"weight": jnp.asarray(TABLE_VD)}, "norm": {"weight": jnp.ones(3)}}}
    return tied | {"lm_head": {"weight": jnp.asarray(-TABLE_VD)}} if head else tied


@pytest.mark.parametrize("head", [True, False])
def test_rows_taken_and_put_back_change_nothing_else(head):
    whole = params(head)
    taken = rows.take(whole, 5, 2)
    assert taken["model"]["embed_tokens"]["weight"].tolist() == TABLE_VD[5:7].tolist()
    assert ("lm_head" in taken) == head and "norm" not in taken["model"]
    back = rows.put(whole, jax.tree.map(lambda x: x + 1, taken), 5)
    expected = TABLE_VD.copy()
    expected[5:7] += 1
    assert back["model"]["embed_tokens"]["weight"].tolist() == expected.tolist()
    assert back["model"]["norm"]["weight"] is whole["model"]["norm"]["weight"]
    assert whole["model"]["embed_tokens"]["weight"].tolist() == TABLE_VD.tolist()


def test_gradients_reach_the_rows_alone():
    whole = params()
    loss = lambda taken: (rows.put(whole, taken, 5)["model"]["embed_tokens"]["weight"] ** 2).sum()
    found = jax.grad(loss)(rows.take(whole, 5, 2))
    assert found["model"]["embed_tokens"]["weight"].tolist() == (2 * TABLE_VD[5:7]).tolist()
    assert not found["lm_head"]["weight"].any()


def test_means_of_rows():
    found = rows.means(params(), [[0, 2], [7], [1, 1, 4]])
    expected = [TABLE_VD[[0, 2]].mean(0), TABLE_VD[7], (2 * TABLE_VD[1] + TABLE_VD[4]) / 3]
    np.testing.assert_allclose(found["model"]["embed_tokens"]["weight"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["lm_head"]["weight"], -np.array(expected), rtol=1e-6)
    with pytest.raises(ValueError, match="piece 1 is spelt by no id"):
        rows.means(params(), [[0], []])


@pytest.mark.parametrize("wrap", [False, True], ids=["adam", "groups"])
def test_the_moments_of_rows_are_forgotten_and_no_others(wrap):
    whole = params()
    transform = optax.adam(0.1)
    if wrap:  # as `optimizer.make` groups them
        labels = jax.tree.map(lambda x: "a" if x.ndim == 2 else "b", whole)
        transform = optax.chain(
            optax.clip(1.0), optax.multi_transform({"a": optax.adam(0.1), "b": optax.sgd(1.0)}, labels)
        )
    state = transform.init(whole)
    _, state = transform.update(jax.tree.map(jnp.ones_like, whole), state, whole)
    found = rows.forget(state, 5, 2)
    before, after = jax.tree.leaves(state), jax.tree.leaves(found)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if not np.array_equal(a, b)]
    assert len(changed) == 4  # two moments of two tables
    for a, b in changed:
        assert not b[5:7].any() and a[5:7].all()
        np.testing.assert_array_equal(np.delete(a, [5, 6], 0), np.delete(b, [5, 6], 0))


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (7, 2), (3, 0)])
def test_rows_that_are_not_there_are_refused(first, count):
    with pytest.raises(ValueError, match="has 8"):
        rows.take(params(), first, count)


def test_rows_of_another_model_are_refused():
    with pytest.raises(ValueError, match="no such table"):
        rows.put(params(head=False), rows.take(params(), 5, 2), 5)
    with pytest.raises(ValueError, match="ends at 8"):
        rows.put(params(), rows.take(params(), 5, 2), 7)
