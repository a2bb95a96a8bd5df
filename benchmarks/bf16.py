"""How far bfloat16 is from float32: ours beside transformers', of a tiny random model of every family or a real one.

    python benchmarks/bf16.py [--only NAME] [--draws 3]
    python benchmarks/bf16.py --model FOLDER [--tokens 256]

Both sides hold the same weights, numbers of bfloat16, and read the same ids and pictures. The reference is
transformers in float32 with these weights: what is told is the difference of logits (the largest, the mean), the
Kullback-Leibler divergence from the reference to either side in nats, the mean over positions, and the share of
positions where the likeliest token is the reference's. "ours / theirs" is the quotient of the mean differences; above
1.5 our sums are rounded where theirs are not, and the exit status is 1.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Tiny models run for milliseconds and compile for seconds: code that is not optimised comes sooner.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))

import check_export
import families
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy.special import log_softmax
from tokenizers import Tokenizer
from write_families import pictures_for, words_and, write_folder
from write_reference import forward

from ain_jax import sample
from ain_jax.generate import Prompt
from ain_jax.models.config import ModelConfig
from ain_jax.weights.load import load_config, load_folder

NOTABLE = 1.5


@dataclass(frozen=True)
class Distance:
    """How far logits are from the reference's."""

    most: float
    mean: float
    divergence: float  # nats
    equal: float  # share of positions


def distance(logits_LV: np.ndarray, reference_LV: np.ndarray) -> Distance:
    """The mean is over all logits, the divergence and the share over positions."""
    apart = np.abs(logits_LV - reference_LV)
    p_LV, q_LV = (log_softmax(x.astype(np.float64), axis=-1) for x in (reference_LV, logits_LV))
    divergence = (np.exp(p_LV) * (p_LV - q_LV)).sum(-1).mean()
    equal = (logits_LV.argmax(-1) == reference_LV.argmax(-1)).mean()
    return Distance(float(apart.max()), float(apart.mean()), float(divergence), float(equal))


def compare(folder: Path, config: ModelConfig, prompt: Prompt, given: dict) -> list[np.ndarray]:
    """logits_LV of the reference, of transformers in bfloat16 and of ours."""
    reference = check_export.open_model(str(folder), bool(given))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.bfloat16().float())
    expected_LV = check_export.logits(reference, prompt.tokens_L, given)
    del reference
    theirs = check_export.open_model(str(folder), bool(given), torch.bfloat16)
    theirs_LV = check_export.logits(theirs, prompt.tokens_L, given)
    del theirs
    params, _ = load_folder(folder, jnp.bfloat16)
    return [expected_LV, theirs_LV, forward(params, config, prompt, jnp.bfloat16)]


def compare_case(name: str, config: ModelConfig, draws: int) -> list[np.ndarray]:
    """The same of a tiny model, the positions of several draws of its weights one behind the other."""
    pictures = pictures_for(config)
    prompt = words_and(pictures, config)
    found = []
    with tempfile.TemporaryDirectory() as place:
        for seed in range(draws):
            params = families.random_params(config, seed)
            folder = write_folder(name, config, params, Path(place))
            given = check_export.processed(str(folder), pictures) if pictures else {}
            found.append(compare(folder, config, prompt, given))
    return [np.concatenate(sides) for sides in zip(*found, strict=True)]


def compare_model(folder: Path, tokens: int) -> list[np.ndarray]:
    """The same of a real model on the Universal Declaration of Human Rights, Arabic and English in turn."""
    config = load_config(folder)
    lines = (sample.FOLDER / "udhr.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(f"{record['ar']}\n{record['en']}" for record in map(json.loads, lines))
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:tokens]
    return compare(folder, config, Prompt(np.array(ids, np.int32)), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a folder; may be given several times")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--draws", type=int, default=3, help="of weights, for each tiny model")
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    title = f"bfloat16 against float32; transformers {transformers.__version__}, jax {jax.__version__}"
    table = Table("model", title=title)
    for column in ("max", "mean", "KL, nats", "equal tokens"):
        for side in ("theirs", "ours"):
            table.add_column(f"{column}\n{side}", justify="right")
    table.add_column("mean\nours / theirs", justify="right")
    cases = {name: config for name, config in families.every().items() if name.startswith(given.only)}
    found = {folder.name: lambda folder=folder: compare_model(folder, given.tokens) for folder in given.model} or {
        name: lambda name=name, config=config: compare_case(name, config, given.draws) for name, config in cases.items()
    }
    notable = []
    for name, run in found.items():
        expected_LV, *sides = run()
        theirs, ours = (distance(logits_LV, expected_LV) for logits_LV in sides)
        cells = [f"{getattr(side, n):.4f}" for n in ("most", "mean") for side in (theirs, ours)]
        cells += [f"{side.divergence:.1e}" for side in (theirs, ours)]
        cells += [f"{side.equal:.1%}" for side in (theirs, ours)]
        table.add_row(name, *cells, f"{ours.mean / theirs.mean:.2f}")
        notable += [name] if ours.mean > NOTABLE * theirs.mean else []
    Console().print(table)
    if notable:
        sys.exit(f"further from float32 than transformers is: {', '.join(notable)}")


if __name__ == "__main__":
    main()
