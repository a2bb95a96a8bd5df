"""What an extension costs and saves, worked by hand; and the sentence for each way it can end."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ain_jax import sample
from ain_jax.tokenizer import verdict
from ain_jax.tokenizer.base import open_base
from ain_jax.tokenizer.corpus import count_chunks
from ain_jax.tokenizer.grow import grow
from ain_jax.tokenizer.inspect import Fertility
from ain_jax.tokenizer.learn import learn
from ain_jax.tokenizer.verdict import Model, judge, point, words_to_train

MISTRAL = sample.FOLDER / "tokenizer" / "mistral_v1.model"


def cut(tokens):
    """A thousand words cut into so many tokens."""
    return Fertility("ar", words=1000, bytes=10_000, tokens=tokens, continued=0, byte_tokens=0)


def test_words_to_train():
    assert words_to_train(np.array([10, 5, *[10] * 8]), 1000) == 10_000  # nine of ten in 1,000 words ten times
    assert words_to_train(np.array([0, *[50] * 9]), 1000) == 2000
    assert words_to_train(np.array([0] * 10), 1000) == 100_000  # never seen: once at most
    assert words_to_train(np.array([], int), 1000) == 0


def test_costs_by_hand():
    model = Model(rows=128, width=10, tied=False, parameters=64_000)
    found = point(100, cut(5000), cut(2000), 3000.0, model, base_size=100, planned=1e6, step_tokens=1000)
    assert (found.spare_used, found.rows) == (28, 256)  # 200 ids, to a multiple of 64
    assert found.new_parameters == 128 * 10 * 2 and found.parameter_share == 0.04
    assert (found.saved, found.tokens_to_train, found.steps) == (0.6, 6000, 6)
    head = 1 + 128 * 10 / 64_000  # 2% more for every token
    assert found.break_even == pytest.approx(2 / 3 * 3000 * 2 * head / (5 - 2 * head))
    assert found.compute == pytest.approx((1e6 * 2 * head + 2 / 3 * 3000 * 2 * head) / 5e6)


def test_tied_tables_count_once_and_spare_rows_cost_nothing():
    tied = point(100, cut(5000), cut(2000), 0.0, Model(128, 10, True, 64_000), base_size=100)
    assert tied.new_parameters == 128 * 10
    spare = point(100, cut(5000), cut(2000), 0.0, Model(320, 10, False, 64_000), base_size=100)
    assert (spare.spare_used, spare.rows, spare.new_parameters) == (100, 320, 0)
    assert spare.compute == pytest.approx(0.4)


def test_what_is_not_known_is_left_out():
    found = point(100, cut(5000), cut(2000), 3000.0, Model(), base_size=100)
    assert (found.rows, found.new_parameters, found.parameter_share, found.spare_used) == (None, None, None, 0)
    assert found.break_even == pytest.approx(2 / 3 * 3000 * 2 / 3)
    never = point(100, cut(2000), cut(2000), 3000.0, Model(), base_size=100)
    assert never.break_even is None and never.compute > 1
    assert "never" in "\n".join(verdict.table(cut(2000), [never]))


def points(before, *sizes_and_tokens, to_train=1000.0, planned=1e9):
    return [point(size, cut(before), cut(tokens), to_train * size, Model(), base_size=100, planned=planned)
            for size, tokens in sizes_and_tokens]  # fmt: skip


def test_it_pays_on_a_base_that_does_not_cover_the_language():
    found = judge("ar", cut(5100), points(5100, (4000, 2300), (8000, 2000), (16_000, 1750)))
    assert (found.pays, found.size) == (True, 16_000)
    assert found.sentence.startswith("Yes: 16,000 new pieces cut 5.10 tokens a word of held-out ar text to 1.75 (-66%)")


def test_of_sizes_that_hardly_differ_the_smaller_is_taken():
    found = judge("ar", cut(5100), points(5100, (8000, 1800), (16_000, 1760)))
    assert found.size == 8000  # 35.3% and 34.5% of the compute


def test_little_training_gives_a_small_extension_or_none():
    sizes = (4000, 2300), (16_000, 1750)
    assert judge("ar", cut(5100), points(5100, *sizes, planned=2e7), 2e7).size == 4000
    found = judge("ar", cut(5100), points(5100, *sizes, planned=1e6), 1e6)
    assert not found.pays and "the planned 1.0 M words do not train its rows" in found.sentence
    assert "it pays from 2.2 M words" in found.sentence  # 2/3 x 4 M x 2.3 / (5.1 - 2.3)


def test_no_on_a_base_that_covers_the_language():
    found = judge("ar", cut(2230), points(2230, (16_000, 1600)))
    assert (found.pays, found.size) == (False, None)
    assert found.sentence.startswith("No: the base already covers ar, at 2.23 tokens a word")


def test_no_where_little_is_saved():
    found = judge("ar", cut(4000), points(4000, (16_000, 3400)))
    assert not found.pays and "saves less than 20%" in found.sentence


def test_thresholds_part_the_bases_that_are_known():
    """Tokens a word as published (the SARF card), with and without Arabic in the vocabulary's training."""
    covered = {"SARF": 1.978, "Falcon-H1": 2.083, "GPT-4o": 2.249, "Fanar": 2.264, "Gemma-3": 2.311, "Qwen3": 2.314}
    not_covered = {"GPT-4": 4.111, "Mistral": 5.133, "Llama-2": 5.236}
    assert max(covered.values()) < verdict.COVERED < min(not_covered.values())


def test_counts_of_new_pieces_are_those_of_the_whole_text():
    texts = [row["ar"] for row in sample.rows("udhr")]
    base = open_base(MISTRAL)
    chunks = count_chunks(texts, progress=False)
    learnt = learn(base, chunks, 120)
    grown = grow(base, learnt, 100)
    counts_N = verdict.piece_counts(base, grown, chunks.counts)
    whole = Counter(index for text in texts for index in grown.encode(text, add_special_tokens=False).ids)
    assert counts_N.tolist() == [whole[base.size + i] for i in range(100)] and counts_N.sum() > 1000


def test_a_models_folder(tmp_path: Path):
    config = {"vocab_size": 64, "hidden_size": 8, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert verdict.read_model(tmp_path) == Model(64, 8, True, None)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config, "tie_word_embeddings": False}))
    assert verdict.read_model(tmp_path) == Model(64, 8, False, None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "vocab_size": 9, "hidden_size": 2}))
    assert verdict.read_model(tmp_path).tied  # Gemma's configs leave it out, and its class ties
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        verdict.read_model(tmp_path / "nothing")


def test_the_parameters_are_those_of_the_weights(tmp_path: Path):
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 6, "hidden_size": 2}))
    save_file({"a": np.zeros((6, 2), np.float32), "b": np.zeros(5, np.float32)}, tmp_path / "model.safetensors")
    assert verdict.read_model(tmp_path).parameters == 17


def test_short():
    assert [verdict.short(n) for n in (12.4, 1234, 4.54e6, 2e9)] == ["12", "1,234", "4.5 M", "2.0 G"]
