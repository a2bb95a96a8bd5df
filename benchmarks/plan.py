"""How full packed rows are, how long a plan takes, and how much memory: python benchmarks/plan.py [--most 1000000]

Three mixtures of made-up lengths at 4,096 tokens are planned at several sizes, each in a process of its own:

    text       lengths lognormal, median 330 tokens, longest 4,096
    mixed      half the same texts, half questions about a picture of 256 to 5,120 patches (64 to 1,280 tokens, the
               range that Qwen2-VL's processor allows by default), 12,288 patches a row
    pictures   such pictures alone, with short answers, 8,192 patches a row

Peak memory is the whole process, the mapped columns that were touched included. What it grows by from the second
largest plan to the largest is carried on to ten million rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PATCHES = {"text": 0, "mixed": 12288, "pictures": 8192}


def sizes(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """(count, 3) int32: tokens, patches and learnt tokens of made-up examples."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(rng.lognormal(5.8, 1.0, count), 16, 4096)
    share = {"text": 0.0, "mixed": 0.5, "pictures": 1.0}[kind]
    pictured = rng.random(count) < share
    features = np.clip(rng.lognormal(np.log(380), 0.6, count), 64, 1280).astype(int)
    words = np.clip(rng.lognormal(5.0 if kind == "mixed" else 3.7, 0.8, count), 8, 2500)
    tokens = np.where(pictured, np.minimum(words + features + 20, 4096), tokens).astype(int)
    learnt = np.where(pictured, np.minimum(words, tokens - 1) // 2 + 1, tokens // 2)
    return np.stack([tokens, np.where(pictured, 4 * features, 0), learnt], axis=1).astype(np.int32)


def measure(kind: str, count: int, window: int) -> dict:
    """One plan of so many examples, each drawn once and packed: what it came to."""
    from ain_jax.data import columns, pack_plan
    from ain_jax.data.examples import Examples
    from ain_jax.data.mixture import Mixture
    from ain_jax.data.packing import Packing

    none = np.zeros(0, np.int32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with columns.growing(folder, {"sizes_E3": (np.int32, (3,)), "group_E": (np.int32, ())}) as files:
            for start in range(0, count, 100_000):
                part = min(100_000, count - start)
                files["sizes_E3"].add(sizes(kind, part, seed=start))
                files["group_E"].add(np.zeros(part, np.int32))
        column = lambda n: columns.opened(folder, n)
        first_E = np.broadcast_to(np.int64(0), count + 1)  # lengths alone are planned
        source = Examples(
            *([], none, none, none, none, first_E, column("group_E"), none, none),
            *(("made/ar",), "made", column("sizes_E3")),
        )
        packing = Packing(row_tokens=4096, row_patches=PATCHES[kind], window=window)
        before, began = peak(), time.process_time()
        plan = pack_plan.plan({"a": source}, Mixture({"a": 1.0}, by="epochs"), packing, None, 0, folder / "plan")
        seconds = time.process_time() - began
        assert len(plan.units_U2) == count, "an example was lost"
        began = time.perf_counter()
        for row in range(0, plan.rows, max(plan.rows // 1000, 1)):
            plan.row(row)
        one = (time.perf_counter() - began) / len(range(0, plan.rows, max(plan.rows // 1000, 1)))
        told = ("filled", "best", "patches_filled", "patches_best")
        return {n: getattr(plan, n) for n in told} | {
            "kind": kind,
            "examples": count,
            "rows": plan.rows,
            "seconds": seconds,
            "row_microseconds": 1e6 * one,
            "before": before,
            "peak": peak(),
        }


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=1_000_000, help="examples of the largest plan")
    parser.add_argument("--kinds", nargs="+", choices=list(PATCHES), default=list(PATCHES))
    parser.add_argument("--window", type=int, default=512, help="Packing.window")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]), given.window)))
        return
    heads = ("mixture", "examples", "rows", "seconds", "peak MiB", "tokens filled", "best", "patches", "best", "a row")
    print("  ".join(head.rjust(13 if i in (0, 5) else 9) for i, head in enumerate(heads)))
    for kind in given.kinds:
        found = []
        for count in (given.most // 10, given.most * 3 // 10, given.most):
            command = [sys.executable, __file__, "--window", str(given.window), "--one", kind, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            line = json.loads(done.stdout)
            found.append(line)
            cells = (
                *(kind, f"{count:,}", f"{line['rows']:,}", f"{line['seconds']:.1f}", f"{line['peak']:.0f}"),
                *(f"{line['filled']:.3%}", f"{line['best']:.3%}"),
                *(f"{line['patches_filled']:.3%}", f"{line['patches_best']:.3%}", f"{line['row_microseconds']:.1f} us"),
            )
            print("  ".join(cell.rjust(13 if i in (0, 5) else 9) for i, cell in enumerate(cells)), flush=True)
        small, large = found[-2:]
        more = large["rows"] - small["rows"]
        growth = (large["peak"] - small["peak"]) / more * 1e6
        slope = (large["seconds"] - small["seconds"]) / more * 1e7
        whole = large["peak"] + growth * max(10 - large["rows"] / 1e6, 0)
        print(
            f"{kind}: {growth:.0f} MiB more for each million rows, of which {mapped(large):.0f} MiB are the files of "
            f"lengths; at ten million rows {whole:,.0f} MiB and {slope / 60:.0f} minutes"
        )


def mapped(line: dict) -> float:
    """MiB of the columns of lengths, read through memory maps, for a million rows."""
    return 16 * line["examples"] / line["rows"] * 1e6 / 2**20


if __name__ == "__main__":
    main()
