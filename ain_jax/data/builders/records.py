"""The records that a builder wrote, read back by index, and which of them are in which language or of which kind.

Nothing is decoded on the way, and tensorflow-datasets is needed by builders only, not by a process that reads.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from ain_jax.data.builders.coding import parse
from ain_jax.data.formats import Record
from ain_jax.experiment import nearest

READ_BYTES = 16 << 20  # read at a time when all records are
READ_RECORDS = 1024
GROUPS_FILE = "groups.json"


@dataclass(frozen=True, order=True)
class Group:
    """The records of one split that are alike in these; a code stands for it, its place among the split's groups."""

    language: str
    kind: str
    pair: bool = False  # whether they have a rejected answer
    rows: int = 0

    @property
    def label(self) -> str:
        """What a part of a source is named by: "documents/ar", and of pairs the kind, "preference/wrong_language"."""
        return self.kind if self.pair else self.language

    @classmethod
    def of(cls, record: Record) -> "Group":
        return cls(record.language, record.kind, bool(record.rejected))


def _in_order(records: "Selected | Records", step: int) -> Iterator[Record]:
    """The records in order, so many read at a time."""
    for start in range(0, len(records), step):
        yield from records[start : start + step]


class Selected(Sequence[Record]):
    """Some records of a split, by their numbers `indices_E` there. Copies for other processes are small."""

    def __init__(self, records: "Records", indices_E: np.ndarray):
        self.records, self.indices_E = records, np.asarray(indices_E, np.int64)

    def __len__(self) -> int:
        return len(self.indices_E)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.records[int(self.indices_E[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Many records in one reading."""
        return self.records.__getitems__(self.indices_E[np.asarray(indices, np.int64)].tolist())

    def __iter__(self) -> Iterator[Record]:
        return _in_order(self, self.records.at_a_time)

    def take(self, indices_E: Any) -> "Selected":
        """Those of these numbers."""
        return Selected(self.records, self.indices_E[np.asarray(indices_E, np.int64)])


class Records(Sequence[Record]):
    """The records of one split by index, their pictures still encoded.

    Reading them in order (`for record in records`, or slices) is ten times as fast as one by one. It can be pickled:
    files are opened at the first reading, anew in each process.
    """

    def __init__(self, builder: Any, split: str):
        splits = builder.info.splits
        if split not in splits:
            raise ValueError(f"{builder.info.full_name}: no split {split!r}; there are {', '.join(splits)}")
        instructions = splits[split].file_instructions
        self.folder, self.split = Path(builder.data_dir), split
        missing = [i.filename for i in instructions if not Path(i.filename).is_file()]
        if missing:
            raise ValueError(f"{missing[0]}: no such file ({len(missing)} missing): {self._again()}")
        self._source = ArrayRecordDataSource(instructions)
        mean = splits[split].num_bytes / max(len(self._source), 1)
        self.at_a_time = int(np.clip(READ_BYTES / max(mean, 1), 1, READ_RECORDS))

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Many records in one reading; what cannot be read is a ValueError with its number."""
        wanted = [int(i) + len(self) if i < 0 else int(i) for i in indices]
        for given, index in zip(indices, wanted, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"record {given} of {len(self)}")
        if not wanted:
            return []
        try:
            if len(wanted) == 1:
                return [parse(self._source[wanted[0]])]
            return [parse(data) for data in self._source.__getitems__(wanted)]
        except Exception as error:  # of protobuf or ArrayRecord; each has several kinds
            if len(wanted) > 1:
                return [self[index] for index in wanted]  # which of them?
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            where = f"record {wanted[0]} of {len(self)} in {self.folder}, split {self.split!r}"
            raise ValueError(f"{where}: cannot be read ({reason}): {self._again()}") from None

    def _again(self) -> str:
        return f"remove the folder {self.folder}, and it is made again"

    def __iter__(self) -> Iterator[Record]:
        return _in_order(self, self.at_a_time)

    def take(self, indices_E: Any) -> Selected:
        """The records of these numbers, not read yet."""
        return Selected(self, np.asarray(indices_E, np.int64))

    # Which records are in which language, or of which kind, without reading them

    def codes(self) -> np.ndarray:
        """int32, one number a record: its group's place in `groups`."""
        path = self.folder / f"codes-{self.split}.npy"
        if not path.is_file():
            self._index()
        return np.load(path, mmap_mode="r")

    def groups(self) -> tuple[Group, ...]:
        """The groups of the split in order of language and kind, each with its number of rows."""
        path = self.folder / GROUPS_FILE
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if self.split not in found:
            self._index()
            return self.groups()
        return tuple(Group(**values) for values in found[self.split])

    def languages(self) -> dict[str, int]:
        """The rows of each language."""
        return self._rows_by("language")

    def kinds(self) -> dict[str, int]:
        """The rows of each kind."""
        return self._rows_by("kind")

    def labels(self) -> dict[str, int]:
        """The rows of each part that `select` gives."""
        return self._rows_by("label")

    def _rows_by(self, name: str) -> dict[str, int]:
        rows: Counter[str] = Counter()
        for group in self.groups():
            rows[getattr(group, name)] += group.rows
        return dict(rows)

    def select(self, label: str) -> Selected:
        """The records of a language, or of preference pairs those of a kind; else those of that kind.

        So InstAr's tasks, the kinds of its records, can be weighed one by one: "instar/closed_qa".
        """
        return self.take(np.flatnonzero(np.isin(self.codes(), self._codes_of(label))))

    def without(self, labels: Iterable[str]) -> Selected:
        """The records that `select` gives for none of these."""
        taken = [code for label in labels for code in self._codes_of(label)]
        return self.take(np.flatnonzero(~np.isin(self.codes(), taken)))

    def _codes_of(self, label: str) -> list[int]:
        groups = self.groups()
        wanted = [code for code, group in enumerate(groups) if group.label == label]
        wanted = wanted or [code for code, group in enumerate(groups) if group.kind == label]
        if not wanted:
            known = [*self.labels(), *self.kinds()]
            raise ValueError(f"no record of {label!r} in split {self.split!r}: {nearest(label, known)}")
        return wanted

    def _index(self) -> None:
        """Writes the codes and groups of a split whose builder wrote none."""
        groups = [Group.of(record) for record in self]
        path = self.folder / GROUPS_FILE
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        names = sorted(set(groups))
        number = {group: code for code, group in enumerate(names)}
        write_index(self.folder, {self.split: ([number[g] for g in groups], names)}, found)


def write_index(
    folder: Path, splits: Mapping[str, tuple[Any, Sequence[Group]]], others: Mapping[str, Any] | None = None
) -> None:
    """Writes, for each split, the code of each record and the groups that the codes stand for."""
    found = dict(others or {})
    for split, (codes, groups) in splits.items():
        codes_E = np.asarray(codes, np.int32)
        rows = np.bincount(codes_E, minlength=len(groups)).tolist()
        found[split] = [asdict(g) | {"rows": n} for g, n in zip(groups, rows, strict=True)]
        beside = folder / f"codes-{split}.{os.getpid()}.tmp.npy"
        np.save(beside, codes_E)
        beside.replace(folder / f"codes-{split}.npy")
    beside = folder / f"{GROUPS_FILE}.{os.getpid()}.tmp"
    beside.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(folder / GROUPS_FILE)


def records(builder: Any, split: str) -> Records:
    """The records of a split, by index."""
    return Records(builder, split)
