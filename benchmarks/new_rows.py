"""What each way of making the rows of new pieces is worth before any step, and after a few steps of the rows alone.

    python benchmarks/new_rows.py --model FOLDER [--pieces 16000 --text FILE ...] [--steps 40] [--distil 40]

The model's tokenizer grows by pieces learnt from the Arabic documents of the package's sample, which hold 15,000, and
from --text, UTF-8 files with a text a line. Rows are made and trained on the sample's documents alone. Losses are taken
on its held-out documents, per byte, so that the model as published ("base") compares; English documents in which a new
piece stands are left out. Then every way's rows learn on their own for --steps steps of the same batches, everything
else frozen.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ain_jax.data.builders import sample
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.tokenizer.align import Aligned, align
from ain_jax.tokenizer.base import Base, open_base
from ain_jax.tokenizer.corpus import count_chunks, read_texts
from ain_jax.tokenizer.grow import grow
from ain_jax.tokenizer.learn import learn
from ain_jax.train.rows import put, take
from ain_jax.weights import rows_report
from ain_jax.weights.distil import Distil, cross_entropy
from ain_jax.weights.embeddings import Corpus, Embeddings, extend_params
from ain_jax.weights.load import load_folder
from ain_jax.weights.lowered import Lowered
from ain_jax.weights.states import hidden_states

WAYS = {
    "mean": Embeddings(),
    "covariance": Embeddings("covariance"),
    "similar": Embeddings("similar"),
    "mean, lowered": Embeddings(lowered=Lowered(0.0005)),
    "mean, shrunk": Embeddings(shrink=0.7),
    "distil": Embeddings("distil", shrink=0.7),
    "distil, next token": Embeddings("distil", shrink=0.7),
}
ROWS = 8  # texts of a step


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a published folder of a text model")
    parser.add_argument("--pieces", type=int, default=15_000)
    parser.add_argument("--min_count", type=int, default=1, help="occurrences of a merge in so small a corpus")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=40, help="of the rows alone, after each way")
    parser.add_argument("--distil", type=int, default=40, help="steps of token distillation")
    parser.add_argument("--tokens", type=int, default=96, help="of a text at most, under either tokenizer")
    parser.add_argument("--parts", type=int, default=48, help="parts of held-out text in each language")
    parser.add_argument("--rate", type=float, default=0.003, help="of the row-only steps, in mean sizes of a row")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)

    base = open_base(given.model)
    with tempfile.TemporaryDirectory() as folder:
        texts = documents(Path(folder))
    train = [*texts["train", "ar"], *read_texts(*given.text)]
    learnt = learn(base, count_chunks(train, progress=False), given.pieces, min_count=given.min_count)
    new, first, count = grow(base, learnt), base.size, len(learnt.pieces)
    held_out = {language: texts["test", language] for language in ("ar", "en")}
    held_out["en"] = [
        text for text, ids in zip(held_out["en"], encoded(new, held_out["en"]), strict=True) if max(ids) < first
    ]
    opening = first_token(base)
    parts = rows_report.cut_alike(base.backend, new, held_out, opening, given.tokens, given.parts)
    corpus = Corpus(base.backend, new, texts["train", "ar"], texts["train", "en"], opening)
    batches = training_batches(corpus, first, given.tokens, given.steps)

    params, config = load_folder(given.model, jnp.float32)
    before = rows_report.losses(params, config, parts, extended=False)
    after: dict[str, rows_report.RowsReport] = {}
    stepped: dict[str, dict[str, rows_report.TextLoss]] = {}
    seconds: dict[str, float] = {}
    for name in given.ways:
        settings = WAYS[name]
        steps = Distil(
            steps=given.distil, rows=ROWS, tokens=given.tokens, next_token=0.1 if "next token" in name else 0.0
        )
        began = time.perf_counter()
        grown, larger = extend_params(params, config, first, learnt.replaces, replace(settings, distil=steps), corpus)
        seconds[name] = time.perf_counter() - began
        after[name] = rows_report.report(grown, larger, first, count, parts)
        if given.steps:
            trained = train_rows(MultimodalModel(larger), grown, first, count, batches, given.rate, name)
            stepped[name] = rows_report.losses(trained, larger, parts, extended=True)
            del trained
        del grown
    text = rows_report.table(before, after, width=150)
    print(
        f"{given.model.name}, {first} ids and {count} new ones; made in "
        + ", ".join(f"{n} {s:.0f} s" for n, s in seconds.items())
    )
    print(text)
    if stepped:
        show(before, stepped, given.steps)
    if given.json:
        numbers: dict[str, Any] = rows_report.as_json(before, after)
        numbers["after_steps"] = {
            name: {language: one.bits_per_byte for language, one in losses.items()} for name, losses in stepped.items()
        }
        given.json.write_text(json.dumps(numbers | {"seconds": seconds, "steps": given.steps}, indent=1) + "\n")
    return 0


def documents(folder: Path) -> dict[tuple[str, str], list[str]]:
    """The sample's plain texts by split and language."""
    builder = sample.build("documents", folder)
    records = {split: list(sample.records(builder, split)) for split in ("train", "test")}
    return {
        (split, language): [r.text for r in some if r.language == language]
        for split, some in records.items()
        for language in ("ar", "en")
    }


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [[0, *e.ids] for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def first_token(base: Base) -> int:
    """What opens a document: the beginning-of-text token, or the end token where there is none."""
    name = base.named.get("bos_token") or base.named["eos_token"]
    return base.ids[name]


def training_batches(corpus: Corpus, first: int, tokens: int, steps: int) -> list[Aligned]:
    """The same for every way: texts that hold new pieces, in random order."""
    pairs = align(corpus.old, corpus.new, corpus.texts, corpus.first_token, tokens)
    useful = np.flatnonzero((pairs.new_tokens_NM >= first).any(axis=1))
    order = np.random.default_rng(0).permutation(useful)
    return [pairs[np.resize(order, (steps, ROWS))[step]] for step in range(steps)]


def train_rows(
    model: MultimodalModel,
    params: Mapping[str, Any],
    first: int,
    count: int,
    batches: Sequence[Aligned],
    rate: float,
    name: str,
) -> dict[str, Any]:
    """`params` after a step of the new rows alone for each batch: Adam on the next token, everything else frozen."""
    params = jax.tree.map(jnp.asarray, dict(params))
    rows = take(params, first, count)
    sizes = jax.tree.map(lambda table: jnp.sqrt(jnp.mean(jnp.square(table))), take(params, 0, first))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, len(batches), 0.1), b1=0.9, b2=0.95)

    def loss(rows, params, batch):
        student = put(params, rows, first)
        hidden = hidden_states(model, student, batch.new_tokens_NM, batch.new_lengths_N)
        return cross_entropy(model, student, hidden, batch)

    @jax.jit
    def update(rows, state, params, batch):
        updates, state = optimizer.update(jax.grad(loss)(rows, params, batch), state, rows)
        return jax.tree.map(lambda row, change, size: row + size * change, rows, updates, sizes), state

    state = optimizer.init(rows)
    for batch in tqdm(batches, desc=name, file=sys.stderr):
        rows, state = jax.block_until_ready(update(rows, state, params, batch))  # so that the bar is true
    return put(params, rows, first)


def show(before: Mapping[str, Any], stepped: Mapping[str, Mapping[str, Any]], steps: int) -> None:
    table = Table("rows", title=f"bits per byte after {steps} steps of the new rows alone")
    for language in before:
        table.add_column(language, justify="right")
        table.add_column("change", justify="right")
    table.add_row("base", *(cell for one in before.values() for cell in (f"{one.bits_per_byte:.4f}", "")))
    for name, losses in stepped.items():
        cells = [
            (f"{one.bits_per_byte:.4f}", f"{rows_report.rise(before[lang], one):+.3%}") for lang, one in losses.items()
        ]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
