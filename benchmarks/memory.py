"""Memory of the loss over a large vocabulary: read in blocks, beside plain full logits.

    python benchmarks/memory.py [--vocabulary 32000 152064 256000] [--held 20 22 23] [--rows 4] [--targets 128]

The gradient of the summed log-probabilities of rows x targets learnt positions, of their hidden states and of the
table, float32. "compiled" is what the compiler sets aside beside arguments and results; "measured" is the most that a
process of its own held while it ran (VmHWM), less what it held before and less the results. Plain logits grow with the
vocabulary; in blocks, 2^held logits are held at once, whatever the vocabulary: the exit status is 1 where the compiler
sets aside a tenth more for the largest vocabulary than for the smallest.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20
PLAIN = 0  # instead of a power of 2: full logits


def compiled(rows: int, targets: int, width: int, size: int, power: int) -> Any:
    """The gradient, compiled: (hidden_BCD, table_VD, targets_BC) -> its two arrays."""
    import jax
    import jax.numpy as jnp

    from ain_jax.train import vocabulary

    def loss(hidden_BCD, table_VD, targets_BC):
        if power == PLAIN:
            log_BCV = jax.nn.log_softmax(jnp.einsum("BCD,VD->BCV", hidden_BCD, table_VD))
            return -jnp.take_along_axis(log_BCV, targets_BC[..., None], axis=-1).sum()
        return -vocabulary.log_probs([(hidden_BCD, table_VD)], targets_BC, None, 2**power)[0].sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, targets, width), (size, width))]
    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, jax.ShapeDtypeStruct((rows, targets), jnp.int32))
    return lowered.compile()


def held(name: str) -> int:
    """Bytes of memory of this process: VmHWM, the most at once, or VmRSS, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def one(given: argparse.Namespace, size: int, power: int) -> dict[str, float]:
    """Both numbers of one case, in MiB, and the seconds of a run."""
    import time

    import jax

    step = compiled(given.rows, given.targets, given.width, size, power)
    keys = jax.random.split(jax.random.key(0), 3)  # drawn by jax: a source in numpy would be let go of during the step
    hidden_BCD = jax.random.normal(keys[0], (given.rows, given.targets, given.width))
    table_VD = 0.05 * jax.random.normal(keys[1], (size, given.width))
    targets_BC = jax.random.randint(keys[2], (given.rows, given.targets), 0, size)
    jax.block_until_ready((hidden_BCD, table_VD, targets_BC))
    ctypes.CDLL(None).malloc_trim(0)
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    results = jax.block_until_ready(step(hidden_BCD, table_VD, targets_BC))
    seconds = time.perf_counter() - start
    measured = held("VmHWM") - before - sum(result.nbytes for result in results)
    aside = step.memory_analysis().temp_size_in_bytes
    return {"compiled": aside / MIB, "measured": measured / MIB, "seconds": seconds}


def main(given: argparse.Namespace) -> int:
    title = f"{given.rows} x {given.targets} learnt positions, width {given.width}, float32; MiB beside the tables"
    table = Table("logits held", *[f"V = {size:,}" for size in given.vocabulary], title=title)
    found: dict[int, list[dict[str, float]]] = {}
    for power in (PLAIN, *given.held):
        found[power] = []
        for size in given.vocabulary:
            command = [sys.executable, __file__, "--one", str(size), str(power)]
            command += ["--rows", str(given.rows), "--targets", str(given.targets), "--width", str(given.width)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[power].append(json.loads(done.stdout.splitlines()[-1]))
        cells = [
            f"{x['compiled']:.0f} compiled, {x['measured']:.0f} measured, {x['seconds']:.1f} s" for x in found[power]
        ]
        table.add_row("all, plain" if power == PLAIN else f"2^{power} = {4 * 2**power // MIB} MiB", *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    grown = [power for power in given.held if found[power][-1]["compiled"] > 1.1 * found[power][0]["compiled"]]
    if grown:
        print(f"memory grows with the vocabulary where 2 to the power of {grown} logits are held", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32000, 152064, 256000])
    parser.add_argument("--held", type=int, nargs="+", default=[20, 22, 23], help="powers of 2")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--targets", type=int, default=128, help="learnt positions of a row")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen, *chosen.one)))
    else:
        sys.exit(main(chosen))
