"""A plan as numbers for JSON, and as tables on the terminal."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ain_jax.plan import estimate
from ain_jax.plan.chips import GIB, Slices
from ain_jax.plan.compile import Compiled, TooLarge
from ain_jax.plan.search import Tried

DAY = 86400


def heading(experiment: str, slices: Slices) -> dict[str, Any]:
    """What a plan's JSON begins with: the slice, and what its chips can do by whose word."""
    return {
        "experiment": experiment,
        "slice": slices.name,
        "topology": slices.topology,
        "slices": slices.count,
        "chips": slices.chips,
        "chip": dataclasses.asdict(slices.chip),
        "stages": {},
    }


def numbers(found: Compiled | TooLarge, slices: Slices, price: float | None) -> dict[str, Any]:
    """Every figure of one stage."""
    if isinstance(found, TooLarge):
        return {"fits": False, **dataclasses.asdict(found)}
    roof = found.roofline(slices)
    result = dataclasses.asdict(found) | {"fits": found.fits, "tokens_per_step": found.tokens}
    for name, seconds in (("overlapped", roof.fastest), ("in_turn", roof.slowest)):
        result[name] = {
            "step_seconds": seconds,
            **{f"mfu_{kind}": estimate.mfu(slices, flops, seconds) for kind, flops in found.model_flops.items()},
            "tokens_per_second": found.tokens / seconds,
            "tokens_per_day": found.tokens / seconds * DAY,
            "chip_hours_per_billion_tokens": 1e9 / found.tokens * seconds / 3600 * slices.chips,
        }
        if found.steps:
            result[name] |= dataclasses.asdict(estimate.cost(slices, found.steps, found.tokens, seconds, price))
    return result | {"roofline_seconds": dataclasses.asdict(roof), "bound": roof.bound, "price": price}


def show(found: Compiled | TooLarge, told: dict[str, Any], slices: Slices) -> None:
    """One stage's tables on the terminal."""
    console = Console()
    if isinstance(found, TooLarge):
        console.print(
            f"[bold]{found.stage}[/bold] ({found.program}) does not fit {slices.name}: needs {_gib(found.needed)} of "
            f"HBM a chip, which has {_gib(found.limit)} (the compiler: {found.message})",
            highlight=False,
        )
        return
    m = found.memory
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1) or "one chip"
    table = Table(title=f"{found.stage} on {slices.name}: {slices.chips} chips, {mesh}, remat {found.remat}")
    table.add_column("per chip and step")
    table.add_column("", justify="right")
    table.add_column("")
    rows = [
        ("parameters", _gib(m.parameters), f"{found.parameters:,} in all, {found.trained:,} learn"),
        ("optimiser", _gib(m.optimizer), ""),
        ("batch", _gib(m.batch), f"{found.rows} rows of {found.row_tokens:,} tokens, accumulate {found.accumulate}"),
        ("arguments", _gib(m.arguments), "the three together, as laid out with padding"),
        ("gradients, activations", _gib(m.temporaries), "the compiler's temporaries"),
        ("peak HBM", _gib(m.peak), f"reserved, of {_gib(m.limit)}: " + ("fits" if m.fits else "DOES NOT FIT")),
        ("live at once", _gib(m.live), "the compiler's own peak, without gaps and scratch"),
    ]
    for program in found.programs:
        its = program.memory
        beside = f"; {_gib(its.beside)} of it lie beside" if its.beside else ""
        rows.append((f"peak HBM, {program.name}", _gib(its.peak), ("fits" if its.fits else "DOES NOT FIT") + beside))
    for row in rows:
        table.add_row(*row)
    table.add_section()
    totals = found.model_flops
    per_chip = lambda flops: f"{flops / slices.chips / 1e12:.2f} TFLOP"
    table.add_row('model FLOPs, "all"', per_chip(totals["all"]), "6N a token, L x L pairs; no remat")
    table.add_row('model FLOPs, "needed"', per_chip(totals["needed"]), "seen pairs, learnt targets; no remat")
    table.add_row("matrix products programmed", per_chip(found.flops_programmed), "with what remat computes again")
    loops = f"; loops counted once: {len(found.unknown_loops)}" if found.unknown_loops else ""
    table.add_row("HBM read and written", _gb(found.hbm_bytes), f"loops multiplied out{loops}")
    table.add_row("", _gb(found.hbm_bytes_once), "as the compiler counts, a loop's body once")
    for c in found.collectives:
        where = " between slices" if c.between_slices else ""
        table.add_row(f"{c.kind}{where}", _gb(c.wire), f"{c.count:,.0f} times; {_gb(c.bytes)} of arrays")
    table.add_section()
    roof = found.roofline(slices)
    for name, seconds in dataclasses.asdict(roof).items():
        table.add_row(f"time: {name}", f"{seconds * 1e3:,.1f} ms", "decides" if name == roof.bound else "")
    table.add_section()
    for name, label in (("overlapped", "all of it overlapped"), ("in_turn", "the network not overlapped")):
        part = told[name]
        detail = f'MFU {part["mfu_all"]:.1%} ("all"), {part["mfu_needed"]:.1%} ("needed")'
        table.add_row(f"step: {label}", f"{part['step_seconds'] * 1e3:,.1f} ms", detail)
        table.add_row("", f"{part['tokens_per_day'] / 1e9:,.2f} G", "tokens a day")
        per = f"{part['chip_hours_per_billion_tokens']:,.0f} chip-hours"
        table.add_row("", per, "a billion tokens")
        if found.steps:
            price = f", {part['dollars']:,.0f} dollars" if part["dollars"] is not None else ""
            detail = (
                f"{part['hours']:,.1f} hours{price} for {part['steps']:,} steps, {part['tokens'] / 1e9:,.2f} G tokens"
            )
            table.add_row("", f"{part['chip_hours']:,.0f} chip-hours", detail)
    console.print(table, highlight=False)
    for line in found.assumed:
        console.print(f"assumed: {line}", highlight=False)
    if not found.steps:
        console.print("steps unknown: bind Budget.tokens for the cost in all", highlight=False)
    chip = slices.chip
    console.print(
        f"at peak: {chip.bf16_flops / 1e12:,.0f} TFLOP/s in bfloat16, {chip.hbm_bandwidth / 1e9:,.0f} GB/s HBM, "
        f"{chip.ici_bandwidth / 1e9:,.0f} GB/s ICI, {chip.dcn_bandwidth / 1e9:,.2f} GB/s DCN; by {chip.source}; "
        f"compiled in {found.seconds:,.0f} s",
        highlight=False,
    )


def show_change(change: Tried | None) -> dict[str, Any] | None:
    """What would make it fit."""
    if change is None:
        print("none of the usual changes makes it fit; --search tries other meshes, a larger slice has more memory")
        return None
    print(f"it would fit ({_gib(change.peak)}) with " + " ".join(f"--set '{text}'" for text in change.overrides))
    return dataclasses.asdict(change)


def show_search(stage: str, tried: Sequence[Tried], slices: Slices) -> list[dict[str, Any]]:
    """The ranking of a search, and what to type for its first."""
    table = Table(title=f"{stage} on {slices.name}: what was tried, the quickest that fits first")
    for name in ("", "tokens/s", "beside yours", "peak HBM", "changes", ""):
        table.add_column(name, justify="left" if name in ("changes", "") else "right")
    yours = next((one.tokens_per_second for one in tried if not one.overrides), 0.0)
    for place, one in enumerate(tried, 1):
        speed = f"{one.tokens_per_second:,.0f}" if one.tokens_per_second else ""
        beside = f"{one.tokens_per_second / yours - 1:+.0%}" if yours and one.overrides and speed else ""
        changes = "\n".join(one.overrides) or "none: as it is"
        peak = _gib(one.peak) if one.peak else ""
        table.add_row(str(place) if one.fits else "", speed, beside, peak, changes, one.fault)
    console = Console()
    console.print(table, highlight=False)
    console.print(
        "tokens/s: the roofline's, with the network not overlapped. Other rows are another batch: the rate may have "
        "to change with them",
        highlight=False,
    )
    if not tried[0].fits:
        print("nothing of this fits: a larger slice has more memory")
    elif not tried[0].overrides:
        print("nothing of this is quicker than the settings as they are")
    else:
        print("the quickest that fits: " + " ".join(f"--set '{text}'" for text in tried[0].overrides))
    return [dataclasses.asdict(one) for one in tried]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
