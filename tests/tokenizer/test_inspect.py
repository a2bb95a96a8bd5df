"""Fertility: counts done by hand, and tokenizers of every kind."""

from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from ain_jax.tokenizer import inspect
from ain_jax.tokenizer.inspect import Encoder, Fertility, fertility, shown, table

BASE = Path(inspect.__file__).parents[1] / "sample" / "tokenizer" / "mistral_v1.model"


def by_letters(text):
    """A tokenizer simple enough to count by hand: one token for each character that is no blank."""
    return [ord(character) for character in text if character != " "]


def test_counts_by_hand():
    rows = fertility(by_letters, {"en": ["a be", "see a"], "ar": ["من"], "none": []})
    assert rows[0] == Fertility("en", words=4, bytes=9, tokens=7, continued=2, byte_tokens=0)
    assert rows[1] == Fertility("ar", words=1, bytes=4, tokens=2, continued=1, byte_tokens=0)
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


def test_pieces_are_shown_safely():
    assert shown("▁the") == "␣the"
    assert shown("▁ال") == "\u2068␣ال\u2069"
    assert shown("\u064e") == "\u25cc\u064e"  # right-to-left only by its base, so no isolate
    assert shown("\u202eabc\n") == "\\u202eabc\\u000a"


def test_no_tokenizer():
    with pytest.raises(ValueError, match="str is no tokenizer"):
        fertility("mistral", {"en": ["a"]})
