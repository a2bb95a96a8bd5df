"""Columns on disk: arrays that are written as they come, and read without being loaded.

A folder holds one .npy file for each column and a small JSON file with the rest. It is written beside its place and
then renamed, so that it is there whole or not at all.
"""

import contextlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

REST = "rest.json"  # what of a folder is no array


class Growing:
    """An .npy file that grows by rows; `close` writes into its head how many there are.

    >>> column = Growing(Path("/tmp/a.npy"), np.int32, (2,)); column.add([[1, 2]]); column.add([[3, 4]]); column.close()
    >>> np.load("/tmp/a.npy").tolist()
    [[1, 2], [3, 4]]
    """

    def __init__(self, path: Path, dtype: Any, tail: Sequence[int] = ()):
        self.dtype, self.tail, self.rows = np.dtype(dtype), tuple(tail), 0
        self.file = path.open("wb")
        self._head()
        self.begin = self.file.tell()

    def add(self, values: Any) -> None:
        array = np.ascontiguousarray(values, self.dtype).reshape(-1, *self.tail)
        self.file.write(array.data if len(array) else b"")
        self.rows += len(array)

    def close(self) -> None:
        if not self.file.closed:
            self.file.seek(0)
            self._head()
            assert self.file.tell() == self.begin, "numpy leaves room in the head for the number of rows"
            self.file.close()

    def _head(self) -> None:
        head = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self.file, head | {"shape": (self.rows, *self.tail)})


@contextlib.contextmanager
def growing(folder: Path, kinds: Mapping[str, tuple[Any, Sequence[int]]]) -> Iterator[dict[str, Growing]]:
    """A growing file in `folder` for each column, {name: (dtype, sizes of the axes behind the first)}."""
    columns: dict[str, Growing] = {}
    try:
        for name, (dtype, tail) in kinds.items():
            columns[name] = Growing(folder / f"{name}.npy", dtype, tail)
        yield columns
    finally:
        for column in columns.values():
            column.close()


def opened(folder: Path, name: str) -> np.ndarray:
    """A column, mapped into memory: a read costs the pages that it touches."""
    path = folder / f"{name}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except ValueError:  # nothing can be mapped of a column without rows
        return np.load(path)


def write_rest(folder: Path, values: Mapping[str, Any]) -> None:
    (folder / REST).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", "utf-8")


def read_rest(folder: Path) -> dict[str, Any]:
    """What of a folder is no array; a ValueError where it is no such folder."""
    try:
        return json.loads((folder / REST).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read ({error}): delete it, and it is made anew") from None


def beside(path: Path) -> Path:
    """A new folder to write into, which `put` makes to `path`; two processes do not share one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    return made


def put(made: Path, path: Path) -> None:
    """Rename a finished folder to `path`, in place of what stands there. Who has that mapped goes on reading it."""
    for _ in range(100):
        try:
            made.rename(path)
            return
        except OSError:  # another stands there, or another process has just put one there
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True) if path.is_file() else None
    raise OSError(f"{made} cannot be renamed to {path}: is it in use, or may nothing be written there?")


class Mapped:
    """A dataclass whose mapped columns are handed to another process by the names of their files, not as numbers."""

    def __getstate__(self) -> dict[str, Any]:
        whole = lambda v: isinstance(v, np.memmap) and isinstance(v.base, mmap.mmap)
        return {name: _File(str(v.filename)) if whole(v) else v for name, v in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, _File):
                value = opened(Path(value).parent, Path(value).stem)
            object.__setattr__(self, name, value)


class _File(str):
    """The path of a mapped column."""
