"""A data check in the terminal: tables, and the examples as running text, what is learnt in green.

Text from right to left is set apart by Unicode isolates, so that it does not reorder what stands beside it, and
characters that would steer the terminal are shown as U+FFFD.
"""

import itertools
import unicodedata
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ain_jax import report_page
from ain_jax.data import check_rows
from ain_jax.data.check import Report, StageReport
from ain_jax.data.check_rows import Piece, RowReport, Shown
from ain_jax.tokenizer.display import FIRST_STRONG, POP

LEARNT, READ, SPECIAL, PICTURE, FAULT = "bold green", "", "cyan", "magenta", "bold red"
LEGEND = (("learnt", LEARNT), ("read, not learnt", READ), ("control tokens", SPECIAL), ("pictures", PICTURE))


def print_report(report: Report, console: Console | None = None) -> None:
    """The report on standard output."""
    console = console or Console(highlight=False)
    for stage in report.stages:
        console.rule(Text(f"{report.experiment}: {stage.stage}"))
        if any(source.counts for source in stage.sources):
            console.print(_counts(stage))
            console.print(_lengths(stage))
            for source in stage.sources:
                longest = ", ".join(f"{name} ({tokens:,})" for name, tokens in source.longest)
                console.print(Text(f"the longest of {source.name}: {isolated(longest)}" if longest else "", "dim"))
        for source in stage.sources:
            if source.shown:
                console.print(Text.assemble("\nexamples of ", (source.name, "bold"), "   ", *_legend()))
            for example in source.shown:
                console.print(_example(example, stage.images))
        if stage.mixture:
            console.print(
                Text("\nwhat the rows of the stage hold", "italic"), Text(stage.mixture), sep="\n", soft_wrap=True
            )
        if stage.row:
            console.print(_row(stage.row))
        for stop in stage.stops:
            console.print(Text.assemble(("\nthe stage would stop: ", FAULT), isolated(stop)), soft_wrap=True)
        for source in stage.sources:
            for note in source.notes:
                console.print(Text(f"{source.name}: {note}", "dim"))
            for fault in source.faults:
                console.print(
                    Text.assemble(f"\n{source.name}: ", (f"{fault.what}, {fault.count:,}", FAULT)), soft_wrap=True
                )
                for where in fault.where:
                    console.print(Text("  " + isolated(where)), soft_wrap=True)
    for path, rows, reasons in report.rejected:
        console.print(Text(f"\nrejected before: {rows:,} rows, {path}"))
        for reason, count in reasons:
            console.print(Text(f"  {count:,}  {isolated(reason)}"))
    total = report.faults
    told = f"\n{total:,} fault{'s' if total != 1 else ''} found" if total else "\nno fault found"
    console.print(Text(told, FAULT if total else "bold"))


def _legend() -> list[tuple[str, str] | str]:
    return list(itertools.chain.from_iterable((pair, "  ") for pair in LEGEND))


def isolated(text: str) -> str:
    """The text with nothing in it that steers the terminal; each line with letters from right to left is isolated."""

    def line(text: str) -> str:
        turned = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text)
        return FIRST_STRONG + text + POP if turned else text

    return "\n".join(map(line, report_page.visible(text).split("\n")))


def _counts(stage: StageReport) -> Table:
    table = Table(title="what the sources hold", title_justify="left", box=None, pad_edge=False)
    table.add_column("source", overflow="fold")
    for name in ("examples", "tokens", "learnt", "pictures", "patches"):
        table.add_column(name, justify="right")
    for source in stage.sources:
        for row in source.counts:
            share = f"{row.learnt / row.tokens:.0%}" if row.tokens else ""
            cells = (row.examples, row.tokens, share, row.pictures, row.patches)
            name = source.name if row.group == "all" else "  " + row.group
            table.add_row(Text(name), *(cell if isinstance(cell, str) else f"{cell:,}" for cell in cells))
    return table


def _lengths(stage: StageReport) -> Table:
    title = f"tokens of an example; a row holds {stage.row_tokens:,}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("source", overflow="fold")
    for name in (*(f"{q:.0%}" for q in check_rows.QUANTILES), "share of a row"):
        table.add_column(name, justify="right")
    for source in stage.sources:
        if source.lengths:
            share = f"{source.lengths[-1] / stage.row_tokens:.0%}"
            table.add_row(Text(source.name), *(f"{n:,}" for n in source.lengths), share)
    return table


def _example(example: Shown, images: Any) -> Text:
    out = Text.assemble("\n", (isolated(example.id), "bold"), f"  {example.group}")
    for number, picture in enumerate(example.pictures):
        out.append(f"\n  picture {number}: {check_rows.seen(picture, images)}", PICTURE)
    for name, found in example.sequences:
        out.append("\n")
        if name:
            out.append(f"{name}: ", "bold")
        out.append(running(found))
    return out


def running(found: Sequence[Piece]) -> Text:
    """Pieces as running text: neighbours of one look are one stretch, so that Arabic letters join."""
    out = Text()
    for (kind, learnt), group in itertools.groupby(found, lambda piece: (piece.kind, piece.learnt)):
        stretch = list(group)
        if kind == "picture":
            out.append("".join(f"[{piece.label}]" for piece in stretch), PICTURE)
            continue
        style = LEARNT if learnt else SPECIAL if kind == "special" else READ
        out.append(isolated("".join(piece.text for piece in stretch)), style)
    return out


def _row(row: RowReport) -> Table:
    tokens, patches, targets = (f"{n:,} of {of:,}" for n, of in zip(row.used, row.budgets, strict=True))
    title = (
        f"\nrow {row.index:,} of {row.rows:,}: {tokens} tokens, {patches} patches, {targets} targets; "
        f"all rows are {row.filled:.1%} full, {row.best:.1%} at best"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("segment", justify="right")
    table.add_column("source", overflow="fold")
    table.add_column("record", overflow="fold")
    for name in ("from place", "tokens", "learnt", "patches"):
        table.add_column(name, justify="right")
    for s in row.segments:
        numbers = (f"{n:,}" for n in (s.first, s.tokens, s.learnt, s.patches))
        table.add_row(str(s.number), Text(s.source), Text(isolated(s.id)), *numbers)
    return table
