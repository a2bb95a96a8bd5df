"""This machine: which devices jax is to look for, and whether this process is one of several."""

import ctypes
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
COORDINATOR = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
OLDER_CHIP, NEWER_CHIP = Path("/dev/accel0"), Path("/dev/vfio/0")  # as the drivers of TPU hosts name the first one


def keep_memory() -> None:
    """Let the process keep the memory that it frees, where the C library is glibc.

    Else each step on a CPU gives its buffers back to the system, hundreds of MB, and the next one has them zeroed
    page by page: an eighth of the time of ain_tiny. Only the main arena serves large blocks without that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for setting, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(setting, value)


def has_gpu() -> bool:
    """Whether NVIDIA's driver is here."""
    return shutil.which("nvidia-smi") is not None


def has_tpu() -> bool:
    """Whether this is a host of a TPU slice."""
    # vfio hands on GPUs as well
    return OLDER_CHIP.exists() or "TPU_WORKER_ID" in os.environ or (NEWER_CHIP.exists() and not has_gpu())


def prepare() -> None:
    """Set what has to be set before jax is asked for its devices; what the caller has set stays."""
    if not has_gpu() and not has_tpu():  # else a stray plug-in is asked for devices that are not there
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if jax := sys.modules.get("jax"):  # imported before: it has read its variables
            jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        keep_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def joins(environment: Mapping[str, str] = os.environ) -> dict[str, object] | None:
    """What jax.distributed.initialize is to be told here; None where this process is alone.

    Slurm's variables and those of a TPU slice jax reads by itself. Raises ValueError where some of COORDINATOR are
    missing.
    """
    given = [name for name in COORDINATOR if environment.get(name)]
    if given and len(given) < len(COORDINATOR):
        missing = [name for name in COORDINATOR if name not in given]
        raise ValueError(f"{', '.join(given)} is set, and {', '.join(missing)} is not: set all three, or none")
    if given:
        address, processes, number = (environment[name] for name in COORDINATOR)
        told: dict[str, object] = {"coordinator_address": address}
        # Several processes that share a GPU host name their own in JAX_LOCAL_DEVICE_IDS.
        return told | {"num_processes": int(processes), "process_id": int(number)}
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return {"cluster_detection_method": "slurm"}
    return None


def join(environment: Mapping[str, str] = os.environ) -> int:
    """Join the other processes of the run, if this one is not alone; how many there are.

    Called before anything else asks jax for its devices. On a TPU host jax itself knows the slice.
    """
    import jax

    told = joins(environment)
    if told is None and has_tpu():
        told = {}
    if told is not None:
        jax.distributed.initialize(**told)  # pyright: ignore[reportArgumentType]
    return jax.process_count()
