"""Training on one GPU: ours beside transformers with SDPA, and the attention backends beside one another.

    python benchmarks/gpu.py [--only vision decoder attention] [--rounds 2] [--steps 6] [--seconds 570] [--json FILE]
    python benchmarks/gpu.py --cpu     the same program on models of a thousandth of the size, without a GPU

"vision": a random Qwen2-VL of 2.2 B parameters, all of them trained (float32, products in bfloat16), on 8 rows of 4,096
tokens, each packed from four conversations with a picture of 1,024 patches. "decoder": a random Qwen2 of 7.6 B in
bfloat16 with adapters of rank 16 (transformers' by PEFT), on packed text. Layers are computed again in the backward
pass on both sides; every position is filled, half of the words are learnt; AdamW, gradients clipped.

Each side has the card alone, in a process of its own that warms up before it is timed; the sides take turns. Tokens a
second count every position. MFU is told in two conventions (`ain_jax/plan/estimate.py`), of the dense bfloat16 peak of
the card named. On a CPU both sides open the same weights in float32 and their first losses must agree; no figure of a
GPU is measured there, and the output says so. Aims: 45% MFU and 1.3 times the tokens of transformers.
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

import gpu_sides
import numpy as np
from gpu_sides import Case
from rich.console import Console
from rich.table import Table

from ain_jax.train import peaks

TOLERANCE = 1e-4  # of the first losses, in float32
NO_FIGURE = "no GPU is used here: no figure of a GPU was measured. Times and bytes below are this CPU's, of tiny twins."


def flops(case: Case) -> dict[str, float]:
    """Model FLOPs of a step in both conventions."""
    from ain_jax.models.config import from_hf
    from ain_jax.plan import estimate

    config, picture = from_hf(gpu_sides.as_json(case)), int(np.prod(case.grid)) if case.grid else 0
    part = "adapters" if case.rank else "all"
    learns = {"decoder": part, "head": "" if case.rank else "all", "vision": part, "merger": part}
    every = dict.fromkeys(learns, "all")
    rows, L = case.rows, case.length
    whole = estimate.forward(config, rows, L, L, picture * len(case.segments), picture, needed=False)
    learnt = gpu_sides.batch(case)["target_segments_BC"][0]
    alone = [
        estimate.forward(config, rows, length, int((learnt == n).sum()), picture, picture, needed=True)
        for n, length in enumerate(case.segments, start=1)
    ]
    needed = sum(sum(estimate.training(parts, learns, not case.rank).values()) for parts in alone)
    return {"all": sum(estimate.training(whole, every, True).values()), "needed": needed}


def process(given: argparse.Namespace, *arguments: str) -> dict[str, Any]:
    """What this program prints in a process of its own; {"failed": why} where it does not."""
    command = [sys.executable, __file__, "--one", *arguments, "--steps", str(given.steps), *["--cpu"] * given.cpu]
    root = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, root))}
    environment |= {"JAX_PLATFORMS": "cpu"} if given.cpu else {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if given.cpu else {}
    left = max(1.0, given.end - time.monotonic())
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=left)
    except subprocess.TimeoutExpired:
        return {"failed": f"the {given.seconds} seconds of this program were over"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(given: argparse.Namespace, case_name: str, cache: Path) -> dict[str, dict[str, Any]]:
    """By side: its losses, its seconds of all rounds, the most bytes."""
    found: dict[str, dict[str, Any]] = {}
    folder = ""
    if given.cpu:
        folder = str(cache / case_name)
        process(given, "save", case_name, folder, str(cache))
    for turn in range(given.rounds):
        for side in ("ours", "transformers")[:: 1 - 2 * (turn % 2)]:
            said = process(given, side, case_name, folder, str(cache))
            if side not in found or "failed" in found[side]:
                found[side] = said
            elif "failed" not in said:
                found[side]["seconds"] += said["seconds"]
    return found


def attention_times(cpu: bool) -> dict[str, dict[str, str]]:
    """By shape and backend: milliseconds forwards and backwards on packed rows, or why it is not taken."""
    import jax
    import jax.numpy as jnp

    from ain_jax.models.attention import attention

    L, scale = (128, 1) if cpu else (4096, 4)
    dtype = jnp.float32 if cpu else jnp.bfloat16
    shapes = {
        "decoder, 28 heads on 4 of 128": ((scale, L, 28, 4, 128), {"causal": True}),
        "tower, 16 heads of 80": ((scale, L, 16, 16, 80), {"causal": False, "longest": L // 4}),
    }
    found: dict[str, dict[str, str]] = {}
    for name, ((B, L, N, K, H), rules) in shapes.items():
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [jax.random.normal(key, (B, L, n, H), dtype) for key, n in zip(keys, (N, K, K), strict=True)]
        segments = jnp.tile(1 + jnp.arange(L, dtype=jnp.int32) // (L // 4), (B, 1))
        found[name], expected = {}, None
        for backend in ("xla", "cudnn", "tokamax"):

            def loss(q, k, v, backend=backend, rules=rules, segments=segments):
                out = attention(q, k, v, segments, backend=backend, **rules)
                return jnp.sum(jnp.sin(out.astype(jnp.float32)))

            try:
                step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
                result = jax.block_until_ready(step(*arrays))
            except ValueError as refusal:
                found[name][backend] = f"refused: {str(refusal).split(': ', 1)[-1].split('. Choose')[0]}"
                continue
            times = []
            for _ in range(10):
                start = time.perf_counter()
                jax.block_until_ready(step(*arrays))
                times.append(time.perf_counter() - start)
            values = [np.asarray(x, np.float32) for x in result[1]]
            expected = expected or values
            apart = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(values, expected, strict=True))
            found[name][backend] = f"{1e3 * statistics.median(times):.2f} ms, gradients within {apart:.1e} of xla"
    return found


def show(console: Console, given: argparse.Namespace, case: Case, found: dict[str, Any], gpu: str | None) -> list[str]:
    """The table of a case; what is wrong with it."""
    work, tokens = flops(case), case.rows * case.length
    peak, source = (gpu and peaks.peak(gpu, 1)) or (None, f"no peak is known of {gpu}")
    title = f"{case.name}: {case.rows} rows of {case.length} tokens, {len(case.segments)} segments each"
    title += "" if given.cpu else f"; MFU by {source}"
    table = Table("side", "s a step", "least to most", "tokens a s", "TFLOP a step", "MFU", "GB", "loss", title=title)
    faults = []
    for side, values in found.items():
        if "failed" in values:
            table.add_row(side, *["-"] * 6, values["failed"])
            faults.append(f"{case.name}, {side}: {values['failed']}")
            continue
        seconds = statistics.median(values["seconds"])
        mfu = "-" if given.cpu or not peak else " / ".join(f"{n / seconds / peak:.1%}" for n in work.values())
        table.add_row(
            side,
            f"{seconds:.3f}",
            f"{min(values['seconds']):.3f} to {max(values['seconds']):.3f}",
            f"{tokens / seconds:,.0f}",
            " / ".join(f"{n / 1e12:.3g}" for n in work.values()),
            mfu,
            f"{values['bytes'] / 1e9:.1f}",
            f"{values['losses'][0]:.4f} to {values['losses'][-1]:.4f}",
        )
    console.print(table)
    if not faults:
        mine, peer = (found[side] for side in ("ours", "transformers"))
        speed = statistics.median(peer["seconds"]) / statistics.median(mine["seconds"])
        console.print(
            f"ours / transformers: {speed:.2f} times the tokens, {mine['bytes'] / peer['bytes']:.2f} the memory"
        )
        apart = abs(mine["losses"][0] / peer["losses"][0] - 1)
        if given.cpu and not apart < TOLERANCE:
            faults.append(f"{case.name}: not the same work, the first losses differ by {apart:.1e} of themselves")
    return faults


def one(given: argparse.Namespace) -> dict[str, Any]:
    """The work of a process of its own."""
    what, case_name, folder, cache = given.one
    if what != "transformers":
        import jax

        if not given.cpu:
            jax.config.update("jax_compilation_cache_dir", cache)
    if what == "attention":
        return attention_times(given.cpu)
    case = gpu_sides.cases(given.cpu)[case_name]
    if what == "save":
        import torch

        torch.manual_seed(0)
        gpu_sides.their_model(case, None).save_pretrained(folder)
        return {}
    return gpu_sides.measure(what, case, Path(folder) if folder else None, given.steps)


def main(given: argparse.Namespace) -> int:
    given.end = time.monotonic() + given.seconds
    console, gpu = Console(width=None if sys.stdout.isatty() else 160), gpu_sides.card()
    if not given.cpu and gpu is None:
        print("no GPU is here (nvidia-smi finds none), and no figure was measured: try --cpu for the small twin")
        return 2
    if given.cpu:
        console.print(NO_FIGURE)
    faults: list[str] = []
    results: dict[str, Any] = {"gpu": None if given.cpu else gpu}
    with tempfile.TemporaryDirectory() as cache:
        for name, case in gpu_sides.cases(given.cpu).items():
            if name in given.only:
                results[name] = compare(given, name, Path(cache))
                faults += show(console, given, case, results[name], gpu)
        if "attention" in given.only:
            results["attention"] = process(given, "attention", "", "", cache)
            table = Table("attention", "backend", "forwards and backwards")
            for shape, by_backend in results["attention"].items():
                if shape == "failed":
                    faults.append(f"attention: {by_backend}")
                    continue
                for backend, said in by_backend.items():
                    table.add_row(shape, backend, said)
            console.print(table)
    if given.json:
        given.json.write_text(json.dumps(results))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ["vision", "decoder", "attention"]
    parser.add_argument("--cpu", action="store_true", help="the small twins, on this CPU")
    parser.add_argument("--only", nargs="+", choices=everything, default=everything)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turn")
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a process")
    parser.add_argument("--seconds", type=float, default=570, help="after which no more is measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen)))
    else:
        sys.exit(main(chosen))
