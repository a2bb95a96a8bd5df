"""Pieces made visible: decoded, isolated, whole characters told from parts of them."""

import pytest
import tokenizers

from ain_jax.tokenizer.display import is_partial, piece_bytes, shown, shown_bytes


@pytest.mark.parametrize("text", [" الحرية", "a b", "é\n", "日本🙂"])
def test_byte_level_pieces_are_decoded_as_the_library_writes_them(text):
    splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    piece = "".join(part for part, _ in splitter.pre_tokenize_str(text))
    assert piece_bytes(piece, byte_level=True) == text.encode()


def test_sentencepiece_pieces_are_decoded():
    assert piece_bytes("▁ال", byte_level=False) == " ال".encode()
    assert piece_bytes("<0xD8>", byte_level=False) == b"\xd8"
    assert piece_bytes("<0xD8>", byte_level=True) == b"<0xD8>"  # there these are five characters of text
    assert piece_bytes("<|im_end|>", byte_level=True) == b"<|im_end|>"


def test_partial():
    assert is_partial(b"\xd8") and is_partial("ا".encode() + b"\xd9") and is_partial(b"\xa7")
    assert not is_partial("ا".encode()) and not is_partial(b"") and not is_partial(b"\n")


def test_bytes_of_no_whole_character_are_shown_as_hexadecimal():
    assert shown_bytes("ا".encode() + b"\xd9") == "\u2068ا<D9>\u2069"
    assert shown_bytes(b"\xd8") == "<D8>"
    assert shown_bytes(b" the") == "␣the"


def test_pieces_are_shown_safely():
    assert shown("▁the") == "␣the"
    assert shown("▁ال") == "\u2068␣ال\u2069"
    assert shown("\u064e") == "\u25cc\u064e"  # right-to-left only by its base, so no isolate
    assert shown("\u202eabc\n") == "\\u202eabc\\u000a"
