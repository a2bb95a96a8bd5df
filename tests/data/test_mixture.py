"""Draws hold each source in its share, each epoch whole, and a longer draw begins with the shorter one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.data.mixture import Mixture, draw, example_shares

sources = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 1)), min_size=1, max_size=12)


def normed(weights):
    return [w / sum(weights) for w in weights]


@settings(max_examples=80, deadline=None)
@given(sources, st.integers(0, 300), st.integers(0, 300), st.integers(0, 5))
def test_a_longer_draw_begins_with_the_shorter_one(items, count, more, seed):
    sizes, weights = zip(*items, strict=True)
    shorter, longer = (draw(sizes, normed(weights), seed, n) for n in (count, count + more))
    assert shorter.shape == (count, 2)
    np.testing.assert_array_equal(longer[:count], shorter)


def test_many_small_sources_behind_a_large_one_do_not_change_the_beginning():
    shares = [0.9, *[0.01] * 10]
    np.testing.assert_array_equal(draw([500] * 11, shares, 0, 400)[:44], draw([500] * 11, shares, 0, 44))


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(1, 400), st.integers(0, 5))
def test_each_epoch_holds_every_example_once_and_each_source_its_share(items, count, seed):
    sizes, weights = zip(*items, strict=True)
    drawn = draw(sizes, normed(weights), seed, count)
    for source, (size, share) in enumerate(zip(sizes, normed(weights), strict=True)):
        examples = drawn[drawn[:, 0] == source, 1]
        for start in range(0, len(examples), size):
            epoch = examples[start : start + size]
            assert len(set(epoch)) == len(epoch) and (epoch < size).all()
        assert abs(len(examples) - share * count) <= len(sizes) / 2 + 1
        places = np.flatnonzero(drawn[:, 0] == source)
        if len(places) > 1:  # evenly: no stretch without the source is much longer than its share says
            assert np.diff(places).max() <= 1 / share + len(sizes) + 1


def test_epochs_are_shuffled_anew_and_follow_the_seed():
    first, second = draw([50], [1.0], 0, 100)[:, 1].reshape(2, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(50)) and not np.array_equal(second, np.arange(50))
    assert not np.array_equal(draw([50], [1.0], 1, 50)[:, 1], first)
    two = draw([50, 50], [0.5, 0.5], 0, 100)
    assert not np.array_equal(two[two[:, 0] == 0, 1], two[two[:, 0] == 1, 1])


def test_shares_by_hand():
    # Twice the tokens of b, and an example of a is four times as long: one of a for every two of b.
    mixture = Mixture({"a": 2.0, "b": 1.0}, by="tokens")
    assert example_shares(mixture, {"a": 40.0, "b": 10.0}) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert example_shares(Mixture({"a": 2.0, "b": 1.0}), {"a": 40.0, "b": 10.0}) == pytest.approx(
        {"a": 2 / 3, "b": 1 / 3}
    )


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(1, 300), st.integers(1, 300), st.integers(0, 5))
def test_a_later_phase_goes_on_where_the_sources_stood(items, first, second, seed):
    sizes, weights = zip(*items, strict=True)
    shares = normed(weights)
    before = draw(sizes, shares, seed, first)
    begin = np.bincount(before[:, 0], minlength=len(sizes)).tolist()
    after = draw(sizes, shares[::-1], seed, second, begin)
    assert len(after) == second
    for source, size in enumerate(sizes):
        examples = np.concatenate([part[part[:, 0] == source, 1] for part in (before, after)])
        whole = draw([size] * (source + 1), [0.0] * source + [1.0], seed, len(examples))
        np.testing.assert_array_equal(examples, whole[:, 1])


def test_phases_by_hand():
    mixture = Mixture({"a": (1.0, 0.0, 3.0), "b": (0.0, 2.0, 1.0), "c": 1.0}, phases=(1.0, 1.0, 2.0))
    assert mixture.phase_rows(8) == [2, 2, 4] and mixture.phase_rows(5) == [1, 1, 3] and sum(mixture.phase_rows(7)) == 7
    assert mixture.phase_weights(1) == {"a": 0.0, "b": 2.0, "c": 1.0}
    assert example_shares(mixture, {"a": 1, "b": 1, "c": 1}, 2) == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.2})


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(
        ValueError, match=r"weights = \{'a': 1, 'b': -1\}: expected one source or more, each with a share above 0"
    ):
        Mixture({"a": 1, "b": -1})
    with pytest.raises(ValueError, match="expected one source or more"):
        Mixture({})
    with pytest.raises(
        ValueError, match=r"weights\['a'\] = \(1.0,\): expected one number, or 2, one for each of phases"
    ):
        Mixture({"a": (1.0,)}, phases=(0.5, 0.5))
    with pytest.raises(ValueError, match="and one at least in every phase"):
        Mixture({"a": (1.0, 0.0)}, phases=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"phases = \(0.5, 0\): expected one share of the rows or more, each above 0"):
        Mixture({"a": 1.0}, phases=(0.5, 0))
    with pytest.raises(ValueError, match="names 'documnts': did you mean 'documents'"):
        example_shares(Mixture({"documnts": 1.0}), {"documents": 5.0, "read": 3.0})
    with pytest.raises(ValueError, match="source 1 of the mixture has no examples"):
        draw([3, 0], [0.5, 0.5], 0, 4)
