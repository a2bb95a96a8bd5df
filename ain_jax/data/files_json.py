"""The rows of a JSON file: the items of a list, however long, in bounded memory.

The brackets are found here, not by a library for streams of JSON, so that reading goes on behind an item that is no
JSON or no UTF-8, an item without end takes no memory, and a file can be cut between items.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

from ain_jax.data import files_text
from ain_jax.data.files_text import (
    BLOCK,
    COMPRESSED,
    BrokenFile,
    Found,
    blocks,
    cut_lines,
    decode,
    file_size,
    json_lines,
    pieces,
    too_long,
    without_mark,
)

# Keys of a record itself. Any other key of an object that holds a list of objects holds the file's rows.
RECORD_LISTS = frozenset(
    ("conversations", "conversation", "messages", "dialog", "dialogue", "history", "prompt", "completion")
) | {"chosen", "rejected", "images", "image", "videos", "video"}
# A string, whole or cut off by the end of the bytes, or a bracket.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("|\\?\Z)|[\[\]{}]', re.DOTALL)
_OBJECTS = re.compile(rb"\s*[{\]]")  # behind "[": the list has objects, or nothing
_QUOTE, _OPENING = ord('"'), frozenset(b"[{")


def json_rows(path: str, start: int = 0, stop: int = -1, first: int = 0) -> Iterator[Found]:
    """The items of a JSON file: of its list, of the one list in its object, or its lines where each is an object.

    A piece (start > 0) lies inside the list.
    """
    kind, begin = json_start(path)
    if kind == "lines":
        yield from json_lines(path, start, stop, first)
        return
    if kind == "object":
        yield from _one_object(path)
        return
    start = start or begin
    for number, (_, _, item) in enumerate(json_items(blocks_from(path, start, stop), closed=stop < 0), start=first):
        value, fault = (None, too_long(files_text.MAX_LINE + 1)) if item is None else decode(item)
        yield f"#{number}", value, fault


def blocks_from(path: str, start: int, stop: int = -1) -> Iterator[bytes]:
    """As `blocks`, but `start` counts decompressed bytes."""
    if not path.lower().endswith(COMPRESSED):
        yield from blocks(path, start, stop)
        return
    for block in blocks(path):
        skipped = min(start, len(block))
        start -= skipped
        if len(block) > skipped:
            yield block[skipped:]


def json_start(path: str) -> tuple[str, int]:
    """("list", where its first item may begin), ("lines", 0) or ("object", 0)."""
    head = b""
    try:
        for block in blocks(path):
            head += block
            if len(head) >= BLOCK:
                break
    except BrokenFile:
        if not head.strip():
            raise  # else it is told behind what is whole
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BrokenFile("text in UTF-16; save the file as UTF-8")
    begin = len(head) - len(head.removeprefix(b"\xef\xbb\xbf").lstrip())
    if head[begin : begin + 1] == b"[":
        return "list", begin + 1
    line, _, after = head[begin:].partition(b"\n")
    if head[begin : begin + 1] != b"{" or (decode(line.strip())[0] is not None and after.strip()):
        return "lines", 0
    depth, key = 0, b""
    for match in _TOKEN.finditer(head, begin):
        sign = head[match.start()]
        if sign == _QUOTE:
            key = match.group() if depth == 1 else key
            continue
        name = key.strip(b'"').decode("utf-8", "replace")
        if depth == 1 and sign == ord("[") and name not in RECORD_LISTS and _OBJECTS.match(head, match.end()):
            return "list", match.end()
        depth += 1 if sign in _OPENING else -1
        if not depth:
            break
    # An object on one line longer than this head: a line as good as any.
    return ("object" if b"\n" in head or len(head) < BLOCK else "lines"), 0


def _one_object(path: str) -> Iterator[Found]:
    kept, size = [], 0
    for block in without_mark(blocks(path)):
        size += len(block)
        kept.append(block)
        if size > files_text.MAX_LINE:
            raise BrokenFile(
                f"an object that holds no list of rows, of more than {files_text.MAX_LINE:,} bytes; give a list"
            )
    value, fault = decode(b"".join(kept).strip())
    yield "#0", value, fault


def json_items(parts: Iterator[bytes], closed: bool) -> Iterator[tuple[int, int, bytes | None]]:
    """(begin, end, bytes) of each item of a list whose bytes begin behind its "["; None: longer than MAX_LINE.

    BrokenFile if the list has no end (where it is to be `closed`), or if other lists or objects follow it.
    """
    buffer, base = b"", 0  # base: the place of buffer[0]
    at = begin = depth = 0  # at: looked through up to here; begin: of the item, or of the gap before it
    opened = 0  # where in the list the item begins, also if that is no longer in the buffer
    long = False
    while True:
        cut = None  # the string that the end of the buffer cuts off
        for match in _TOKEN.finditer(buffer, at):
            sign, place = buffer[match.start()], match.start()
            if sign == _QUOTE:
                if match.group(1) != b'"':
                    cut = match
                    break
                continue
            if not depth:
                if gap := buffer[begin:place].strip(b" \t\r\n,"):
                    yield base + begin, base + place, gap  # a number or a string where an object is expected
                begin, opened = place, base + place
            depth += 1 if sign in _OPENING else -1
            if depth < 0:
                _nothing_after(itertools.chain([buffer[match.end() :]], parts))
                return
            if not depth:
                long = long or match.end() - begin > files_text.MAX_LINE
                yield opened, base + match.end(), None if long else buffer[begin : match.end()]
                begin, long = match.end(), False
        at = cut.start() if cut else len(buffer)
        if len(buffer) - begin > files_text.MAX_LINE:
            long, begin = True, at  # what was looked through goes
        base, buffer, at, begin = base + begin, buffer[begin:], at - begin, 0
        if cut and len(buffer) > files_text.MAX_LINE:
            left = b'"' + cut.group(1)  # still inside the string, perhaps behind a backslash
            base, buffer = base + len(buffer) - len(left), left
        more, size = [buffer], 0
        for block in parts:
            more.append(block)
            size += len(block)
            if size >= len(buffer):  # doubled, so that a long string is not looked through once a block
                break
        if not size:
            if not closed:
                if gap := buffer.strip(b" \t\r\n,"):
                    yield base, base + len(buffer), gap
                return
            raise BrokenFile("the list has no end; the file breaks off" + (" inside an item" if depth else ""))
        buffer = b"".join(more)


def _nothing_after(parts: Iterable[bytes]) -> None:
    """Nothing, or BrokenFile if another list or object follows the list of rows."""
    for block in parts:
        if found := re.search(rb"[\[{]", block):
            what = "list" if found.group() == b"[" else "object"
            raise BrokenFile(f"another {what} follows the list of rows and is not read; keep one list in the file")


def cut_json(path: str, count: int) -> list[tuple[int, int, int]]:
    """(start, stop, items before) of up to `count` pieces; one pass finds where items begin."""
    try:
        kind, offset = json_start(path)
        if kind == "lines":
            return cut_lines(path, count)
        share = (file_size(path) - offset) / count
        cuts = [(offset, 0)]
        if kind == "list" and count > 1:
            for number, (begin, _, _) in enumerate(json_items(blocks(path, offset), closed=False)):
                if begin >= share * len(cuts):
                    cuts.append((offset + begin, number))
            return pieces(cuts)
    except BrokenFile:
        pass  # reading it as a whole tells why
    return [(0, -1, 0)]
