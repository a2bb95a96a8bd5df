"""An experiment from its file to its last stage: what is finished is kept, what was interrupted goes on.

Each stage owns a folder of the run. `config.gin` in it says what the stage was begun with, `result.json` that it is
finished and with which numbers; both are written beside and renamed.
"""

import argparse
import fcntl
import json
import os
import platform
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ain_jax.experiment import (
    ExperimentError,
    Resolved,
    find_experiment,
    nearest,
    parse_override,
    read_bindings,
    resolve,
)
from ain_jax.launching import TOLD, Interrupted, OtherProcess

if TYPE_CHECKING:
    from ain_jax.stages import registry

# Settings that leave every number as it is: they may change between a run and its resumption.
NEUTRAL = (
    *("Trainer.save_seconds", "Trainer.keep", "Trainer.keep_every", "Trainer.bad_steps", "Trainer.bad_steps_in_all"),
    *("Trainer.peak_tflops", "Evaluation.shown", "Model.remat", "Budget.tokens", "Watch.every", "Watch.stop_rise"),
    *("Model.origin", "Model.vision_origin", "Tokenizer.origin", "Sources.origins"),
    "Experiment.description",
)
LAST_SECONDS = 5
LOST = 75  # the exit status of a process that lost the others (EX_TEMPFAIL)
SEEN_SECONDS = 60  # that a network's disk may take to show a new file
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "tokenizers",
    "transformers",
    "sentencepiece",
    "numpy",
)


def arguments(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, help="a name in experiments/, or the path of a .gin file")
    parser.add_argument("--run_dir", type=Path, help="where everything is written (default: runs/NAME)")
    parser.add_argument(
        "--data_dir", type=Path, help="where data are built, once for all runs that name it (default: RUN_DIR/data)"
    )
    parser.add_argument("--stage", help="run this one stage")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="BINDING",
        dest="overrides",
        help="override a binding, for example --set 'pretrain/Trainer.steps=20'; may be repeated",
    )
    parser.add_argument("--profile", action="store_true", help="trace some steps of each stage for XProf")
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="extend the tokenizer, build, tokenise and pack the data of every stage that learns, and stop before one "
        "does: a machine with accelerators then begins at once",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the resolved experiment and stop")
    return parser.parse_args(argv)


def main(
    argv: Sequence[str] | None = None,
    description: str = "Run an experiment on this machine.",
    experiments: Path = Path("experiments"),
    join: Callable[[], object] = lambda: None,
    programs: dict[tuple[Any, ...], Any] | None = None,
) -> int:
    """The exit status: 0 done, 1 stopped by a fault that is told, 130 interrupted, 75 one of several was lost.

    `join` is called before jax is asked for its devices: there a process joins the others of the run. `programs` holds
    what earlier runs of this process compiled, for those to come; of so many no page is made, ain_jax.report does it.
    """
    asked = arguments(argv, description)
    try:
        path = find_experiment(asked.exp, experiments)
        from ain_jax.launching import signals
        from ain_jax.launching.processes import of_first
        from ain_jax.stages import learning, needs, registry  # import jax: a mistyped name is told before that

        bindings = read_bindings(path)
        overrides = [parse_override(text) for text in asked.overrides]
        resolved = resolve(bindings, registry.SETTINGS, overrides)
        stages = resolved.experiment.stages
        if asked.stage and asked.stage not in stages:
            raise ExperimentError(
                f"--stage {asked.stage!r}: {resolved.experiment.name} has no such stage: {nearest(asked.stage, stages)}"
            )
        root = asked.run_dir or Path("runs") / resolved.experiment.name
        learns = [stage for stage in stages if resolved.experiment.kind(stage) in registry.LOSS]
        _check_stages(resolved, root)
        missing = needs.missing(resolved, root, asked.stage)
        if asked.dry_run:
            print(resolved.text(), end="")
            learning.show_planned(resolved, root, learns)
            print("".join(f"not here yet: {line}\n" for line in missing), end="", file=sys.stderr)
            return 0
        if missing:
            raise ExperimentError("\n".join(missing))
        with signals.at_once():
            join()
            of_first(lambda: learning.check(resolved, root, learns))  # asks jax for devices: not before the join
            with _alone(root):
                shared = None
                if asked.data_dir or programs is not None:
                    shared = registry.Shared(asked.data_dir or root / "data", programs if programs is not None else {})
                if asked.prepare:
                    return prepare(resolved, root, asked.stage, shared)
                return run(resolved, root, asked.stage, asked.profile, shared, page=programs is None)
    except KeyboardInterrupt as stop:
        detail = f" ({stop})" if str(stop) else ""
        print(f"\ninterrupted{detail}; the same command goes on from there", file=sys.stderr)
        return 130 if isinstance(stop, Interrupted) else _leave(130)
    except OtherProcess:  # the first process says what it was
        return 1
    except (ValueError, FloatingPointError, OSError) as fault:
        print(f"\nain_jax: {fault}", file=sys.stderr)
        return 1 if TOLD in getattr(fault, "__notes__", ()) else _leave(1)
    except Exception as error:
        # Of several processes one that is lost ends the others like this: to be started again, and no fault of theirs.
        if not _several() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        traceback.print_exc()
        return _leave(LOST)


def _leave(status: int) -> int:
    """The status, to be handed back; one of several processes ends here, since the others wait for it for ever."""
    if _several():
        sys.stdout.flush()
        sys.stderr.flush()
        if sys.modules["jax"].process_index() == 0:
            time.sleep(LAST_SECONDS)  # with this process the others end: those that have a fault to tell tell it first
        os._exit(status)
    return status


def _several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _check_stages(resolved: Resolved, root: Path) -> None:
    """Refuse settings that a later stage would stop at, all at once and before the first one runs."""
    from ain_jax.stages import registry

    faults = []
    for stage in resolved.experiment.stages:
        try:
            registry.CHECK[resolved.experiment.kind(stage)](registry.StageRun(resolved, root, stage))
        except ValueError as fault:
            faults.append(str(fault))
    if faults:
        raise ExperimentError("\n".join(dict.fromkeys(faults)))


def run(
    resolved: Resolved,
    root: Path,
    only: str | None = None,
    profile: bool = False,
    shared: "registry.Shared | None" = None,
    page: bool = True,
) -> int:
    """Run the stages in order, or one of them; write the summary and the report when all are finished."""
    from ain_jax import report
    from ain_jax.launching.processes import of_first
    from ain_jax.stages import learning, registry

    order = resolved.experiment.stages
    of_first(lambda: _begin(resolved, root))
    for stage in [only] if only else order:
        here = root / stage
        if of_first((here / "result.json").is_file):
            _say(f"{stage:16} finished before")
            continue
        of_first(lambda stage=stage: _begin_stage(resolved, root, stage))
        began, kind = time.monotonic(), resolved.experiment.kind(stage)
        try:
            stage_run = registry.StageRun(resolved, root, stage, profile, shared)
            if kind in registry.LOSS:
                learning.tell(stage_run)
            numbers = registry.RUN[kind](stage_run)
        except BaseException:
            written = {p.name for p in here.iterdir()} if here.is_dir() else set()
            if written <= {"config.gin", learning.FILE}:  # refused before it began: nothing holds it to that
                for name in written:
                    (here / name).unlink(missing_ok=True)
            raise
        seconds = time.monotonic() - began

        def finish(stage=stage, here=here, numbers=numbers, seconds=seconds) -> None:
            _write_text(here / "result.json", _json({"numbers": numbers, "seconds": round(seconds, 1)}))
            report.print_stage(stage, numbers, seconds)

        of_first(finish)
    of_first(lambda: _finish(resolved, root, page))
    return 0


def prepare(resolved: Resolved, root: Path, only: str | None = None, shared: "registry.Shared | None" = None) -> int:
    """Run what comes before learning, and tokenise and pack what each stage learns from."""
    from ain_jax.launching.processes import of_first
    from ain_jax.stages import prefer, registry, training

    of_first(lambda: check_folder(resolved, root))
    for stage in [only] if only else resolved.experiment.stages:
        kind = resolved.experiment.kind(stage)
        if kind == registry.EXTEND:
            run(resolved, root, stage, shared=shared)
        elif kind in registry.LOSS:
            found = registry.StageRun(resolved, root, stage, shared=shared)
            rows = training.prepare(found, prefer.answers(found))
            _say(f"{stage:16} packed: " + ", ".join(f"{name} {count:,} rows" for name, count in rows.items()))
    return 0


def _begin(resolved: Resolved, root: Path) -> None:
    check_folder(resolved, root)
    _write_text(root / "config.gin", resolved.text())


def _begin_stage(resolved: Resolved, root: Path, stage: str) -> None:
    order = resolved.experiment.stages
    missing = [s for s in order[: order.index(stage)] if not (root / s / "result.json").is_file()]
    if missing:
        raise ValueError(
            f"stage {stage!r} comes after {', '.join(missing)}, not finished in {root}: run "
            f"--stage {missing[0]} first, or leave --stage out to run them all"
        )
    _write_text(root / stage / "config.gin", "\n".join(_lines(resolved, stage)) + "\n")


def _finish(resolved: Resolved, root: Path, page: bool) -> None:
    """The summary and the report, where all stages are finished."""
    from ain_jax import report

    if not all((root / s / "result.json").is_file() for s in resolved.experiment.stages):
        return
    summary = summarise(resolved, root)
    _write_text(root / "summary.json", _json(summary))
    report.print_table(summary)
    print(f"\nsummary  {root / 'summary.json'}")
    if page:
        print(f"report   {report.write(summary, root, resolved)}")
    if (root / "export").is_dir():
        print(f"model    {root / 'export'}")


def _say(line: str) -> None:
    """A line on standard error, once for all processes."""
    from ain_jax.launching.processes import is_first

    if is_first():
        print(line, file=sys.stderr)


def summarise(resolved: Resolved, root: Path) -> dict[str, Any]:
    """Every number of the run; two runs with one seed on one machine differ in `times` alone."""
    import jax

    results = {s: json.loads((root / s / "result.json").read_text("utf-8")) for s in resolved.experiment.stages}
    speeds = {s: _speed(root / s / "metrics.jsonl") for s in results}
    return {
        "experiment": resolved.experiment.name,
        "seed": resolved.experiment.seed,
        "stages": {stage: result["numbers"] for stage, result in results.items()},
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "devices": [str(d.device_kind) for d in jax.devices()],
            "processes": jax.process_count(),
        },
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "times": {
            "seconds": {stage: result["seconds"] for stage, result in results.items()},
            "tokens_per_second": {stage: speed for stage, speed in speeds.items() if speed},
        },
    }


def _speed(path: Path) -> int | None:
    from ain_jax.train import metrics

    lines = metrics.read(path)
    return lines[-1]["tokens_per_second"] if lines else None


def _lines(resolved: Resolved, stage: str) -> list[str]:
    """The settings of a stage that its numbers depend on, one a line, without the comments."""
    keep = (f"{stage}/", "Experiment.seed")
    lines = [line for line in resolved.text(origins=False).splitlines() if line.startswith(keep)]
    return [line for line in lines if not line.partition(" = ")[0].endswith(NEUTRAL)]


def check_folder(resolved: Resolved, root: Path) -> None:
    """Refuse to mix two experiments in one folder: what was begun otherwise would be reported as this one."""
    for stage in resolved.experiment.stages:
        stored = root / stage / "config.gin"
        if not stored.is_file():
            continue
        before = stored.read_text("utf-8").splitlines()
        now = _lines(resolved, stage)
        known, fresh = {line.partition(" = ")[0] for line in before}, set(resolved.defaults(stage))
        # A setting that came later than the folder, at its default, was in force already.
        now = [line for line in now if line.partition(" = ")[0] in known or line not in fresh]
        if before != now:
            was, will = sorted(set(before) - set(now)), sorted(set(now) - set(before))
            raise ValueError(
                f"{root / stage} was begun with\n  "
                + "\n  ".join(was or ["(nothing)"])
                + "\nand this run has\n  "
                + "\n  ".join(will or ["(nothing)"])
                + "\nNothing was changed. Give another --run_dir, or delete "
                f"{root / stage} and the folders of the stages after it to run them anew"
            )


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold the run's folder: two runs in it would overwrite one another's checkpoints.

    Of several processes the first holds it, and the others must see what it writes there.
    """
    from ain_jax.launching.processes import of_first

    with ExitStack() as held:

        def hold() -> str:
            root.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((root / ".lock").open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"{root} is in use by another process; wait for it, or give another --run_dir"
                ) from None
            lock.truncate(0)  # not before it is held: the processes of another run may be reading it
            lock.write(mark := uuid.uuid4().hex)
            lock.flush()
            return mark

        mark = of_first(hold)
        for _ in range(SEEN_SECONDS):
            if (root / ".lock").is_file() and (root / ".lock").read_text("utf-8") == mark:
                break
            time.sleep(1.0)
        else:
            raise ValueError(
                f"{root.absolute()} on {platform.node()} is not the folder that the first process of the run writes: "
                "give a --run_dir that lies on a disk which all of them see"
            )
        yield


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
