"""Speed and peak memory of loading a published folder, beside a plain read of the same files.

    python benchmarks/load.py [--gigabytes 2.2] [--folder FOLDER] [--dtype float32] [--devices 8] [--rounds 5]

A folder of random bfloat16 shards is made first, of TinyLlama-1.1B's shape with as many layers as fill it, unless one
is given. Every measurement is a process of its own, plain reads and loads in turn; all read what the system has in
memory, so that what is compared is the work and not the disk. Where the devices are this machine's own memory (a CPU)
the parameters are in the peak, and the column "beyond them" says what loading took on top.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MESHES = {1: (1, 1, 1), 2: (1, 2, 1), 4: (1, 2, 2), 8: (2, 2, 2)}


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def write_shards(folder: Path, gigabytes: float) -> None:
    """A folder of random weights: as bits, since only their number matters."""
    import jax
    import ml_dtypes
    import numpy as np

    from ain_jax.models.config import ModelConfig, TextConfig, to_hf
    from ain_jax.models.multimodal import abstract_params, parameter_count
    from ain_jax.weights.export import write_json, write_weights

    def sized(layers: int) -> ModelConfig:
        text = TextConfig(32000, 2048, 5632, layers, 32, 4, 64, rope_theta=10_000.0, qkv_bias=False, tied=False)
        return ModelConfig(text, family="llama", eos_token_id=2)

    layers = next(layers for layers in range(1, 999) if 2 * parameter_count(sized(layers)) >= gigabytes * 1e9)
    config, rng = sized(layers), np.random.default_rng(0)
    bits = lambda shape: rng.integers(0x3C00, 0x3F00, shape, np.uint16).view(ml_dtypes.bfloat16)
    params = jax.tree.map(lambda leaf: bits(leaf.shape), abstract_params(config))
    write_json(folder / "config.json", to_hf(config, "bfloat16"))
    write_weights(params, config, folder, shard_bytes=500_000_000)


def plain(folder: Path) -> dict[str, Any]:
    """Every byte of the shards read into one buffer."""
    buffer, count = bytearray(2**24), 0
    before, start = memory("VmRSS"), time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                count += read
    return {"seconds": time.perf_counter() - start, "bytes": count, "beyond": memory("VmHWM") - before}


def load(folder: Path, dtype: str, devices: int) -> dict[str, Any]:
    """The folder loaded by ain_jax; what was compiled on the way is counted."""
    if devices > 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    import jax

    from ain_jax import sharding
    from ain_jax.weights.load import load_folder
    from ain_jax.weights.shards import stored

    mesh = None if devices == 1 else sharding.make_mesh(sharding.Mesh(*MESHES[devices]))
    jax.block_until_ready(jax.numpy.zeros(1))
    before, start = memory("VmRSS"), time.perf_counter()
    params, _ = load_folder(folder, dtype or None, mesh)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    shards = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    held = sum(shard.data.nbytes for shard in shards) if jax.default_backend() == "cpu" else 0
    tensors = stored(folder)
    largest = max(tensor.count * tensor.dtype.itemsize for tensor in tensors)
    count = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"seconds": seconds, "bytes": count, "beyond": peak - before - held, "held": held, "largest": largest}


def measured(arguments: list[str]) -> dict[str, Any]:
    """The numbers of one measurement, made in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, dtype: str, devices: int, rounds: int) -> None:
    from rich.console import Console
    from rich.table import Table

    common = ["--folder", str(folder), "--dtype", dtype, "--devices", str(devices)]
    measured([*common, "--measure", "plain"])  # the system has the files in memory from here on
    runs = [
        (measured([*common, "--measure", "plain"]), measured([*common, "--measure", "load"])) for _ in range(rounds)
    ]
    title = f"{folder}: {runs[0][1]['bytes'] / 1e9:.2f} GB, medians of {rounds}"
    table = Table("", "GB/s", "of a plain read", "parameters held, GB", "peak beyond them, MB", title=title)
    speed = lambda run: run["bytes"] / run["seconds"] / 1e9
    plains, loads = zip(*runs, strict=True)
    ratios = sorted(speed(ours) / speed(read) for read, ours in runs)
    middle = statistics.median
    table.add_row(
        "plain read", f"{middle(map(speed, plains)):.2f}", "", "", f"{middle(r['beyond'] for r in plains) / 1e6:.0f}"
    )
    table.add_row(
        f"load_folder, {dtype or 'as stored'}, {devices} devices",
        f"{middle(map(speed, loads)):.2f}",
        f"{middle(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{loads[0]['held'] / 1e9:.2f}",
        f"{middle(r['beyond'] for r in loads) / 1e6:.0f}, at most {max(r['beyond'] for r in loads) / 1e6:.0f}",
    )
    Console(width=120).print(table)
    print(f"the largest tensor has {loads[0]['largest'] / 1e6:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--dtype", default="", help="what is cast to (default: as stored)")
    parser.add_argument("--devices", type=int, default=1, choices=sorted(MESHES), help="simulated on a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=("plain", "load"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure == "plain":
        print(json.dumps(plain(given.folder)))
    elif given.measure:
        print(json.dumps(load(given.folder, given.dtype, given.devices)))
    elif given.folder:
        compare(given.folder, given.dtype, given.devices, given.rounds)
    else:
        with tempfile.TemporaryDirectory() as made:
            write_shards(Path(made), given.gigabytes)
            compare(Path(made), given.dtype, given.devices, given.rounds)
