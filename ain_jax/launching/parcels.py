"""Folders as files of a bounded size, for a machine that is reached by small copies alone.

pack([data, models], parcels)   parcels/00000.part, 00001.part, ... and SHA256SUMS, which is written last
unpack(parcels, place)          every part is compared with its sum before any file is written

The parts together are one .tar.gz, so that Python alone opens them; `sha256sum -c SHA256SUMS` knows the sums as well.
"""

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from ain_jax.kits.packages import sha256

SUMS = "SHA256SUMS"
MARK = ".unpacked"  # where parts were unpacked: the sums of the last ones
MIB = 1 << 20


class _Parts(io.RawIOBase):
    """What is written goes to numbered files of at most so many bytes each."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.sums = folder, size, dict[str, str]()
        self.part, self.left, self.sum = None, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        written = len(view)
        while view:
            if self.part is None:
                self.part = (self.folder / f"{len(self.sums):05d}.part").open("wb")
                self.left, self.sum = self.size, hashlib.sha256()
            taken = view[: self.left]
            self.part.write(taken)
            self.sum.update(taken)
            self.left, view = self.left - len(taken), view[len(taken) :]
            if not self.left:
                self.finish()
        return written

    def finish(self) -> None:
        """Close the part that is open."""
        if self.part is not None:
            self.part.close()
            self.sums[Path(self.part.name).name] = self.sum.hexdigest()
            self.part = None


class _Whole(io.RawIOBase):
    """Files read one after another as if they were one."""

    def __init__(self, paths: Sequence[Path]):
        self.paths, self.file = list(paths), io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not (count := self.file.readinto(buffer)) and self.paths:
            self.file.close()
            self.file = self.paths.pop(0).open("rb")
        return count or 0


def pack(paths: Sequence[Path], into: Path, mib: int) -> list[Path]:
    """The parts that hold these files and folders, each by its path from here. Parts of before are replaced.

    `mib` is the most that a part may have, in MiB. Raises ValueError for what is not there or lies elsewhere.
    """
    if mib < 1:
        raise ValueError(f"parts of {mib} MiB; expected 1 or more")
    names = {path: _from_here(path) for path in paths}
    into.mkdir(parents=True, exist_ok=True)
    for old in (into / SUMS, *into.glob("*.part")):
        old.unlink(missing_ok=True)
    parts, without_locks = _Parts(into, mib * MIB), lambda info: None if info.name.endswith(".lock") else info
    with (
        gzip.GzipFile(fileobj=parts, mode="wb", compresslevel=4, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", dereference=True) as tar,
    ):
        for path, name in names.items():
            tar.add(path, name, filter=without_locks)
    parts.finish()
    beside = into / f"{SUMS}.tmp"
    told = [f"# {len(parts.sums)} parts", *(f"{digest}  {name}" for name, digest in parts.sums.items())]
    beside.write_text("\n".join(told) + "\n", encoding="utf-8")
    beside.replace(into / SUMS)
    return [into / name for name in parts.sums]


def _from_here(path: Path) -> str:
    if not path.exists():
        raise ValueError(f"{path} is not there; expected a file or a folder to pack")
    try:
        return str(Path(os.path.normpath(path.absolute())).relative_to(Path.cwd()))
    except ValueError:
        raise ValueError(f"{path} lies outside {Path.cwd()}: it would have no place at the other end") from None


def unpack(parcels: Path, into: Path) -> bool:
    """Lay the packed files below `into`; whether there was anything to do.

    What was unpacked there before is left alone. Raises ValueError, which names every part that is missing or was
    damaged on the way, before anything is written.
    """
    told = parcels / SUMS
    if not told.is_file():
        raise ValueError(f"{told} is not there: it comes with the parts, and says which there are")
    mark, text = into / MARK, told.read_text(encoding="utf-8")
    if mark.is_file() and mark.read_text(encoding="utf-8") == text:
        return False
    head, *lines = text.splitlines() or [""]
    sums = {name: wanted for wanted, _, name in (line.partition("  ") for line in lines)}
    if head != f"# {len(sums)} parts" or not all(sums):
        raise ValueError(f"{told} is not whole: it begins with {head!r}, and names {len(sums)} parts; copy it again")
    faults = [f"{name} {fault}" for name, wanted in sums.items() if (fault := _fault(parcels / name, wanted))]
    if faults:
        raise ValueError(f"of {len(sums)} parts in {parcels}: {', '.join(faults)}; copy them again")
    whole = io.BufferedReader(_Whole([parcels / name for name in sums]), MIB)
    with gzip.GzipFile(fileobj=whole) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
        tar.extractall(into, filter="data")
    mark.write_text(text, encoding="utf-8")
    return True


def _fault(part: Path, wanted: str) -> str:
    if not part.is_file():
        return "is missing"
    return "" if sha256(part) == wanted else "is damaged"
