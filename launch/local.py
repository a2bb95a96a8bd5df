"""Run an experiment on this machine: its CPU, or its GPUs where jax finds some.

python launch/local.py --exp ain_tiny

As one of several processes, those of a Slurm step, of a Kubernetes job or of JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, it joins the others; the run's folder is then one that all of them see.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


if __name__ == "__main__":
    from ain_jax.launching import machine

    machine.prepare()

    from ain_jax.run import main

    sys.exit(main(description=__doc__ or "", experiments=ROOT / "experiments", join=machine.join))
