"""Real data small enough to ship: where it lies, and its tables as rows. README.md names its sources."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


@lru_cache
def rows(name: str) -> tuple[dict[str, Any], ...]:
    """The rows of `name`.jsonl: udhr, handbook, dialect, emoji, names, flags or terms."""
    path = FOLDER / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.jsonl")))
        raise ValueError(f"sample table {name!r}: no such table; there are {known or 'none: run rebuild.py'}")
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
