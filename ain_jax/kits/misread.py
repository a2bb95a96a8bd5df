"""What Tesseract makes of drawn lines: its own errors as rejected answers, and its error rate as a baseline.

Tesseract (`apt-get install tesseract-ocr tesseract-ocr-ara`) is run as a program, a list of pictures at a time.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ain_jax.data import drawn
from ain_jax.evaluate import scores
from ain_jax.kits.packages import Unavailable, clean
from ain_jax.kits.texts import bare

Json = dict[str, Any]
BATCH = 100  # pictures that one process reads
OPTIONS = ("-l", "ara", "--psm", "7")  # Arabic, one line


def version() -> str:
    """What the program says of itself; Unavailable where it or its Arabic is not installed."""
    if shutil.which("tesseract") is None:
        raise Unavailable("Tesseract is not installed: apt-get install tesseract-ocr tesseract-ocr-ara")
    languages = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True).stdout.split()
    if "ara" not in languages:
        raise Unavailable("Tesseract knows no Arabic here: apt-get install tesseract-ocr-ara")
    return subprocess.run(["tesseract", "--version"], capture_output=True, text=True).stdout.split("\n")[0]


def read(rows: Sequence[Json], folder: Path, workers: int = 2) -> list[str]:
    """What it reads in the one drawing of each row."""
    version()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(workers) as pool:  # threads wait for processes
        coming = []
        for start in range(0, len(rows), BATCH):
            names = []
            for number, row in enumerate(rows[start : start + BATCH], start):  # drawn here: fonts are shared
                told = drawn.drawing(in_folder(row["images"][0], folder))
                names.append(f"{scratch}/{number}.png")
                told.image().convert("L").save(names[-1])
            coming.append(pool.submit(_read, names, Path(f"{scratch}/{start}.txt")))
        return [text for batch in coming for text in batch.result()]


def _read(names: Sequence[str], listed: Path) -> list[str]:
    listed.write_text("".join(f"{name}\n" for name in names))
    command = ["tesseract", str(listed), "stdout", *OPTIONS, "-c", "page_separator=\f"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_THREAD_LIMIT": "1"})
    pages = done.stdout.decode("utf-8").split("\f")
    if done.returncode or len(pages) != len(names):
        raise ValueError(f"Tesseract read {len(pages)} of {len(names)} pictures: {done.stderr[-300:]!r}")
    return [clean(page) for page in pages]


def in_folder(words: Mapping[str, Any], folder: Path) -> Json:
    """A drawing's words with its files below the folder."""
    return {key: str(folder / value) if key in ("font", "picture") else value for key, value in words.items()}


def plain(text: str) -> str:
    """What is compared: no vowel marks, white space collapsed."""
    return clean(bare(text))


def pairs(rows: Sequence[Json], read_as: Sequence[str]) -> Iterator[Json]:
    """Rows that were misread, and not hopelessly: the truth is chosen, the misreading rejected."""
    for row, text in zip(rows, read_as, strict=True):
        question, answer = (turn["content"] for turn in row["messages"])
        wrong, right = plain(text), plain(answer)
        if wrong and wrong != right and 0 < scores.error_rate([right], [wrong]) <= 0.6:
            yield {"id": f"misread/{row['id']}", "language": row["language"], "prompt": question, "chosen": answer,
                   "rejected": clean(text), "images": row["images"]}  # fmt: skip


def rates(rows: Sequence[Json], read_as: Sequence[str]) -> dict[str, Any]:
    """Error rates by font and kind of ground ("Amiri-Regular/plain"), with the number of lines and of exact ones."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row, text in zip(rows, read_as, strict=True):
        groups.setdefault(f"{row['font']}/{row['kind']}", []).append(
            (plain(row["messages"][-1]["content"]), plain(text))
        )
    return {
        name: {
            "cer": round(scores.error_rate(*map(list, zip(*found, strict=True))), 5),
            "exact": round(sum(right == text for right, text in found) / len(found), 5),
            "lines": len(found),
        }
        for name, found in sorted(groups.items())
    }
