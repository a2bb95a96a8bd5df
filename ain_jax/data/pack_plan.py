"""Which examples make which row: computed once from sizes alone, stored, any row in O(1).

The plan and a step are all that says where the data stands: a run resumes on any number of hosts at the very next
batch, because row r is the same wherever it is laid.
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from ain_jax.data.examples import Examples
from ain_jax.data.mixture import Mixture, draw, example_shares
from ain_jax.data.packing import Packing, pack


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Rows as runs of (source, example) units."""

    units_U2: np.ndarray  # int32: source, example
    starts_R: np.ndarray  # int64, R + 1 entries: where each row begins in units_U2
    filled: float  # share of token places that hold a token
    patches_filled: float  # share of patch places, 0 where there are none
    best: float  # the share that no packing could exceed with these rows' own tokens
    max_units: int  # examples in the fullest row
    fingerprint: str

    @property
    def rows(self) -> int:
        return len(self.starts_R) - 1

    def row(self, index: int) -> np.ndarray:
        """(units, 2): source and example of each unit of the row."""
        return self.units_U2[self.starts_R[index] : self.starts_R[index + 1]]


def plan(
    sources: dict[str, Examples], mixture: Mixture | None, packing: Packing, rows: int | None, seed: int, path: Path
) -> PackPlan:
    """The plan of `rows` rows of a mixture, or of every example once where `mixture` and `rows` are None.

    Read from `path` where its fingerprint fits, else computed and written there.
    """
    wanted = fingerprint(sources, mixture, packing, rows, seed)
    if path.exists():
        stored = load(path)
        if stored.fingerprint == wanted:
            return stored
    made = _make(sources, mixture, packing, rows, seed, wanted)
    save(made, path)
    return made


def fingerprint(sources, mixture, packing, rows, seed) -> str:
    """A digest of everything that the plan depends on: data, tokenizer, budgets, weights, seed, length."""
    what = {
        "sources": [[name, examples.fingerprint] for name, examples in sources.items()],  # units count them in order
        "mixture": None if mixture is None else dataclasses.asdict(mixture),
        "packing": dataclasses.asdict(packing),
        "rows": rows,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _make(sources, mixture, packing, rows, seed, mark) -> PackPlan:
    sizes = {name: examples.sizes() for name, examples in sources.items()}
    for name, sizes_E3 in sizes.items():
        silent = np.flatnonzero(sizes_E3[:, 2] == 0)
        if len(silent):
            raise ValueError(f"source {name}: example {silent[0]} has no token to learn from; check template and roles")
    if mixture is None:
        units = [(s, e) for s, examples in enumerate(sources.values()) for e in range(len(examples))]
        units_U2 = np.array(units, np.int32).reshape(-1, 2)
        packed = list(pack([sizes[list(sources)[s]][e] for s, e in units_U2], packing))
    else:
        assert rows is not None, "a mixture never ends; say how many rows"
        means = {name: float(s[:, 0].mean()) for name, s in sizes.items() if len(s)}
        empty = sorted(set(sources) - set(means))
        if empty:
            raise ValueError(f"source {empty[0]!r} has no examples: take it out of Mixture.weights")
        units_U2, packed = _draw_phases(sizes, mixture, means, packing, rows, seed)
    order = [unit for row in packed for unit in row]
    units_U2 = units_U2[order].astype(np.int32)
    starts_R = np.concatenate([[0], np.cumsum([len(row) for row in packed], dtype=np.int64)])
    names = list(sources)
    totals = np.array([sizes[names[s]][e] for s, e in units_U2]).reshape(-1, 3).sum(axis=0)
    budgets = packing.budgets * len(packed)
    least_rows = max(int(np.ceil((totals / np.maximum(packing.budgets, 1)).max())), 1)
    return PackPlan(
        units_U2=units_U2,
        starts_R=starts_R,
        filled=float(totals[0] / max(budgets[0], 1)),
        patches_filled=float(totals[1] / budgets[1]) if budgets[1] else 0.0,
        best=float(totals[0] / (least_rows * packing.row_tokens)),
        max_units=max((len(row) for row in packed), default=0),
        fingerprint=mark,
    )


def _draw_phases(sizes, mixture: Mixture, means, packing: Packing, rows: int, seed: int):
    """(units_U2, rows as indices of units) of the phases of a mixture, one behind the other."""
    names = list(sizes)
    drawn, packed, begin, done = [], [], np.zeros(len(names), int), 0
    for phase, wanted in enumerate(mixture.phase_rows(rows)):
        shares = example_shares(mixture, means, phase)
        # As many draws as the rows could hold, and the windows that pack() looks ahead.
        mean = np.stack([shares[n] * sizes[n].mean(axis=0) for n in names]).sum(axis=0)
        per_row = float(np.min(packing.budgets[mean > 0] / mean[mean > 0]))
        count = int(1.2 * per_row * wanted) + 4 * packing.window
        units_U2 = draw([len(sizes[n]) for n in names], [shares[n] for n in names], seed, count, begin.tolist())
        made = list(itertools.islice(pack((sizes[names[s]][e] for s, e in units_U2), packing), wanted))
        assert len(made) == wanted, "the draw was too short for the rows"
        packed += [[done + unit for unit in row] for row in made]
        drawn.append(units_U2)
        done += len(units_U2)
        used = units_U2[: 1 + max((unit for row in made for unit in row), default=-1)]
        begin = begin + np.bincount(used[:, 0], minlength=len(names))
    return np.concatenate(drawn), packed


def save(made: PackPlan, path: Path) -> None:
    """Write the plan beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp.npz")
    np.savez(beside, **{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})
    beside.replace(path)


def load(path: Path) -> PackPlan:
    """The plan as it was stored."""
    with np.load(path) as arrays:
        fields = {f.name: arrays[f.name] for f in dataclasses.fields(PackPlan)}
    scalars = {"filled": float, "patches_filled": float, "best": float, "max_units": int, "fingerprint": str}
    return PackPlan(**{k: scalars[k](v[()]) if k in scalars else v for k, v in fields.items()})
