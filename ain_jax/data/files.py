"""Rows of the files that data is published in, each with its place, whatever the container.

    .jsonl .ndjson        one object a line                          corpus.jsonl:17    (lines are counted from 1)
    .json                 a list, an object with one list, or lines  talks.json#16      (items from 0)
    .txt                  documents parted by blank lines, or lines  news.txt:17        (its first line)
    .parquet              rows                                       a.parquet#120      (rows from 0)
    .tar                  WebDataset samples                         shard.tar/000123   (what the members share)
    a folder              that datasets' save_to_disk wrote, or of one kind of the files above

The text files and tars may be compressed (.gz, .zst, .tgz). Paths of gs:// and the like go through etils.epath. A row
that cannot be read is a Row with a fault, and reading goes on; so does what is whole before a file breaks off.
"""

import difflib
import glob
import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from ain_jax.data.files_json import cut_json, json_rows
from ain_jax.data.files_tables import arrow_rows, cut_arrow, cut_parquet, parquet_rows, saved_files
from ain_jax.data.files_tar import cut_tar, tar_rows
from ain_jax.data.files_text import (
    BrokenFile,
    as_path,
    cut_lines,
    decode,
    documents,
    file_size,
    holds_blank_lines,
    is_remote,
    json_lines,
    open_binary,
)

__all__ = ["Part", "Row", "decode", "find", "mark", "parts", "rows"]

# Endings of names -> (reader, cutter or None); a reader takes path, start, stop, first.
LINES, TABLES = (json_lines, cut_lines), (".parquet", ".pq", ".arrow")
READERS: dict[str, tuple[Any, Any]] = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".jsonlines": LINES,
    ".json": (json_rows, cut_json),
    ".txt": (documents, cut_lines),
    ".parquet": (parquet_rows, cut_parquet),
    ".pq": (parquet_rows, cut_parquet),
    ".arrow": (arrow_rows, cut_arrow),
    ".tar": (tar_rows, cut_tar),
    ".tgz": (tar_rows, None),
}
# Files that lie beside data and hold none.
NOTES = frozenset(f"{name}.json" for name in ("dataset_info", "dataset_infos", "dataset_dict", "state", "config"))
SMALL = 16 * 2**20  # bytes; `mark` reads the whole of files up to this size


@dataclass(frozen=True)
class Part:
    """What of one file one worker reads; (0, -1) is the whole file."""

    path: str
    start: int = 0  # bytes of lines, JSON and tars, row groups of Parquet, record batches of Arrow
    stop: int = -1
    first: int = 0  # rows (or lines) of the file before it
    name: str = ""  # what its rows call the file; "": the path's last part


@dataclass(frozen=True)
class Row:
    """One row as it was found, or why it could not be read."""

    where: str
    values: dict[str, Any] | None
    fault: str = ""
    folder: str = ""  # where relative picture paths are looked up


def _kind(path: str) -> str:
    """The ending that says how a file is read, "" if none does: "a.jsonl.gz" gives ".jsonl"."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in (".gz", ".zst"):
        suffix = os.path.splitext(stem)[1]
        return "" if suffix in TABLES else suffix if suffix in READERS else ""
    return suffix if suffix in READERS else ""


def find(pattern: str) -> list[str]:
    """The files of a path, a glob or a folder, in order; a ValueError if there is none, or names all that are empty.

    Of a folder: the Arrow files that `save_to_disk` listed there, else its files of a known kind, else those one level
    below (as data/train-*.parquet of a published set). They must be of one kind, and of one split if their names tell
    splits, so that nothing held out is trained on by mistake.
    """
    if not pattern:
        raise ValueError("an empty path; expected a file, a pattern such as data/*.jsonl, or a folder")
    try:
        found = _find(pattern)
        # An unreadable size is told when the file is read.
        empty = [path for path in found if file_size(path) == 0]
    except (OSError, ImportError) as error:
        raise ValueError(f"{pattern}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    unknown = [path for path in found if not _kind(path)]
    if unknown:
        known = ", ".join(READERS)
        raise ValueError(f"{', '.join(unknown[:5])}: no known kind of file; expected {known}, or those as .gz or .zst")
    if empty:
        told = ", ".join(empty[:10]) + (f" and {len(empty) - 10} more" if len(empty) > 10 else "")
        raise ValueError(f"{told}: empty (0 bytes); get the file again, or leave it out")
    return found


def _find(pattern: str) -> list[str]:
    path = as_path(pattern)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return [pattern]
    if glob.has_magic(pattern):
        found = _glob(pattern)
        if found:
            return found
        raise ValueError(f"{pattern}: no file matches; look at the folder and the pattern{_near(pattern)}")
    raise ValueError(f"{pattern}: no such file or folder{_near(pattern)}")


def _glob(pattern: str) -> list[str]:
    """The files that match, without those of NOTES, which "*.json" would take along."""
    if is_remote(pattern):
        whole = pattern.split("/")
        fixed = next(i for i, piece in enumerate(whole) if glob.has_magic(piece))
        found = [str(path) for path in epath.Path("/".join(whole[:fixed])).glob("/".join(whole[fixed:]))]
    else:
        found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    return sorted(path for path in found if os.path.basename(path) not in NOTES)


def _near(pattern: str) -> str:
    """A clause with the names beside a path that are like its last part."""
    folder = epath.Path(pattern).parent
    try:
        beside = sorted(path.name for path in folder.iterdir())
    except OSError:
        return f"; there is no folder {folder}"
    close = difflib.get_close_matches(os.path.basename(pattern), beside, n=3, cutoff=0.5)
    told = " or ".join(map(repr, close)) if close else ", ".join(p for p in beside if _kind(p)) or "no file of data"
    return f"; did you mean {told}?" if close else f"; {folder} holds {told[:300]}"


def _folder(folder: epath.Path) -> list[str]:
    saved = saved_files(folder)
    if saved is not None:
        return saved
    found = _data_files(folder)
    if not found:
        found = [path for below in sorted(folder.iterdir()) if below.is_dir() for path in _data_files(below)]
    if not found:
        raise ValueError(f"{folder}: holds no file of data; expected {', '.join(READERS)}, or those as .gz or .zst")
    kinds = sorted({_kind(path) for path in found})
    if len(kinds) > 1:
        raise ValueError(
            f"{folder}: holds files of several kinds ({', '.join(kinds)}); name one as {folder}/*{kinds[0]}"
        )
    splits = sorted({split for path in found if (split := _split(path))})
    if len(splits) > 1:
        ending = f"{splits[-1]}*{kinds[0]}"
        raise ValueError(
            f"{folder}: holds the splits {', '.join(splits)}; name one, as {os.path.dirname(found[0])}/{ending}"
        )
    return found


def _data_files(folder: epath.Path) -> list[str]:
    paths = sorted(path for path in folder.iterdir() if _kind(path.name) and path.name not in NOTES)
    return [str(path) for path in paths if not path.name.startswith(".") and not path.is_dir()]


def _split(path: str) -> str:
    """The split that a published file's name tells: "train-00000-of-00004.parquet" gives "train"."""
    name = os.path.basename(path).lower()
    return next(
        (s for s in ("train", "validation", "valid", "dev", "test", "eval") if name.startswith((f"{s}-", f"{s}."))), ""
    )


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: their last parts, unless two are equal."""
    for length in range(1, 32):
        names = ["/".join(path.split("/")[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def parts(paths: Sequence[str], count: int) -> list[Part]:
    """The files in about `count` parts of about equal size, in order: each row lies in exactly one.

    There are more where there are more files; fewer where they cannot be cut: compressed files, files of one row
    group, documents parted by blank lines. Files of lines, JSON and tars are looked through once to be cut.
    """
    sizes = [file_size(path) for path in paths]
    total = max(1, sum(sizes))
    made = []
    for path, name, size in zip(paths, _names(paths), sizes, strict=True):
        kind, share = _kind(path), -(-count * size // total)
        cut = READERS[kind][1] if kind and path.lower().endswith(kind) and share > 1 else None
        if kind == ".txt" and cut and holds_blank_lines(path):
            cut = None
        for start, stop, first in cut(path, share) if cut else [(0, -1, 0)]:
            made.append(Part(path, start, stop, first, name))
    return made


def rows(part: Part, columns: Collection[str] = ()) -> Iterator[Row]:
    """Each row of the part. Of tables only these columns are read, where any are named.

    A fault of the file as a whole, or its end before time, is one more Row; so is a file that holds no row.
    """
    name = part.name or os.path.basename(part.path)
    folder = os.path.dirname(part.path)
    reader = READERS[_kind(part.path)][0]
    more = {"columns": columns} if _kind(part.path) in TABLES and columns else {}
    count, place = 0, ""
    try:
        for place, values, fault in reader(part.path, part.start, part.stop, part.first, **more):
            count += 1
            yield Row(name + place, values, fault, folder)
    except BrokenFile as error:
        after = f"after {place.lstrip(':#/')}: " if place else ""
        yield Row(name, None, f"{after}{error}", folder)
        return
    if not count and (part.start, part.stop) == (0, -1):
        yield Row(name, None, "no row in the file; get it again, or leave it out", folder)


def mark(paths: Sequence[str]) -> str:
    """A digest that changes with the files: their names, sizes, and contents, or times of change above SMALL bytes.

    Pictures that lie beside the files are not in it.
    """
    digest = hashlib.sha256()
    for path, name in zip(paths, _names(paths), strict=True):
        size = file_size(path)
        digest.update(f"{name}\0{size}\0".encode())
        if size <= SMALL:
            with open_binary(path) as file:
                digest.update(hashlib.sha256(file.read()).digest())
        else:
            # As a float: archives and copies keep no nanoseconds, and what was made of a file shall outlive its move.
            changed = as_path(path).stat().mtime if is_remote(path) else os.stat(path).st_mtime
            digest.update(str(changed).encode())
    return digest.hexdigest()[:16]
