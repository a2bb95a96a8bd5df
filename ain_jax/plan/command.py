"""`--plan`: an experiment's training stages compiled for a TPU slice, told as a table and as JSON.

    python -m ain_jax.plan --exp ain_7b --plan v5p-128
    python -m ain_jax.plan --exp ain_7b --plan 2xv5e-256 --search --price 1.2

Neither weights nor data nor TPU have to be there, only libtpu (pip install 'ain_jax[tpu]', on Linux).
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ain_jax.experiment import ExperimentError, find_experiment, nearest, parse_override, read_bindings, resolve
from ain_jax.plan import chips

NOT_FITTING = 3


def arguments(argv: list[str]) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="ain_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exp", required=True, help="a name in experiments/, or the path of a .gin file")
    parser.add_argument("--plan", required=True, metavar="SLICE", help="v5p-128, v5e-256, v6e-64, 2xv5p-128 ...")
    parser.add_argument("--slices", type=int, default=0, help="how many of them")
    parser.add_argument("--stage", help="plan this one stage")
    parser.add_argument("--search", action="store_true", help="try batch x remat x mesh, and rank them")
    parser.add_argument("--tries", type=int, default=12, help="with --search: compile no more than so many (12)")
    parser.add_argument("--minutes", type=float, default=30.0, help="with --search: of one of them, no longer (30)")
    parser.add_argument("--price", type=float, help="dollars for a chip and an hour")
    parser.add_argument("--run_dir", type=Path, help="the run's folder, whose tokenizer and data are used if there")
    parser.add_argument("--out", type=Path, help="where the JSON is written (default: plans/EXPERIMENT-SLICE.json)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="BINDING", dest="overrides", help="override a binding"
    )
    return parser.parse_args(argv)


def main(argv: list[str], experiments: Path) -> int:
    """The exit status: 0 where every stage fits, 3 where one does not, 1 stopped by a fault that is told."""
    asked = arguments(argv)
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else libtpu asks the network which TPU this machine is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two plans at once compile beside one another
    # Else libtpu complains that no TPU is here, which a plan knows.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3"}
    os.environ["TPU_MIN_LOG_LEVEL"] = "3"
    try:
        slices = chips.read(asked.plan, asked.slices)
        return _plan(asked, find_experiment(asked.exp, experiments), slices)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as fault:
        print(f"\nain_jax: {fault}", file=sys.stderr)
        return 1


def _plan(asked: argparse.Namespace, path: Path, slices: chips.Slices) -> int:
    from ain_jax.plan import compile as compiler  # these import jax: a mistyped name is told before that
    from ain_jax.plan import report, search
    from ain_jax.stages import common, registry

    bindings = [*read_bindings(path), *(parse_override(text) for text in asked.overrides)]
    resolved = resolve(bindings, registry.SETTINGS)
    experiment = resolved.experiment
    stages = [s for s in experiment.stages if experiment.kind(s) in registry.LOSS]
    if asked.stage and asked.stage not in stages:
        raise ExperimentError(f"--stage {asked.stage!r}: no such training stage: {nearest(asked.stage, stages)}")
    root = asked.run_dir or Path("runs") / experiment.name
    for stage in stages:
        registry.CHECK[experiment.kind(stage)](common.StageRun(resolved, root, stage))
    written: dict[str, Any] = report.heading(experiment.name, slices)
    fits = True
    for stage in [asked.stage] if asked.stage else stages:
        found = compiler.compile_stage(resolved, root, stage, slices)
        numbers = report.numbers(found, slices, asked.price)
        report.show(found, numbers, slices)
        if isinstance(found, compiler.TooLarge) or not found.fits:
            fits = False
            if not asked.search:
                numbers["would_fit"] = report.show_change(search.what_fits(bindings, resolved, root, stage, slices))
        if asked.search:
            tried = search.search(bindings, resolved, root, stage, slices, asked.tries, found, asked.minutes)
            numbers["search"] = report.show_search(stage, tried, slices)
        written["stages"][stage] = numbers
    out = asked.out or Path("plans") / f"{experiment.name}-{slices.name}.json"
    common.write_json(out, written)
    print(f"written to {out}")
    return 0 if fits else NOT_FITTING
