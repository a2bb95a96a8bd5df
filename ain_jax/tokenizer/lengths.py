"""How many bytes of text each id stands for, so that losses under different tokenizers can be compared per byte."""

import re
from typing import Any

import numpy as np

SPACE = "▁"  # how a SentencePiece vocabulary writes a blank
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: Any, rows: int) -> np.ndarray:
    """(rows,) int32: bytes of UTF-8 by id; 0 for special tokens and for rows that are no id's.

    A ▁-style piece counts its blank as one byte and "<0x0A>" as one; a byte-level piece has one character a byte. The
    blank that some tokenizers put before a text, and decoding takes away, is counted where it stands.
    """
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    byte_level = "ByteLevel" in repr(backend.decoder)
    result = np.zeros(rows, np.int32)
    for piece, index in backend.get_vocab(with_added_tokens=True).items():
        if index in added:
            token = added[index]
            result[index] = 0 if token.special else len(token.content.encode())
        elif byte_level:
            result[index] = len(piece)
        else:
            result[index] = 1 if _BYTE.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())
    return result
