"""Pieces as a reader can see them: decoded, their blanks visible, right-to-left text kept from reordering the rest."""

import unicodedata
from collections.abc import Sequence

from ain_jax.tokenizer.base import byte_of

FIRST_STRONG, POP = "\u2068", "\u2069"  # Unicode isolates: what lies between them does not reorder what lies around
DOTTED_CIRCLE = "\u25cc"  # what a mark is set on when its letter is in another piece


def piece_bytes(piece: str, byte_level: bool) -> bytes:
    """The UTF-8 bytes that a piece stands for, which need not be whole characters.

    byte-level "ĠØ§ÙĦ" is " ال"; SentencePiece's "▁ال" likewise, and its "<0xD8>" is one byte. A piece of another
    notation (an added token, a WordPiece) stands for its own text.
    """
    if byte_level and all(character in byte_of() for character in piece):
        return bytes(byte_of()[character] for character in piece)
    if not byte_level and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode("utf-8", "surrogatepass")


def is_partial(data: bytes) -> bool:
    """Whether the bytes are no whole characters, such as the first byte of an Arabic letter."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def shown_bytes(data: bytes) -> str:
    """`shown` of bytes; those that are no whole character as hexadecimal: b"\\xd8\\xa7\\xd9" is "ا<D9>"."""
    text = data.decode("utf-8", "surrogateescape")
    return shown("".join(f"<{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text))


def shown(piece: str) -> str:
    """A piece for display: its blanks as ␣, a leading mark on a dotted circle, right-to-left text isolated.

    Without the isolates, neighbouring Arabic pieces would be displayed in reverse order. Byte-level pieces have to be
    decoded first (`shown_bytes`), since they print as mojibake.
    """
    text = piece.replace("▁", "␣").replace(" ", "␣")
    if text and unicodedata.combining(text[0]):
        text = DOTTED_CIRCLE + text
    text = "".join(c if c.isprintable() or c == "\u200c" else f"\\u{ord(c):04x}" for c in text)
    if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text):
        return FIRST_STRONG + text + POP
    return text


def row(pieces: Sequence[str]) -> str:
    """Shown pieces from left to right, whatever their own direction."""
    return " | ".join(pieces)
