"""The report on new rows: its numbers beside sums by hand, its table and its JSON."""

import json
import math

import extended
import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from ain_jax.models.multimodal import MultimodalModel
from ain_jax.weights import rows_report
from ain_jax.weights.embeddings import Embeddings, extend_params, replaced
from ain_jax.weights.rows_report import compare_rows, cut_alike, losses, report
from ain_jax.weights.states import text_states


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return extended.vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def texts(vocabulary):
    return cut_alike(vocabulary.old, vocabulary.new, {"ar": extended.ARABIC * 5, "en": extended.ENGLISH}, 0, 128, 12)


def test_norms_and_nearest_cosines_by_hand():
    found = compare_rows(np.array([[3, 4], [0, 2]], np.float32), np.array([[0, 5], [1, -1], [6, 8]], np.float32))
    assert (found.old_norms.mean, found.old_norms.least, found.old_norms.most) == (3.5, 2, 5)
    assert found.new_norms.quantiles[2] == 5
    # The largest of cos with (3, 4) and with (0, 2): 1 by the second, -0.2 / sqrt 2, 1 by the first.
    expected = [1.0, -0.2 / math.sqrt(2), 1.0]
    np.testing.assert_allclose(found.nearest_cosines.mean, np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(found.nearest_cosines.least, min(expected), rtol=1e-6)


def test_losses_equal_a_plain_loop(vocabulary, texts):
    params, config = extended.model(vocabulary.first)
    found = losses(params, config, texts, extended=False)["ar"]
    model, nats, tokens, size = MultimodalModel(config), 0.0, 0, 0
    at = np.broadcast_to(np.arange(128), (3, 1, 128))

    @jax.jit
    def run(ids):  # what follows a token does not change its logits
        hidden = model.apply({"params": params}, ids[None], np.ones((1, 128), np.int32), at)
        return model.apply({"params": params}, hidden, method="logits")[0]

    assert len(texts["ar"]) == 12  # of 20: two batches, the second not full
    for i in range(12):
        ids = texts["ar"].old_tokens_NL[i][: texts["ar"].old_lengths_N[i]]
        logits = np.asarray(run(np.pad(ids, (0, 128 - len(ids)))))[: len(ids)]
        nats -= log_softmax(logits[:-1], axis=-1)[np.arange(len(ids) - 1), ids[1:]].sum()
        tokens += len(ids) - 1
        size += len(vocabulary.old.decode(ids[1:].tolist()).encode())
    assert (found.tokens, found.bytes) == (tokens, size)
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-5)
    hidden, targets = text_states(config, params, texts["ar"].old_tokens_NL, texts["ar"].old_lengths_N)
    assert hidden.shape == (tokens, 32) and targets.shape == (tokens,)


def test_english_loses_what_new_pieces_take(vocabulary, texts):
    params, config = extended.model(vocabulary.first)
    grown, larger = extend_params(params, config, vocabulary.first, replaced(vocabulary.extension), Embeddings())
    before, after = (
        losses(*model, texts, extended=e)["en"] for model, e in (((params, config), False), ((grown, larger), True))
    )
    hidden, _ = text_states(config, params, texts["en"].old_tokens_NL, texts["en"].old_lengths_N)
    logits = hidden @ np.asarray(grown["model"]["embed_tokens"]["weight"]).T
    share = np.exp(log_softmax(logits, axis=-1))[:, vocabulary.first :].sum(axis=1)
    np.testing.assert_allclose(after.nats - before.nats, -np.log1p(-share).sum(), rtol=1e-3)
    assert rows_report.rise(before, after) == pytest.approx(after.nats / before.nats - 1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_and_its_json(vocabulary, texts, tied, tmp_path):
    params, config = extended.model(vocabulary.first, tied)
    before = losses(params, config, texts, extended=False)
    reports = {}
    for name, settings in {"mean": Embeddings(), "shrunk": Embeddings(shrink=0.5)}.items():
        grown, larger = extend_params(params, config, vocabulary.first, replaced(vocabulary.extension), settings)
        reports[name] = report(grown, larger, vocabulary.first, vocabulary.count, texts)
    assert reports["mean"].losses["ar"].tokens < before["ar"].tokens  # the new pieces cut it
    assert list(reports["mean"].tables) == (["input"] if tied else ["input", "head"])
    text = rows_report.table(before, reports)
    for needed in (
        "base",
        "mean",
        "shrunk",
        "ar: bits/byte",
        "en: bits/byte",
        "cosine",
        f"{before['ar'].bits_per_byte:.4f}",
    ):
        assert needed in text
    assert ("head" in text) != tied
    rows_report.write(tmp_path / "rows.json", before, reports)
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert stored["base"]["ar"]["nats"] == before["ar"].nats
    one = stored["methods"]["shrunk"]["losses"]["en"]
    assert one["rise"] == pytest.approx(one["bits_per_byte"] / before["en"].bits_per_byte - 1)
    assert stored["methods"]["mean"]["tables"]["input"]["new_norms"]["mean"] > 0
