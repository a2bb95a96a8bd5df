"""How a pack plan is made: a draw is packed as it comes, and its rows are written as they are closed.

What is held at once are the examples of a window and the stretches of the draw that they come from, however long the
plan is.
"""

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ain_jax.data import columns
from ain_jax.data.draw import draws
from ain_jax.data.examples import Examples
from ain_jax.data.mixture import Counts, Mixture, strata
from ain_jax.data.packing import Packing, batched, packed

BLOCK = 2**12  # rows written at once
READ = 2**18  # lengths read at once
Chunk = tuple[np.ndarray, np.ndarray]  # part_U, the stratum of each unit; units_U2, its source and example


def write(
    sources: Mapping[str, Examples],
    mixture: Mixture | None,
    packing: Packing,
    rows: int | None,
    seed: int,
    folder: Path,
    rows_per_batch: int,
) -> dict[str, Any]:
    """Write units_U2, starts_R and text_only_B into the folder; the plan's numbers come back."""
    sizes = [examples.sizes() for examples in sources.values()]
    for name, sizes_E3 in zip(sources, sizes, strict=True):
        for start in range(0, len(sizes_E3), READ):
            silent_E = np.flatnonzero(sizes_E3[start : start + READ, 2] == 0)
            if len(silent_E):
                told = f"example {start + silent_E[0]} has no token to learn from; check template and roles"
                raise ValueError(f"source {name}: {told}")
    size = rows_per_batch if packing.text_batches else 0
    kinds = {"units_U2": (np.int32, (2,)), "starts_R": (np.int64, ()), "text_only_B": (bool, ())}
    with columns.growing(folder, kinds) as files:
        made = _Written(files, packing, size)
        if mixture is None:
            made.take(_Stream(_each_once(sizes), sizes))
        else:
            drawing = _Drawing(sources, sizes, mixture, seed)
            if mixture.by == "epochs":
                made.take(_Stream(drawing.epochs(), sizes))
                _check_length(made.rows, rows, rows_per_batch, mixture)
            else:
                assert rows is not None
                begin_P = np.zeros(len(drawing.parts), int)
                for phase, wanted in enumerate(mixture.phase_rows(rows, max(size, 1))):
                    stream = _Stream(drawing.chunks(phase, begin_P), sizes)
                    made.take(stream, wanted)
                    begin_P = begin_P + stream.used(len(begin_P))
        return made.numbers()


def _each_once(sizes: Sequence[np.ndarray]) -> Iterator[Chunk]:
    """Every example of every source, in order."""
    for source, sizes_E3 in enumerate(sizes):
        for start in range(0, len(sizes_E3), BLOCK):
            examples = np.arange(start, min(start + BLOCK, len(sizes_E3)), dtype=np.int32)
            source_U = np.full(len(examples), source, np.int32)
            yield source_U, np.stack([source_U, examples], axis=1)


class _Drawing:
    """A mixture over tokenised sources: which strata it has, and the draw of each phase."""

    def __init__(self, sources: Mapping[str, Examples], sizes: Sequence[np.ndarray], mixture: Mixture, seed: int):
        counts = {n: _counts(e, s) for (n, e), s in zip(sources.items(), sizes, strict=True)}
        self.parts = strata(mixture, counts)
        names = list(sources)
        self.source_P = np.array([names.index(part.source) for part in self.parts], np.int32)
        self.seeds, self.members = [], []
        for part, source in zip(self.parts, self.source_P.tolist(), strict=True):
            if not part.language:
                self.seeds.append((seed, source))
                self.members.append(None)
                continue
            self.seeds.append((seed, source, zlib.crc32(part.language.encode())))
            examples = sources[part.source]
            own = [k for k, group in enumerate(examples.groups) if _language(group) == part.language]
            self.members.append(np.flatnonzero(np.isin(examples.group_E, own)).astype(np.int32))

    def chunks(self, phase: int, begin_P: np.ndarray) -> Iterator[Chunk]:
        shares = [part.shares[phase] for part in self.parts]
        for drawn_U2 in draws([p.size for p in self.parts], shares, self.seeds, begin_P.tolist()):
            part_U, examples_U = drawn_U2[:, 0], drawn_U2[:, 1].copy()
            for part, members in enumerate(self.members):
                if members is not None:
                    own = part_U == part
                    examples_U[own] = members[examples_U[own]]
            yield part_U, np.stack([self.source_P[part_U], examples_U], axis=1)

    def epochs(self) -> Iterator[Chunk]:
        """The draw up to the end of every stratum's epochs."""
        left_P = np.array([round(part.draws) for part in self.parts])
        for part_U, units_U2 in self.chunks(0, np.zeros(len(self.parts), int)):
            # The how manieth of its stratum each unit is, from 0.
            nth_U = np.zeros(len(part_U), int)
            for part in range(len(self.parts)):
                own = part_U == part
                nth_U[own] = np.arange(own.sum())
            kept = nth_U < left_P[part_U]
            left_P = np.maximum(left_P - np.bincount(part_U, minlength=len(left_P)), 0)
            yield part_U[kept], units_U2[kept]
            if not left_P.any():
                return


def _counts(examples: Examples, sizes_E3: np.ndarray) -> Counts:
    """How many examples and tokens of each language a source has."""
    groups = len(examples.groups)
    counted, tokens = np.zeros(groups, np.int64), np.zeros(groups)
    for start in range(0, len(sizes_E3), READ):
        here = slice(start, start + READ)
        counted += np.bincount(examples.group_E[here], minlength=groups)
        tokens += np.bincount(examples.group_E[here], weights=sizes_E3[here, 0], minlength=groups)
    by_language: dict[str, list[int]] = {}
    for group, e, t in zip(examples.groups, counted.tolist(), tokens.tolist(), strict=True):
        total = by_language.setdefault(_language(group), [0, 0])
        total[0], total[1] = total[0] + e, total[1] + int(t)
    return Counts({k: e for k, (e, _) in by_language.items()}, {k: t for k, (_, t) in by_language.items()})


def _language(group: str) -> str:
    return group.rpartition("/")[2]


def _check_length(made: int, rows: int | None, rows_per_batch: int, mixture: Mixture) -> None:
    if rows is None or made <= rows < made + max(rows_per_batch, 1):
        return
    batch = max(rows_per_batch, 1)
    raise ValueError(
        f'Mixture.by = "epochs": once through {dict(mixture.weights)} makes {made} rows, which are '
        f"{-(-made // batch)} steps of {batch} rows, and {rows} rows were asked for: set Trainer.steps = "
        f"{-(-made // batch)}, or change the weights"
    )


class _Stream:
    """The sizes of a draw for the packer, and the units behind the numbers that it hands back."""

    def __init__(self, chunks: Iterable[Chunk], sizes: Sequence[np.ndarray]):
        self.chunks, self.sources = chunks, sizes
        self.held: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # first number -> part, units, sizes
        self.left: dict[int, int] = {}  # of these, how many have no row yet
        self.last = -1  # the highest number that has one
        self.passed: np.ndarray | None = None  # units of each stratum in chunks that are done with

    def sizes(self) -> Iterator[list[int]]:
        first = 0
        for part_U, units_U2 in self.chunks:
            sizes_U3 = np.empty((len(units_U2), 3), np.int32)
            for source, sizes_E3 in enumerate(self.sources):
                own = units_U2[:, 0] == source
                if own.any():
                    sizes_U3[own] = sizes_E3[units_U2[own, 1]]
            if len(units_U2):
                self.held[first], self.left[first] = (part_U, units_U2, sizes_U3), len(units_U2)
                first += len(units_U2)
                yield from sizes_U3.tolist()

    def take(self, numbers_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Units and sizes of these numbers, each of which is asked for once."""
        firsts = np.array(list(self.held))
        chunk_U = np.searchsorted(firsts, numbers_U, side="right") - 1
        units_U2, sizes_U3 = np.empty((len(numbers_U), 2), np.int32), np.empty((len(numbers_U), 3), np.int64)
        self.last = max(self.last, int(numbers_U.max(initial=-1)))
        for chunk in np.unique(chunk_U).tolist():
            own, first = chunk_U == chunk, int(firsts[chunk])
            places = numbers_U[own] - first
            _, units_U2[own], sizes_U3[own] = (column[places] for column in self.held[first])
            self.left[first] -= len(places)
            if not self.left[first]:
                part_U = self.held.pop(first)[0]
                self.passed = _added(self.passed, part_U)
        return units_U2, sizes_U3

    def used(self, strata: int) -> np.ndarray:
        """How many of each stratum were drawn up to the last one that has a row."""
        passed = self.passed
        for first, (part_U, _, _) in self.held.items():
            passed = _added(passed, part_U[: max(self.last + 1 - first, 0)])
        result = np.zeros(strata, int)
        if passed is not None:
            result[: len(passed)] = passed
        return result


def _added(counts: np.ndarray | None, part_U: np.ndarray) -> np.ndarray:
    more = np.bincount(part_U)
    if counts is None:
        return more
    both = np.zeros(max(len(counts), len(more)), int)
    both[: len(counts)] += counts
    both[: len(more)] += more
    return both


class _Written:
    """The rows of a plan, as they are written, and what is told about them."""

    def __init__(self, files: Mapping[str, columns.Growing], packing: Packing, rows_per_batch: int):
        self.files, self.packing, self.rows_per_batch = files, packing, rows_per_batch
        self.rows = self.max_units = self.units = 0
        self.budgets = packing.budgets
        self.totals = np.zeros(3, np.int64)
        self.counts = [np.zeros(budget + 1, np.int64) for budget in self.budgets]  # examples of each size
        files["starts_R"].add([0])

    def take(self, stream: _Stream, wanted: int | None = None) -> None:
        """The first `wanted` rows of a stream, or all of them."""
        made = packed(stream.sizes(), self.packing)
        size = self.rows_per_batch
        groups = batched(made, size) if size else (([row], False) for row, _ in made)
        if wanted is not None:
            groups = itertools.islice(groups, -(-wanted // max(size, 1)))
        rows: list[list[int]] = []
        for of_group, text_only in groups:
            rows += of_group
            if size:
                self.files["text_only_B"].add([text_only])
            if len(rows) >= BLOCK:
                self._write(rows, stream)
                rows = []
        self._write(rows, stream)

    def _write(self, rows: list[list[int]], stream: _Stream) -> None:
        lengths = np.array([len(row) for row in rows], np.int64)
        numbers_U = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum()))
        units_U2, sizes_U3 = stream.take(numbers_U)
        self.files["units_U2"].add(units_U2)
        self.files["starts_R"].add(self.units + np.cumsum(lengths))
        self.rows, self.units = self.rows + len(rows), self.units + len(units_U2)
        self.max_units = max(self.max_units, int(lengths.max(initial=0)))
        self.totals += sizes_U3.sum(axis=0)
        for counts, sizes_U in zip(self.counts, sizes_U3.T, strict=True):
            counts += np.bincount(sizes_U, minlength=len(counts))

    def numbers(self) -> dict[str, Any]:
        """What is told of the plan: shares of the places that hold something, and the best that they could be."""
        least = max(1, *(least_rows(counts) for counts in self.counts))
        share = lambda i, rows: float(self.totals[i] / (rows * self.budgets[i])) if self.budgets[i] else 0.0
        shares = {}
        for i, name in enumerate(("", "patches_", "targets_")):
            shares |= {f"{name}filled": share(i, max(self.rows, 1)), f"{name}best": share(i, least)}
        return shares | {"max_units": self.max_units, "rows_per_batch": self.rows_per_batch}


def least_rows(counts: np.ndarray) -> int:
    """A number of rows below which no packing can come, of `counts[s]` examples of each size 0 .. capacity.

    For a threshold a up to half a row: examples larger than capacity - a stand alone; of the others larger than half a
    row no two stand together; and those of size a to half a row need what room these leave, and then more rows
    (L2 of Martello and Toth 1990, section 8.3.2). Threshold 0 is the plain total over the capacity.

    capacity 10:   6 6 6 4 is 3 rows, by total 3; 6 6 6 6 is 4 rows, by total 3
    """
    capacity = len(counts) - 1
    if capacity < 1:
        return 0
    sizes = np.arange(capacity + 1)
    number, amount = np.cumsum(counts), np.cumsum(counts * sizes)  # of all up to a size
    a = np.arange(capacity // 2 + 1)
    half = capacity // 2
    alone = number[capacity] - number[capacity - a]
    large, large_amount = number[capacity - a] - number[half], amount[capacity - a] - amount[half]
    small_amount = amount[half] - np.where(a > 0, amount[np.maximum(a - 1, 0)], 0)
    over = small_amount - (large * capacity - large_amount)
    return int((alone + large + np.maximum(-(-over // capacity), 0)).max())
