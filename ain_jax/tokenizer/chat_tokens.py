"""Texts -> ids, and which of these ids cover given spans of characters.

Offsets of characters are half the price of an encoding, and mostly not needed: where the bytes that the ids spell, one
after another, are the text, their sizes say where each token stands. That is proved for every text; where it does not
hold (a blank put in front, an unknown character, a normaliser) the text is encoded again with offsets.

    text    <s>yes sir    span of characters (3, 6): bytes 3 to 6
    ids     <s>|ye|s| sir    sizes 3 2 1 4    ends 3 5 6 10    covered  0 1 1 0
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ain_jax.tokenizer.align import spellings
from ain_jax.tokenizer.chat_render import Span


@dataclass(frozen=True)
class _Pieces:
    """What each id spells, and its size in bytes."""

    tokens: int  # of the vocabulary when this was made: tokens can be added
    texts: tuple[bytes, ...]
    sizes_V: np.ndarray  # int64


_KNOWN: weakref.WeakKeyDictionary[Any, _Pieces] = weakref.WeakKeyDictionary()


def encode(tokenizer: Any, texts: Sequence[str], offsets: bool = False) -> list[Any]:
    """The encoding of each text, nothing added; `offsets` says whether its tokens' characters are wanted."""
    backend = tokenizer.backend_tokenizer
    assert backend.truncation is None and backend.padding is None, "the tokenizer truncates or pads"
    if not texts:
        return []
    way = backend.encode_batch if offsets else backend.encode_batch_fast
    return way(list(texts), add_special_tokens=False)


def encode_spans(tokenizer: Any, texts: Sequence[tuple[str, Sequence[Span]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32, covered bool) of each text: a token is covered if any of its characters lies in a span.

    So "▁yes" is learnt where " " belongs to the prompt's last word, as in Llama-2's "[/INST] yes", and as transformers
    has it in its masks of the assistant's tokens.
    """
    pieces = _pieces(tokenizer)
    found: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(texts)
    first = _by_sizes(*texts[0], encode(tokenizer, [texts[0][0]])[0].ids, pieces) if texts else None
    if first is not None:  # of a tokenizer that spells otherwise no text is encoded twice
        encodings = encode(tokenizer, [text for text, _ in texts])
        found = [_by_sizes(*text, encoding.ids, pieces) for text, encoding in zip(texts, encodings, strict=True)]
    rest = [number for number, result in enumerate(found) if result is None]
    for number, encoding in zip(rest, encode(tokenizer, [texts[n][0] for n in rest], offsets=True), strict=True):
        found[number] = _by_offsets(texts[number][1], encoding)
    return [result for result in found if result is not None]


def _pieces(tokenizer: Any) -> _Pieces:
    known = _KNOWN.get(tokenizer)
    if known is None or known.tokens != len(tokenizer):
        try:
            spelt = [b"" if s is None else s.special.encode() or s.text for s in spellings(tokenizer.backend_tokenizer)]
        except (KeyError, ValueError):  # a vocabulary of another kind: nothing is proved by it
            spelt = [b""]
        sizes_V = np.array([len(text) for text in spelt], np.int64)
        known = _KNOWN[tokenizer] = _Pieces(len(tokenizer), tuple(spelt), sizes_V)
    return known


def _by_sizes(
    text: str, spans: Sequence[Span], ids: list[int], pieces: _Pieces
) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and what is covered, by the sizes of the pieces; None where these cannot say it.

    At the edge of a span some tokenizers leave a blank out of a token's offsets, and a character may be in two tokens:
    there the offsets decide.
    """
    for start, end in spans:
        if start < end and (text[start].isspace() or text[end - 1].isspace() or not text[end - 1].isascii()):
            return None
    try:
        if b"".join(map(pieces.texts.__getitem__, ids)) != text.encode():
            return None
    except (IndexError, UnicodeEncodeError):
        return None
    ids_L = np.array(ids, np.int32)
    ends_L = np.cumsum(pieces.sizes_V[ids_L])
    covered_L = np.zeros(len(ids_L), bool)
    for start, end in spans:
        if start < end:
            begin, size = len(text[:start].encode()), len(text[start:end].encode())
            # The first token that ends behind the first byte, and the first that ends with the last byte or behind it.
            first, last = np.searchsorted(ends_L, (begin, begin + size - 1), side="right")
            covered_L[first : last + 1] = True
    return ids_L, covered_L


def _by_offsets(spans: Sequence[Span], encoding: Any) -> tuple[np.ndarray, np.ndarray]:
    ids_L = np.array(encoding.ids, np.int32)
    covered_L = np.zeros(len(ids_L), bool)
    for start, end in spans:
        first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
        last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
        if first is None or last is None:
            continue
        while last + 1 < len(ids_L) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
            last += 1  # the further bytes of one character
        covered_L[first : last + 1] = True
    return ids_L, covered_L
