"""Plan + sources -> batches on the devices, from any step onwards."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from ain_jax.data import workers
from ain_jax.data.batch import Batch, PairBatch
from ain_jax.data.rows import Rows, Steps

__all__ = ["Loader", "Rows", "batches"]


@dataclasses.dataclass(frozen=True)
class Loader:
    """How many hands make the batches. It changes no batch, only how soon the next one is there."""

    workers: int = 0  # processes that decode and lay pictures; 0: threads. A stage without pictures starts none
    threads: int = 2  # of this process, where there are no workers
    prefetch: int = 4  # batches made ahead

    def __post_init__(self):
        low = [f"{name} = {value}" for name, value in dataclasses.asdict(self).items() if value < 0]
        if low or not self.prefetch:
            raise ValueError(f"{', '.join(low) or 'prefetch = 0'}: expected 0 or more, and prefetch 1 or more")


def batches(
    rows: Rows,
    rows_per_batch: int,
    sharding: jax.sharding.Sharding | None,
    start: int = 0,
    loader: Loader = Loader(),
    process: int | None = None,
    processes: int | None = None,
) -> Iterator[tuple[Batch | PairBatch, int]]:
    """(batch, tokens of it that are not padding) of step `start` and of each one after it, to the end of the plan.

    Each process lays the rows of a batch that its own devices hold under `sharding`; without one, an equal share of
    them, that of process `process` of `processes` (jax's own numbers if not given). The tokens are counted over the
    rows laid here. The last batch of a plan that does not divide is filled up with empty rows.
    """
    if sharding is None:
        processes = jax.process_count() if processes is None else processes
        process = jax.process_index() if process is None else process
        if rows_per_batch % processes:
            raise ValueError(f"Trainer.rows = {rows_per_batch} cannot be shared by {processes} processes equally")
        share = rows_per_batch // processes
        own, place = tuple(range(process * share, (process + 1) * share)), jax.device_put
    else:
        assert process is None and processes is None, "the sharding says which rows a process lays"
        own, place = _of_devices(sharding, rows_per_batch)
    steps = Steps(rows, rows_per_batch, own)
    for columns in _made(steps, start, loader):
        tokens = int(columns.pop("tokens").sum())
        yield _as_batch({k: place(v) for k, v in columns.items()}), tokens


def _made(steps: Steps, start: int, loader: Loader) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each batch, in order, whoever makes them."""
    if loader.workers and steps.rows.with_pictures:
        yield from workers.in_order(steps, range(start, len(steps)), loader.workers, loader.prefetch)
        return
    dataset = grain.MapDataset.range(start, len(steps)).map(lambda step: steps[int(step)])
    yield from dataset.to_iter_dataset(grain.ReadOptions(loader.threads, loader.prefetch if loader.threads else 0))


def _of_devices(
    sharding: jax.sharding.Sharding, rows_per_batch: int
) -> tuple[tuple[int, ...], Callable[[np.ndarray], jax.Array]]:
    """The rows of a batch that lie on this process' devices, and what lays their arrays there.

    Rows are taken by device and not by the process' number: where a mesh's other axes reach over hosts, several
    processes hold the same rows, and each has to lay the same ones.
    """
    try:
        sharding.shard_shape((rows_per_batch,))
    except ValueError:
        raise ValueError(
            f"a batch of {rows_per_batch} rows cannot be laid over the devices equally ({sharding}): "
            "change the rows of a batch (Trainer.rows, Evaluation.rows), or Mesh"
        ) from None
    held = [where[0] for where in sharding.addressable_devices_indices_map((rows_per_batch,)).values() if where]
    own = sorted({row for rows in held for row in range(rows_per_batch)[rows]})
    first = {row: number for number, row in enumerate(own)}

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = range(rows_per_batch)[index[0]]
            return array[first[wanted[0]] : first[wanted[0]] + len(wanted)][:, *index[1:]]

        return jax.make_array_from_callback((rows_per_batch, *array.shape[1:]), sharding, part)

    return tuple(own), place


def _as_batch(columns: dict[str, Any]) -> Batch | PairBatch:
    pair = {k: columns.pop(k) for k in ("pair_groups_BN", "reference_BN2", "desirable_BN") if k in columns}
    rows = Batch(**columns)
    return PairBatch(rows=rows, **pair) if pair else rows
