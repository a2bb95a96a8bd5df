"""Bytes of a file, decompressed, and the lines and documents in them, in bounded memory.

The readers go on behind a bad line where they can. What cannot be read beyond some point is a BrokenFile,
raised after all that was whole.
"""

import functools
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import zstandard
from etils import epath

MAX_LINE = 64 * 2**20  # bytes of a line or of a JSON value; longer ones are skipped, not kept in memory
BLOCK = 2**20  # bytes read at once
PIECE = 2**12  # bytes decompressed at once: at most 128 MiB come of them, as zstd writes 128 KiB for 4 bytes
COMPRESSED = (".gz", ".zst")
_BLANK = re.compile(rb"\n[ \t\r]*\n")

Found = tuple[str, dict[str, Any] | None, str]  # where in the file, the row, why there is none


class BrokenFile(ValueError):
    """The file cannot be read beyond this point; the message says why."""


def is_remote(path: str) -> bool:
    return "://" in path


def as_path(path: str) -> epath.Path:
    """The path, if etils.epath reaches addresses of its kind; else a ValueError."""
    try:
        return epath.Path(path)
    except KeyError:
        kind = path[: path.index("://") + 3]
        raise ValueError(f"files at {kind} cannot be reached; expected gs://, s3:// or a path here") from None


def open_binary(path: str) -> IO[bytes]:
    """The open file, here or wherever etils.epath reaches (gs://, s3:// ...); BrokenFile if it cannot be opened."""
    try:
        return as_path(path).open("rb") if is_remote(path) else open(path, "rb")
    except (OSError, ValueError, ImportError) as error:
        raise BrokenFile(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None


def blocks(path: str, start: int = 0, stop: int = -1) -> Iterator[bytes]:
    """The file's bytes from `start` to `stop` (-1: the end), decompressed if its name says so."""
    suffix = os.path.splitext(path)[1].lower()
    new: Callable[[], Any] | None = {
        ".gz": functools.partial(zlib.decompressobj, 31),
        ".tgz": functools.partial(zlib.decompressobj, 31),
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj(),
    }.get(suffix)
    raw = _raw(path, start, stop)
    return _decompressed(raw, new) if new else raw


def _raw(path: str, start: int, stop: int) -> Iterator[bytes]:
    with open_binary(path) as file:
        try:
            if start:
                file.seek(start)
            left = stop - start if stop >= 0 else -1
            while left and (block := file.read(BLOCK if left < 0 else min(BLOCK, left))):
                left -= len(block) if left > 0 else 0
                yield block
        except OSError as error:
            raise BrokenFile(f"cannot be read on ({error.strerror or error})") from None


def _decompressed(raw: Iterator[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    """One member or frame after another, as gzip and zstd files may hold; zeros behind the last are passed over."""
    decoder, begun, done, size = new(), False, [], 0
    try:
        for block in raw:
            for at in range(0, len(block), PIECE):
                piece = block[at : at + PIECE]
                while piece:
                    piece = piece if begun else piece.lstrip(b"\0")
                    begun = bool(piece) or begun
                    data = decoder.decompress(piece) if piece else b""
                    piece = b""
                    if decoder.eof:
                        decoder, begun, piece = new(), False, decoder.unused_data
                    done.append(data)
                    size += len(data)
                    if size >= BLOCK:
                        yield b"".join(done)
                        done, size = [], 0
    except (zlib.error, zstandard.ZstdError) as error:
        yield b"".join(done)
        raise BrokenFile(f"the compressed data are damaged ({error}); get the file again") from None
    except BrokenFile:
        yield b"".join(done)
        raise
    yield b"".join(done)
    if begun:
        raise BrokenFile("the compressed data break off; get the file again")


def without_mark(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks without a byte-order mark; BrokenFile if it is one of UTF-16."""
    head = next(parts, b"")
    while len(head) < 3 and (block := next(parts, b"")):
        head += block
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BrokenFile("text in UTF-16; save the file as UTF-8")
    return itertools.chain([head.removeprefix(b"\xef\xbb\xbf")], parts)


def lines(parts: Iterable[bytes], first: int = 0) -> Iterator[tuple[int, bytes | None, int]]:
    """(number from first + 1, the line without its end, its bytes) of each line; None for one above MAX_LINE."""
    number, kept, size = first, [], 0
    for block in parts:
        *whole, rest = block.split(b"\n")
        for piece in whole:
            number += 1
            size += len(piece)
            if size > MAX_LINE:
                yield number, None, size
            else:
                yield number, b"".join([*kept, piece]) if kept else piece, size
            kept, size = [], 0
        size += len(rest)
        if size > MAX_LINE:
            kept = []
        elif rest:
            kept.append(rest)
    if size:
        yield number + 1, (b"".join(kept) if size <= MAX_LINE else None), size


def decode(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object that a line of JSON holds, or None and why there is none."""
    twice: list[str] = []

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.extend(f"the key {k!r} stands more than once" for k in sorted({k for k in keys if keys.count(k) > 1}))
        return value

    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=no_key_twice)
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at character {error.colno} of {short(line.decode('utf-8'))}"
    except RecursionError:
        return None, "not a record: brackets within brackets without end"
    except ValueError as error:  # a number of more than 4,300 digits
        return None, f"not JSON: {error}"
    if twice:
        return None, "; ".join(twice)
    if not isinstance(value, dict):
        return None, f'expected a JSON object such as {{"text": ...}}, found {short(value)}'
    return value, ""


def too_long(size: int) -> str:
    return f"{size:,} bytes in one; at most {MAX_LINE:,} are read: cut it into several rows"


def json_lines(path: str, start: int = 0, stop: int = -1, first: int = 0) -> Iterator[Found]:
    """Each line that is not blank as an object; `first` lines lie before `start`."""
    parts = blocks(path, start, stop)
    for number, line, size in lines(parts if start else without_mark(parts), first):
        if line is None:
            yield f":{number}", None, too_long(size)
        elif line := line.strip():
            value, fault = decode(line)
            yield f":{number}", value, fault


def cut_lines(path: str, count: int) -> list[tuple[int, int, int]]:
    """(start, stop, lines before) of up to `count` pieces of a file that is not compressed; one pass counts lines."""
    size = file_size(path)
    targets = [size * i // count for i in range(1, count)]
    cuts, seen, offset = [(0, 0)], 0, 0
    for block in _raw(path, 0, -1) if targets else ():
        at = 0
        while targets and (end := block.find(b"\n", max(0, targets[0] - offset))) >= 0:
            seen += block.count(b"\n", at, end + 1)
            at = end + 1
            cuts.append((offset + at, seen))
            targets = [target for target in targets if target >= offset + at]  # a line may fill several shares
        seen += block.count(b"\n", at)
        offset += len(block)
    return pieces([cut for cut in cuts if cut[0] < size or cut == (0, 0)])


def pieces(cuts: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(start, stop, before) from (start, before): each ends where the next begins, the last with the file."""
    return [(start, stop, before) for (start, before), (stop, _) in zip(cuts, [*cuts[1:], (-1, 0)], strict=True)]


def file_size(path: str) -> int:
    return as_path(path).stat().length if is_remote(path) else os.path.getsize(path)


# Documents


def holds_blank_lines(path: str) -> bool:
    """Whether documents are set apart by blank lines, told from the file's first MiB; else one stands on each line."""
    try:
        head = next(blocks(path), b"")
    except BrokenFile:
        return False
    return bool(_BLANK.search(head.strip()))


def documents(path: str, start: int = 0, stop: int = -1, first: int = 0) -> Iterator[Found]:
    """Each document as {"text": ...}, named by its first line.

    Where blank lines stand between the lines, they part documents (as in CC-100 and OSCAR); in a file without blank
    lines in its first MiB each line is one (as in the corpora of OPUS).
    """
    together = holds_blank_lines(path)
    parts = blocks(path, start, stop)
    held: list[bytes] = []
    begin = size = 0
    end = [(0, b"", 0)]  # a blank line behind the last
    for number, line, length in itertools.chain(lines(parts if start else without_mark(parts), first), end):
        blank = line is not None and not line.strip()
        if not blank:
            begin, size = begin or number, size + length + 1
            held.append(line or b"")
            if size > MAX_LINE + 1:
                held.clear()
        if begin and (blank or not together):
            value, fault = (None, too_long(size)) if size > MAX_LINE + 1 else _text(b"\n".join(held))
            yield f":{begin}", value, fault
            held.clear()
            begin = size = 0


def _text(data: bytes) -> tuple[dict[str, Any] | None, str]:
    if b"\0" in data:
        return None, "NUL characters in the text; if the file is in UTF-16, save it as UTF-8"
    try:
        return {"text": data.decode("utf-8").replace("\r\n", "\n").strip("\r\n")}, ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 text ({error.reason} at byte {error.start})"


def short(value: Any) -> str:
    """The value as JSON of at most 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):
        text = repr(type(value))
    return text if len(text) <= 60 else text[:57] + "..."
