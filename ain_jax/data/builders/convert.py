"""What a worker does with its share of a source: rows -> records -> ArrayRecord shards, and the rows refused.

Nothing here imports jax, which each worker process would otherwise load beside the parent's.
"""

import functools
import hashlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ain_jax.data import files, filters, forms
from ain_jax.data.builders.coding import serialise
from ain_jax.data.builders.records import Group
from ain_jax.data.files import Part, Row
from ain_jax.data.filters import Filters
from ain_jax.data.forms_video import Sampling

SHARD_BYTES = 512 << 20  # of records before compression; a worker begins another shard then
OPTIONS = "group_size:1"  # each record by itself, as reading by index wants it
TICK = 64  # rows between two signs of life
REASONS = 200  # kinds of reasons that a worker counts apart
SHOWN = 200  # characters of a text in the rejects file
PROGRESS = "progress.npy"


@dataclass(frozen=True)
class Job:
    """What is the same for all workers."""

    source: str
    form: str
    language: str
    images: str
    ids: str  # "own" or "place"
    sampling: Sampling
    filters: Filters
    held_out: float
    folder: str  # of unfinished files
    parent: int  # the process for which the work is done


@dataclass(frozen=True)
class Shard:
    path: str
    split: str
    records: int
    bytes: int


@dataclass(frozen=True)
class Converted:
    """What became of one task's rows. N accepted records, in the order of the rows."""

    rows: int
    rejected: int
    left_out: int  # sound, and not wanted
    reasons: Counter[str]  # of both
    words_N: np.ndarray  # uint64, of what is said in the records; empty where it may be said again
    hashes_N: np.ndarray  # uint64, of the records' ids
    held_out_N: np.ndarray  # bool
    codes_N: np.ndarray  # int32, which of `groups`
    groups: tuple[Group, ...]
    shards: tuple[Shard, ...]  # of each split in order


def id_hash(name: str) -> int:
    """64 bits that stand for an id; the chance that two of ten million ids are taken for one is 3 in a million."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "big")


def is_held_out(hashed: int, share: float) -> bool:
    """Whether an id is of the split "test"; a larger share holds out the same ids and more."""
    return hashed < share * 2.0**64


def rejects_path(folder: str | Path, task: int) -> Path:
    return Path(folder) / f"rejects-{task:06}.jsonl"


def places_path(folder: str | Path, task: int) -> Path:
    """The file with the place and id of each accepted record, for the rows that say the same id again."""
    return Path(folder) / f"places-{task:06}.jsonl"


def convert(job: Job, task: int, parts: Sequence[Part], tick: Callable[[int, int], object]) -> Converted:
    """Writes the shards, rejects and places of one task; `tick` is told the rows and the rejected now and then."""
    rows = rejected = left_out = 0
    reasons: Counter[str] = Counter()
    hashes, words, held_out, codes, groups = [], [], [], [], {}
    writers = {split: _Shards(job.folder, split, task) for split in ("train", "test")}
    with (
        open(rejects_path(job.folder, task), "w", encoding="utf-8") as rejects,
        open(places_path(job.folder, task), "w", encoding="utf-8") as places,
    ):
        for row in _rows(parts, job.form):
            rows += 1
            try:
                if row.values is None:
                    raise ValueError(row.fault)
                record = forms.to_record(row, job.form, job.source, job.language, job.images, job.sampling)
                if job.ids == "place":
                    record = replace(record, id=row.where)
                record = filters.apply(record, job.filters)
                data, hashed = serialise(record), id_hash(record.id)
            except MemoryError:
                raise
            except Exception as error:  # whatever one row of ten million leads to, it is that row's fault
                unwanted = isinstance(error, filters.LeftOut)
                left_out, rejected = left_out + unwanted, rejected + (not unwanted)
                reason = _told(error).removeprefix(f"{row.where}: ")
                kind = reason_kind(reason)
                reasons[kind if kind in reasons or len(reasons) < REASONS else "other reasons"] += 1
                write_reject(rejects, row.where, reason, shortened(row.values))
            else:
                test = is_held_out(hashed, job.held_out)
                writers["test" if test else "train"].write(data)
                hashes.append(hashed)
                if job.filters.repeated:
                    words.append(filters.words_hash(record))
                held_out.append(test)
                codes.append(groups.setdefault(Group.of(record), len(groups)))
                places.write(json.dumps([row.where, record.id]) + "\n")
            if rows % TICK == 0:
                rejects.flush()
                tick(rows, rejected)
    shards = tuple(shard for writer in writers.values() for shard in writer.close())
    tick(rows, rejected)
    return Converted(
        rows,
        rejected,
        left_out,
        reasons,
        np.array(words, np.uint64),
        np.array(hashes, np.uint64),
        np.array(held_out, bool),
        np.array(codes, np.int32),
        tuple(groups),
        shards,
    )


def _rows(parts: Sequence[Part], form: str) -> Iterator[Row]:
    # Any column may be a language of parallel text, and our own form has no others.
    columns = () if form in ("parallel", "record") else forms.columns(form)
    for part in parts:
        try:
            yield from files.rows(part, columns)
        except (ValueError, OSError) as error:
            raise ValueError(f"{part.path}: cannot be read on ({error}); mend the file, or leave it out") from error


class _Shards:
    """ArrayRecord files of one split, one after another; none where nothing is written."""

    def __init__(self, folder: str, split: str, task: int):
        self._pattern = os.path.join(folder, f"{split}-{task:06}-{{:03}}.shard")
        self._split = split
        self._done: list[Shard] = []
        self._writer: Any = None
        self._records = self._bytes = 0

    def write(self, data: bytes) -> None:
        if self._writer is not None and self._bytes + len(data) > SHARD_BYTES:
            self._end()
        if self._writer is None:
            self._writer = ArrayRecordWriter(self._path(), OPTIONS)
        self._writer.write(data)
        self._records += 1
        self._bytes += len(data)

    def close(self) -> list[Shard]:
        if self._writer is not None:
            self._end()
        return self._done

    def _path(self) -> str:
        return self._pattern.format(len(self._done))

    def _end(self) -> None:
        self._writer.close()
        self._done.append(Shard(self._path(), self._split, self._records, self._bytes))
        self._writer, self._records, self._bytes = None, 0, 0


def without(shard: Shard, positions: Sequence[int]) -> Shard | None:
    """The shard written again without the records at these positions; None if nothing is left."""
    reader: Any = ArrayRecordReader(shard.path)
    dropped, beside = set(positions), shard.path + ".tmp"
    writer: Any = ArrayRecordWriter(beside, OPTIONS)
    size = 0
    for start in range(0, shard.records, TICK):
        for position, data in enumerate(reader.read(start, min(start + TICK, shard.records)), start):
            if position not in dropped:
                writer.write(data)
                size += len(data)
    reader.close()
    writer.close()
    os.replace(beside, shard.path)
    return Shard(shard.path, shard.split, shard.records - len(dropped), size) if shard.records > len(dropped) else None


# What is said of a row that is refused


def write_reject(file: TextIO, where: str, reason: str, row: Any) -> None:
    line = json.dumps({"where": where, "reason": reason, "row": row}, ensure_ascii=False)
    file.write(line.encode("utf-8", "replace").decode("utf-8") + "\n")  # the row may hold what is no Unicode


def _told(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"no Unicode text: {error.object[error.start : error.end]!r} at character {error.start}"
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"


_PARTICULAR = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\([^()]*\)|\d[\d,.]*")


def reason_kind(reason: str) -> str:
    """A reason without names and numbers, to be counted: its first clause, at most 80 characters.

    "picture 'a/7.png': broken picture of 12 bytes (cut off); replace the file" is
    "picture …: broken picture of … bytes"
    """
    first = _PARTICULAR.sub("…", reason[:1000]).split(";")[0]
    first = re.sub(r" ([:?,])", r"\1", re.sub(r"(… ?)+", "… ", first))
    return re.sub(r"\s+", " ", first).strip(" .:…")[:80] or "no reason given"


def shortened(value: Any, depth: int = 4) -> Any:
    """A row as it stands in the rejects file: long texts and lists cut, bytes counted."""
    if isinstance(value, str):
        return value if len(value) <= SHOWN else f"{value[:SHOWN]}… ({len(value):,} characters)"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    if isinstance(value, bool | int | float) or value is None:
        return value
    if depth and isinstance(value, dict):
        kept = {str(key)[:SHOWN]: shortened(item, depth - 1) for key, item in list(value.items())[:20]}
        return kept | ({"…": f"{len(value):,} keys"} if len(value) > 20 else {})
    if depth and isinstance(value, list | tuple):
        return [shortened(item, depth - 1) for item in value[:4]] + ([f"… {len(value):,}"] if len(value) > 4 else [])
    return shortened(str(value)) if not isinstance(value, dict | list | tuple) else "…"


# In a process of its own


def begin() -> None:
    """Interrupts are left to the parent: a terminal sends them to every process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def convert_in_worker(job: Job, task: int, parts: Sequence[Part]) -> Converted:
    """As `convert`, with a sign of life in a file that the parent reads; it ends when the parent is gone."""
    progress = np.load(Path(job.folder) / PROGRESS, mmap_mode="r+")
    return convert(job, task, parts, functools.partial(_tick, progress[task], job.parent))


def _tick(progress: np.ndarray, parent: int, rows: int, rejected: int) -> None:
    progress[:] = rows, rejected
    if os.getppid() != parent:
        os._exit(1)  # nobody waits for the result
