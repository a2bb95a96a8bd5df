"""Draws hold each source in its share, each epoch whole, and a longer draw begins with the shorter one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax.data import draw as drawing
from ain_jax.data.draw import draw, scattered
from ain_jax.data.mixture import Counts, Mixture, example_shares, strata

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


# Two sources; English and Arabic stand in both, Urdu in one.
COUNTS = {
    "a": Counts({"en": 60, "ar": 30, "ur": 10}, {"en": 600, "ar": 600, "ur": 300}),
    "b": Counts({"en": 50, "ar": 50}, {"en": 500, "ar": 1000}),
}


def language_shares(parts, amounts=lambda part: 1.0, phase=0):
    """Each language's share, in what `amounts` says an example counts for."""
    totals = {}
    for part in parts:
        totals[part.language] = totals.get(part.language, 0) + part.shares[phase] * amounts(part)
    return {language: total / sum(totals.values()) for language, total in totals.items()}


def test_english_has_its_share_of_the_whole_and_the_others_go_by_temperature():
    # By the weights alone: English 0.55, Arabic 0.40, Urdu 0.05; the roots of the last two are as 8 to 1.
    parts = strata(Mixture({"a": 1.0, "b": 1.0}, shares={"en": 0.4}, temperature=2.0), COUNTS)
    roots = np.sqrt([0.4, 0.05])
    expected = {"en": 0.4, "ar": 0.6 * roots[0] / roots.sum(), "ur": 0.6 * roots[1] / roots.sum()}
    assert language_shares(parts) == pytest.approx(expected)
    by_name = {(p.source, p.language): p.shares[0] for p in parts}
    assert by_name["a", "ar"] / by_name["b", "ar"] == pytest.approx(0.3 / 0.5)  # as without temperature
    assert sum(by_name.values()) == pytest.approx(1) and ("b", "ur") not in by_name


def test_temperature_inside_each_source_leaves_the_sources_their_weights():
    parts = strata(Mixture({"a": 3.0, "b": 1.0}, temperature=1e9, over="source"), COUNTS)
    assert [(p.source, p.language, pytest.approx(p.shares[0])) for p in parts] == [
        ("a", "ar", 0.25), ("a", "en", 0.25), ("a", "ur", 0.25), ("b", "ar", 0.125), ("b", "en", 0.125),
    ]  # fmt: skip
    fixed = strata(Mixture({"a": 1.0, "b": 1.0}, shares={"en": 0.2}, over="source"), COUNTS)
    assert language_shares(fixed) == pytest.approx({"en": 0.2, "ar": 0.5 * (0.6 + 0.8), "ur": 0.5 * 0.2})


def test_a_share_of_tokens_stays_one_when_languages_are_fixed():
    parts = strata(Mixture({"a": 1.0, "b": 2.0}, by="tokens", shares={"en": 0.4}), COUNTS)
    each = lambda p: COUNTS[p.source].tokens[p.language] / COUNTS[p.source].examples[p.language]
    assert language_shares(parts, each)["en"] == pytest.approx(0.4)


def test_epochs_by_hand():
    parts = strata(Mixture({"a": 2.0, "b": 0.5}, by="epochs"), COUNTS)
    assert [(p.source, p.language, p.size, p.draws, p.shares) for p in parts] == [
        ("a", "", 100, 200.0, (0.8,)), ("b", "", 100, 50.0, (0.2,)),
    ]  # fmt: skip
    parts = strata(Mixture({"a": 2.0, "b": 0.5}, by="epochs", shares={"en": 0.5}), COUNTS)
    assert sum(p.draws for p in parts) == pytest.approx(250)
    assert sum(p.draws for p in parts if p.language == "en") == pytest.approx(125)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 5), min_size=1),
    st.lists(st.integers(0, 50), min_size=9, max_size=9), st.floats(0.3, 20),
    st.sampled_from(["examples", "tokens", "epochs"]), st.sampled_from(["stage", "source"]),
)  # fmt: skip
def test_shares_are_shares_whatever_the_setting(weights, numbers, temperature, by, over):
    languages = ("en", "ar", "ur")
    counts = {
        name: Counts(
            {k: numbers[3 * i + j] + (j == 0) for j, k in enumerate(languages)},
            {k: (numbers[3 * i + j] + (j == 0)) * (j + 2) for j, k in enumerate(languages)},
        )
        for i, name in enumerate(weights)
    }
    plain, warm = (strata(Mixture(weights, by, temperature=t, over=over), counts) for t in (1.0, temperature))
    for parts in (plain, warm):
        assert sum(p.shares[0] for p in parts) == pytest.approx(1)
        assert all(p.shares[0] >= 0 and p.size > 0 for p in parts)
    if by == "examples" and over == "source":
        for name in weights:
            totals = [sum(p.shares[0] for p in parts if p.source == name) for parts in (plain, warm)]
            assert totals[0] == pytest.approx(totals[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 3000), st.integers(0, 5))
def test_a_large_source_is_shuffled_without_being_held(size, seed):
    keys = np.random.default_rng(seed).integers(2**63, size=6, dtype=np.uint64)
    places = scattered(np.arange(size), size, keys)
    assert sorted(places.tolist()) == list(range(size))
    np.testing.assert_array_equal(scattered(np.arange(size)[::7], size, keys), places[::7])


def test_a_source_above_the_limit_is_gone_through_once_an_epoch(monkeypatch):
    monkeypatch.setattr(drawing, "KEPT", 100)
    drawn = draw([5000], [1.0], 0, 15_000)[:, 1].reshape(3, 5000)
    assert all(sorted(epoch) == list(range(5000)) for epoch in drawn.tolist())
    assert not np.array_equal(drawn[0], drawn[1])
    assert abs(np.corrcoef(np.arange(5000), drawn[0])[0, 1]) < 0.05


def test_languages_that_cannot_be_mixed_are_refused():
    for change, told in (
        ({"shares": {"en": 1.5}}, r"shares = \{'en': 1.5\}: expected shares of languages, each above 0 and below 1"),
        ({"shares": {"en": 0.7, "ar": 0.7}}, "together 1 at most"),
        ({"temperature": 0.0}, "temperature = 0.0: expected above 0"),
        ({"by": "epochs", "phases": (0.5, 0.5)}, 'by = "epochs" makes one stretch'),
    ):
        with pytest.raises(ValueError, match=told):
            Mixture({"a": 1.0}, **change)
    for shares, told in (
        ({"eng": 0.4}, "Mixture.shares names 'eng': did you mean 'en'"),
        ({"en": 0.5, "ar": 0.5}, "leave nothing for ur"),
    ):
        with pytest.raises(ValueError, match=told):
            strata(Mixture({"a": 1.0, "b": 1.0}, shares=shares), COUNTS)
    with pytest.raises(ValueError, match="no other language takes the rest: let them sum to 1"):
        strata(Mixture({"b": 1.0}, shares={"en": 0.3, "ar": 0.3}), {"b": COUNTS["b"]})
    with pytest.raises(ValueError, match="source 'c' has no examples"):
        strata(Mixture({"c": 1.0}), {"c": Counts({}, {})})
