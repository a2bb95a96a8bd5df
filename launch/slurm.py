"""Run an experiment on GPU nodes of a Slurm cluster.

python launch/slurm.py --exp ain_7b --nodes 4 --gpus 8 --time 24:00:00 --sbatch=--partition=gpu

writes RUN_DIR/job.sh and submits it. Before the time limit the run saves and queues again; after a preemption Slurm
queues it again. What is not listed below goes to the run itself: --set, --stage ...
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """The exit status: 0 submitted or printed, 1 where that was not possible."""
    from ain_jax.experiment import find_experiment
    from ain_jax.launching import slurm

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--exp", required=True, help="a name in experiments/, or the path of a .gin file")
    parser.add_argument("--run_dir", type=Path, help="the run's folder, which every node sees (default: runs/NAME)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="of each node; one process for each (default: 8)")
    parser.add_argument("--cpus", type=int, default=8, help="cores for each process (default: 8)")
    parser.add_argument("--time", default="24:00:00", help="the limit of one job, after which the run queues again")
    parser.add_argument("--save_before", type=int, default=300, help="seconds before the limit at which it saves")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="handed on: --sbatch=--partition=gpu; repeatable",
    )
    parser.add_argument("--print_commands", action="store_true", help="show the script and the command, run none")
    asked, rest = parser.parse_known_args(argv)
    try:
        experiment = find_experiment(asked.exp, ROOT / "experiments").absolute()
        folder = (asked.run_dir or Path("runs") / experiment.stem).absolute()
        job = slurm.Job(
            name=experiment.stem,
            folder=folder,
            root=ROOT,
            command=[sys.executable, str(ROOT / "launch/local.py"), "--exp", str(experiment), *rest],
            nodes=asked.nodes,
            gpus=asked.gpus,
            cpus=asked.cpus,
            time=asked.time,
            save_before=asked.save_before,
            options=asked.sbatch,
        )
        return slurm.submit(job, asked.print_commands)
    except (ValueError, OSError) as fault:
        print(f"ain_jax: {fault}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
