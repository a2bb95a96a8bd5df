"""How a stage trains: what of the model learns, on which rows, and what it came to."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from ain_jax import sharding
from ain_jax.data import loader
from ain_jax.data.examples import Answers
from ain_jax.data.mixture import Mixture
from ain_jax.models import lora
from ain_jax.models.lora import Lora
from ain_jax.plan import flops
from ain_jax.stages import watching
from ain_jax.stages.common import StageRun
from ain_jax.stages.model_settings import Start
from ain_jax.stages.run_settings import EXTEND
from ain_jax.tokenizer import schedule
from ain_jax.tokenizer.schedule import Vocabulary
from ain_jax.train import checkpoint, losses, metrics, optimizer, peaks, rows, state, step, watch
from ain_jax.train.loop import Trainer, train
from ain_jax.train.losses import Loss
from ain_jax.train.measures import Work
from ain_jax.train.optimizer import Optimizer


def check(run: StageRun) -> None:
    """Refuse, before anything runs, a training stage whose settings do not go together."""
    stages, start = run.resolved.experiment.stages, run.get(Start).stage
    before = stages[: stages.index(run.stage)]
    if start and (start not in before or Start.__name__ not in run.resolved.stage(start)):
        training = [name for name in before if Start.__name__ in run.resolved.stage(name)]
        raise ValueError(
            f"{run.stage}/Start.stage = {start!r}: expected one of the stages that train before it, "
            f'{", ".join(training) or "none here"}, or "" for the weights of Model'
        )
    settings, rank = run.get(Optimizer), run.get(Lora).rank
    parts = {f"Lora.rank = {rank}": bool(rank), 'Optimizer.rows = "new"': settings.rows == "new"}
    chosen = [name for name, taken in parts.items() if taken]
    if len(chosen) > 1:
        raise ValueError(f"{run.stage}: {' and '.join(chosen)} train different things: take one of them out")
    if chosen and settings.matrix_rate:
        raise ValueError(
            f"{run.stage}/Optimizer.matrix_rate = {settings.matrix_rate} is for whole matrices, which {chosen[0]} "
            "leaves as they are: set it to 0"
        )
    mixture, growing = run.get(Mixture), run.get(Vocabulary).parts
    if not run.get(Trainer).steps and mixture.by != "epochs":
        raise ValueError(
            f'{run.stage}/Trainer.steps = 0 leaves the number to Mixture.by = "epochs", and by = {mixture.by!r}: '
            "give the steps, or weights in epochs"
        )
    if growing > 1 and mixture.by == "epochs":
        raise ValueError(
            f'{run.stage}/Vocabulary.parts = {growing} cuts the stage by its steps: give Mixture.by = "tokens" or '
            '"examples", and Trainer.steps'
        )
    for name, taken in {
        'Optimizer.rows = "new"': settings.rows == "new",
        f"Vocabulary.parts = {growing}": growing > 1,
    }.items():
        if taken and not run.extended:
            raise ValueError(f"{run.stage}/{name}, but no stage {EXTEND} makes new pieces: add it, or leave this out")
    if growing > 1 and (rank or len(mixture.phases) > 1):
        raise ValueError(
            f"{run.stage}/Vocabulary.parts = {growing} grows rows by phases of its own, which neither adapters nor a "
            "mixture with phases allow: leave Lora.rank and Mixture.phases out"
        )
    watching.check(run)


def prepare(run: StageRun, answers: Answers = "one") -> dict[str, int]:
    """Tokenise and pack what the stage reads, none of which asks for an accelerator; rows by what they are for."""
    rows = {"training": run.training_rows(answers), **watching.held_out(run)}
    return {name: len(found) for name, found in rows.items()}


def next_token(run: StageRun, groups: int) -> Loss:
    """Cross-entropy of the learnt tokens, reported by so many groups."""
    return losses.next_token(run.model, groups, run.get(losses.NextToken), run.token_bytes_V)


def fit(run: StageRun, params: Any, loss: Loss, data: loader.Rows) -> dict[str, Any]:
    """Train `params` on `data` to the last step, from the newest checkpoint if there is one; what it came to.

    With `Lora.rank`, or `Optimizer.rows` = "new", the parameters stay, and what is trained and saved are the low-rank
    pairs beside them, or the rows of the new pieces.
    """
    trainer = run.get(Trainer)
    trainer = dataclasses.replace(trainer, steps=-(-len(data) // trainer.rows))
    with jax.set_mesh(run.mesh):
        new = run.new_rows if run.get(Optimizer).rows == "new" else ()
        made = run.program("step", lambda: make_step(run, loss, trainer.steps), trainer.steps, len(data.groups), new)
        trained, frozen = trained_part(run, params)
        checkpoints = checkpoint.Checkpoints(run.folder / "checkpoints", trainer.keep, trainer.keep_every)
        try:
            train(
                update=made.update,
                state=state.create(trained, made.transform),
                frozen=frozen,
                batches=lambda start: run.batches(data, trainer.rows, start),
                trainer=trainer,
                key=jax.random.key(run.seed("training")),
                checkpoints=checkpoints,
                marks=run.marks(data),
                groups=data.groups,
                log=lambda start: metrics.Log(run.folder, run.stage, trainer.steps, start, data.plan.filled, work(run)),
                changes=changes(run, params),
                profile=run.folder / "profile" if run.profile else None,
                watch=watching.watcher(run, functools.partial(aimed, run)),
            )
        finally:
            checkpoints.close()
    return training_numbers(run.folder, data)


def work(run: StageRun) -> Work | None:
    """What a step of the stage asks of the devices, and their peak; None where that is not known."""
    devices = run.mesh.devices
    best = peaks.peak(devices.flat[0].device_kind, devices.size, run.get(Trainer).peak_tflops)
    if best is None:
        return None
    return Work({name: sum(flops.of_step(run, name == "needed").values()) for name in ("all", "needed")}, *best)


@dataclasses.dataclass(frozen=True)
class Step:
    """One update of a stage, and what it is called with as ShapeDtypeStructs that say where each array lies.

    `update(state, frozen, batch, key)`: nothing has to be there to lower it, neither weights nor data nor devices.
    """

    update: step.Update
    transform: optax.GradientTransformation
    state: state.TrainState
    frozen: Any


def aimed(run: StageRun, loss: Loss) -> Loss:
    """The loss of what the stage trains, and of what stays beside it; see `trained_part`."""
    adapted = run.get(Lora)
    if adapted.rank:
        return lambda pairs, base, *rest: loss(base, {"lora": lora.scaled(pairs, adapted)}, *rest)
    if run.get(Optimizer).rows == "new":
        first = run.new_rows[0]
        return lambda taken, base, *rest: loss(rows.put(base, taken, first), {}, *rest)
    return loss


def make_step(run: StageRun, loss: Loss, steps: int) -> Step:
    """The step that `fit` runs `steps` times and that a plan compiles."""
    settings, params = run.get(Optimizer), run.layout()
    trained, frozen, aim = params, {}, aimed(run, loss)
    if run.get(Lora).rank:
        trained, frozen = run.adapters_layout(), params
    elif settings.rows == "new":
        trained, frozen = run.new_rows_layout(), params
    transform = optimizer.make(settings, trained, steps)
    rates, like = optimizer.rate_tree(trained, settings.rates), state.layout(trained, transform)
    trainer = run.get(Trainer)
    update = step.make_update(aim, transform, rates, trainer.accumulate, like, skip_bad=trainer.bad_steps > 0)
    return Step(update, transform, like, frozen)


def trained_part(run: StageRun, params: Any) -> tuple[Any, Any]:
    """What learns and what stays, of the parameters that a stage starts with; laid out as `make_step` says."""
    if run.get(Lora).rank:
        return run.initial_adapters(params), params
    if run.get(Optimizer).rows == "new":
        taken = rows.take(params, *run.new_rows)
        return sharding.placed(taken, run.new_rows_layout()), params
    return params, {}


def changes(run: StageRun, params: Any) -> dict[int, Callable[[state.TrainState], state.TrainState]]:
    """Where a growing vocabulary's next pieces come into use, their rows are made from what spelt them until then."""
    vocabulary, whole = run.get(Vocabulary), run.get(Optimizer).rows == "all"
    if vocabulary.parts == 1:
        return {}
    extension, first = run.extension, 0 if whole else run.new_rows[0]
    sizes = vocabulary.sizes(len(extension.pieces))
    begins = itertools.accumulate(vocabulary.steps(run.get(Trainer).steps))

    def change(now: state.TrainState, used: int, size: int) -> state.TrainState:
        tables = now.params if whole else rows.put(params, now.params, first)
        begin = extension.first_piece + used - first
        made = rows.means(tables, schedule.spelt_before(extension, used, size))
        opt_state = rows.forget(now.opt_state, begin, size - used)
        return dataclasses.replace(now, params=rows.put(now.params, made, begin), opt_state=opt_state)

    return {
        begin + 1: functools.partial(change, used=used, size=size)
        for begin, used, size in zip(begins, sizes, sizes[1:], strict=False)
        if size > used
    }


def training_numbers(folder: Path, data: loader.Rows, window: int = 20) -> dict[str, Any]:
    """Means over the first and the last `window` steps of each number of a stage, and how full its rows were.

    And of each text that was watched, bits per byte before the first step and after the last.
    """
    lines, watched = metrics.read(folder / "metrics.jsonl"), watch.read(folder)
    names = sorted({k for line in lines for k in line if not metrics.is_time(k)} - {"step", "filled"})

    def mean(part: Sequence[Mapping[str, Any]], name: str) -> float | None:
        values = [line[name] for line in part if name in line]
        return round(sum(values) / len(values), 4) if values else None

    return {
        "steps": len(lines),
        "first": {name: mean(lines[:window], name) for name in names},
        "last": {name: mean(lines[-window:], name) for name in names},
        "slots_filled": round(data.plan.filled, 4),
        "slots_filled_at_best": round(data.plan.best, 4),
        "patches_filled": round(data.plan.patches_filled, 4),
        "patches_filled_at_best": round(data.plan.patches_best, 4),
        "plan": data.plan.fingerprint,
        **(
            {"watched": {name: [watched[0][name], watched[-1][name]] for name in watched[0] if name != "step"}}
            if watched
            else {}
        ),
    }
