"""Rows of new pieces: each method beside a sum by hand; old rows and old logits stay bit for bit."""

import dataclasses

import extended
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given
from hypothesis import strategies as st

from ain_jax.models.multimodal import MultimodalModel
from ain_jax.train.rows import TABLES
from ain_jax.weights import embeddings
from ain_jax.weights.distil import Distil
from ain_jax.weights.embeddings import Corpus, Embeddings, extend_params, extend_rows, new_rows, padded_rows
from ain_jax.weights.lowered import Lowered
from ain_jax.weights.states import text_states

OLD = np.array([[0, 2], [4, 0], [2, 4]], np.float32)
MEAN = Embeddings()
SMALL = Distil(steps=2, rows=2, tokens=32)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return extended.vocabulary(tmp_path_factory.mktemp("vocabulary"))


def corpus(vocabulary):
    return Corpus(vocabulary.old, vocabulary.new, extended.ARABIC, extended.ENGLISH)


def test_the_mean_is_that_of_the_pieces_that_spelt_it():
    rows = new_rows(OLD, [[0, 1], [2], [1, 1, 2]], MEAN)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, [[2, 1], [2, 4], [10 / 3, 4 / 3]], rtol=1e-6)


@given(st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=8))
def test_means_equal_a_plain_loop(replaced):
    table_VD = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
    rows = new_rows(table_VD, replaced, MEAN)
    for row, ids in zip(rows, replaced, strict=True):
        if ids:
            np.testing.assert_allclose(row, sum(table_VD[i] for i in ids) / len(ids), atol=1e-6)


@pytest.mark.parametrize("method", ["mean", "covariance"])
def test_special_rows_lie_near_the_mean_and_differ(method):
    settings = Embeddings(method)
    rows = new_rows(OLD, [[], []], settings)
    assert np.abs(rows - 2).max() < 1 and not np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows, new_rows(OLD, [[], []], settings))


def test_covariance_draws_have_the_moments_of_the_old_rows():
    random = np.random.default_rng(0)
    table_VD = (random.normal(size=(400, 4)) @ random.normal(size=(4, 4)) + random.normal(size=4)).astype(np.float32)
    settings = Embeddings("covariance", spread=0.25)
    rows = new_rows(table_VD, [[0]] * 40_000, settings)
    np.testing.assert_allclose(rows.mean(axis=0), table_VD.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(np.cov(rows.T), 0.25 * np.cov(table_VD.T), atol=0.05 * np.cov(table_VD.T).max())
    assert np.array_equal(rows, new_rows(table_VD, [[0]] * 40_000, settings))
    other = new_rows(table_VD, [[0]] * 40_000, dataclasses.replace(settings, seed=1))
    assert not np.array_equal(rows, other)


def test_spare_rows_are_taken_first_and_the_rest_is_kept():
    table_VD = np.array([[0], [4], [9], [8]], np.float32)
    assert extend_rows(table_VD, np.array([[1]], np.float32), 2, 4).tolist() == [[0], [4], [1], [8]]
    assert extend_rows(table_VD, np.array([[1]], np.float32), 2, 6).tolist() == [[0], [4], [1], [8], [2], [2]]
    assert (padded_rows(8, 8, 4), padded_rows(8, 9, 4), padded_rows(7, 5, 4)) == (8, 12, 7)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="new piece 1 replaces id 3; expected ids of the old vocabulary, 0 to 2"):
        new_rows(OLD, [[0], [3]], MEAN)
    with pytest.raises(ValueError, match="padded=4 rows cannot hold 3 old ones and the new ones up to 5"):
        extend_rows(OLD, OLD[:2], 3, 4)
    with pytest.raises(ValueError, match="first new row 4: expected 1 to 3"):
        extend_rows(OLD, OLD[:2], 4, 8)
    with pytest.raises(ValueError, match="method = 'middle': expected one of mean, covariance"):
        Embeddings("middle")  # pyright: ignore
    params, config = extended.model(64)
    with pytest.raises(ValueError, match="method = 'similar', lowered.rise = 0.01: expected a corpus"):
        extend_params(params, config, 60, [[1]], Embeddings("similar", lowered=Lowered(0.01)))
    with pytest.raises(ValueError, match="no new piece"):
        extend_params(params, config, 60, [], MEAN)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["mean", "covariance", "similar", "distil", "lowered"])
def test_old_rows_and_old_logits_stay_bit_for_bit(vocabulary, method, tied):
    first, count = vocabulary.first, vocabulary.count
    params, config = extended.model(first + 5, tied)  # five spare rows, so that both kinds of new row occur
    settings = Embeddings(method, distil=SMALL) if method != "lowered" else Embeddings(lowered=Lowered(1e-6))
    grown, larger = extend_params(
        params, config, first, embeddings.replaced(vocabulary.extension), settings, corpus(vocabulary)
    )
    V = larger.text.vocabulary
    assert first + count <= V == -(-(first + count) // 64) * 64
    before, after = flatten_dict(params), flatten_dict(grown)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        kept = (
            np.asarray(after[path])[:first] if "embed_tokens" in path or "lm_head" in path else np.asarray(after[path])
        )
        assert kept.tobytes() == np.asarray(leaf)[: len(kept)].tobytes(), path
    assert np.isfinite(np.asarray(after["model", "embed_tokens", "weight"])).all()

    # A product of another shape is summed in another order. So the old tables get as many rows, of zeros.
    wide = lambda path, leaf: np.pad(leaf, ((0, V - len(leaf)), (0, 0))) if path in TABLES else leaf
    padded = unflatten_dict({path: wide(path, np.asarray(leaf)) for path, leaf in before.items()})
    tokens_NL = np.array([[3, 77, 200, 9, 31, 4, 150, first - 1]], np.int32)
    score = jax.jit(lambda p, hidden: MultimodalModel(larger).apply({"params": p}, hidden, method="logits"))
    (hidden, _), (same, _) = (text_states(larger, p, tokens_NL, np.array([8])) for p in (padded, grown))
    assert hidden.tobytes() == same.tobytes()
    assert np.asarray(score(padded, hidden))[:, :first].tobytes() == np.asarray(score(grown, same))[:, :first].tobytes()


@pytest.mark.parametrize("tied", [True, False])
def test_head_rows_are_shrunk_towards_the_mean_of_the_old_ones(vocabulary, tied):
    params, config = extended.model(vocabulary.first, tied)
    replaced, first = embeddings.replaced(vocabulary.extension), vocabulary.first
    whole, shrunk = (
        flatten_dict(embeddings.make_rows(params, config, first, replaced, Embeddings(shrink=share)), sep="/")
        for share in (1.0, 0.25)
    )
    for path, rows in whole.items():
        mean_D = np.asarray(flatten_dict(params, sep="/")[path]).mean(axis=0)
        is_head = tied or path == "lm_head/weight"
        expected = 0.25 * rows + 0.75 * mean_D if is_head else rows
        np.testing.assert_allclose(shrunk[path][1:], expected[1:], atol=1e-6)  # the first is the special token's


def test_head_and_input_are_made_each_from_its_own_rows(vocabulary):
    params, config = extended.model(vocabulary.first, tied=False)
    replaced = embeddings.replaced(vocabulary.extension)
    grown, _ = extend_params(params, config, vocabulary.first, replaced, MEAN)
    for table, new in (
        (params["model"]["embed_tokens"], grown["model"]["embed_tokens"]),
        (params["lm_head"], grown["lm_head"]),
    ):
        for i, ids in list(enumerate(replaced))[1:]:  # the first is the special token
            expected = np.asarray(table["weight"])[list(ids)].mean(axis=0)
            np.testing.assert_allclose(new["weight"][vocabulary.first + i], expected, atol=1e-6)
    special = [
        grown[a][b]["weight"] if b else grown[a]["weight"] for a, b in (("model", "embed_tokens"), ("lm_head", ""))
    ]
    noise = [
        (t[vocabulary.first] - t[: vocabulary.first].mean(axis=0)) / t[: vocabulary.first].std(axis=0) for t in special
    ]
    assert np.abs(noise[0] - noise[1]).max() > 0.05  # not the same draw twice


def test_rows_are_written_read_and_put_into_another_copy(vocabulary, tmp_path):
    params, config = extended.model(vocabulary.first, tied=False)
    replaced = embeddings.replaced(vocabulary.extension)
    rows = embeddings.make_rows(params, config, vocabulary.first, replaced, MEAN)
    embeddings.save_rows(tmp_path / "a" / "rows.npz", rows)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["rows.npz"]
    again = embeddings.load_rows(tmp_path / "a" / "rows.npz")
    grown, larger = extend_params(params, config, vocabulary.first, replaced, MEAN)
    placed = embeddings.grow_tables(params, again, vocabulary.first, larger.text.vocabulary)
    for path, leaf in flatten_dict(grown).items():
        assert np.asarray(leaf).tobytes() == np.asarray(flatten_dict(placed)[path]).tobytes()
    tied, _ = extended.model(vocabulary.first, tied=True)
    with pytest.raises(ValueError, match="expected rows for model/embed_tokens/weight: they were made for another"):
        embeddings.grow_tables(tied, again, vocabulary.first, larger.text.vocabulary)
