"""Settings that fit and are quick: batch x remat x mesh, each compiled, ranked by tokens a second."""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as Late
from pathlib import Path

import loky
from loky.process_executor import TerminatedWorkerError

from ain_jax import sharding
from ain_jax.data.packing import Packing
from ain_jax.experiment import Binding, Resolved, parse_override, resolve
from ain_jax.plan import compile as compiler
from ain_jax.plan.chips import GIB, Slices
from ain_jax.stages import registry
from ain_jax.stages.model_settings import Model
from ain_jax.train.loop import Trainer


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a search varies of a stage."""

    rows: int
    remat: str
    mesh: sharding.Mesh

    def overrides(self, stage: str, base: "Choice") -> tuple[str, ...]:
        """Bindings that make it out of another."""
        sizes, before = dataclasses.asdict(self.mesh), dataclasses.asdict(base.mesh)
        return (
            *((f"{stage}/Trainer.rows={self.rows}",) if self.rows != base.rows else ()),
            *((f'{stage}/Model.remat="{self.remat}"',) if self.remat != base.remat else ()),
            *(f"{stage}/Mesh.{axis}={size}" for axis, size in sizes.items() if size != before[axis]),
        )


@dataclasses.dataclass(frozen=True)
class Tried:
    """One choice and what became of it; `tokens_per_second` is what the roofline allows at best, 0 where it failed."""

    overrides: tuple[str, ...]  # none: the settings as they are
    tokens_per_second: float = 0.0
    peak: int = 0  # bytes of HBM
    fits: bool = False
    fault: str = ""
    seconds: float = 0.0  # that it took


def meshes(slices: Slices, kv_heads: int) -> Iterator[sharding.Mesh]:
    """Meshes over all chips, one copy of the model over each slice first, then more tensor or sequence parallel."""
    inside = slices.chips // slices.count
    for data, tensor, sequence in itertools.product((1, 2), (1, 2, 4), (1, 2)):
        if inside % (tensor * data * sequence) == 0 and kv_heads % tensor == 0:
            fsdp = inside // (tensor * data * sequence)
            yield sharding.Mesh(slices.count, data, fsdp, sequence, tensor)


def base_of(run: compiler.PlannedRun) -> Choice:
    """The settings as they are, the mesh with its sizes told."""
    return Choice(run.get(Trainer).rows, run.get(Model).remat, sharding.Mesh(**dict(run.mesh.shape)))


def choices(run: compiler.PlannedRun, slices: Slices) -> Iterator[Choice]:
    """What differs in one thing from the settings as they are: more kept, other batches, other meshes, in turn.

    What cannot be laid over the chips is left out, and costs nothing.
    """
    base = base_of(run)
    remats = [dataclasses.replace(base, remat=name) for name in ("minimal", "attention", "full") if name != base.remat]
    rows = [dataclasses.replace(base, rows=int(base.rows * share)) for share in (2.0, 0.5) if base.rows * share >= 1]
    others = [mesh for mesh in meshes(slices, run.config.text.kv_heads) if mesh != base.mesh]
    places = [dataclasses.replace(base, mesh=mesh) for mesh in others]
    turns = itertools.chain.from_iterable(itertools.zip_longest(remats, places, rows))
    return (choice for choice in turns if choice is not None and _can_be_laid(choice, run.get(Trainer).accumulate))


def _can_be_laid(choice: Choice, accumulate: int) -> bool:
    parts = choice.mesh.slice * choice.mesh.data * choice.mesh.fsdp
    return choice.rows % accumulate == 0 and (choice.rows // accumulate) % parts == 0


def joined(base: Choice, found: Sequence[tuple[Choice, Tried]], accumulate: int) -> Iterator[Choice]:
    """The best single changes together, where two or more of them fit and are quicker than what there is."""
    speed = max((tried.tokens_per_second for choice, tried in found if choice == base and tried.fits), default=0.0)
    ranked = sorted(found, key=lambda pair: -pair[1].tokens_per_second)
    better: dict[str, object] = {}
    for choice, tried in ranked:
        changed = [f.name for f in dataclasses.fields(Choice) if getattr(choice, f.name) != getattr(base, f.name)]
        if tried.fits and tried.tokens_per_second > speed and len(changed) == 1:
            better.setdefault(changed[0], getattr(choice, changed[0]))
    for count in range(len(better), 1, -1):
        for names in itertools.combinations(better, count):
            choice = dataclasses.replace(base, **{name: better[name] for name in names})
            if _can_be_laid(choice, accumulate):
                yield choice


def smaller(run: compiler.PlannedRun) -> Iterator[tuple[str, ...]]:
    """Changes that need less memory, the one that costs least first, each with those before it."""
    stage, trainer, made = run.stage, run.get(Trainer), ()
    mesh, settings = run.get(sharding.Mesh), run.get(Model)
    if mesh.fsdp != -1 and mesh.data not in (0, 1):
        made = (f"{stage}/Mesh.data=1", f"{stage}/Mesh.fsdp=-1")
        yield made
    if settings.remat != "full":
        made = (*made, f'{stage}/Model.remat="full"')
        yield made
    if settings.dtype != "bfloat16":
        made = (*made, f'{stage}/Model.dtype="bfloat16"')
        yield made
    shards = math.prod(run.mesh.shape[axis] for axis in sharding.RULES["rows"])
    for times in (2, 4):
        if trainer.rows // (trainer.accumulate * times) >= shards:
            yield (*made, f"{stage}/Trainer.accumulate={trainer.accumulate * times}")
    if settings.param_dtype != "bfloat16":
        made = (*made, f'{stage}/Model.param_dtype="bfloat16"')
        yield made
    packing = run.get(Packing)
    halves = {"row_tokens": packing.row_tokens // 2, "row_patches": packing.row_patches // 2}
    halves["row_targets"] = packing.row_targets // 2
    yield (*made, *(f"{stage}/Packing.{name}={value}" for name, value in halves.items() if value))


def attempt(
    bindings: list[Binding], overrides: tuple[str, ...], root: Path, stage: str, slices: Slices, step_alone: bool = True
) -> Tried:
    """One choice compiled; a fault is told in the result."""
    begun = time.monotonic()
    try:
        resolved = resolve(bindings, registry.SETTINGS, [parse_override(text) for text in overrides])
        found = compiler.compile_stage(resolved, root, stage, slices, step_alone)
    except Exception as fault:  # the compiler's own faults too: the search goes on
        told = " ".join(str(fault).split())[:200] or type(fault).__name__
        return Tried(overrides, fault=told, seconds=time.monotonic() - begun)
    return told_of(found, overrides, slices, time.monotonic() - begun)


def told_of(
    found: compiler.Compiled | compiler.TooLarge, overrides: tuple[str, ...], slices: Slices, seconds: float
) -> Tried:
    """What became of a choice that was compiled."""
    if isinstance(found, compiler.TooLarge):
        return Tried(overrides, peak=found.needed, fault="needs more memory", seconds=seconds)
    speed = found.tokens / found.roofline(slices).slowest
    fault = "" if found.fits else "needs more memory"
    return Tried(overrides, speed, found.memory.peak, found.fits, fault, seconds)


def apart(minutes: float, *arguments: object, of: Callable[..., Tried] = attempt) -> Tried:
    """`attempt` in a process of its own: its minutes are kept to, and where the compiler falls the search goes on."""
    executor = loky.get_reusable_executor(max_workers=1, timeout=600)
    overrides = arguments[1]
    assert isinstance(overrides, tuple)
    try:
        return executor.submit(of, *arguments).result(minutes * 60)
    except Late:
        executor.shutdown(kill_workers=True)
        return Tried(overrides, fault=f"not compiled within {minutes:g} minutes", seconds=minutes * 60)
    except TerminatedWorkerError:
        return Tried(overrides, fault="the compiler fell, or this machine has too little memory for it")
    except KeyboardInterrupt:
        executor.shutdown(kill_workers=True)
        raise


def search(
    bindings: list[Binding],
    resolved: Resolved,
    root: Path,
    stage: str,
    slices: Slices,
    tries: int,
    known: compiler.Compiled | compiler.TooLarge,
    minutes: float = 30.0,
    compiled: Callable[..., Tried] = apart,
) -> list[Tried]:
    """What was tried, the best first: the settings as they are (`known`), at most `tries` others, told as they come.

    First what differs in one thing, in two thirds of the tries; then the best of these together. Interrupted, it ranks
    what there is.
    """
    run = compiler.planned(resolved, root, stage, compiler.devices(slices))
    base, accumulate = base_of(run), run.get(Trainer).accumulate
    found = [(base, told_of(known, (), slices, known.seconds))]
    single = list(choices(run, slices))
    at_first = itertools.islice(single, max(1, tries * 2 // 3))
    print(
        f"{stage}: search: at most {tries} of {len(single)} single changes and their joins; this plan took "
        f"{known.seconds:,.0f} s, so all may take {math.ceil(tries * max(known.seconds, 1) / 60):,} minutes. Ctrl-C "
        "ranks what is there",
        file=sys.stderr,
    )
    try:
        for more in (at_first, joined(base, found, accumulate), single):
            for choice in more:
                if len(found) > tries or any(choice == before for before, _ in found):
                    continue
                overrides = choice.overrides(stage, base)
                tried = compiled(minutes, bindings, overrides, root, stage, slices)
                found.append((choice, tried))
                result = tried.fault or f"{tried.tokens_per_second:,.0f} tokens/s, {tried.peak / GIB:,.2f} GiB"
                print(
                    f"{stage}: {len(found) - 1} of {tries}: {' '.join(overrides)}: {result} ({tried.seconds:,.0f} s)",
                    file=sys.stderr,
                )
    except KeyboardInterrupt:
        print(f"{stage}: interrupted; ranked is what was tried", file=sys.stderr)
    return sorted((tried for _, tried in found), key=lambda t: (not t.fits, -t.tokens_per_second, t.peak))


def what_fits(bindings: list[Binding], resolved: Resolved, root: Path, stage: str, slices: Slices) -> Tried | None:
    """The first change that makes a stage fit which does not; None where none of those tried does."""
    run = compiler.planned(resolved, root, stage, compiler.devices(slices))
    for overrides in smaller(run):
        print(f"{stage}: would it fit with {' '.join(overrides)}?", file=sys.stderr)
        tried = attempt(bindings, overrides, root, stage, slices, step_alone=False)
        if tried.fits:
            return tried
    return None
