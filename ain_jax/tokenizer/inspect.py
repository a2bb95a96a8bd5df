"""How well a tokenizer cuts each language: tokens per word and per byte, so that an extension can be judged.

    python -m ain_jax.tokenizer.inspect --base FOLDER --text ar=FILE... --text en=FILE... --out DIR

language  words    tokens/word  tokens/byte  bytes/token  continued  byte tokens
ar        62,037   5.24 > 1.90  0.61 > 0.22  1.6 > 4.5    97% > 49%  1% > 0%
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, cast

from ain_jax.tokenizer import display, kinds

ALL = "all"  # the row of a whole language, beside those of its kinds
BATCH = 512  # texts encoded at once


@dataclass(frozen=True)
class Encoder:
    """What is asked of a tokenizer here: text -> ids without special tokens and, where known, id -> piece."""

    encode: Callable[[str], Sequence[int]]
    piece: Callable[[int], str] | None = None
    byte_level: bool = False  # pieces are written in GPT-2's alphabet, one character a byte
    batch: Callable[[list[str]], list[Sequence[int]]] | None = None  # the same for many texts, where that is quicker
    unknown: int | None = None  # the id that stands for text the vocabulary cannot spell

    def each(self, texts: Iterable[str]) -> Iterator[tuple[str, Sequence[int]]]:
        """Every text and its ids; the texts are held a batch at a time."""
        texts = iter(texts)
        while batch := list(islice(texts, BATCH)):
            yield from zip(batch, self.batch(batch) if self.batch else map(self.encode, batch), strict=True)

    def bytes_of(self, index: int) -> bytes:
        """What an id spells; empty where the tokenizer names no pieces."""
        return display.piece_bytes(self.piece(index) or "", self.byte_level) if self.piece else b""


@dataclass(frozen=True)
class Fertility:
    """One language's counts; the ratios are made of them, so counts of several texts can be added first."""

    language: str
    words: int  # between white space; of a kind of numbers, the runs of its digits
    bytes: int  # of UTF-8
    tokens: int
    continued: int  # words that take more than one token
    byte_tokens: int  # tokens that are no whole character: byte fallback, or a byte-level piece that cuts a letter
    kind: str = ALL
    characters: int = 0
    texts: int = 0
    unknown: int = 0  # tokens that lost what they stood for

    def __add__(self, other: "Fertility") -> "Fertility":
        counts = ("words", "bytes", "tokens", "continued", "byte_tokens", "characters", "texts", "unknown")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in counts})

    @property
    def tokens_per_word(self) -> float:
        return self.tokens / max(self.words, 1)

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / max(self.bytes, 1)

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / max(self.characters, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)

    @property
    def continued_share(self) -> float:
        return self.continued / max(self.words, 1)

    @property
    def byte_share(self) -> float:
        return self.byte_tokens / max(self.tokens, 1)


@dataclass(frozen=True)
class Parity:
    """A language's tokens over a reference's; 1 is parity, 3 means three times the cost and a third of the context."""

    language: str
    reference: str
    measure: str  # "tokens for the same content", "tokens per byte" or "tokens per character"
    ratio: float


def as_encoder(tokenizer: Any) -> Encoder:
    """The Encoder of a SentencePiece, `tokenizers` or transformers tokenizer, or of a function."""
    if isinstance(tokenizer, Encoder):
        return tokenizer
    if hasattr(tokenizer, "IdToPiece"):  # sentencepiece
        return Encoder(
            lambda text: tokenizer.encode(text, out_type=int),
            tokenizer.IdToPiece,
            batch=lambda texts: tokenizer.encode(texts, out_type=int),
            unknown=tokenizer.unk_id(),
        )
    if getattr(tokenizer, "is_fast", False):  # transformers, around one of `tokenizers`
        tokenizer = tokenizer.backend_tokenizer
    if hasattr(tokenizer, "convert_ids_to_tokens"):  # transformers, slow
        return Encoder(
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            tokenizer.convert_ids_to_tokens,
            unknown=tokenizer.unk_token_id,
        )
    if hasattr(tokenizer, "id_to_token"):  # tokenizers
        unknown = getattr(tokenizer.model, "unk_token", None)
        return Encoder(
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            tokenizer.id_to_token,
            byte_level="ByteLevel" in repr(tokenizer.decoder),
            batch=lambda texts: [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
            unknown=tokenizer.token_to_id(unknown) if unknown else None,
        )
    if callable(tokenizer):
        return Encoder(lambda text: cast(Sequence[int], tokenizer(text)))
    raise ValueError(
        f"{type(tokenizer).__name__} is no tokenizer; give a SentencePiece, tokenizers or transformers one, "
        "or a function from text to ids"
    )


@dataclass
class _Count:
    """What is counted of one kind of one language before ratios are made."""

    words: Counter[str] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    bytes: int = 0
    characters: int = 0
    texts: int = 0


def fertility(tokenizer: Any, texts_by_language: Mapping[str, Iterable[str]], by_kind: bool = False) -> list[Fertility]:
    """One row a language, in the order given; a word is cut as it stands behind another word.

    by_kind adds, behind each language's row, one a kind of its texts (`kinds.kind_of`), which add up to it, and one a
    kind of the numbers in them, each measured by itself: its "words" are runs of digits.
    """
    encoder = as_encoder(tokenizer)
    rows = []
    for language, texts in texts_by_language.items():
        counts: defaultdict[str, _Count] = defaultdict(_Count)
        runs: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for text, ids in encoder.each(texts):
            count = counts[kinds.kind_of(text, language) if by_kind else ALL]
            count.texts += 1
            count.words.update(text.split())
            count.tokens.update(ids)
            count.bytes += len(text.encode("utf-8"))
            count.characters += len(text)
            for kind, run in kinds.numbers(text) if by_kind else ():
                runs[kind][run] += 1
        found = [_row(encoder, language, kind, count) for kind, count in sorted(counts.items())]
        rows.append(sum(found, Fertility(language, 0, 0, 0, 0, 0)))
        if by_kind:
            rows += sorted(found, key=lambda row: kinds.TEXT_KINDS.index(row.kind))
            rows += [_numbers(encoder, language, kind, runs[kind]) for kind in kinds.NUMBER_KINDS if runs[kind]]
    return rows


def _row(encoder: Encoder, language: str, kind: str, count: _Count) -> Fertility:
    lengths = _alone(encoder, count.words)
    partial = sum(n for index, n in count.tokens.items() if display.is_partial(encoder.bytes_of(int(index))))
    return Fertility(
        language=language,
        words=count.words.total(),
        bytes=count.bytes,
        tokens=count.tokens.total(),
        continued=sum(n for (_, n), length in zip(count.words.items(), lengths, strict=True) if length > 1),
        byte_tokens=partial,
        kind=kind,
        characters=count.characters,
        texts=count.texts,
        unknown=count.tokens[encoder.unknown] if encoder.unknown is not None else 0,
    )


def _numbers(encoder: Encoder, language: str, kind: str, runs: Counter[str]) -> Fertility:
    lengths = [*_alone(encoder, runs)]
    return Fertility(
        language=language,
        words=runs.total(),
        bytes=sum(n * len(run.encode("utf-8")) for run, n in runs.items()),
        tokens=sum(n * length for n, length in zip(runs.values(), lengths, strict=True)),
        continued=sum(n for n, length in zip(runs.values(), lengths, strict=True) if length > 1),
        byte_tokens=0,
        kind=kind,
        characters=sum(n * len(run) for run, n in runs.items()),
    )


def _alone(encoder: Encoder, words: Iterable[str]) -> Iterator[int]:
    """How many tokens each word takes behind another word."""
    other = len(encoder.encode("a"))
    return (len(ids) - other for _, ids in encoder.each("a " + word for word in words))


def frequent_words(tokenizer: Any, texts: Iterable[str], number: int = 20) -> list[tuple[str, int, list[str]]]:
    """The most frequent words of two letters or more, how often each occurs, and its pieces as `display` shows them."""
    encoder = as_encoder(tokenizer)
    counts = Counter(word for text in texts for word in text.split() if sum(map(str.isalpha, word)) > 1)
    other = len(encoder.encode("a"))
    found = counts.most_common(number)
    cuts = encoder.each("a " + word for word, _ in found)
    return [
        (word, count, [display.shown_bytes(encoder.bytes_of(int(index))) for index in ids[other:]])
        for (word, count), (_, ids) in zip(found, cuts, strict=True)
    ]


def parity(rows: Sequence[Fertility], reference: str = "en") -> list[Parity]:
    """Each language's tokens per byte and per character over the reference's: what can be said without parallel text.

    Neither is the same content: an Arabic letter takes two bytes, and Arabic writes the same in fewer letters.
    """
    whole = {row.language: row for row in rows if row.kind == ALL and row.tokens}
    if reference not in whole:
        return []
    base = whole.pop(reference)
    return [
        Parity(language, reference, measure, getattr(row, name) / getattr(base, name))
        for language, row in whole.items()
        for measure, name in (("tokens per byte", "tokens_per_byte"), ("tokens per character", "tokens_per_character"))
    ]


def same_content(tokenizer: Any, pairs: Sequence[tuple[str, str]], language: str, reference: str) -> Parity:
    """The tokens of the first texts over those of the second, which say the same (Petrov et al. 2023: the premium)."""
    encoder = as_encoder(tokenizer)
    ours, theirs = (sum(len(ids) for _, ids in encoder.each(side)) for side in zip(*pairs, strict=True))
    return Parity(language, reference, "tokens for the same content", ours / max(theirs, 1))


COLUMNS: tuple[tuple[str, Callable[[Fertility], str]], ...] = (
    ("tokens/word", lambda row: f"{row.tokens_per_word:.2f}"),
    ("tokens/byte", lambda row: f"{row.tokens_per_byte:.3f}"),
    ("bytes/token", lambda row: f"{row.bytes_per_token:.2f}"),
    ("continued", lambda row: f"{row.continued_share:.0%}"),
    ("byte tokens", lambda row: f"{row.byte_share:.1%}"),
)


def table(before: Sequence[Fertility], after: Sequence[Fertility] | None = None) -> list[str]:
    """Lines of text, a header and one a row, each number as "before > after" (or alone)."""
    if after is not None and [(r.language, r.kind, r.words, r.bytes) for r in before] != [
        (r.language, r.kind, r.words, r.bytes) for r in after
    ]:
        raise ValueError("before and after were not measured on the same texts; give both tokenizers the same mapping")
    by_kind = any(row.kind != ALL for row in before)
    lost = any(row.unknown for row in (*before, *(after or ())))
    columns = [*COLUMNS, *([("unknown", lambda row: f"{row.unknown:,}")] if lost else [])]
    cells = [["language", *(["kind"] if by_kind else []), "words", *(name for name, _ in columns)]]
    for index, row in enumerate(before):
        pair = [row] if after is None else [row, after[index]]
        names = [row.language, *([row.kind] if by_kind else [])]
        cells.append([*names, f"{row.words:,}", *(" > ".join(map(show, pair)) for _, show in columns)])
        if after is not None:
            cells[-1].append(f"{after[index].tokens_per_word / max(row.tokens_per_word, 1e-9) - 1:+.0%} tokens")
    if after is not None:
        cells[0].append("change")
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines whose columns stand under each other, two blanks apart."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


if __name__ == "__main__":
    from ain_jax.tokenizer.inspect_run import main

    main()
