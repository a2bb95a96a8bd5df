"""Run an experiment on this machine: its CPU, or its GPUs where jax finds some.

python launch/local.py --exp ain_tiny
"""

import ctypes
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_memory() -> None:
    """Let the process keep the memory that it frees, where the C library is glibc.

    Else each step on a CPU gives its buffers back to the system, hundreds of MB, and the next one has them zeroed
    page by page: an eighth of the time of ain_tiny. Only the main arena serves large blocks without that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(setting, value)


if __name__ == "__main__":
    if not shutil.which("nvidia-smi"):  # else a stray TPU or GPU plug-in is asked for devices that are not there
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        keep_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from ain_jax.run import main

    sys.exit(main(description=__doc__ or "", experiments=ROOT / "experiments"))
