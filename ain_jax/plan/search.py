"""Settings that fit and are quick: batch x remat x mesh, each compiled, ranked by tokens a second."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ain_jax import sharding
from ain_jax.data.packing import Packing
from ain_jax.experiment import Binding, Resolved, parse_override, resolve
from ain_jax.plan import compile as compiler
from ain_jax.plan.chips import Slices
from ain_jax.stages import registry
from ain_jax.stages.common import Model
from ain_jax.train.loop import Trainer


@dataclasses.dataclass(frozen=True)
class Tried:
    """One choice and what became of it; `tokens_per_second` is what the roofline allows at best, 0 where it failed."""

    overrides: tuple[str, ...]
    tokens_per_second: float = 0.0
    peak: int = 0  # bytes of HBM
    fits: bool = False
    fault: str = ""


def meshes(slices: Slices, kv_heads: int) -> Iterator[sharding.Mesh]:
    """Meshes over all chips, one copy of the model over each slice first, then more tensor or sequence parallel."""
    inside = slices.chips // slices.count
    for data, tensor, sequence in itertools.product((1, 2), (1, 2, 4), (1, 2)):
        if inside % (tensor * data * sequence) == 0 and kv_heads % tensor == 0:
            fsdp = inside // (tensor * data * sequence)
            yield sharding.Mesh(slices.count, data, fsdp, sequence, tensor)


def choices(run: compiler.PlannedRun, slices: Slices) -> Iterator[tuple[str, ...]]:
    """Bindings to try, the likeliest first: the settings as they are, then more or less kept, other batches, meshes."""
    stage, rows = run.stage, run.get(Trainer).rows
    kinds = list(dict.fromkeys((run.get(Model).remat, "minimal", "attention", "full")))
    places = dict.fromkeys((run.get(sharding.Mesh), *meshes(slices, run.config.text.kv_heads)))
    for mesh, share, remat in itertools.product(places, (1.0, 2.0, 0.5), kinds):
        if rows * share >= 1:
            yield (
                f"{stage}/Trainer.rows={int(rows * share)}",
                f'{stage}/Model.remat="{remat}"',
                *(f"{stage}/Mesh.{axis}={size}" for axis, size in dataclasses.asdict(mesh).items()),
            )


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


def attempt(bindings: list[Binding], overrides: tuple[str, ...], root: Path, stage: str, slices: Slices) -> Tried:
    """One choice compiled; a fault is told in the result."""
    try:
        resolved = resolve(bindings, registry.SETTINGS, [parse_override(text) for text in overrides])
        found = compiler.compile_stage(resolved, root, stage, slices)
    except Exception as fault:  # the compiler's own faults too: the search goes on
        return Tried(overrides, fault=" ".join(str(fault).split())[:200] or type(fault).__name__)
    if isinstance(found, compiler.TooLarge):
        return Tried(overrides, peak=found.needed, fault="needs more memory")
    speed = found.tokens / found.roofline(slices).slowest
    return Tried(overrides, speed, found.memory.peak, found.memory.fits, "" if found.memory.fits else "too large")


def search(
    bindings: list[Binding], resolved: Resolved, root: Path, stage: str, slices: Slices, tries: int
) -> list[Tried]:
    """What was tried, the best first: at most `tries` choices, those that fit before those that do not."""
    run = compiler.planned(resolved, root, stage, compiler.devices(slices))
    wanted = list(itertools.islice(choices(run, slices), tries))
    with tqdm(wanted, desc=f"{stage}: search", unit="plan", dynamic_ncols=True) as bar:
        found = [attempt(bindings, overrides, root, stage, slices) for overrides in bar]
    return sorted(found, key=lambda tried: (not tried.fits, -tried.tokens_per_second, tried.peak))


def what_fits(bindings: list[Binding], resolved: Resolved, root: Path, stage: str, slices: Slices) -> Tried | None:
    """The first change that makes a stage fit which does not; None where none of those tried does."""
    run = compiler.planned(resolved, root, stage, compiler.devices(slices))
    for overrides in smaller(run):
        tried = attempt(bindings, overrides, root, stage, slices)
        if tried.fits:
            return tried
    return None
