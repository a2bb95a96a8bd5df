"""Run an experiment on a TPU pod, or plan it for one.

On a host of the slice, on each of them:    python launch/tpu_pod.py --exp ain_7b
From a workstation with gcloud:             python launch/tpu_pod.py --exp ain_7b --tpu NAME --zone ZONE --bucket BUCKET
                                            with --create v5p-128 [--spot] where the slice is not there yet
Without a TPU, on a CPU:                    python launch/tpu_pod.py --exp ain_7b --plan v5p-128

From a workstation the exact commit goes to all workers, all are started, worker 0's log is shown, and a run that was
preempted goes on from its last checkpoint. What is not listed below goes to the run itself: --set, --stage ...
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the launcher was asked for, and what the run is told."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--exp", required=True, help="a name in experiments/, or the path of a .gin file")
    parser.add_argument("--plan", metavar="SLICE", help="compile every stage for a slice that is not here")
    parser.add_argument("--tpu", metavar="NAME", help="the slice to run on, from a workstation")
    parser.add_argument("--zone", help="its zone")
    parser.add_argument("--project", default="", help="its project, where gcloud's own is another")
    parser.add_argument("--create", default="", metavar="SLICE", help="create it where it is not there: v5p-128")
    parser.add_argument("--spot", action="store_true", help="create it as spot capacity, which may be taken back")
    parser.add_argument("--bucket", default="", help="mounted on every worker; the run lies in its folder runs/")
    parser.add_argument("--run_dir", default="", help="the run's folder, on a disk that all workers see")
    parser.add_argument("--dirty", action="store_true", help="take files along that differ from the commit")
    parser.add_argument("--restarts", type=int, default=100, help="how often a lost run is started again")
    parser.add_argument("--print_commands", action="store_true", help="show the gcloud commands and run none")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> int:
    """The exit status: that of the run, 1 where nothing could be run."""
    from ain_jax.launching import machine

    asked, rest = arguments(argv)
    if asked.plan:
        from ain_jax.plan import command

        return command.main(argv, ROOT / "experiments")
    own = ["--exp", asked.exp, *rest]
    if asked.tpu:
        return from_workstation(asked, own)
    unused = [f"--{name}" for name in ("zone", "project", "create", "spot", "bucket", "dirty") if getattr(asked, name)]
    if unused:
        print(f"ain_jax: {', '.join(unused)} needs --tpu NAME, the name of the slice", file=sys.stderr)
        return 1
    if machine.has_tpu():
        machine.prepare()
        from ain_jax.run import main as run

        where = ["--run_dir", asked.run_dir] if asked.run_dir else []
        return run([*own, *where], description=__doc__ or "", experiments=ROOT / "experiments", join=machine.join)
    print(
        "ain_jax: this machine has no TPU. Choose one of\n"
        f"  python launch/tpu_pod.py --exp {asked.exp} --plan v5p-128\n      plan the run for a slice, on this CPU\n"
        f"  python launch/tpu_pod.py --exp {asked.exp} --tpu NAME --zone ZONE --bucket BUCKET\n"
        "      run it on a slice, by gcloud; --create v5p-128 where it is not there yet\n"
        f"  python launch/local.py --exp {asked.exp}\n      run it on this machine's CPU or GPUs",
        file=sys.stderr,
    )
    return 1


def from_workstation(asked: argparse.Namespace, own: list[str]) -> int:
    """The exit status of the run on the slice that is named."""
    import shutil

    from ain_jax.experiment import find_experiment
    from ain_jax.launching import pod

    try:
        if not asked.zone:
            raise ValueError(f"--tpu {asked.tpu} needs --zone, for example --zone us-east5-a")
        if not (asked.run_dir or asked.bucket):
            raise ValueError("the workers write into one folder: give --bucket NAME, or --run_dir on a disk they share")
        if not asked.print_commands and not shutil.which("gcloud"):
            raise ValueError("gcloud is not here: install the Google Cloud CLI, or show the commands: --print_commands")
        experiment = find_experiment(asked.exp, ROOT / "experiments")
        if experiment.is_relative_to(ROOT):  # where it lies on the workers, too
            own[1] = str(experiment.relative_to(ROOT))
        folder = asked.run_dir or f"~/{asked.bucket}/runs/{experiment.stem}"
        slice_ = pod.Pod(asked.tpu, asked.zone, asked.project, asked.create, asked.spot, asked.bucket)
        source = pod.code(ROOT, asked.dirty or asked.print_commands)
        shell = pod.Shell(only_print=asked.print_commands)
        return pod.run(slice_, source, [*own, "--run_dir", folder], shell, asked.restarts)
    except (ValueError, OSError) as fault:
        print(f"ain_jax: {fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nain_jax: the run goes on without this window; the same command shows its log again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
