"""A run -> tables on the terminal and one self-contained HTML page."""

from pathlib import Path
from typing import Any


def print_stage(stage: str, numbers: dict[str, Any], seconds: float) -> None:
    print(stage, round(seconds, 1))


def print_table(summary: dict[str, Any]) -> None:
    pass


def write(summary: dict[str, Any], root: Path, resolved: Any) -> Path:
    return root / "report.html"
