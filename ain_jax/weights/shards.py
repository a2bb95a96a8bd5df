"""safetensors files, read slice by slice and written tensor by tensor.

The library maps a file into memory, where pages once read count as the process' own and are faulted in one by one; a
plain read of the bytes wanted is two to three times quicker and holds nothing but what it returns. So the library looks
through each file's header and we read the bytes.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
BUFFER_BYTES = 2**24
MAPPED_BYTES = 2**20
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what it is, and where its first byte lies."""

    name: str
    path: Path
    kind: str  # as the file names the dtype: "BF16"
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """Raises KeyError for a kind that is not in DTYPES."""
        return DTYPES[self.kind]

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The slices of the tensor that `index` names (whole where it names none); no other byte is read.

        Of a (4, 6) tensor, [1:3, 2:4] are two runs of two numbers, [1:3] is one run of twelve.
        """
        index = (*index, *(slice(None) for _ in self.shape[len(index) :]))
        ranges = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        cut = [axis for axis, (kept, size) in enumerate(zip(ranges, self.shape, strict=True)) if len(kept) < size]
        last = cut[-1] if cut else 0  # behind this axis all is kept: from there on the bytes are one run
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        starts = np.zeros((), np.int64)
        for axis in range(last):
            starts = starts[..., None] + np.asarray(ranges[axis], np.int64) * strides[axis]
        starts = starts.reshape(-1) + (ranges[last].start * strides[last] if self.shape else 0)
        array = _buffer([len(kept) for kept in ranges], self.dtype)
        target = array.reshape(-1).view(np.uint8).data
        if len(target):
            run = len(target) // len(starts)
            with self.path.open("rb", buffering=0) as file:
                for i, start in enumerate(starts.tolist()):
                    self._fill(file.fileno(), target[i * run : (i + 1) * run], start * self.dtype.itemsize)
        return array

    def _fill(self, file: int, target: memoryview, start: int) -> None:
        done = 0
        while done < len(target):  # one call reads 2 GiB at most
            read = os.preadv(file, [target[done:]], self.offset + start + done)
            if not read:
                raise ValueError(f"{self.path} ends within {self.name}; download it again")
            done += read

    def blocks(self) -> Iterator[np.ndarray]:
        """The tensor in blocks of rows, each within a small buffer where a row is."""
        rows = max(1, BUFFER_BYTES // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for first in range(0, self.shape[0], rows):
            yield self.read((slice(first, first + rows),))


def _buffer(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array to read into. Large ones are mapped, so that the system has them back at once when they are let go.

    An allocator keeps what it was given back, up to 32 MB apiece, and the host's memory would grow past one tensor.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < MAPPED_BYTES:
        return np.empty(shape, dtype)
    mapped = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to be had and given back
    return np.frombuffer(mapped, dtype, count).reshape(shape)


def stored(folder: Path) -> list[Stored]:
    """Every tensor of the folder's safetensors files. A file that is missing, damaged or not as its index says is told.

    Raises one ValueError of all faults.
    """
    places = _weight_map(folder)
    names = sorted(set(places.values())) if places else sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise ValueError(f"{folder} holds no *.safetensors; expected a folder as transformers saves it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: {INDEX} names {', '.join(missing)}, not found; download the folder again")
    tensors = [tensor for name in names for tensor in header(folder / name)]
    found = {tensor.name: tensor.path.name for tensor in tensors}
    faults = [
        f"{name} is said to be in {file}, but lies in {found.get(name, 'no file of the folder')}"
        for name, file in places.items()
        if found.get(name) != file
    ]
    if faults:
        raise ValueError(f"{folder / INDEX} is not of these files, {len(faults)} faults:\n  " + "\n  ".join(faults))
    return tensors


def header(path: Path) -> list[Stored]:
    """Every tensor of one file."""
    try:
        with safe_open(path, framework="numpy"):  # looks through lengths and offsets
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}{_lengths(path)}; download it again") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    return [
        Stored(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    ]


def _lengths(path: Path) -> str:
    """What a damaged file has and what it says that it should have, as far as that can be read."""
    size = path.stat().st_size if path.is_file() else 0
    if size < 8:
        return f"; it has {size} bytes, expected at least 8"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return f"; it has {size} bytes, expected {8 + length} for its header alone"
        try:
            ends = [
                entry["data_offsets"][1] for name, entry in json.loads(file.read(length)).items() if name[:2] != "__"
            ]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            return ""
    return f"; it has {size} bytes, expected {8 + length + max(ends, default=0)}"


def write(path: Path, entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """A safetensors file of the tensors that `entries` announces, their arrays taken one by one in that order.

    The library's own writer asks for all arrays of a file at once.
    """
    kinds, header, at = {dtype: kind for kind, dtype in DTYPES.items()}, {}, 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin where numbers of any size may
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, told), array in zip(entries.items(), arrays, strict=True):
            assert (array.dtype, array.shape) == told, f"{name} is {array.dtype} {array.shape}, announced was {told}"
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor, from the folder's index; empty where there is none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f'{path} has no "weight_map" from tensors to files; download it again')
    return places


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a folder as transformers saves it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value
