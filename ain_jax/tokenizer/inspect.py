"""How well a tokenizer cuts each language: tokens per word and per byte, so that an extension can be judged.

language  words    tokens/word  tokens/byte  bytes/token  continued  byte tokens
ar        62,037   5.24 > 1.90  0.61 > 0.22  1.6 > 4.5    97% > 49%  1% > 0%
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

FIRST_STRONG, POP = (
    "\u2068",
    "\u2069",
)  # Unicode isolates: what lies between them does not reorder what lies around


@dataclass(frozen=True)
class Encoder:
    """What is asked of a tokenizer here: text -> ids without special tokens and, where known, id -> piece."""

    encode: Callable[[str], Sequence[int]]
    piece: Callable[[int], str] | None = None


@dataclass(frozen=True)
class Fertility:
    """One language's counts; the ratios are made of them, so counts of several texts can be added first."""

    language: str
    words: int  # between white space
    bytes: int  # of UTF-8
    tokens: int
    continued: int  # words that take more than one token
    byte_tokens: int  # tokens that are one byte of a character outside ASCII (newlines are bytes in any text)

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(self.words, 1)

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / max(self.bytes, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)

    @property
    def continued_share(self) -> float:
        return self.continued / max(self.words, 1)

    @property
    def byte_share(self) -> float:
        return self.byte_tokens / max(self.tokens, 1)


def as_encoder(tokenizer: Any) -> Encoder:
    """The Encoder of a SentencePiece, `tokenizers` or transformers tokenizer, or of a function."""
    if isinstance(tokenizer, Encoder):
        return tokenizer
    if hasattr(tokenizer, "IdToPiece"):  # sentencepiece
        return Encoder(lambda text: tokenizer.encode(text, out_type=int), tokenizer.IdToPiece)
    if hasattr(tokenizer, "convert_ids_to_tokens"):  # transformers
        return Encoder(lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.convert_ids_to_tokens)
    if hasattr(tokenizer, "id_to_token"):  # tokenizers
        return Encoder(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.id_to_token)
    if callable(tokenizer):
        return Encoder(lambda text: cast(Sequence[int], tokenizer(text)))
    raise ValueError(
        f"{type(tokenizer).__name__} is no tokenizer; give a SentencePiece, tokenizers or transformers one, "
        "or a function from text to ids"
    )


def fertility(tokenizer: Any, texts_by_language: Mapping[str, Iterable[str]]) -> list[Fertility]:
    """One row a language, in the order given; a word is cut as it stands behind another word."""
    encoder = as_encoder(tokenizer)
    alone = len(encoder.encode("a"))
    rows = []
    for language, texts in texts_by_language.items():
        words: Counter[str] = Counter()
        tokens: Counter[int] = Counter()
        size = 0
        for text in texts:
            ids = encoder.encode(text)
            words.update(text.split())
            size += len(text.encode("utf-8"))
            tokens.update(ids)
        continued = sum(n for word, n in words.items() if len(encoder.encode("a " + word)) - alone > 1)
        piece = encoder.piece
        byte_tokens = sum(n for index, n in tokens.items() if piece and _is_foreign_byte(piece(int(index))))
        rows.append(Fertility(language, words.total(), size, tokens.total(), continued, byte_tokens))
    return rows


def _is_foreign_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece[3] in "89ABCDEF"


def table(before: Sequence[Fertility], after: Sequence[Fertility] | None = None) -> list[str]:
    """Lines of text, a header and one a language, each number as "before > after" (or alone)."""
    if after is not None and [(r.language, r.words, r.bytes) for r in before] != [
        (r.language, r.words, r.bytes) for r in after
    ]:
        raise ValueError("before and after were not measured on the same texts; give both tokenizers the same mapping")
    columns: list[tuple[str, Callable[[Fertility], str]]] = [
        ("tokens/word", lambda row: f"{row.tokens_per_word:.2f}"),
        ("tokens/byte", lambda row: f"{row.tokens_per_byte:.3f}"),
        ("bytes/token", lambda row: f"{row.bytes_per_token:.2f}"),
        ("continued", lambda row: f"{row.continued_share:.0%}"),
        ("byte tokens", lambda row: f"{row.byte_share:.1%}"),
    ]
    cells = [["language", "words", *(name for name, _ in columns)]]
    for index, row in enumerate(before):
        pair = [row] if after is None else [row, after[index]]
        cells.append([row.language, f"{row.words:,}", *(" > ".join(map(show, pair)) for _, show in columns)])
        if after is not None:
            cells[-1].append(f"{after[index].tokens_per_word / max(row.tokens_per_word, 1e-9) - 1:+.0%} tokens")
    if after is not None:
        cells[0].append("change")
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def shown(piece: str) -> str:
    """A piece for display: its blank as ␣, a leading mark on a dotted circle, right-to-left text isolated.

    Without the isolates, neighbouring Arabic pieces would be displayed in reverse order; byte-level pieces
    must be decoded first, since they print as mojibake.
    """
    text = piece.replace("▁", "␣")
    if text and unicodedata.combining(text[0]):
        text = "\u25cc" + text
    text = "".join(c if c.isprintable() or c == "\u200c" else f"\\u{ord(c):04x}" for c in text)
    if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text):
        return FIRST_STRONG + text + POP
    return text
