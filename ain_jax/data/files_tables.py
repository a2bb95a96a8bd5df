"""Rows of Parquet files and of Arrow files, which Hugging Face's datasets saves."""

import json
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from ain_jax.data.files_text import BrokenFile, Found, is_remote, open_binary

TOGETHER = 32  # rows turned into Python objects at once; their pictures may have megabytes each
ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)  # what pyarrow raises for damaged files


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        source = open_binary(path) if is_remote(path) else path
        # The limits are there for damaged headers, which may ask for any amount of memory.
        limits: dict[str, Any] = {"thrift_string_size_limit": 2**27, "thrift_container_size_limit": 2**24}
        return pq.ParquetFile(source, buffer_size=2**20, **limits)
    except ERRORS as error:
        raise BrokenFile(f"no whole Parquet file ({_told(error)}); get the file again") from None


def parquet_rows(
    path: str, start: int = 0, stop: int = -1, first: int = 0, columns: Collection[str] = ()
) -> Iterator[Found]:
    """The rows of row groups `start` to `stop`, numbered from `first`; only these columns, where any are named."""
    file = _open_parquet(path)
    names = [name for name in file.schema_arrow.names if name in columns] if columns else None
    number = first
    for group in range(start, file.num_row_groups if stop < 0 else min(stop, file.num_row_groups)):
        count = file.metadata.row_group(group).num_rows
        done = 0
        try:
            for batch in file.iter_batches(TOGETHER, row_groups=[group], columns=names):
                for values, fault in _objects(batch):
                    yield f"#{number + done}", values, fault
                    done += 1
        except ERRORS as error:
            lost = f"row group {group} is damaged ({_told(error)}): its other {count - done} rows are lost"
            yield f"#{number + done}", None, lost
        number += count


def cut_parquet(path: str, count: int) -> list[tuple[int, int, int]]:
    """(first row group, the one after the last, rows before) of up to `count` pieces, of about as many rows each."""
    try:
        file = _open_parquet(path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except BrokenFile:
        return [(0, -1, 0)]  # reading it tells why
    return _shares(sizes, count)


def _shares(sizes: list[int], count: int) -> list[tuple[int, int, int]]:
    """(begin, end, rows before) of pieces of neighbours: [3, 3, 3] in two gives (0, 1, 0) and (1, 3, 3)."""
    if count < 2 or len(sizes) < 2:
        return [(0, -1, 0)]
    total, before, cuts = sum(sizes), 0, []
    for i, size in enumerate(sizes):
        if before * count >= len(cuts) * total:
            cuts.append((i, before))
        before += size
    ends = [begin for begin, _ in cuts[1:]] + [len(sizes)]
    return [(begin, end, before) for (begin, before), end in zip(cuts, ends, strict=True)]


def _batches(path: str) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow stream or file; BrokenFile where it breaks off."""
    try:
        source: Any = pa.PythonFile(open_binary(path), "r") if is_remote(path) else pa.memory_map(path)
        with source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader: Any = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            if is_file:
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from reader
    except ERRORS as error:
        if isinstance(error, BrokenFile):
            raise
        raise BrokenFile(f"damaged Arrow data ({_told(error)}); get the file again") from None


def arrow_rows(
    path: str, start: int = 0, stop: int = -1, first: int = 0, columns: Collection[str] = ()
) -> Iterator[Found]:
    """The rows of record batches `start` to `stop`, numbered from `first`; only these columns, where any are named."""
    number = first
    for i, batch in enumerate(_batches(path)):
        if i < start or (0 <= stop <= i):
            if 0 <= stop <= i:
                return
            continue
        if columns:
            batch = batch.select([name for name in batch.schema.names if name in columns])
        for at in range(0, batch.num_rows, TOGETHER):
            for values, fault in _objects(batch.slice(at, TOGETHER)):
                yield f"#{number}", values, fault
                number += 1


def cut_arrow(path: str, count: int) -> list[tuple[int, int, int]]:
    """(first record batch, the one after the last, rows before) of up to `count` pieces."""
    try:
        return _shares([batch.num_rows for batch in _batches(path)], count) if count > 1 else [(0, -1, 0)]
    except BrokenFile:
        return [(0, -1, 0)]  # reading it tells why


def _objects(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Each row as Python objects, or what is wrong with it."""
    try:
        batch.validate(full=True)  # Arrow files are not checked by their reader; a wild offset would end the process
        rows = batch.to_pylist()
    except (*ERRORS, OverflowError) as error:
        if batch.num_rows <= 1:
            yield None, f"damaged or not UTF-8 text ({_told(error)})"
            return
        for i in range(batch.num_rows):
            yield from _objects(batch.slice(i, 1))
        return
    yield from ((row, "") for row in rows)


def _told(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# Folders that `Dataset.save_to_disk` wrote


def saved_files(folder: epath.Path) -> list[str] | None:
    """The Arrow files of a folder that Hugging Face's datasets saved, in order; None for another folder."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        if len(splits) != 1:
            told = " or ".join(str(folder / split) for split in splits)
            raise ValueError(f"{folder}: holds {len(splits)} splits; name one of them: {told}")
        folder = folder / splits[0]
    if not (folder / "state.json").exists():
        return None
    state = json.loads((folder / "state.json").read_text())
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{folder}: a selection of rows is kept beside the data; save it after flatten_indices()")
    return [str(folder / file["filename"]) for file in state["_data_files"]]
