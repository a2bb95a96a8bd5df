"""Tokens a second of greedy decoding: ours beside transformers', on the same processor with as many threads.

    python benchmarks/generate.py [--model FOLDER] [--batch 1 8 32] [--threads 2] [--json FILE]

Without a folder it makes a random Llama of SmolLM2-135M's sizes; both sides open the same folder. Prompts are of uneven
length. What is timed is what a user calls, padding and all: `ain_jax.generate.generate` and `model.generate`, which
runs as it comes ("eager") and compiled with a static cache ("compiled"); the quicker one is the peer. All are called in
turn, after calls that are not counted, and ratios are taken within a turn.

The prefill is the time to the first token, the decode rate counts the tokens after it. "of the read" compares the
weights' bytes over the time of one step with a plain sum over as many bytes: at small batches that is the bound.
`--clock processor` counts the processor time of all threads instead of the clock on the wall: with one thread this
stays true beside other work.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from ain_jax.generate import Prompt, generate
from ain_jax.launching import machine
from ain_jax.weights.load import load_folder

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "initializer_range": 1 / 24,
}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and what it said."""

    first: float  # to the first token
    whole: float
    ids: list[list[int]]


Side = Callable[[list[np.ndarray]], Timing]


def random_model(folder: str) -> Path:
    """A folder with a random Llama, as transformers saves it."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2_135M)).save_pretrained(folder)
    return Path(folder)


def prompts_of(batch: int, longest: int, vocabulary: int) -> list[np.ndarray]:
    """Random ids: one prompt of `longest` tokens, the others down to half of it."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(longest, -(-longest // 2), batch).astype(int)
    return [rng.integers(5, vocabulary, size=length) for length in lengths]


def our_side(folder: Path, dtype: str, new_tokens: int, clock: Callable[[], float]) -> tuple[Side, int, int]:
    """(ours, the bytes of the weights that a step reads, rows of the vocabulary)."""
    numpy_params, config = load_folder(folder, np.dtype(jax.numpy.dtype(dtype)))
    params = jax.device_put(numpy_params)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.text.tied:  # of an embedding that is no head one row is read
        read -= params["model"]["embed_tokens"]["weight"].nbytes

    def call(prompts: list[np.ndarray]) -> Timing:
        given = [Prompt(tokens_L) for tokens_L in prompts]
        start = clock()
        generate(params, config, given, 1, rows=len(given), dtype=dtype)
        middle = clock()
        ids = generate(params, config, given, new_tokens, rows=len(given), dtype=dtype)
        return Timing(middle - start, clock() - middle, ids)

    return call, read, config.text.vocabulary


class Watch:
    """A streamer of transformers that notes when the first token came; the prompt is handed to it before."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.times = clock, []

    def put(self, value: Any) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


def their_side(folder: Path, dtype: str, new_tokens: int, clock: Callable[[], float], compiled: bool) -> Side:
    """transformers' generate, on prompts padded at the left."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # no token ends a text
    settings = {}
    if compiled:
        model.forward = torch.compile(model.forward)
        settings = {"cache_implementation": "static"}

    def call(prompts: list[np.ndarray]) -> Timing:
        longest = max(map(len, prompts))
        tokens_BL = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask_BL = torch.zeros_like(tokens_BL)
        for row, tokens_L in enumerate(prompts):
            tokens_BL[row, longest - len(tokens_L) :] = torch.as_tensor(tokens_L)
            mask_BL[row, longest - len(tokens_L) :] = 1
        watch, start = Watch(clock), clock()
        with torch.inference_mode():
            said = model.generate(
                tokens_BL, attention_mask=mask_BL, max_new_tokens=new_tokens, streamer=watch, **settings
            )
        return Timing(watch.times[1] - start, clock() - start, said[:, longest:].tolist())

    return call


def read_rate(count: int, clock: Callable[[], float]) -> float:
    """Bytes a second of a plain sum over `count` bytes, the best of five."""
    array, spent = torch.ones(count // 4), []
    for _ in range(5):
        start = clock()
        array.sum()
        spent.append(clock() - start)
    return count / min(spent)


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, most)"""
    return statistics.median(values), min(values), max(values)


def measure(sides: dict[str, Side], prompts: list[np.ndarray], repeats: int) -> dict[str, list[Timing] | str]:
    """The timings of each side, taken in turn; of a side that fails, the reason."""
    results: dict[str, list[Timing] | str] = {}
    for name, call in sides.items():
        try:
            call(prompts)
            if name == "compiled":
                call(prompts)  # the first call's static cache was new to the compiler, the second's is not
            results[name] = []
        except Exception as error:  # whatever a compiler may raise: the others go on
            results[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    for turn in range(repeats):
        names = [name for name in sides if not isinstance(results[name], str)]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            timings = results[name]
            assert isinstance(timings, list)
            timings.append(sides[name](prompts))
            gc.collect()
    return results


def figures(timings: list[Timing], batch: int) -> dict[str, list[float]]:
    """By turn: seconds to the first token, tokens a second after it and over all."""
    later = len(timings[0].ids[0]) - 1
    return {
        "prefill": [t.first for t in timings],
        "decode": [batch * later / (t.whole - t.first) for t in timings],
        "whole": [batch * (later + 1) / t.whole for t in timings],
    }


def main(given: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    threads = min(given.threads or len(cores), len(cores))
    os.sched_setaffinity(0, cores[:threads])  # XLA makes as many threads as it sees cores
    torch.set_num_threads(threads)
    machine.prepare()  # as python -m ain_jax.generate does; both sides keep what they free
    transformers.utils.logging.disable_progress_bar()
    clock, console, rows = CLOCKS[given.clock], Console(width=None if sys.stdout.isatty() else 130), []
    with tempfile.TemporaryDirectory() as made:
        folder = given.model or random_model(made)
        ours, weights, vocabulary = our_side(folder, given.dtype, given.new_tokens, clock)
        sides = {"ours": ours}
        for name in given.peers:
            sides[name] = their_side(folder, given.dtype, given.new_tokens, clock, name == "compiled")
        plain = read_rate(weights, clock)
        title = (
            f"tokens a second, {given.clock} time, medians of {given.repeats}; {given.dtype}, {threads} threads each, "
            f"prompts of {-(-given.prompt_tokens // 2)} to {given.prompt_tokens} tokens, {given.new_tokens} new; "
            f"weights {weights / 1e9:.2f} GB, plain read {plain / 1e9:.1f} GB/s; jax {jax.__version__}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}"
        )
        table = Table("batch", "side", title=title)
        for column in ("prefill s", "decode", "whole", "of the read", "decode, ours / theirs", "whole, ours / theirs"):
            table.add_column(column, justify="right")
        table.add_column("ids")
        for batch in given.batch:
            results = measure(sides, prompts_of(batch, given.prompt_tokens, vocabulary), given.repeats)
            if isinstance(results["ours"], str):
                raise SystemExit(f"ours failed: {results['ours']}")
            mine = figures(results["ours"], batch)
            for name, timings in results.items():
                row: dict[str, Any] = {"batch": batch, "side": name}
                if isinstance(timings, str):
                    table.add_row(str(batch), name, *["-"] * 6, timings)
                    rows.append(row | {"failed": timings})
                    continue
                theirs = figures(timings, batch)
                row |= {key: middle(values) for key, values in theirs.items()}
                row["timings"] = [asdict(t) for t in timings]
                of_read = row["decode"][0] / batch * weights / plain
                cells = [f"{row['prefill'][0]:.2f}", f"{row['decode'][0]:.1f}", f"{row['whole'][0]:.1f}"]
                cells.append(f"{of_read:.0%}")
                if name == "ours":
                    cells += ["", "", ""]
                else:
                    for key in ("decode", "whole"):
                        ratio = middle([a / b for a, b in zip(mine[key], theirs[key], strict=True)])
                        row[f"{key}_ratio"] = ratio
                        cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio))
                    pairs = zip(results["ours"][0].ids, timings[0].ids, strict=True)
                    row["same_rows"] = same = sum(a == b for a, b in pairs)
                    cells.append("the same" if same == batch else f"the same in {same} of {batch} rows")
                table.add_row(str(batch), name, *cells)
                rows.append(row | {"of_read": of_read})
            table.add_section()
            if given.json:
                given.json.write_text(json.dumps({"title": title, "rows": rows}))
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder as transformers saves it")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt_tokens", type=int, default=100, help="of the longest prompt; the shortest has half")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of each side; all cores where none is given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--peers", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
