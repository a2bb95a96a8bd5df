"""A training stage's step, the very one that the loop runs, compiled for TPUs that are not here."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing
from ain_jax.experiment import Resolved
from ain_jax.plan import estimate, flops, hlo, products
from ain_jax.plan.chips import Slices
from ain_jax.plan.planned import PlannedRun, planned
from ain_jax.stages import prefer, registry, training, watching
from ain_jax.train import reference
from ain_jax.train.loop import Trainer
from ain_jax.train.optimizer import Optimizer, rate_tree
from ain_jax.train.preferences import Preference
from ain_jax.train.watch import Watch

STEP = "step"
UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The compiler says it in two ways; the second counts arguments and temporaries before it has placed any of them.
_SIZE = r"([\d.]+)([BKMGT])"
OUT_OF_MEMORY = re.compile(rf"(?:Used {_SIZE} of |temporaries \({_SIZE}\) exceeds available HBM \(){_SIZE}")


@functools.lru_cache
def devices(slices: Slices) -> tuple[Any, ...]:
    """The chips of a slice as the compiler knows them; ValueError where libtpu is not installed."""
    options: dict[str, Any] = {"num_slices": slices.count} if slices.count > 1 else {}
    if math.prod(slices.shape) < 4:  # less than the compiler's usual host of 2 x 2 chips
        options["chips_per_host_bounds"] = (*slices.shape, 1)[:3]
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=slices.topology, **options)
    except Exception as fault:  # jax raises a RuntimeError, or one of its own, by version
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise ValueError(
            f"{slices.topology} cannot be described here ({reason}): the TPU compiler comes with pip install "
            "'ain_jax[tpu]', on Linux"
        ) from fault
    return tuple(described.devices)


def trace(run: PlannedRun, groups: int = 0, steps: int = 0, batch: Any = None) -> tuple[Any, training.Step]:
    """The traced step of a stage, to be lowered under the run's mesh, and what it is called with.

    `groups` and `steps` are those of the data; where they are not known, one group for each source, and as many steps
    as the trainer or the budget says. Neither changes a shape that matters.
    """
    kind = run.resolved.experiment.kind(run.stage)
    # Before the mesh is set: under one of described devices nothing can be computed, only traced.
    loss = registry.LOSS[kind](run, groups or len(run.get(Mixture).weights))
    made = training.make_step(run, loss, steps or steps_of(run) or 1)
    batch, key = batch or run.batch(), jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(run.mesh):
        return made.update.trace(made.state, made.frozen, batch, key), made


def steps_of(run: PlannedRun) -> int:
    """How many steps the stage takes: as bound, as its pack plan makes, or as its budget gives; 0 where none says."""
    trainer, packing = run.get(Trainer), run.get(Packing)
    if trainer.steps:
        return trainer.steps
    if run.pack_plan is not None:
        return -(-run.pack_plan.rows // trainer.rows)
    return estimate.steps_for(run.get(estimate.Budget).tokens, trainer.rows * packing.row_tokens)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip's HBM in a step."""

    parameters: int  # that are there all the time: trained and frozen ones
    optimizer: int
    batch: int
    arguments: int  # what the compiler reserves for these three, padding included
    temporaries: int  # gradients, activations, gathered parameters
    outputs: int  # beside the arguments that they overwrite
    code: int
    live: int  # the compiler's own peak: the arrays that are needed at one time, without gaps and without scratch
    beside: int  # what lies there meanwhile and is no argument
    peak: int  # what is reserved, all in all
    limit: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class Program:
    """Another program of a stage, that runs between or before its steps."""

    name: str
    memory: Memory
    seconds: float  # that compiling took


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of one stage's step."""

    stage: str
    memory: Memory
    rows: int
    row_tokens: int
    accumulate: int
    mesh: dict[str, int]
    remat: str
    steps: int  # 0: unknown
    parameters: int  # numbers, not bytes
    trained: int
    flops_all: dict[str, float]  # model FLOPs of a step, all chips, by part: see `estimate`
    flops_needed: dict[str, float]
    flops_programmed: float  # of all matrix products of the program, those computed again included; all chips
    hbm_bytes: float  # read and written in a step, loops multiplied out, per chip
    hbm_bytes_once: float  # as the compiler counts, bodies of loops once
    collectives: tuple[hlo.Collective, ...]
    unknown_loops: tuple[str, ...]
    assumed: tuple[str, ...]
    seconds: float  # that compiling took
    programs: tuple[Program, ...] = ()  # what else the stage runs

    @property
    def fits(self) -> bool:
        """Whether all programs of the stage do."""
        return self.memory.fits and all(program.memory.fits for program in self.programs)

    @property
    def tokens(self) -> int:
        """Places for tokens in a step."""
        return self.rows * self.row_tokens

    @property
    def model_flops(self) -> dict[str, float]:
        """Of a step over all chips, by convention."""
        return {"all": sum(self.flops_all.values()), "needed": sum(self.flops_needed.values())}

    def roofline(self, slices: Slices) -> estimate.Roofline:
        """Seconds of a step at the peaks of the chip."""
        inside, between = (
            sum(c.wire for c in self.collectives if c.between_slices == crosses) for crosses in (False, True)
        )
        return estimate.roofline(slices, self.flops_programmed / slices.chips, self.hbm_bytes, inside, between)


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A step that does not fit, with the compiler's own figure."""

    stage: str
    needed: int  # bytes of HBM
    limit: int
    message: str
    seconds: float
    program: str = STEP


def others(run: PlannedRun) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(name, function that traces it, bytes on a chip beside its arguments) of what a stage compiles beside its step.

    Rows without pictures are a second shape of the step; the reference of preferences is read before the first step,
    with no optimiser there yet; watched texts are read between steps, which keep theirs.
    """
    packing = run.get(Packing)
    if packing.text_batches:
        batch = run.batch(packing=_without_pictures(packing))
        yield "step, rows without pictures", functools.partial(_traced_step, run, batch), 0
    if prefer.answers(run) != "one" and run.get(Preference).needs_reference:
        batch = run.batch(prefer.together(run), reference=False)
        yield "reference", functools.partial(_traced, run, reference.scorer(run.model), run.layout(), batch), 0
    if run.get(Watch).texts:
        packing, rows = watching.shape(run)
        shapes = {"watched texts": packing}
        if packing.text_batches:
            shapes["watched texts without pictures"] = _without_pictures(packing)
        # Made before the mesh is set, as the loss of a step.
        score = watching.scorer(run, functools.partial(training.aimed, run), 1)
        loss = registry.LOSS[run.resolved.experiment.kind(run.stage)](run, 1)
        made = training.make_step(run, loss, 1)
        for name, own in shapes.items():
            arguments = (made.state.params, made.frozen, run.batch(rows, own, "one"))
            yield name, functools.partial(_traced, run, score, *arguments), _bytes(made.state.opt_state)


def _traced_step(run: PlannedRun, batch: Any) -> Any:
    return trace(run, batch=batch)[0]


def _without_pictures(packing: Packing) -> Packing:
    return dataclasses.replace(packing, row_patches=0, text_batches=False)


def _traced(run: PlannedRun, function: Any, *arguments: Any) -> Any:
    with jax.set_mesh(run.mesh):
        return function.trace(*arguments)


def compile_stage(
    resolved: Resolved, root: Path, stage: str, slices: Slices, step_alone: bool = False
) -> Compiled | TooLarge:
    """The step of one stage on these slices, and its other programs (see `others`), or the first that does not fit.

    Raises ValueError for settings that cannot be laid over the slices.
    """
    run = planned(resolved, root, stage, devices(slices))
    begun = time.monotonic()
    traced, made = trace(run)
    state = made.state
    compiled = _compile(run, traced)
    if isinstance(compiled, TooLarge):
        return dataclasses.replace(compiled, seconds=round(time.monotonic() - begun, 1))
    seconds = round(time.monotonic() - begun, 1)
    programs = []
    for name, make, beside in () if step_alone else others(run):
        start = time.monotonic()
        found = _compile(run, make(), name)
        took = round(time.monotonic() - start, 1)
        if isinstance(found, TooLarge):
            return dataclasses.replace(found, seconds=took)
        programs.append(Program(name, _memory(found, slices, beside=beside), took))
    text = hlo.Module(compiled.as_text())
    trainer, packing = run.get(Trainer), run.get(Packing)
    memory = _memory(
        compiled,
        slices,
        parameters=_bytes((state.params, made.frozen)),
        optimizer=_bytes(state.opt_state),
        batch=_bytes(run.batch()),
    )
    return Compiled(
        stage=stage,
        memory=memory,
        rows=trainer.rows,
        row_tokens=packing.row_tokens,
        accumulate=trainer.accumulate,
        mesh=dict(run.mesh.shape),
        remat=run.model.remat,
        steps=steps_of(run),
        parameters=_numbers(run.layout()),
        trained=_trained(run, made),
        flops_all=flops.of_step(run, needed=False),
        flops_needed=flops.of_step(run, needed=True),
        flops_programmed=products.flops(traced.jaxpr.jaxpr),
        hbm_bytes=text.hbm_bytes(),
        hbm_bytes_once=float((compiled.cost_analysis() or {}).get("bytes accessed", math.nan)),
        collectives=tuple(text.collectives(math.prod(slices.shape) if slices.count > 1 else 0)),
        unknown_loops=tuple(text.unknown_loops),
        assumed=tuple(run.assumed),
        seconds=seconds,
        programs=tuple(programs),
    )


def _compile(run: PlannedRun, traced: Any, program: str = STEP) -> Any:
    """The compiled program, or what it would need where it does not fit."""
    try:
        with jax.set_mesh(run.mesh):
            return traced.lower().compile()
    except jax.errors.JaxRuntimeError as fault:
        used = OUT_OF_MEMORY.search(str(fault))
        if used is None:
            raise
        found = [text for text in used.groups() if text]
        needed, limit = (int(float(n) * UNITS[u]) for n, u in (found[:2], found[2:]))
        return TooLarge(run.stage, needed, limit, _short(str(fault)), 0.0, program)


def _memory(
    compiled: Any, slices: Slices, parameters: int = 0, optimizer: int = 0, batch: int = 0, beside: int = 0
) -> Memory:
    """What a compiled program reserves on a chip, by the compiler's analysis.

    The peak is arguments, outputs, temporaries and code, each as it is reserved: a program that the compiler refuses
    for its memory is refused for their sum. What it calls its peak counts the arrays alone that are needed at one time,
    and is less: neither the gaps between them nor the scratch of collectives are in it.
    """
    analysis = compiled.memory_analysis()
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=batch,
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        live=analysis.peak_memory_in_bytes,
        beside=beside,
        peak=kept + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes + beside,
        limit=slices.chip.hbm_bytes,
    )


def _trained(run: PlannedRun, made: training.Step) -> int:
    rates = jax.tree.leaves(rate_tree(made.state.params, run.get(Optimizer).rates))
    return sum(math.prod(s.shape) for s, rate in zip(jax.tree.leaves(made.state.params), rates, strict=True) if rate)


def _numbers(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    """Bytes of a tree on one chip, without padding."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _short(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])[:400]
