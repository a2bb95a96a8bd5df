"""Print the manifest of a Kubernetes JobSet that runs an experiment on GPU nodes, or on a TPU slice of GKE.

python launch/jobset.py --exp ain_7b --image IMAGE --claim CLAIM --gpus 8 --nodes 4 | kubectl apply -f -
python launch/jobset.py --exp ain_7b --image IMAGE --claim CLAIM --tpu v5p-128 | kubectl apply -f -

IMAGE holds this repository as its working folder, with pip install -e '.[cuda]' or '.[tpu]' done in it; CLAIM is a
volume that all pods may write. What is not listed below goes to the run itself: --set, --stage ...
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """The exit status: 0 printed, 1 where a setting cannot be."""
    from ain_jax.experiment import find_experiment
    from ain_jax.launching import jobset

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--exp", required=True, help="a name in experiments/")
    parser.add_argument("--image", required=True, help="the container image")
    parser.add_argument("--claim", required=True, help="the persistent volume claim that the run's folder lies on")
    parser.add_argument("--name", help="of the JobSet (default: the experiment's)")
    parser.add_argument("--tpu", default="", metavar="SLICE", help="v5p-128, v6e-64, 2xv5p-128 ...: for TPUs")
    parser.add_argument("--gpus", type=int, default=0, help="of each node: for GPUs")
    parser.add_argument("--nodes", type=int, default=1, help="how many nodes with GPUs")
    parser.add_argument("--restarts", type=int, default=100, help="how often a lost run is started again")
    asked, rest = parser.parse_known_args(argv)
    try:
        experiment = find_experiment(asked.exp, ROOT / "experiments")
        name = asked.name or experiment.stem.replace("_", "-")
        command = ["--exp", asked.exp, "--run_dir", f"{jobset.MOUNT}/{name}", *rest]
        machines = jobset.machines(asked.tpu, asked.gpus, asked.nodes)
        print(jobset.manifest(name, asked.image, asked.claim, command, machines, asked.restarts), end="")
        return 0
    except (ValueError, OSError) as fault:
        print(f"ain_jax: {fault}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
