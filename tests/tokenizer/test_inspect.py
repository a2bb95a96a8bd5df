"""Fertility: counts done by hand, and tokenizers of every kind."""

from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from ain_jax.tokenizer import inspect
from ain_jax.tokenizer.inspect import Encoder, Fertility, fertility, frequent_words, parity, same_content, table

BASE = Path(inspect.__file__).parents[1] / "sample" / "tokenizer" / "mistral_v1.model"


def by_letters(text):
    """A tokenizer simple enough to count by hand: one token for each character that is no blank."""
    return [ord(character) for character in text if character != " "]


def test_counts_by_hand():
    rows = fertility(by_letters, {"en": ["a be", "see a"], "ar": ["من"], "none": []})
    assert rows[0] == Fertility("en", words=4, bytes=9, tokens=7, continued=2, byte_tokens=0, characters=9, texts=2)
    assert rows[1] == Fertility("ar", words=1, bytes=4, tokens=2, continued=1, byte_tokens=0, characters=2, texts=1)
    assert (rows[0].tokens_per_word, rows[0].continued_share) == (1.75, 0.5)
    assert (rows[1].tokens_per_byte, rows[1].bytes_per_token) == (0.5, 2.0)
    assert rows[2].tokens_per_word == 0.0


def test_sentencepiece_and_tokenizers_agree():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(BASE))
    texts = {"en": ["the house of the people"], "ar": ["؛ الحرية"]}
    rows = fertility(processor, texts)
    assert (rows[0].words, rows[0].tokens, rows[0].continued) == (5, 5, 0)
    assert processor.encode("؛ الحرية", out_type=str) == ["▁", "<0xD8>", "<0x9B>", "▁ال", "ح", "ر", "ي", "ة"]
    assert (rows[1].tokens, rows[1].byte_tokens, rows[1].continued, rows[1].byte_share) == (8, 2, 2, 0.25)
    with_pieces = fertility(Encoder(processor.encode, processor.IdToPiece), texts)
    assert with_pieces == rows
    assert fertility(processor.encode, texts)[1].byte_tokens == 0  # a bare function names no pieces

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "house": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    assert fertility(words, {"en": ["a house"]})[0].tokens == 2


def test_newlines_are_no_byte_fallback():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(BASE))
    assert fertility(processor, {"en": ["a\nb"]})[0].byte_tokens == 0


def test_table():
    before = [Fertility("ar", 1000, 4000, 5000, 900, 50)]
    after = [Fertility("ar", 1000, 4000, 2000, 300, 0)]
    header, line = table(before, after)
    assert header.split() == [
        "language",
        "words",
        "tokens/word",
        "tokens/byte",
        "bytes/token",
        "continued",
        "byte",
        "tokens",
        "change",
    ]
    assert line.split("  ") and [cell.strip() for cell in line.split("  ") if cell] == [
        "ar", "1,000", "5.00 > 2.00", "1.250 > 0.500", "0.80 > 2.00",
        "90% > 30%", "1.0% > 0.0%", "-60% tokens",
    ]  # fmt: skip
    assert table(before)[1].split() == ["ar", "1,000", "5.00", "1.250", "0.80", "90%", "1.0%"]
    with pytest.raises(ValueError, match="not measured on the same texts"):
        table(before, [Fertility("ar", 999, 4000, 2000, 300, 0)])


def test_no_tokenizer():
    with pytest.raises(ValueError, match="str is no tokenizer"):
        fertility("mistral", {"en": ["a"]})


def byte_level(merges=()):
    """A byte-level BPE in which every byte is a token, and these pairs of the GPT-2 alphabet are merged."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(left + right for left, right in merges)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def test_parts_of_letters_are_byte_tokens_of_a_byte_level_vocabulary():
    assert "من".encode() == b"\xd9\x85\xd9\x86" and [*"Ù\u0127"] == ["Ù", "ħ"]  # GPT-2 writes D9 85 as these
    (row,) = fertility(byte_level(), {"ar": ["من"]})
    assert (row.tokens, row.byte_tokens, row.byte_share) == (4, 4, 1.0)
    (row,) = fertility(byte_level([("Ù", "ħ")]), {"ar": ["من"]})
    assert (row.tokens, row.byte_tokens) == (3, 2)  # the first letter is whole now
    (row,) = fertility(byte_level(), {"en": ["a b"]})
    assert (row.tokens, row.byte_tokens) == (3, 0)


def test_kinds_add_up_to_the_language_and_numbers_stand_alone():
    texts = ["ذهب الولد", "ذَهَبَ", "نظام Debian 11", "عام ٢٠٢٤ و12"]
    rows = {row.kind: row for row in fertility(by_letters, {"ar": texts}, by_kind=True)}
    assert list(rows) == ["all", "plain", "vocalised", "code-mixed", "digits", "Arabic-Indic digits"]
    plain = rows["plain"]
    assert (plain.texts, plain.words, plain.tokens) == (2, 5, 8 + 3 + 4 + 3)  # blanks are no tokens
    assert (rows["vocalised"].tokens, rows["code-mixed"].words) == (6, 3)
    for name in ("texts", "words", "bytes", "characters", "tokens", "continued"):
        assert getattr(rows["all"], name) == sum(
            getattr(rows[kind], name) for kind in ("plain", "vocalised", "code-mixed")
        )
    digits, arabic = rows["digits"], rows["Arabic-Indic digits"]
    assert (digits.words, digits.characters, digits.bytes, digits.tokens) == (2, 4, 4, 4)  # 11 and 12
    assert (arabic.words, arabic.characters, arabic.bytes, arabic.tokens) == (1, 4, 8, 4)


def test_unknown_tokens_are_counted_and_shown():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "house": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    rows = fertility(words, {"en": ["a house", "a garden"]})
    assert rows[0].unknown == 1
    assert table(rows)[0].split()[-1] == "unknown" and table(rows)[1].split()[-1] == "1"


def test_many_texts_are_encoded_in_batches():
    backend = byte_level()
    texts = [f"text {i}" for i in range(1300)]
    batched, one = fertility(backend, {"en": texts}), fertility(lambda text: backend.encode(text).ids, {"en": texts})
    assert batched[0].tokens == one[0].tokens == sum(map(len, texts)) and batched[0].texts == 1300


def test_parity():
    rows = [
        Fertility("ar", 10, 100, 60, 0, 0, characters=50),
        Fertility("ar", 4, 40, 20, 0, 0, kind="plain", characters=20),
        Fertility("en", 10, 60, 12, 0, 0, characters=60),
    ]
    found = {each.measure: each.ratio for each in parity(rows)}
    assert found == {"tokens per byte": pytest.approx(0.6 / 0.2), "tokens per character": pytest.approx(1.2 / 0.2)}
    assert parity(rows[:2]) == []  # nothing to compare with
    same = same_content(by_letters, [("abcd", "ab"), ("ef", "c")], "ar", "en")
    assert (same.ratio, same.measure) == (2.0, "tokens for the same content")


def test_frequent_words_and_their_pieces():
    backend = byte_level([("Ù", "ħ")])
    found = frequent_words(backend, ["من من .. هذا 12 x", "من"], number=1)
    assert found == [("من", 3, ["␣", "\u2068م\u2069", "<D9>", "<86>"])]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(BASE))
    assert frequent_words(processor, ["الحرية"])[0][2] == [
        "\u2068␣ال\u2069", "\u2068ح\u2069", "\u2068ر\u2069", "\u2068ي\u2069", "\u2068ة\u2069"
    ]  # fmt: skip
