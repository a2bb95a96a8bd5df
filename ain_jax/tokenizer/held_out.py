"""Labelled text files as documents, parted into what a vocabulary is learnt from and what it is measured on.

    ar=news.jsonl.gz    one document a value of the field "document", else one a line; the text is in the field named
                        like the label ("ar"), else in "text"
    ar=book.txt         50 lines in a row are one document, so that neighbours stay together

A document is held out by the hash of its name (of its text where it has none), so the same corpus is always parted
the same way; a line that occurs on both sides is dropped from the held-out side.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = 10  # one document in so many is held out
LINES = 50  # of a plain text make a document
_LABEL = re.compile(r"([a-z]{2,3}(?:-[A-Za-z0-9]+)*)=(.+)")


@dataclass(frozen=True)
class Source:
    """A file and the language of its text: an ISO 639 code, perhaps with a script or a region behind it."""

    label: str
    path: Path


@dataclass(frozen=True)
class Split:
    """One language's held-out lines, and what has to be said about how they were made."""

    lines: tuple[str, ...]
    documents: int  # held out
    repeated: int  # lines dropped, since the training side has them too
    cut: bool  # there was more than was asked for


def sources(arguments: Sequence[str]) -> list[Source]:
    """ "ar=a.txt b.txt en=c.txt" as files with labels; a file without one has that of the file before."""
    found: list[Source] = []
    for argument in arguments:
        match = _LABEL.fullmatch(argument)
        if not match and not found:
            raise ValueError(f"{argument!r} has no language; expected LANGUAGE=FILE, for example ar={argument}")
        label, path = match.groups() if match else (found[-1].label, argument)
        found.append(Source(label, Path(path)))
    missing = [str(source.path) for source in found if not source.path.is_file()]
    if missing:
        raise ValueError(f"no such file: {', '.join(missing)}")
    return found


def lines(source: Source) -> Iterator[tuple[str, str]]:
    """(document, line) of a file; blank lines are left out. Raises ValueError where it is no UTF-8 or no JSON."""
    if ".jsonl" not in source.path.suffixes:
        for kept, (_, text) in enumerate(_lines(source.path)):
            yield f"{source.path.name}/{kept // LINES}", text
        return
    for number, row in _objects(source.path):
        text = row.get(source.label, row.get("text"))
        if not isinstance(text, str):
            raise ValueError(
                f"{source.path}, line {number}: it has neither text under {source.label!r} nor under 'text', "
                f"but {', '.join(sorted(row)) or 'nothing'}"
            )
        document = str(row.get("document", text))
        yield from ((document, part) for part in text.splitlines() if part.strip())


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of JSON, each with its number."""
    for number, text in _lines(path):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; a .jsonl file holds one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} holds a {type(row).__name__}, expected an object")
        yield number, row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, each with its number."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}, byte {error.start}: 0x{line[error.start]:02x} is not UTF-8; "
                        "convert the file, for example with iconv"
                    ) from error
                if text.strip():
                    yield number, text
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def is_held_out(document: str) -> bool:
    return int.from_bytes(_digest(document)[:4], "big") % HELD_OUT == 0


def training(files: Iterable[Source], parted: bool) -> Iterator[str]:
    """The lines to learn from; of parted files those whose document is not held out."""
    for source in files:
        yield from (line for document, line in lines(source) if not (parted and is_held_out(document)))


def held_out(
    files: Sequence[Source], learnt_from: Sequence[Source], parted: bool, megabytes: float
) -> dict[str, Split]:
    """By label, the lines to measure: at most so many megabytes each, those of the lowest hashes' documents first come.

    Raises ValueError where a language keeps no line to measure.
    """
    seen = {_digest(line)[:8] for line in training(learnt_from, parted)}
    found: dict[str, Split] = {}
    for label in dict.fromkeys(source.label for source in files):
        kept: list[str] = []
        documents: set[bytes] = set()
        size = repeated = 0
        cut = False
        for source in (source for source in files if source.label == label):
            for document, line in lines(source):
                if parted and not is_held_out(document):
                    continue
                if cut := size >= megabytes * 1e6:
                    break
                if _digest(line)[:8] in seen:
                    repeated += 1
                    continue
                kept.append(line)
                documents.add(_digest(document)[:8])
                size += len(line.encode("utf-8"))
        if not kept:
            raise ValueError(
                f"no {label} line is left to measure ({repeated} occur in the training text as well); "
                f"give more documents (one in {HELD_OUT} is held out), or other text with --train"
            )
        found[label] = Split(tuple(kept), len(documents), repeated, cut)
    return found


def pairs(argument: str) -> tuple[str, str, list[tuple[str, str]]]:
    """ "ar,en=FILE.jsonl": the two languages and the rows that have a text in both."""
    match = re.fullmatch(r"([\w-]+),([\w-]+)=(.+)", argument)
    if not match:
        raise ValueError(
            f"{argument!r} names no parallel text; expected LANGUAGE,LANGUAGE=FILE.jsonl, such as ar,en=x.jsonl"
        )
    first, second, path = match.groups()
    rows = [(row.get(first), row.get(second)) for _, row in _objects(Path(path))]
    found = [(ours, theirs) for ours, theirs in rows if ours and theirs]
    if not found:
        raise ValueError(f"{path}: no row has a text under both {first!r} and {second!r}")
    return first, second, found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
