"""How new rows lie beside the old ones, and what they cost and gain before any step.

Losses compare across tokenizers only per byte of text: the same parts of the same texts are cut by both. English in
which no new piece stands is cut alike by both, so its loss rises by just the probability that the new pieces take.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table

from ain_jax.models.config import ModelConfig
from ain_jax.tokenizer.align import Aligned, align
from ain_jax.train.rows import TABLES
from ain_jax.weights.states import text_nats

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BLOCK = 2048  # new rows whose cosines with all old ones are held at once
NAMES = {TABLES[0]: "input", TABLES[1]: "head"}


@dataclass(frozen=True)
class Spread:
    """Mean, smallest, largest and the QUANTILES of some numbers."""

    mean: float
    least: float
    most: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class TableReport:
    """The rows of one table: Euclidean norms, and each new row's cosine with the old row nearest to it."""

    old_norms: Spread
    new_norms: Spread
    nearest_cosines: Spread


@dataclass(frozen=True)
class TextLoss:
    """The loss on some text. Tokens are those predicted, bytes those of the whole text in UTF-8."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / log(2)


@dataclass(frozen=True)
class RowsReport:
    """One way of making the rows: `tables` by "input" and, where it is not tied, "head"; `losses` by language."""

    tables: Mapping[str, TableReport]
    losses: Mapping[str, TextLoss]


def report(
    params: Mapping[str, Any],
    config: ModelConfig,
    first: int,
    count: int,
    texts: Mapping[str, Aligned],
) -> RowsReport:
    """The report on `count` new rows from id `first` on. `texts` is what `cut_alike` gave."""
    flat = flatten_dict(dict(params))
    tables = {
        NAMES[path]: compare_rows(np.asarray(flat[path])[:first], np.asarray(flat[path])[first : first + count])
        for path in TABLES
        if path in flat
    }
    return RowsReport(tables, losses(params, config, texts, extended=True))


def losses(
    params: Mapping[str, Any], config: ModelConfig, texts: Mapping[str, Aligned], extended: bool
) -> dict[str, TextLoss]:
    """The loss by language, cut by the extended tokenizer or by the base."""
    found = {}
    for language, parts in texts.items():
        tokens_NL, lengths_N = (
            (parts.new_tokens_NM, parts.new_lengths_N) if extended else (parts.old_tokens_NL, parts.old_lengths_N)
        )
        nats, tokens = text_nats(config, params, tokens_NL, lengths_N)
        found[language] = TextLoss(nats, tokens, int(parts.bytes_N.sum()))
    return found


def cut_alike(
    old: tokenizers.Tokenizer,
    new: tokenizers.Tokenizer,
    texts: Mapping[str, Sequence[str]],
    first_token: int,
    tokens: int = 128,
    parts: int = 64,
) -> dict[str, Aligned]:
    """By language, at most `parts` parts of its texts, taken evenly, of which neither tokenizer makes `tokens`."""
    return {language: align(old, new, some, first_token, tokens, parts) for language, some in texts.items()}


def compare_rows(old_VD: np.ndarray, new_ND: np.ndarray) -> TableReport:
    """Norms of old and new rows, and of each new row its largest cosine with an old one."""
    old_VD, new_ND = old_VD.astype(np.float32), new_ND.astype(np.float32)
    old_V, new_N = np.linalg.norm(old_VD, axis=1), np.linalg.norm(new_ND, axis=1)
    directions_VD = old_VD / np.maximum(old_V, 1e-9)[:, None]
    nearest = [
        ((new_ND[i : i + BLOCK] @ directions_VD.T).max(axis=1) / np.maximum(new_N[i : i + BLOCK], 1e-9))
        for i in range(0, len(new_ND), BLOCK)
    ]
    return TableReport(_spread(old_V), _spread(new_N), _spread(np.concatenate(nearest)))


def rise(before: TextLoss, after: TextLoss) -> float:
    """By which share the loss per byte rose: 0.006 is 0.6%."""
    return after.bits_per_byte / before.bits_per_byte - 1


def table(before: Mapping[str, TextLoss], reports: Mapping[str, RowsReport], width: int = 120) -> str:
    """The reports as text, a line for the base and for each way of making rows: losses, then norms and cosines."""
    loss = Table("rows", title="loss before any step")
    for language in before:
        for column in (f"{language}: bits/byte", "change", "nats/token"):
            loss.add_column(column, justify="right")
    loss.add_row("base", *(cell for one in before.values() for cell in _loss_cells(one, None)))
    for name, one in reports.items():
        loss.add_row(name, *(cell for lang in before for cell in _loss_cells(one.losses[lang], before[lang])))
    rows = Table("rows", "table", title="new rows, and the old ones beside them")
    columns = ("mean", "least", *(f"{q:.0%}" for q in QUANTILES), "most")
    for column in ("", *columns):
        rows.add_column(column, justify="right")
    seen = set()
    for name, one in reports.items():
        for which, found in one.tables.items():
            if which not in seen:
                rows.add_row("old", which, "norm", *_spread_cells(found.old_norms))
                seen.add(which)
            rows.add_row(name, which, "norm", *_spread_cells(found.new_norms))
            rows.add_row("", "", "cosine", *_spread_cells(found.nearest_cosines))
    out = StringIO()
    console = Console(file=out, width=width)
    console.print(loss)
    console.print(rows)
    return out.getvalue()


def as_json(before: Mapping[str, TextLoss], reports: Mapping[str, RowsReport]) -> dict[str, Any]:
    """The same numbers as plain values."""
    numbers = lambda one: asdict(one) | {"nats_per_token": one.nats_per_token, "bits_per_byte": one.bits_per_byte}
    methods = {
        name: {
            "tables": {which: asdict(found) for which, found in one.tables.items()},
            "losses": {
                language: numbers(found) | {"rise": rise(before[language], found)}
                for language, found in one.losses.items()
            },
        }
        for name, one in reports.items()
    }
    return {"base": {language: numbers(one) for language, one in before.items()}, "methods": methods}


def write(path: str | Path, before: Mapping[str, TextLoss], reports: Mapping[str, RowsReport]) -> None:
    """The numbers as a JSON file."""
    text = json.dumps(as_json(before, reports), indent=1, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _spread(values: np.ndarray) -> Spread:
    quantiles = tuple(float(q) for q in np.quantile(values, QUANTILES))
    return Spread(float(values.mean()), float(values.min()), float(values.max()), quantiles)


def _spread_cells(one: Spread) -> list[str]:
    return [f"{value:.3f}" for value in (one.mean, one.least, *one.quantiles, one.most)]


def _loss_cells(one: TextLoss, before: TextLoss | None) -> list[str]:
    change = "" if before is None else f"{rise(before, one):+.3%}"
    return [f"{one.bits_per_byte:.4f}", change, f"{one.nats_per_token:.4f}"]
