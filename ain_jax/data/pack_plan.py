"""Which examples make which row: computed once from sizes alone, stored, any row in O(1).

The plan and a step are all that says where the data stands: a run resumes on any number of hosts at the very next
batch, because row r is the same wherever it is laid.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ain_jax.data import columns, locks, planning
from ain_jax.data.examples import Examples
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing


@dataclasses.dataclass(frozen=True)
class PackPlan(columns.Mapped):
    """Rows as runs of (source, example) units; of a stored plan the arrays are mapped, not loaded.

    The shares with `best` are those that no packing could exceed with these rows' own examples, in this budget.
    """

    units_U2: np.ndarray  # int32: source, example
    starts_R: np.ndarray  # int64, R + 1 entries: where each row begins in units_U2
    filled: float  # share of token places that hold a token
    patches_filled: float  # share of patch places, 0 where there are none
    best: float  # of tokens
    max_units: int  # examples in the fullest row
    fingerprint: str
    patches_best: float = 0.0
    targets_filled: float = 0.0  # share of the places for learnt tokens
    targets_best: float = 0.0
    # Which batches have no pictures and are laid without arrays for them; empty where all have one shape.
    text_only_B: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    rows_per_batch: int = 0  # what text_only_B counts by; 0: any number

    @property
    def rows(self) -> int:
        return len(self.starts_R) - 1

    def row(self, index: int) -> np.ndarray:
        """(units, 2): source and example of each unit of the row."""
        return self.units_U2[self.starts_R[index] : self.starts_R[index + 1]]


def plan(
    sources: dict[str, Examples],
    mixture: Mixture | None,
    packing: Packing,
    rows: int | None,
    seed: int,
    path: Path,
    rows_per_batch: int = 0,
) -> PackPlan:
    """The plan of `rows` rows of a mixture, or of every example once where `mixture` and `rows` are None.

    Read from the folder `path` where its fingerprint fits, else computed and written there. Of a mixture by epochs
    `rows` may be None, too; where it is given, it must be what the epochs make, up to the batch's unused rows.
    `rows_per_batch` is needed where Packing.text_batches brings rows without pictures together.
    """
    if packing.text_batches and rows_per_batch < 1:
        raise ValueError("Packing.text_batches needs the rows of a batch: give rows_per_batch")
    if packing.text_batches and rows is not None and rows % rows_per_batch:
        raise ValueError(f"Packing.text_batches makes whole batches of {rows_per_batch} rows; {rows} rows are no such")
    assert mixture is None or mixture.by == "epochs" or rows is not None, "a mixture never ends; say how many rows"
    wanted = fingerprint(sources, mixture, packing, rows, seed, rows_per_batch)
    if stored_fingerprint(path) == wanted:
        return load(path)
    with locks.building(path):
        if stored_fingerprint(path) != wanted:  # another process may have made it, for which this one waited
            made = columns.beside(path)
            try:
                numbers = planning.write(sources, mixture, packing, rows, seed, made, rows_per_batch)
                save(PackPlan(**_arrays(made), **numbers, fingerprint=wanted), path)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        return load(path)


def fingerprint(sources, mixture, packing, rows, seed, rows_per_batch: int = 0) -> str:
    """A digest of everything that the plan depends on: data, tokenizer, budgets, weights, seed, length."""
    what = {
        "sources": [[name, examples.fingerprint] for name, examples in sources.items()],  # units count them in order
        "mixture": None if mixture is None else dataclasses.asdict(mixture),
        "packing": dataclasses.asdict(packing),
        "rows": rows,
        "seed": seed,
        "rows_per_batch": rows_per_batch if packing.text_batches else 0,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


ARRAYS = ("units_U2", "starts_R", "text_only_B")
READ = 2**16  # units read at once


def save(made: PackPlan, path: Path) -> None:
    """Write the plan beside, then rename; arrays that lie beside already are left as they are."""
    folders = {Path(str(a.filename)).parent for a in map(made.__getattribute__, ARRAYS) if isinstance(a, np.memmap)}
    ours = next((f for f in folders if f.parent == path.parent and f != path), None)
    folder = ours or columns.beside(path)
    for name in ARRAYS:
        if not (folder / f"{name}.npy").is_file():
            np.save(folder / f"{name}.npy", getattr(made, name))
    rest = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name not in ARRAYS}
    columns.write_rest(folder, rest)
    columns.put(folder, path)


def load(path: Path) -> PackPlan:
    """The plan as it was stored; nothing of its arrays is read yet."""
    return PackPlan(**_arrays(path), **columns.read_rest(path))


def stored_fingerprint(path: Path) -> str | None:
    """The fingerprint of a stored plan; None where there is none that can be read."""
    try:
        return str(columns.read_rest(path)["fingerprint"])
    except (ValueError, KeyError):
        return None


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    return {name: columns.opened(folder, name) for name in ARRAYS}


def table(made: PackPlan, sources: Mapping[str, Examples], mixture: Mixture | None = None) -> list[dict[str, Any]]:
    """What the rows hold of each source and language, in numbers that a user can check against the mixture.

    One dict each: source, language, weight (of the source; of a mixture with phases the tuple), examples that there
    are, drawn, epochs (drawn / examples), tokens drawn, and its share of all drawn tokens and of all drawn examples.
    """
    lines = []
    offsets, tables = [], []
    for examples in sources.values():
        offsets.append(sum(len(t) for t in tables))
        tables.append(examples.groups)
    drawn_G, tokens_G = np.zeros(sum(map(len, tables)), np.int64), np.zeros(sum(map(len, tables)), np.int64)
    sizes = [examples.sizes() for examples in sources.values()]
    for start in range(0, len(made.units_U2), READ):
        units_U2 = np.asarray(made.units_U2[start : start + READ])
        for number, examples in enumerate(sources.values()):
            own_U = units_U2[units_U2[:, 0] == number, 1]
            groups_U = examples.group_E[own_U]
            span = slice(offsets[number], offsets[number] + len(examples.groups))
            drawn_G[span] += np.bincount(groups_U, minlength=len(examples.groups))
            tokens = np.bincount(groups_U, weights=sizes[number][own_U, 0], minlength=len(examples.groups))
            tokens_G[span] += tokens.astype(np.int64)
    for number, (name, examples) in enumerate(sources.items()):
        have_G = np.bincount(examples.group_E, minlength=len(examples.groups))
        for k, group in enumerate(examples.groups):
            at = offsets[number] + k
            lines.append(
                {
                    "source": name,
                    "language": group.rpartition("/")[2],
                    "weight": None if mixture is None else mixture.weights.get(name),
                    "examples": int(have_G[k]),
                    "drawn": int(drawn_G[at]),
                    "epochs": float(drawn_G[at] / max(have_G[k], 1)),
                    "tokens": int(tokens_G[at]),
                    "share": float(tokens_G[at] / max(tokens_G.sum(), 1)),
                    "example_share": float(drawn_G[at] / max(drawn_G.sum(), 1)),
                }
            )
    return lines


def table_text(lines: list[dict[str, Any]]) -> str:
    """The table of `table`, to be printed."""
    heads = ("source", "language", "weight", "examples", "drawn", "epochs", "tokens", "share of tokens", "of examples")
    rows = [
        (
            *(line["source"], line["language"], "" if line["weight"] is None else f"{line['weight']}"),
            *(f"{line['examples']:,}", f"{line['drawn']:,}", f"{line['epochs']:.2f}", f"{line['tokens']:,}"),
            *(f"{line['share']:.2%}", f"{line['example_share']:.2%}"),
        )
        for line in lines
    ]
    widths = [max(len(row[c]) for row in [heads, *rows]) for c in range(len(heads))]
    cells = [
        [
            cell.ljust(width) if c < 2 else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in [heads, *rows]
    ]
    return "\n".join("  ".join(row).rstrip() for row in cells)
