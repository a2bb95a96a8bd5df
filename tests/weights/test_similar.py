"""Similar pieces: sparsemax and neighbour counts by brute force, and a made-up text whose answer is known."""

import extended
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ain_jax.weights import similar
from ain_jax.weights.embeddings import Embeddings, new_rows
from ain_jax.weights.similar import Similarity, sparsemax


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return extended.vocabulary(tmp_path_factory.mktemp("vocabulary"))


def test_sparsemax_by_hand():
    np.testing.assert_allclose(sparsemax(np.array([[0.9, 0.7, -1.0], [3.0, 0.0, 0.0]])), [[0.6, 0.4, 0], [1, 0, 0]])


@given(arrays.arrays(np.float64, (1, 4), elements=st.floats(-3, 3)))
def test_sparsemax_is_the_nearest_point_of_the_simplex(scores):
    simplex = {"type": "eq", "fun": lambda p: p.sum() - 1}
    nearest = scipy.optimize.minimize(
        lambda p: ((p - scores[0]) ** 2).sum(), np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints=simplex, tol=1e-14
    )
    np.testing.assert_allclose(sparsemax(scores)[0], nearest.x, atol=1e-4)


def test_neighbours_equal_a_plain_loop():
    random = np.random.default_rng(0)
    ids, text = random.integers(0, 6, 40), np.repeat([0, 1, 2], [15, 5, 20])
    expected = np.zeros((6, 6))
    for i in range(40):
        for j in range(40):
            if i != j and abs(i - j) <= 3 and text[i] == text[j]:
                expected[ids[i], ids[j]] += 1 / abs(i - j)
    found = similar._neighbours(ids, text, 6, 3)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6)
    p = expected / expected.sum()
    with np.errstate(divide="ignore"):
        information = np.log(p / np.outer(p.sum(axis=1), p.sum(axis=0)))
    np.testing.assert_allclose(similar._ppmi(found).toarray(), np.maximum(information, 0), atol=1e-5)


def test_ngrams_by_hand():
    grams = similar._ngrams(["cat", "at", ""], np.array([1, 2, 0]), 2, 3)
    # <c ca at t> <ca cat at>   and   <a at t> <at at>
    assert grams.sum(axis=1).tolist() == [7, 5, 0]
    assert grams.shape[1] == 9 and (grams.toarray()[0] * grams.toarray()[1]).sum() == 3


def test_a_new_piece_gets_the_row_of_the_old_one_in_its_contexts():
    # Ids 0-5 are old, 6 is new; it stands where 2 stands, between 0 and 1, and never near 3, 4, 5.
    random = np.random.default_rng(0)
    texts = [[0, int(middle), 1] for middle in random.choice([2, 6], 200)] + [[3, 4, 5], [5, 3, 4]] * 50
    ids, text = np.concatenate(texts), np.repeat(np.arange(300), 3)
    settings = Similarity(width=4, window=2, ngram_share=0.0)
    vectors = similar.vectors(ids, text, [""] * 7, np.bincount(ids), settings)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = vectors[6] @ vectors[:6].T
    assert cosines.argmax() == 2 and cosines[2] > 0.99 and (cosines[3:] < 0.3).all()
    shares = similar._nearest(cosines[None], 3).toarray()[0]
    assert shares.argmax() == 2 and shares.sum() == pytest.approx(1) and not shares[3:].any()


def test_letters_in_common_bring_pieces_nearer():
    ids = np.array([0, 3, 1, 0, 3, 2] * 30)  # 1 and 2 stand in the same places; 2 is spelt like 3
    pieces = ["x", "cat", "hats", "hat"]
    between = lambda share: similar.vectors(
        ids, np.zeros(180, int), pieces, np.bincount(ids), Similarity(width=3, ngram_share=share)
    )
    apart, joined = (v[2] @ v[3] - v[1] @ v[3] for v in (between(0.0), between(0.7)))
    assert joined > apart


def test_weights_of_a_real_vocabulary(vocabulary):
    settings = Similarity(width=8)
    texts = [*extended.ARABIC, *extended.ENGLISH] * 3
    shares = similar.weights(vocabulary.new, texts, vocabulary.first, vocabulary.count, settings)
    assert shares.shape == (vocabulary.count, vocabulary.first)
    sums = np.asarray(shares.sum(axis=1))
    used = np.zeros(vocabulary.count, bool)
    for text in texts:
        ids = np.array(vocabulary.new.encode(text, add_special_tokens=False).ids)
        used[ids[ids >= vocabulary.first] - vocabulary.first] = True
    assert used.any() and not used.all()  # the special token, and letters that longer pieces took over
    np.testing.assert_allclose(sums[sums > 0], 1, rtol=1e-5)
    assert not sums[~used].any() and sums[used].all()
    again = similar.weights(vocabulary.new, texts, vocabulary.first, vocabulary.count, settings)
    assert np.array_equal(shares.toarray(), again.toarray())


def test_rows_are_the_weighted_mean_and_without_weights_that_of_the_spelling():
    old = np.array([[0, 2], [4, 0], [2, 4]], np.float32)
    weights = scipy.sparse.csr_array(np.array([[0.25, 0.75, 0], [0, 0, 0]], np.float32))
    rows = new_rows(old, [[2], [0, 1]], Embeddings("similar"), weights)
    np.testing.assert_allclose(rows, [[3, 0.5], [2, 1]])
    with pytest.raises(ValueError, match="needs its weights"):
        new_rows(old, [[2]], Embeddings("similar"))


def test_texts_without_new_pieces_are_refused(vocabulary):
    with pytest.raises(ValueError, match="and 0 new pieces; expected text in the new pieces' language"):
        similar.weights(vocabulary.new, extended.ENGLISH, vocabulary.first, vocabulary.count, Similarity())
    with pytest.raises(ValueError, match="1 <= shortest <= longest"):
        Similarity(shortest=4, longest=3)
