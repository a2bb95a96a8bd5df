"""A training stage's step, the very one that the loop runs, compiled for TPUs that are not here."""

import dataclasses
import functools
import math
import re
import time
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
from ain_jax.stages import registry, training
from ain_jax.train.loop import Trainer
from ain_jax.train.optimizer import Optimizer, rate_tree

UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# The compiler says it in two ways; the second counts temporaries alone, before it has placed any of them.
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


def trace(run: PlannedRun, groups: int = 0, steps: int = 0) -> tuple[Any, training.Step]:
    """The traced step of a stage, to be lowered under the run's mesh, and what it is called with.

    `groups` and `steps` are those of the data; where they are not known, one group for each source, and as many steps
    as the trainer or the budget says. Neither changes a shape that matters.
    """
    kind = run.resolved.experiment.kind(run.stage)
    # Before the mesh is set: under one of described devices nothing can be computed, only traced.
    loss = registry.LOSS[kind](run, groups or len(run.get(Mixture).weights))
    made = training.make_step(run, loss, steps or steps_of(run) or 1)
    batch, key = run.batch(), jax.eval_shape(lambda: jax.random.key(0))
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
    peak: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


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


def compile_stage(resolved: Resolved, root: Path, stage: str, slices: Slices) -> Compiled | TooLarge:
    """The step of one stage on these slices. Raises ValueError for settings that cannot be laid over them."""
    run = planned(resolved, root, stage, devices(slices))
    begun = time.monotonic()
    traced, made = trace(run)
    state = made.state
    with jax.set_mesh(run.mesh):
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as fault:
            used = OUT_OF_MEMORY.search(str(fault))
            if used is None:
                raise
            found = [text for text in used.groups() if text]
            needed, limit = (int(float(n) * UNITS[u]) for n, u in (found[:2], found[2:]))
            return TooLarge(stage, needed, limit, _short(str(fault)), round(time.monotonic() - begun, 1))
    text = hlo.Module(compiled.as_text())
    trainer, packing = run.get(Trainer), run.get(Packing)
    analysis = compiled.memory_analysis()
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = Memory(
        parameters=_bytes((state.params, made.frozen)),
        optimizer=_bytes(state.opt_state),
        batch=_bytes(run.batch()),
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=kept + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes,
        limit=slices.chip.hbm_bytes,
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
        seconds=round(time.monotonic() - begun, 1),
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
