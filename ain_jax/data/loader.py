"""Plan + sources -> batches on the devices, from any step onwards."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from ain_jax.data.batch import Batch, PairBatch
from ain_jax.data.examples import Examples, PictureSettings
from ain_jax.data.pack_plan import PackPlan
from ain_jax.data.packing import Packing, lay_row


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a plan as a random-access source; a row is laid when it is asked for."""

    plan: PackPlan
    sources: Sequence[Examples]
    packing: Packing
    image_token: int | None  # None: a model without an image encoder
    images: PictureSettings | None
    pairs: bool = False
    reference_RN2: np.ndarray | None = None  # log-probabilities under the frozen policy, by row

    def __post_init__(self):
        for examples in self.sources:
            odd_E = np.flatnonzero(np.diff(examples.first_E) != (2 if self.pairs else 1))
            if len(odd_E):
                record = examples.records[int(examples.record_S[examples.first_E[odd_E[0]]])]
                why = (
                    "has no rejected answer, and this stage compares pairs"
                    if self.pairs
                    else "is a preference pair, and this stage would learn its rejected answer too"
                )
                raise ValueError(f"record {record.id} {why}: take its source out of Mixture.weights")
        names = self.groups
        tables = [np.array([names.index(g) for g in s.groups], np.int32) for s in self.sources]
        object.__setattr__(self, "_group_tables", tables)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names that `target_groups_BC` (or `pair_groups_BN`) counts, those of all sources together."""
        return tuple(sorted({g for s in self.sources for g in s.groups}))

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        units = self.plan.row(int(index))
        segments, groups = [], []
        for source, example in units:
            examples = self.sources[source]
            group = int(self._group_tables[source][examples.group_E[example]])  # type: ignore[attr-defined]
            made = examples.segments(int(example), self.image_token, self.images)
            segments += [dataclasses.replace(s, group=group) for s in made]
            groups.append(group)
        width = self.images.patch_values if self.images else 0
        row = lay_row(segments, self.packing, width, self.images.merge_size if self.images else 1)
        row["tokens"] = np.array(sum(len(s.tokens_L) for s in segments), np.int64)
        if self.pairs:
            row["pair_groups_BN"] = np.full(self.plan.max_units, -1, np.int32)
            row["pair_groups_BN"][: len(groups)] = groups
            none_N2 = np.zeros((self.plan.max_units, 2), np.float32)
            row["reference_BN2"] = none_N2 if self.reference_RN2 is None else self.reference_RN2[index]
        return row


def batches(
    rows: Rows, rows_per_batch: int, sharding: jax.sharding.Sharding | None, start: int = 0, threads: int = 2
) -> Iterator[tuple[Batch | PairBatch, int]]:
    """(batch, tokens that are not padding) of step `start` and of each one after it, to the end of the plan.

    Each process lays its own slice of the rows of a batch. The last batch of a plan that does not divide is
    filled up with empty rows.
    """
    processes, process = jax.process_count(), jax.process_index()
    if rows_per_batch % processes:
        raise ValueError(f"Trainer.rows = {rows_per_batch} cannot be shared by {processes} processes equally")
    if sharding is not None:
        try:
            sharding.shard_shape((rows_per_batch,))
        except ValueError:
            raise ValueError(
                f"a batch of {rows_per_batch} rows cannot be laid over the devices equally ({sharding}): "
                "change the rows of a batch (Trainer.rows, Evaluation.rows), or Mesh"
            ) from None
    local = rows_per_batch // processes
    steps = -(-len(rows) // rows_per_batch)
    source = _Steps(rows, rows_per_batch, process * local, local)
    dataset = grain.MapDataset.range(start, steps).map(source)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
    for columns in dataset.to_iter_dataset(options):
        tokens = int(columns.pop("tokens").sum())
        placed = {k: _place(v, sharding) for k, v in columns.items()}
        yield _as_batch(placed), tokens


@dataclasses.dataclass(frozen=True)
class _Steps(grain.transforms.Map):
    """Step -> the stacked rows of this process."""

    rows: Rows
    rows_per_batch: int
    first: int
    count: int

    def map(self, element):  # pyright: ignore[reportIncompatibleMethodOverride]
        begin = int(element) * self.rows_per_batch + self.first
        laid = [self.rows[i] if i < len(self.rows) else None for i in range(begin, begin + self.count)]
        pattern = next((r for r in laid if r is not None), None) or self.rows[0]
        empty = {k: np.full_like(v, _EMPTY.get(k, 0)) for k, v in pattern.items()}
        return {k: np.stack([(r or empty)[k] for r in laid]) for k in pattern}


_EMPTY: Mapping[str, int] = {"feature_index_BL": -1, "pair_groups_BN": -1}


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> Any:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_process_local_data(sharding, array)


def _as_batch(columns: dict[str, Any]) -> Batch | PairBatch:
    pair = {k: columns.pop(k) for k in ("pair_groups_BN", "reference_BN2") if k in columns}
    rows = Batch(**columns)
    return PairBatch(rows=rows, **pair) if pair else rows
