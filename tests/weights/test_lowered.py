"""Lowered head rows: the loss on known text rises by what was asked for, and the new language keeps its pieces."""

import extended
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.special import logsumexp

from ain_jax.weights import embeddings, rows_report
from ain_jax.weights.embeddings import Corpus, Embeddings, extend_params
from ain_jax.weights.lowered import Lowered, direction, lowest
from ain_jax.weights.states import text_states


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return extended.vocabulary(tmp_path_factory.mktemp("vocabulary"))


def test_the_direction_along_which_all_states_are_alike():
    random = np.random.default_rng(0)
    hidden = np.array([1, -1, 2]) + 0.1 * random.normal(size=(300, 3))
    u = direction(hidden.astype(np.float32), 1e-6)
    np.testing.assert_allclose(hidden @ u, 1, atol=0.25)
    # The same by a solver that knows nothing of normal equations.
    np.testing.assert_allclose(u, np.linalg.lstsq(hidden, np.ones(300), rcond=None)[0], atol=1e-4)
    by_hand = direction(np.array([[2, 1], [2, -1]], np.float32), 0.1)  # mean square 2.5, so 2 / (4 + 0.25)
    np.testing.assert_allclose(by_hand, [2 / 4.25, 0], atol=1e-6)


def risen(hidden, targets, head, first, rows):
    old, whole = hidden @ head[:first].T, hidden @ np.concatenate([head[:first], rows]).T
    at = np.arange(len(hidden))
    losses = [logsumexp(z, axis=1).sum() - z[at, targets].sum() for z in (old, whole)]
    return losses[1] / losses[0] - 1


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_fewest_nats_that_do(cap):
    random = np.random.default_rng(0)
    hidden = (random.normal(size=(700, 6)) + 2).astype(np.float32)  # more than one block
    head = random.normal(size=(30, 6)).astype(np.float32)
    targets, first = random.integers(0, 20, 700), 20
    u = direction(hidden, 1e-6)
    nats = lowest(hidden, targets, head, first, 10, u, 0.01, cap)
    assert nats > 0.5
    if cap is None:
        assert 0.009 < risen(hidden, targets, head, first, head[first:] - nats * u) <= 0.01
        assert risen(hidden, targets, head, first, head[first:] - (nats - 0.02) * u) > 0.01
    assert lowest(hidden, targets, head, first, 10, u, 10.0, cap) == 0.0
    if cap is None:
        with pytest.raises(ValueError, match="share no direction"):
            lowest(hidden, targets, head, first, 10, -u, 0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_loses_no_more_than_was_asked_for(vocabulary, tied):
    # A head ten times as long, so that a random model prefers some tokens to others.
    params, config = extended.model(vocabulary.first, tied)
    name = ("model", "embed_tokens", "weight") if tied else ("lm_head", "weight")
    flat = flatten_dict(params)
    flat[name] = 10 * flat[name]
    params = unflatten_dict(flat)
    corpus = Corpus(vocabulary.old, vocabulary.new, extended.ARABIC, extended.ENGLISH)
    replaced = embeddings.replaced(vocabulary.extension)
    texts = rows_report.cut_alike(vocabulary.old, vocabulary.new, {"en": extended.ENGLISH}, 0)
    before = rows_report.losses(params, config, texts, extended=False)["en"]

    def after(settings):
        grown, larger = extend_params(params, config, vocabulary.first, replaced, settings, corpus)
        # Padding rows are no new pieces: they are put out of the way.
        head = np.asarray(flatten_dict(grown)[name]).copy()
        hidden = extended_hidden(grown, larger, texts)
        old = logsumexp(hidden @ head[: vocabulary.first].T, axis=1)
        return flatten_dict(grown), (
            np.logaddexp(old, logsumexp(hidden @ new(head).T, axis=1)) - old
        ).sum() / before.nats

    def new(head):
        return head[vocabulary.first : vocabulary.first + vocabulary.count]

    plain, free = after(Embeddings())
    grown, bound = after(Embeddings(lowered=Lowered(free / 3)))
    assert free / 4 < bound <= free / 3 + 1e-6
    for path, leaf in plain.items():
        if path == name:
            leaf, other = new(np.asarray(leaf)), new(np.asarray(grown[path]))
            shift = leaf - other
            np.testing.assert_allclose(
                shift, np.broadcast_to(shift[0], shift.shape), atol=1e-5
            )  # the same for each piece
            assert np.abs(shift).max() > 0
        else:
            assert np.array_equal(leaf, grown[path])
    assert after(Embeddings(lowered=Lowered(2 * free)))[1] == free  # there is nothing to do


def extended_hidden(params, config, texts):
    parts = texts["en"]
    return text_states(config, params, parts.new_tokens_NM, parts.new_lengths_N)[0].astype(np.float64)


def test_settings_and_texts_that_do_not_do(vocabulary):
    with pytest.raises(ValueError, match="rise = 0: expected a share above 0"):
        Lowered(0)
    params, config = extended.model(vocabulary.first)
    corpus = Corpus(vocabulary.old, vocabulary.new, extended.ARABIC)
    with pytest.raises(ValueError, match="but no text in the languages known before"):
        replaced = embeddings.replaced(vocabulary.extension)
        extend_params(params, config, vocabulary.first, replaced, Embeddings(lowered=Lowered(0.01)), corpus)
