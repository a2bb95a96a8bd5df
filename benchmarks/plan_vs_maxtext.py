"""What one training step needs by the TPU compiler's word: ours beside MaxText's, the same decoder on the same slice.

    python benchmarks/plan_vs_maxtext.py
    python benchmarks/plan_vs_maxtext.py --maxtext ENVIRONMENT/bin/python

The decoder of Qwen2-7B, 4,096 tokens, 2 rows a chip, full rematerialisation, flash (splash) attention, every position
learnt, float32 weights and Adam's moments, products in bfloat16, all sharded over v5p 4x4x4, 64 chips. MaxText is
compiled by its own `train_compile`, in an environment of its own:

    python3.12 -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install 'maxtext[tpu]==0.2.5'

Without one its figures are those recorded of 0.2.5, and marked so. Bytes accessed are the compiler's own count in both,
which takes the body of a loop once: 28 layers as one. They compare two programs of the same loops, and are no measure
of a step.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

GIB = 2**30
EXPERIMENT = """
Experiment.name = "qwen2_7b"
Experiment.stages = ("pretrain",)
Model.folder = "models/Qwen2-7B"
Model.size = "qwen2_7b"
Model.dtype = "bfloat16"
Model.remat = "full"
Packing.row_tokens = 4096
Mixture.weights = {"texts": 1.0}
Optimizer.learning_rate = 3e-5
Optimizer.weight_decay = 0.1
Trainer.steps = 1000
Trainer.rows = 128
Mesh.data = 1
Mesh.fsdp = -1
"""
VARIANTS = {
    "ours": (),
    "ours, bfloat16 weights": ('Model.param_dtype="bfloat16"',),
    "ours, a quarter of the positions learnt": ("Packing.row_targets=1024",),
}
MAXTEXT = [
    *("compile_topology=v5p-128", "compile_topology_num_slices=1", "model_name=qwen2.5-7b", "per_device_batch_size=2"),
    *("max_target_length=4096", "remat_policy=full", "attention=flash", "dataset_type=synthetic"),
    *("enable_checkpointing=false", "run_name=plan"),
]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes on a chip."""

    arguments: float
    temporaries: float
    accessed: float
    note: str = ""


RECORDED = Measured(1.33 * GIB, 7.47 * GIB, 47.4e9, "recorded, 0.2.5")


def ours(overrides: tuple[str, ...]) -> Measured:
    """Our step as the loop would run it."""
    from ain_jax.experiment import parse_override, read_bindings, resolve
    from ain_jax.plan import chips
    from ain_jax.plan import compile as compiler
    from ain_jax.stages import registry

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "qwen2_7b.gin"
        file.write_text(EXPERIMENT, encoding="utf-8")
        bindings = [*read_bindings(file), *map(parse_override, overrides)]
        resolved = resolve(bindings, registry.SETTINGS)
        found = compiler.compile_stage(resolved, Path(folder), "pretrain", chips.read("v5p-128"))
    if isinstance(found, compiler.TooLarge):
        return Measured(0.0, float(found.needed), 0.0, "does not fit")
    return Measured(found.memory.arguments, found.memory.temporaries, found.hbm_bytes_once, f"{found.seconds:.0f} s")


def maxtext(python: str) -> Measured:
    """MaxText's own, compiled in its environment."""
    find = "import maxtext, pathlib; print(pathlib.Path(maxtext.__file__).parent / 'configs' / 'base.yml')"
    config = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.split()[-1]
    command = [python, "-m", "maxtext.trainers.pre_train.train_compile", config, *MAXTEXT]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    number = lambda pattern: re.search(pattern, done.stdout)
    found = [
        number(pattern)
        for pattern in (
            r"argument_size_in_bytes=(\d+)",
            r"temp_size_in_bytes=(\d+)",
            r"'bytes accessed': ([\d.e+]+)",
        )
    ]
    if None in found:
        raise SystemExit(f"MaxText's train_compile gave no figures:\n{done.stderr[-2000:]}")
    return Measured(*(float(match[1]) for match in found if match), "compiled now")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext", metavar="PYTHON", help="the python of an environment with maxtext[tpu]")
    asked = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if not asked.maxtext:
        print("MaxText is not compiled here (--maxtext PYTHON does, see --help): its recorded figures\n")
    rows = {"MaxText": maxtext(asked.maxtext) if asked.maxtext else RECORDED}
    print(f"{'':42}{'arguments':>12}{'temporaries':>14}{'bytes accessed':>17}")
    for name in ["MaxText", *VARIANTS]:
        made = rows.setdefault(name, ours(VARIANTS[name]) if name in VARIANTS else RECORDED)
        sizes = f"{made.arguments / GIB:>8.2f} GiB{made.temporaries / GIB:>10.2f} GiB{made.accessed / 1e9:>14.1f} GB"
        print(f"{name:42}{sizes}   {made.note}", flush=True)


if __name__ == "__main__":
    main()
