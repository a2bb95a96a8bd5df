"""A run -> lines and a table on the terminal, the verdicts on its targets, and one self-contained HTML page.

python -m ain_jax.report runs/ain_tiny              # the page and the table of a finished run, made again
python -m ain_jax.report runs/ain_tiny --check      # and exit status 1 where a target does not hold
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ain_jax.report_measures import Verdict, columns, duration, heading, held, table, verdicts

__all__ = ["Verdict", "main", "print_stage", "print_table", "verdicts", "write"]


def print_stage(stage: str, numbers: Mapping[str, Any], seconds: float) -> None:
    """A line on what a finished stage came to, and a second one where there is more."""
    first, *more = _told(numbers) or ["finished"]
    print(f"{stage:16} {duration(seconds)}; {first}", *(f"{'':16} {line}" for line in more), sep="\n", flush=True)


def _told(numbers: Mapping[str, Any]) -> list[str]:
    if "fertility" in numbers:
        moved = (
            f"{code} {pair['before']['tokens_per_word']:.2f} -> {pair['after']['tokens_per_word']:.2f}"
            for code, pair in numbers["fertility"].items()
        )
        return [f"{numbers.get('new_pieces', 0):,} new pieces; tokens per word " + ", ".join(moved)]
    if "first" in numbers and "last" in numbers:
        first, last = numbers["first"], numbers["last"]
        head, *rest = [
            f"{name.removeprefix('loss/')} {_number(first.get(name))} -> {_number(last.get(name))}"
            for name in ("loss", *sorted(n for n in last if n.startswith("loss/")))
            if name == "loss" or (first.get(name), last.get(name)) != (None, None)  # a rare group, in neither window
        ]
        told = f"{numbers.get('steps', 0):,} steps, {numbers.get('slots_filled', 0):.1%} of slots filled; {head}"
        return [told, ", ".join(rest)] if rest else [told]
    if "models" in numbers:
        names = [name for name in numbers["models"] if name != "baselines"]
        claims = verdicts({"stages": {name: {} for name in names} | {"evaluate": numbers}})
        return [f"{', '.join(names)} measured; {held(claims)}"]
    if "files" in numbers:
        size = sum(numbers["files"].values()) / 1e6
        return [f"{len(numbers['files'])} files, {size:.1f} MB, in {numbers.get('folder', 'export')}/"]
    return [", ".join(f"{k} {_number(v)}" for k, v in numbers.items() if isinstance(v, int | float)) or "finished"]


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "?"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def print_table(summary: Mapping[str, Any]) -> None:
    """What each stage changed, which way is better, and whether the targets hold."""
    rows = table(summary)
    if not rows:
        return
    shown = columns(summary, rows)
    console = Console(force_jupyter=False)
    if not console.is_terminal:
        console = Console(force_jupyter=False, width=160)  # a log has no width of its own
    drawn = Table(box=box.SIMPLE_HEAD)
    drawn.add_column("measure", no_wrap=not console.is_terminal)
    for name in shown:
        drawn.add_column(Text(heading(name).replace(" ", "\n")), justify="right")
    drawn.add_column("better")
    drawn.add_column("target")
    for row in rows:
        told = {None: "", True: "ok", False: "no"}[row.holds]
        style = {None: "", True: "green", False: "bold red"}[row.holds]
        cells = [row.measure, *map(row.text, shown), "lower" if row.lower else "higher"]
        drawn.add_row(*map(Text, cells), Text(told, style))
    print(f"\n{summary.get('experiment', 'run')}: what each stage changed")
    console.print(drawn)
    claims = verdicts(summary)
    print(held(claims))
    for claim in claims:
        if not claim.holds:
            print(f"  not met: {claim.claim} ({claim.value:.3f} against {claim.bound:.3f})")


def write(summary: Mapping[str, Any], root: Path, resolved: Any = None) -> Path:
    """The path of the run's page, written beside and renamed. Without `resolved`, the stored config.gin is shown."""
    from ain_jax import report_page  # imports matplotlib: the table does without

    stored = root / "config.gin"
    config = resolved.text() if resolved is not None else stored.read_text("utf-8") if stored.is_file() else ""
    path, beside = root / "report.html", root / "report.html.tmp"
    beside.write_text(report_page.render(summary, root, config), encoding="utf-8")
    beside.replace(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status, after the table is printed and the page written for a finished run; `argv` as on a shell."""
    parser = argparse.ArgumentParser(
        prog="python -m ain_jax.report", description="Make the report of a finished run anew."
    )
    parser.add_argument("run_dir", type=Path, help="the run's folder, for example runs/ain_tiny")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a target does not hold")
    arguments = parser.parse_args(argv)
    root = arguments.run_dir
    try:
        summary = json.loads((root / "summary.json").read_text("utf-8"))
    except FileNotFoundError:
        print(
            f"ain_jax: {root / 'summary.json'} is not there: expected the folder of a finished run; run the "
            "experiment to its end first",
            file=sys.stderr,
        )
        return 1
    except ValueError as fault:
        print(
            f"ain_jax: {root / 'summary.json'} is not readable ({fault}); delete it and run the experiment again, "
            "which writes it anew and repeats no finished stage",
            file=sys.stderr,
        )
        return 1
    print_table(summary)
    print(f"report   {write(summary, root)}")
    claims = verdicts(summary)
    if arguments.check and not (claims and all(claim.holds for claim in claims)):
        print(f"ain_jax: {held(claims)}, where --check expects one or more, and all", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
