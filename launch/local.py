"""Run an experiment on this machine: its CPU, or its GPUs where jax finds some.

python launch/local.py --exp ain_tiny
"""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    if not shutil.which("nvidia-smi"):  # else a stray TPU or GPU plug-in is asked for devices that are not there
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from ain_jax.run import main

    sys.exit(main(description=__doc__ or "", experiments=ROOT / "experiments"))
