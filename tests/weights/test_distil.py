"""Distilled rows: a case whose answer is known, the loss beside a plain loop, and everything else left alone."""

import dataclasses

import extended
import jax
import numpy as np
import pytest
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import models, pre_tokenizers

from ain_jax.models.multimodal import MultimodalModel
from ain_jax.tokenizer.align import align
from ain_jax.weights import distil as module
from ain_jax.weights.distil import Distil, distil, lowest_layers
from ain_jax.weights.embeddings import Embeddings, extend_params, replaced
from ain_jax.weights.states import text_nats, text_states

WORDS = ["a", "b", "c", "d", "e", "f"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return extended.vocabulary(tmp_path_factory.mktemp("vocabulary"))


def of_words(ids):
    made = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    return made


@pytest.mark.parametrize("layer", [0, 2])
def test_a_piece_of_another_name_becomes_the_row_of_the_piece(layer):
    """The new vocabulary calls the word "c" 7 instead of 3: nothing is lost once row 7 is row 3."""
    old = of_words({word: i for i, word in enumerate(WORDS, 1)})
    new = of_words({word: 7 if word == "c" else i for i, word in enumerate(WORDS, 1)})
    params, config = extended.model(9)
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 6)) for _ in range(32)]
    seen: list[float] = []
    settings = Distil(steps=300, rows=8, tokens=16, rate=0.1, layer=layer)
    made = distil(params, config, 7, 1, old, new, texts, 0, settings, lambda step, loss: seen.append(loss))
    table, before = (np.asarray(p["model"]["embed_tokens"]["weight"]) for p in (made, params))
    assert len(seen) == 300 and np.mean(seen[-10:]) < 0.005 * np.mean(seen[:5])
    # The norms of the model leave little of a row's length, so its direction alone is learnt.
    cosine = lambda row: row @ before[3] / np.linalg.norm(row) / np.linalg.norm(before[3])
    assert cosine(before[7]) < 0.5 and cosine(table[7]) > 0.95
    assert np.array_equal(np.delete(table, 7, axis=0), np.delete(before, 7, axis=0))


def test_the_loss_equals_a_plain_loop(vocabulary):
    params, config = extended.model(vocabulary.first)
    grown, larger = extend_params(params, config, vocabulary.first, replaced(vocabulary.extension), Embeddings())
    pieces = (vocabulary.old, vocabulary.new)
    seen = []
    settings = Distil(steps=1, rows=len(extended.ARABIC), tokens=128)
    everything = (*pieces, extended.ARABIC, 0, settings, lambda step, loss: seen.append(loss))
    distil(grown, larger, vocabulary.first, vocabulary.count, *everything)
    pairs = align(*pieces, extended.ARABIC, 0, 128)
    assert len(pairs) == len(extended.ARABIC)

    model, at = MultimodalModel(larger), np.broadcast_to(np.arange(128), (3, 1, 128))
    run = jax.jit(lambda tokens: model.apply({"params": grown}, tokens[None], np.ones((1, 128), np.int32), at))

    def states(tokens):  # what follows a token does not change its state
        return np.asarray(run(np.pad(tokens, (0, 128 - len(tokens)))))[0]

    apart, size = 0.0, 0.0
    for i in range(len(pairs)):
        row = pairs[i]
        teacher, student = (
            states(row.old_tokens_NL[: row.old_lengths_N]),
            states(row.new_tokens_NM[: row.new_lengths_N]),
        )
        for a, b in zip(row.old_ends_NC[: row.words_N], row.new_ends_NC[: row.words_N], strict=True):
            apart += float(((teacher[a] - student[b]) ** 2).sum())
            size += float((teacher[a] ** 2).sum())
    np.testing.assert_allclose(seen[0], apart / size, rtol=1e-4)


@pytest.mark.parametrize("next_token", [0.0, 0.5])
def test_only_new_rows_change_and_the_head_only_where_it_is_asked_to(vocabulary, next_token):
    params, config = extended.model(vocabulary.first + 3, tied=False)
    grown, larger = extend_params(params, config, vocabulary.first, replaced(vocabulary.extension), Embeddings())
    everything = (vocabulary.old, vocabulary.new, extended.ARABIC, 0)
    settings = Distil(steps=8, rows=2, tokens=64, next_token=next_token)
    losses: list[float] = []
    made = distil(
        grown, larger, vocabulary.first, vocabulary.count, *everything, settings, lambda _, loss: losses.append(loss)
    )
    before, after = flatten_dict(grown, sep="/"), flatten_dict(made, sep="/")
    first, last = vocabulary.first, vocabulary.first + vocabulary.count
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert changed == {"model/embed_tokens/weight"} | ({"lm_head/weight"} if next_token else set())
    for path in changed:
        same = np.r_[0:first, last : len(before[path])]
        assert np.array_equal(np.asarray(before[path])[same], np.asarray(after[path])[same])
    assert losses[-1] < losses[0]
    if next_token:
        pairs = align(vocabulary.old, vocabulary.new, extended.ARABIC, 0, 64)
        loss = [text_nats(larger, p, pairs.new_tokens_NM, pairs.new_lengths_N) for p in (grown, made)]
        assert loss[1][0] < loss[0][0] and loss[0][1] == loss[1][1]
        chosen = module._order(pairs.new_tokens_NM, pairs.new_tokens_NM >= first, 0)[:2]
        nats, tokens = text_nats(larger, grown, pairs.new_tokens_NM[chosen], pairs.new_lengths_N[chosen])
        alone: list[float] = []
        plain = dataclasses.replace(settings, next_token=0.0, steps=1)
        distil(grown, larger, first, vocabulary.count, *everything, plain, lambda _, loss: alone.append(loss))
        np.testing.assert_allclose(losses[0], alone[0] + 0.5 * nats / tokens, rtol=1e-5)


def test_the_lowest_layers_are_the_model_without_the_others():
    """Layers whose projections are zero add nothing, so a model of five with two such is the model of three."""
    params, config = extended.model(40, layers=5, windows=(4, 4, 0))
    flat = flatten_dict(params)
    for path, leaf in flat.items():
        if path[-2] in ("o_proj", "down_proj"):
            stack = np.asarray(leaf).copy()
            stack[{"layers": 3, "last_layers": 0}[path[1]] :] = 0
            flat[path] = stack
    tokens, lengths = np.arange(24, dtype=np.int32).reshape(2, 12), np.array([12, 9])
    whole = text_states(config, unflatten_dict(flat), tokens, lengths)[0]
    cut, shorter = lowest_layers(params, config, 3)
    assert shorter.text.layers == 3 and jax.tree.leaves(cut["model"]["layers"])[0].shape[0] == 3
    np.testing.assert_allclose(text_states(shorter, cut, tokens, lengths)[0], whole, atol=1e-5)
    one, shortest = lowest_layers(params, config, 4)  # across the two stacks
    assert [(name, layers) for name, _, layers in shortest.text.stacks()] == [("layers", 3), ("last_layers", 1)]
    assert text_states(shortest, one, tokens, lengths)[0].shape == whole.shape


@pytest.mark.parametrize("seed", range(5))
def test_texts_with_unseen_pieces_come_first(seed):
    tokens = np.array([[9, 3, 0]] * 20 + [[7, 0, 0], [3, 8, 0]])
    order = module._order(tokens, tokens >= 7, seed)
    assert sorted(order.tolist()) == list(range(22))
    assert {7, 8, 9} <= set(tokens[order[:3]].ravel().tolist())


def test_what_cannot_be_distilled_is_refused(vocabulary):
    params, config = extended.model(vocabulary.first)
    grown, larger = extend_params(params, config, vocabulary.first, replaced(vocabulary.extension), Embeddings())
    start = (grown, larger, vocabulary.first, vocabulary.count, vocabulary.old, vocabulary.new)
    with pytest.raises(ValueError, match="3 texts hold none of the 25 new pieces"):
        distil(*start, extended.ENGLISH, 0, Distil())
    with pytest.raises(ValueError, match="layer = 9, and the model has 3"):
        distil(*start, extended.ARABIC, 0, Distil(layer=9))
    with pytest.raises(ValueError, match=r"next_token = 1.0 needs the head, and layer = 2 ends before it"):
        distil(*start, extended.ARABIC, 0, Distil(layer=2, next_token=1.0))
    with pytest.raises(ValueError, match="steps = 0"):
        Distil(steps=0)
