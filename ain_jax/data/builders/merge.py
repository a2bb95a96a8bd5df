"""The tasks of a source run by worker processes, in order, and their results put together."""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loky
import numpy as np
from tqdm import tqdm

from ain_jax.data.builders import convert
from ain_jax.data.builders.convert import Converted, Job, Shard
from ain_jax.data.builders.records import Group
from ain_jax.data.files import Part

EARLY_ROWS = 10_000  # a source of which more than half is bad by then is stopped
TOLD_DUPLICATES = 100_000  # rows of an id seen before that are written out one by one
DUPLICATE = "the id stands elsewhere already"
SAID = "the same is said elsewhere already"


def run(
    job: Job, tasks: Sequence[Sequence[Part]], workers: int, progress: bool | None, bad_share: float, rejects: Path
) -> list[Converted]:
    """What became of each task, in their order. If most rows are bad, a ValueError soon; `rejects` holds them then."""
    workers = min(workers or _cores(), len(tasks))
    counts_T2 = np.zeros((len(tasks), 2), np.int64)
    with tqdm(
        desc=job.source, unit=" rows", disable=None if progress is None else not progress, dynamic_ncols=True
    ) as bar:

        def show() -> None:
            rows, rejected = (int(n) for n in counts_T2.sum(axis=0))
            bar.update(rows - bar.n)
            bar.set_postfix_str(f"{rejected:,} rejected", refresh=False)
            if rows >= EARLY_ROWS and rejected > max(bad_share, 0.5) * rows:
                raise _Hopeless

        try:
            if workers > 1:
                counts_T2 = np.lib.format.open_memmap(
                    Path(job.folder) / convert.PROGRESS, mode="w+", dtype=np.int64, shape=counts_T2.shape
                )
                return _in_workers(job, tasks, workers, show)
            done = []
            for number, parts in enumerate(tasks):

                def tick(rows: int, rejected: int, number: int = number) -> None:
                    counts_T2[number] = rows, rejected
                    show()

                done.append(convert.convert(job, number, parts, tick))
            return done
        except _Hopeless:
            rows, rejected = (int(n) for n in counts_T2.sum(axis=0))
            reasons = _rescued(job, len(tasks), rejects)
            raise ValueError(
                f"{job.source}: stopped after {rows:,} rows, of which {rejected:,} were rejected as form {job.form!r} "
                f"({_counts(reasons)}). They stand in {rejects}: name another form in Sources.forms, or mend the files"
            ) from None


class _Hopeless(Exception):
    """Most of many rows are bad."""


def _rescued(job: Job, tasks: int, path: Path) -> Counter[str]:
    """Writes the rejects of tasks that were stopped; returns how many rows there are of each reason."""
    reasons = Counter()
    with open(path, "w", encoding="utf-8") as file:
        for part in filter(Path.is_file, (convert.rejects_path(job.folder, number) for number in range(tasks))):
            for line in part.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True):
                if line.endswith("}\n"):  # the last may be cut off
                    file.write(line)
                    reasons[convert.reason_kind(json.loads(line)["reason"])] += 1
    return reasons


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_workers(job: Job, tasks: Sequence[Sequence[Part]], workers: int, show: Any) -> list[Converted]:
    with _pool(job.source, workers) as pool:
        futures = [pool.submit(convert.convert_in_worker, job, number, parts) for number, parts in enumerate(tasks)]
        waiting = set(futures)
        while waiting:
            finished, waiting = concurrent.futures.wait(
                waiting, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                future.result()  # the first fault is raised at once
            show()
        return [future.result() for future in futures]


@contextmanager
def _pool(source: str, workers: int) -> Iterator[Any]:
    """Worker processes started afresh (a fork would copy a running jax half alive), killed if anything goes wrong.

    loky's do not import the caller's main module, which may be a script without a guard, and imports jax.
    """
    pool = loky.ProcessPoolExecutor(max_workers=workers, initializer=convert.begin)
    clean = False
    try:
        yield pool
        clean = True
    except concurrent.futures.BrokenExecutor as error:
        codes = str(error).partition("exit codes of the workers are ")[2].split("\n")[0]
        raise RuntimeError(
            f"{source}: a worker process ended before its work was done ({codes or error}); killed for want of memory? "
            "Set Sources.workers to fewer"
        ) from None
    except MemoryError:
        raise RuntimeError(f"{source}: a worker process is out of memory; set Sources.workers to fewer") from None
    finally:
        pool.shutdown(wait=True, kill_workers=not clean)


@dataclasses.dataclass(frozen=True)
class Repeated:
    """record -> the first of its kind, for each that is not the first; counted over all tasks."""

    ids: Mapping[int, int]
    words: Mapping[int, int]  # of records that say what one before them says; none where that may be

    @property
    def all(self) -> dict[int, int]:
        return dict(sorted({**self.ids, **self.words}.items()))


def repeated(done: Sequence[Converted]) -> Repeated:
    """What stands there again. Memory: some 40 bytes a record."""
    ids = _repeated(np.concatenate([task.hashes_N for task in done]), ())
    words_N = np.concatenate([task.words_N for task in done])
    return Repeated(ids, _repeated(words_N, ids) if len(words_N) else {})


def _repeated(hashes_N: np.ndarray, without: Iterable[int]) -> dict[int, int]:
    kept_N = np.delete(np.arange(len(hashes_N)), list(without))
    hashes_N = hashes_N[kept_N]
    order_N = np.argsort(hashes_N, kind="stable")  # equal ones stay in their order
    again_N = np.zeros(len(order_N), bool)
    again_N[1:] = hashes_N[order_N[1:]] == hashes_N[order_N[:-1]]
    first_N = order_N[np.maximum.accumulate(np.where(again_N, 0, np.arange(len(order_N))))]
    pairs = zip(kept_N[order_N[again_N]].tolist(), kept_N[first_N[again_N]].tolist(), strict=True)
    return dict(sorted(pairs))


def told(job: Job, done: Sequence[Converted], found: Repeated, path: Path) -> dict[str, Any]:
    """Writes the rejects file, repeated records among it.

    Returns the counts of rows, of those at fault and of those left out though they are sound, and of reasons.
    """
    starts_T = np.cumsum([0, *(len(task.hashes_N) for task in done)])
    every = found.all
    shown = dict(itertools.islice(every.items(), TOLD_DUPLICATES))
    wanted = np.unique(np.array([*shown, *shown.values()], np.int64))
    places: dict[int, tuple[str, str]] = {}
    for number in range(len(done)):
        inside = wanted[(wanted >= starts_T[number]) & (wanted < starts_T[number + 1])] - starts_T[number]
        if len(inside):
            lines = set(inside.tolist())
            with open(convert.places_path(job.folder, number), encoding="utf-8") as file:
                for i, line in enumerate(file):
                    if i in lines:
                        places[int(starts_T[number]) + i] = json.loads(line)
    beside = path.with_name(path.name + ".tmp")
    waiting = collections.deque(shown.items())
    with open(beside, "w", encoding="utf-8") as file:
        for number in range(len(done)):
            with open(convert.rejects_path(job.folder, number), encoding="utf-8") as part:
                for line in part:
                    file.write(line)
            while waiting and waiting[0][0] < starts_T[number + 1]:
                record, first = waiting.popleft()
                where, name = places[record]
                reason = f"{SAID}, in {places[first][0]} (Sources.repeated)"
                if record in found.ids:
                    reason = (
                        f"id {name[: convert.SHOWN]!r} stands in {places[first][0]} already; every record needs its "
                        f'own (Sources.ids = {{"{job.source}": "place"}} names records by file and line)'
                    )
                convert.write_reject(file, where, reason, {"id": convert.shortened(name)})
        if len(every) > len(shown):
            more = f"{len(every) - len(shown):,} more rows whose id, or whose words, stand elsewhere already"
            convert.write_reject(file, "", more, None)
    beside.replace(path)
    reasons = sum((task.reasons for task in done), Counter())
    reasons.update({kind: len(rows) for kind, rows in ((DUPLICATE, found.ids), (SAID, found.words)) if rows})
    return {
        "rows": sum(task.rows for task in done),
        "rejected": sum(task.rejected for task in done) + len(found.ids),
        "left_out": sum(task.left_out for task in done) + len(found.words),
        "form": job.form,
        "reasons": dict(reasons.most_common()),
    }


def counted(told: Mapping[str, Any]) -> str:
    """ "1,234 rows, 12 rejected (7 x no picture in …, 5 x empty id)", and how many were left out, if some were."""
    reasons = Counter(told["reasons"])
    unwanted = f", {told['left_out']:,} left out" if told.get("left_out") else ""
    counts = f"{told['rows']:,} rows, {told['rejected']:,} rejected{unwanted}"
    return counts + (f" ({_counts(reasons)})" if reasons else "")


def _counts(reasons: Counter[str], shown: int = 5) -> str:
    texts = [f"{count:,} x {reason}" for reason, count in reasons.most_common(shown)]
    rest = reasons.total() - sum(count for _, count in reasons.most_common(shown))
    return ", ".join(texts + ([f"{rest:,} x other reasons"] if rest else []))


def kept(
    done: Sequence[Converted], repeated: Mapping[int, int]
) -> tuple[list[Shard], dict[str, tuple[np.ndarray, list[Group]]]]:
    """The shards without the repeated records, and of each split the codes and groups of its records."""
    dropped_N = np.zeros(sum(len(task.hashes_N) for task in done), bool)
    dropped_N[list(repeated)] = True
    groups = sorted({group for task in done for group in task.groups})
    number = {group: code for code, group in enumerate(groups)}
    shards: list[Shard] = []
    codes: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    begin = 0
    for task in done:
        dropped_n = dropped_N[begin : begin + len(task.hashes_N)]
        begin += len(task.hashes_N)
        codes_n = np.array([number[group] for group in task.groups], np.int32)[task.codes_N]
        for split, test in (("train", False), ("test", True)):
            of_split = task.held_out_N == test
            codes[split].append(codes_n[of_split & ~dropped_n])
            dropped_S, start = dropped_n[of_split], 0
            for shard in (shard for shard in task.shards if shard.split == split):
                positions = np.flatnonzero(dropped_S[start : start + shard.records])
                start += shard.records
                left = convert.without(shard, positions.tolist()) if len(positions) else shard
                shards += [left] if left else []
    index = {}
    for split, pieces in codes.items():
        codes_E = np.concatenate(pieces)
        present, codes_E = np.unique(codes_E, return_inverse=True)
        if len(codes_E):
            index[split] = (codes_E.astype(np.int32), [groups[code] for code in present])
    return shards, index
