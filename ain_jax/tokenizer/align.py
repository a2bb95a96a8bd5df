"""Two tokenizers side by side: what each id spells, and the same text cut by both, with the places where they meet.

text     the word ends at       3       8
old      c a t |  p i e c e     1 2 3 | 4 5 6 7 8
new      cat   |  piece         1     | 2
ends     old (3, 8), new (1, 2): after these tokens both have read the same words
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from ain_jax.tokenizer.base import byte_of, character_of
from ain_jax.tokenizer.folder import SPACE

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte that is part of no piece
TEXTS_A_PART = 16  # texts from which one part is taken, so that long texts are met as often as they have parts


@dataclass(frozen=True)
class Spelling:
    """What one id stands for: a special token's name, or bytes of text."""

    special: str = ""
    text: bytes = b""
    is_byte: bool = False  # SentencePiece has "A" and <0x41>, two ids of the same byte


def spellings(tokenizer: tokenizers.Tokenizer) -> list[Spelling | None]:
    """What each id stands for, in order of the ids; None where the vocabulary has a hole.

    Pieces of both kinds of tokenizer are comparable: "▁cat" of the one and "Ġcat" of the other are b" cat". A byte that
    SentencePiece spells <0xE2> is the byte-level "â"; of ASCII the former's <0x41> is its own.
    """
    byte_level = is_byte_level(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    found: list[Spelling | None] = [None] * (max(vocabulary.values()) + 1)
    for piece, index in vocabulary.items():
        if index in added:
            found[index] = Spelling(special=added[index].content)
        elif byte_level:
            found[index] = Spelling(text=bytes(byte_of()[character] for character in piece))
        elif match := BYTE.fullmatch(piece):
            byte = int(match[1], 16)
            found[index] = Spelling(text=bytes([byte]), is_byte=byte < 0x80)
        else:
            found[index] = Spelling(text=piece.replace(SPACE, " ").encode())
    return found


def token_bytes(tokenizer: tokenizers.Tokenizer, rows: int) -> np.ndarray:
    """(rows,) int32: bytes of UTF-8 that each id stands for; 0 for special tokens and for rows that are no id's.

    Losses under different tokenizers compare per byte alone. The blank that some tokenizers put before a text, and
    decoding takes away, is counted where it stands.
    """
    silent = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    result = np.zeros(rows, np.int32)
    for index, spelling in enumerate(spellings(tokenizer)):
        if spelling is not None and index not in silent:
            result[index] = len(spelling.text or spelling.special.encode())
    return result


def cut(tokenizer: tokenizers.Tokenizer, texts: Sequence[bytes]) -> list[list[int]]:
    """The ids that a tokenizer's merges make of each piece of text, nothing put before it.

    Bytes that are no whole characters are spelt byte by byte where the tokenizer is not byte-level.
    """
    model: Any = tokenizer.model
    if is_byte_level(tokenizer):
        return [[t.id for t in model.tokenize("".join(character_of()[byte] for byte in text))] for text in texts]
    return [_cut_text(tokenizer, text) for text in texts]


def _cut_text(tokenizer: tokenizers.Tokenizer, text: bytes) -> list[int]:
    model: Any = tokenizer.model
    try:
        return [token.id for token in model.tokenize(text.decode().replace(" ", SPACE))]
    except UnicodeDecodeError:
        return [index for byte in text if (index := tokenizer.token_to_id(f"<0x{byte:02X}>")) is not None]


def is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the pieces are written in GPT-2's alphabet of bytes; else in text with ▁ and bytes as <0xE2>.

    Raises ValueError where they are neither.
    """
    model: Any = tokenizer.model
    if type(model).__name__ != "BPE":
        raise ValueError(
            f"a tokenizer of type {type(model).__name__}, expected BPE: its pieces are not comparable here"
        )
    if model.byte_fallback:
        return False
    # Not all 256 bytes are pieces everywhere (SmolLM2 lacks those that no UTF-8 has), but all pieces are bytes.
    if set("".join(tokenizer.get_vocab(with_added_tokens=False))) <= byte_of().keys():
        return True
    raise ValueError(
        "a BPE tokenizer with neither byte fallback nor a byte alphabet; its pieces are not comparable here"
    )


@dataclass(frozen=True)
class Aligned:
    """The same texts under two tokenizers, one a row; each row opens with the token that opens a document.

    tokens are int32 with 0 behind the end, lengths count them; `old_ends_NC` and `new_ends_NC` are the positions of the
    tokens that end the same words, `words_N` says how many of them are in use.
    """

    old_tokens_NL: np.ndarray
    new_tokens_NM: np.ndarray
    old_lengths_N: np.ndarray
    new_lengths_N: np.ndarray
    old_ends_NC: np.ndarray
    new_ends_NC: np.ndarray
    words_N: np.ndarray
    bytes_N: np.ndarray  # of the texts, in UTF-8

    def __len__(self) -> int:
        return len(self.words_N)

    def __getitem__(self, index: Any) -> "Aligned":
        return Aligned(**{name: array[index] for name, array in vars(self).items()})


def align(
    old: tokenizers.Tokenizer,
    new: tokenizers.Tokenizer,
    texts: Sequence[str],
    first_token: int,
    longest: int,
    most: int | None = None,
) -> Aligned:
    """The texts, in parts of whole words that either tokenizer cuts into fewer than `longest` tokens.

    A single word that is longer is left out. Of a large corpus `most` parts are taken evenly; only the texts that they
    are taken from are cut. Raises ValueError where no text is left.
    """
    texts = texts if most is None else [texts[int(i)] for i in evenly(len(texts), TEXTS_A_PART * most)]
    parts = [part for text in texts for part in _parts(old, new, text, longest - 1)]
    encoded = [_encode(tokenizer, parts) for tokenizer in (old, new)]
    short = [i for i in range(len(parts)) if all(0 < len(side[i].ids) < longest for side in encoded)]
    short = short if most is None else [short[i] for i in evenly(len(short), most)]
    if not short:
        raise ValueError(
            f"{len(texts)} texts, none with a word of fewer than {longest} tokens; give text, or a larger row"
        )
    sides = [[(np.array(side[i].ids, np.int32), _word_ends(side[i], parts[i])) for i in short] for side in encoded]
    shared = [np.intersect1d(a[1][0], b[1][0], return_indices=True)[1:] for a, b in zip(*sides, strict=True)]
    arrays: dict[str, np.ndarray] = {}
    for side, (name, rows) in enumerate(zip(("old", "new"), sides, strict=True)):
        tokens = [np.concatenate([[first_token], ids]) for ids, _ in rows]
        letter = "L" if name == "old" else "M"
        arrays[f"{name}_tokens_N{letter}"] = _padded(tokens, 8)
        arrays[f"{name}_lengths_N"] = np.array([len(row) for row in tokens], np.int32)
        arrays[f"{name}_ends_NC"] = _padded(
            [1 + at[kept[side]] for (_, (_, at)), kept in zip(rows, shared, strict=True)]
        )
    return Aligned(
        words_N=np.array([len(kept[0]) for kept in shared], np.int32),
        bytes_N=np.array([len(parts[i].encode()) for i in short], np.int64),
        **arrays,
    )


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the numbers below `count`, first and last among them.

    evenly(9, 3): 0, 4, 8
    """
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)) if count else np.zeros(0, int)


def _parts(old: tokenizers.Tokenizer, new: tokenizers.Tokenizer, text: str, longest: int) -> list[str]:
    """The text in runs of whole words, each of at most `longest` tokens as the words are cut alone."""
    words = re.findall(r"\s*\S+", text.strip())
    sizes = np.array([[len(e.ids) for e in _encode(tokenizer, words)] for tokenizer in (old, new)]).max(axis=0)
    parts, begin, total = [], 0, 0
    for i, size in enumerate(sizes.tolist()):
        if begin < i and total + size > longest:
            parts.append("".join(words[begin:i]).strip())
            begin, total = i, 0
        total += size
    return [*parts, "".join(words[begin:]).strip()] if words else []


def _encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[Any]:
    """The encodings of plain texts, nothing added; "</s>" in a text is cut like any other text."""
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        return tokenizer.encode_batch(list(texts), add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = before


def _word_ends(encoding: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(characters, tokens): where words end, and the last token of each. Bytes of one character share its end."""
    ends_T = np.array([end for _, end in encoding.offsets])
    words = np.array([match.end() for match in re.finditer(r"\S+", text)])
    last_T = np.flatnonzero(np.append(ends_T[1:] != ends_T[:-1], True))
    last_T = last_T[np.isin(ends_T[last_T], words)]
    return ends_T[last_T], last_T


def _padded(rows: Sequence[np.ndarray], multiple: int = 1) -> np.ndarray:
    """(rows, longest) int32 with zeros behind each row; the width is rounded up, so that few shapes are compiled."""
    width = max(1, *(len(row) for row in rows)) if rows else 1
    padded = np.zeros((len(rows), -(-width // multiple) * multiple), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
