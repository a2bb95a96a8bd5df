"""Samples of WebDataset tars: members that stand together and share a name up to its first dot."""

import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from ain_jax.data.files_text import COMPRESSED, MAX_LINE, BrokenFile, Found, blocks, decode, open_binary, too_long
from ain_jax.data.forms_video import VIDEO_FILES

MEMBERS = "__members__"  # in a sample's values: its pictures and videos, by the name of their member
KEY = "__key__"  # likewise the name that the members share
VIDEOS = frozenset(name[1:] for name in VIDEO_FILES)
PICTURES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"))
TEXTS = frozenset(("txt", "text", "caption"))


class _Stream:
    """A file for reading on, made of blocks."""

    def __init__(self, parts: Iterator[bytes]):
        self._parts, self._kept = parts, b""

    def read(self, size: int) -> bytes:
        more = [self._kept]
        have = len(self._kept)
        while have < size and (block := next(self._parts, None)) is not None:
            more.append(block)
            have += len(block)
        data = b"".join(more)
        self._kept = data[size:]
        return data[:size]


def _members(path: str, start: int, stop: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """(archive, member) of the files whose headers begin from `start` to `stop`; BrokenFile where it breaks off."""
    told: list[tarfile.HeaderError] = []

    class Told(tarfile.TarInfo):
        """tarfile takes a damaged header, and a missing end, for the end; here they are told apart."""

        @classmethod
        def frombuf(cls, buf, encoding, errors):
            try:
                return super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                told.append(error)
                raise

    compressed = path.lower().endswith((*COMPRESSED, ".tgz"))
    file = cast(IO[bytes], _Stream(blocks(path))) if compressed else open_binary(path)
    try:
        if start:
            file.seek(start)
        with tarfile.open(fileobj=file, mode="r|" if compressed else "r:", tarinfo=Told) as archive:
            while (member := archive.next()) is not None:
                if 0 <= stop <= member.offset:
                    return
                cast(Any, archive).members = []  # else all headers are kept
                if member.isfile():
                    yield archive, member
    except BrokenFile:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        raise BrokenFile(f"damaged or broken off ({error}); get the file again") from None
    finally:
        if not compressed:
            file.close()
    if not told or type(told[-1]).__name__ != "EOFHeaderError":
        raise BrokenFile("damaged or broken off behind its last whole member; get the file again")


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        opened = archive.extractfile(member)
        data = opened.read() if opened else b""
    except BrokenFile:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise BrokenFile(f"damaged or broken off inside a member ({error}); get the file again") from None
    if len(data) < member.size:
        raise BrokenFile("broken off inside a member; get the file again")
    return data


def _key(name: str) -> tuple[str, str]:
    """(what a sample's members share, the rest): "a/000.seg.png" gives ("a/000", "seg.png")."""
    folder, base = os.path.split(name)
    stem, _, rest = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem).removeprefix("./"), rest.lower()


def tar_rows(path: str, start: int = 0, stop: int = -1, first: int = 0) -> Iterator[Found]:
    """Each sample: the keys of its .json, its .txt as "txt", its pictures and videos under MEMBERS, its name under KEY.

    Other members (.cls, .npy, sound ...) are passed over. A sample that the file breaks off in is lost.
    """
    key, values, faults = "", {}, []
    for archive, member in _members(path, start, stop):
        new, kind = _key(member.name)
        if os.path.basename(member.name).startswith((".", "__MACOSX")):
            continue
        if new != key:
            if key:
                yield _sample(key, values, faults)
            key, values, faults = new, {}, []
        last = kind.rpartition(".")[2]
        if not (last in PICTURES or last in VIDEOS or last in TEXTS or last == "json"):
            continue
        if member.size > MAX_LINE:
            faults.append(f".{kind}: {too_long(member.size)}")
            continue
        data = _read(archive, member)
        _add(values, faults, member.name, kind, data)
    if key:
        yield _sample(key, values, faults)


def _add(values: dict[str, Any], faults: list[str], name: str, kind: str, data: bytes) -> None:
    last = kind.rpartition(".")[2]
    if last in PICTURES or last in VIDEOS:
        values.setdefault(MEMBERS, {})[name] = data
    elif last == "json":
        read, fault = decode(data.strip().removeprefix(b"\xef\xbb\xbf"))
        if read is None:
            faults.append(f".{kind}: {fault}")
        else:
            values.update(read)
    else:
        try:
            values["txt"] = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            faults.append(f".{kind}: not UTF-8 text ({error.reason} at byte {error.start})")


def _sample(key: str, values: dict[str, Any], faults: list[str]) -> Found:
    if faults:
        return f"/{key}", None, "; ".join(faults)
    if not values:
        return f"/{key}", None, "no .json, .txt or picture among its members"
    return f"/{key}", {**values, KEY: key}, ""


def cut_tar(path: str, count: int) -> list[tuple[int, int, int]]:
    """(start, stop, 0) in bytes of up to `count` pieces of a tar that is not compressed; one pass reads its headers."""
    if count < 2:
        return [(0, -1, 0)]
    starts: list[int] = []
    key = ""
    try:
        for _, member in _members(path, 0, -1):
            new, _ = _key(member.name)
            if new != key and not os.path.basename(member.name).startswith((".", "__MACOSX")):
                starts.append(member.offset)
                key = new
    except BrokenFile:
        return [(0, -1, 0)]  # reading it tells why
    if len(starts) < 2:
        return [(0, -1, 0)]
    cuts = sorted({starts[len(starts) * i // count] for i in range(count)} | {starts[0]})
    return [(begin, end, 0) for begin, end in zip([0, *cuts[1:]], [*cuts[1:], -1], strict=True)]
