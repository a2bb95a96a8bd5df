"""Records -> tokenised examples, kept as columns on disk: what planning measures and what rows are laid from.

An example is one sequence of tokens, or two for a preference pair (the better answer, then the worse one) and for a
judged answer (that answer, then one to another question in its place: see `judged.py`). Pictures are not decoded here:
their size, read from the file's head, gives the number of places that they take.
"""

import dataclasses
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ain_jax.data import columns, locks, positions, visuals
from ain_jax.data.encoding import Encoder, Item, Rejects, encode_batch, encode_documents, first_token, kept
from ain_jax.data.formats import Record
from ain_jax.data.judged import Judgements
from ain_jax.data.packing import Packing, Segment
from ain_jax.data.tiles import TileSettings
from ain_jax.data.visuals import PictureSettings
from ain_jax.tokenizer.chat import Chat

__all__ = ["Examples", "PictureSettings", "encode_documents", "first_token", "tokenise", "tokenizer_fingerprint"]

BATCH = 1024  # records tokenised at a time
BATCH_BYTES = 2**26  # and of pictures no more than this, but for one record
Answers = Literal["one", "pair", "judged"]  # what an example holds
KINDS: tuple[Answers, ...] = ("one", "pair", "judged")
REJECTS = "rejects.jsonl"  # in the folder of a source: what was left out or cut, and why


@dataclasses.dataclass(frozen=True)
class Examples(columns.Mapped):
    """The tokenised examples of one source. S sequences, E examples, T tokens in all, M pictures in all.

    Of a source that was tokenised the arrays are mapped from its files, and read where they are touched.
    """

    records: Sequence[Record]  # for the pictures, read again when a row is laid
    tokens_T: np.ndarray  # int32
    learn_T: np.ndarray  # bool
    starts_S: np.ndarray  # int64, S + 1 entries: where each sequence begins in tokens_T
    record_S: np.ndarray  # int32, the record of each sequence
    first_E: np.ndarray  # int64, E + 1 entries: the first sequence of each example
    group_E: np.ndarray  # int32, which of `groups`
    grids_M3: np.ndarray  # int32, frames, rows and columns of patches
    grid_starts_S: np.ndarray  # int64, S + 1 entries
    groups: tuple[str, ...]  # "read/ar"
    fingerprint: str
    sizes_E3: np.ndarray | None = None  # int32, what `sizes` gives; None: it counts
    desirable_E: np.ndarray | None = None  # int8: 1 a good answer, 0 a bad one (KTO), -1 not judged so; None: none is
    bad: int = 0  # records at fault, and left out
    dropped: int = 0  # records left out because no row holds them
    split: int = 0  # conversations cut into several for that reason
    rejects: Path | None = None  # where each of these stands with its reason

    def __len__(self) -> int:
        return len(self.first_E) - 1

    def answers(self) -> np.ndarray:
        """(E,): the place in KINDS of what each example holds."""
        two_E = np.diff(self.first_E) == 2
        judged_E = np.zeros(len(self), bool) if self.desirable_E is None else self.desirable_E >= 0
        assert two_E[judged_E].all(), "judged answers tokenised by an older version: remove the run's data/tokenised"
        return two_E.astype(np.int8) + judged_E

    def sizes(self) -> np.ndarray:
        """(E, 3): tokens, patches and learnt tokens of each example."""
        if self.sizes_E3 is not None:
            return self.sizes_E3
        patches_M = self.grids_M3.prod(axis=1) if len(self.grids_M3) else np.zeros(0, np.int64)
        learn_T = self.learn_T.copy()
        learn_T[self.starts_S[:-1]] = False  # nothing stands before the first token
        result = []
        for values, starts_S in (
            (np.ones_like(self.tokens_T), self.starts_S),
            (patches_M, self.grid_starts_S),
            (learn_T, self.starts_S),
        ):
            total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
            result.append(np.diff(total[starts_S[self.first_E]]))
        return np.stack(result, axis=1)

    def segments(
        self,
        example: int,
        image_token: int | None,
        settings: PictureSettings | None,
        video_token: int | None = None,
        tokens_per_second: float = 0.0,
    ) -> list[Segment]:
        """The segments of one example, its pictures and videos decoded.

        `tokens_per_second` is Qwen2.5-VL's, 0 for other models: two patches of a video are taken to lie a second apart,
        as two frames a second make it and as decoding takes it.
        """
        result = []
        for s in range(int(self.first_E[example]), int(self.first_E[example + 1])):
            span = slice(int(self.starts_S[s]), int(self.starts_S[s + 1]))
            tokens_L = np.array(self.tokens_T[span])
            grids_m3 = np.array(self.grids_M3[int(self.grid_starts_S[s]) : int(self.grid_starts_S[s + 1])])
            fields: dict[str, Any] = {}
            if len(grids_m3):
                assert settings is not None, "pictures need image settings"
                record = self.records[int(self.record_S[s])]
                try:
                    fields = visuals.laid(record, grids_m3, settings)
                except ValueError as error:
                    raise ValueError(f"record {record.id}: {error}") from None
                fields["is_picture_L"] = positions.visual_tokens(tokens_L, image_token, video_token)
            if isinstance(settings, TileSettings):  # such a decoder counts on by one, over pictures too
                positions_3L = np.tile(np.arange(len(tokens_L), dtype=np.int32), (3, 1))
            else:
                grids = [tuple(grid) for grid in grids_m3.tolist()]
                rate = tokens_per_second
                intervals = [rate if frames > 1 else 1.0 for frames, _, _ in grids] if rate else None
                merge = settings.merge_size if settings else 1
                positions_3L = positions.mrope_positions(tokens_L, grids, image_token, merge, video_token, intervals)
            learn_L = np.array(self.learn_T[span])
            result.append(Segment(tokens_L, learn_L, positions_3L, int(self.group_E[example]), **fields))
        return result


def tokenise(
    records: Sequence[Record],
    name: str,
    tokenizer: Any,
    settings: PictureSettings | None,
    row_tokens: int,
    mark: str,
    cache: Path,
    packing: Packing | None = None,
    chat: Chat = Chat(),  # noqa: B008  (frozen)
    bad_share: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """The examples of a source, read from `cache` where its fingerprint fits, else made and written there.

    `mark` stands for the records (the builder's fingerprint). `packing` says what becomes of a record that no row
    holds, and what its other budgets are; without it conversations longer than `row_tokens` are refused. A record at
    fault stops all when more than `bad_share` of the records are. `progress` is told (records done, of so many).
    """
    packing = dataclasses.replace(packing or Packing(), row_tokens=row_tokens)
    encoder = Encoder(tokenizer, settings, packing, chat)
    budgets = (*encoder.budgets, packing.windows, packing.too_long)
    parts = (name, mark, tokenizer_fingerprint(tokenizer), repr(settings), repr(budgets), repr(chat), repr(bad_share))
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    path = cache / f"{name}-{fingerprint}"
    if not _finished(path):
        with locks.building(path):
            if not _finished(path):  # by another process, for which this one waited
                _write(path, name, records, encoder, bad_share, progress)
    rest = columns.read_rest(path)
    arrays: dict[str, Any] = {column: columns.opened(path, column) for column in COLUMNS}
    counts: dict[str, Any] = {name: rest[name] for name in ("bad", "dropped", "split")}
    if (path / REJECTS).is_file():
        counts["rejects"] = path / REJECTS
    return Examples(records=records, groups=tuple(rest["groups"]), fingerprint=fingerprint, **counts, **arrays)


def _write(
    path: Path,
    name: str,
    records: Sequence[Record],
    encoder: Encoder,
    bad_share: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    made = columns.beside(path)
    try:
        rejects = Rejects(made / REJECTS, bad_share, len(records))
        with columns.growing(made, COLUMNS) as files:
            written, judged = _Written(files, name), Judgements()
            for start, batch in _batches(records):
                _tokenise_batch(batch, start, encoder, written, rejects, judged)
                if progress is not None:
                    progress(start + len(batch), len(records))
            _write_judged(judged.rest(), encoder, written, rejects)
            written.flush()
        groups = written.sort_groups(made)
        columns.write_rest(made, {"groups": groups, **rejects.counts})
        columns.put(made, path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _finished(path: Path) -> bool:
    try:
        columns.read_rest(path)
    except ValueError:
        return False
    return True


def _batches(records: Sequence[Record]) -> Iterator[tuple[int, list[Record]]]:
    """(number of the first, records) of each batch, read in order."""
    start, batch, size = 0, [], 0
    for record in records:
        own = sum(map(len, itertools.chain(record.images, *record.videos)))
        if batch and (len(batch) == BATCH or size + own > BATCH_BYTES):
            yield start, batch
            start, batch, size = start + len(batch), [], 0
        batch.append(record)
        size += own
    if batch:
        yield start, batch


def _tokenise_batch(
    batch: Sequence[Record],
    start: int,
    encoder: Encoder,
    written: "_Written",
    rejects: Rejects,
    judged: Judgements,
) -> None:
    for i, items in encode_batch(batch, encoder, rejects):
        record = batch[i]
        for item in items:
            if record.desirable is not None:
                judged.add(record, start + i, item)
            else:
                written.add(item, start + i, record.kind if record.rejected else record.language)
    _write_judged(judged.group(), encoder, written, rejects)
    written.flush()


def _write_judged(
    made: Iterator[tuple[Record, int, Item]], encoder: Encoder, written: "_Written", rejects: Rejects
) -> None:
    for record, number, item in made:
        for whole in kept(record, item, encoder, rejects):
            written.add(whole, number, record.language, int(bool(record.desirable)))


COLUMNS: dict[str, tuple[Any, Sequence[int]]] = {
    "tokens_T": (np.int32, ()),
    "learn_T": (bool, ()),
    "starts_S": (np.int64, ()),
    "record_S": (np.int32, ()),
    "first_E": (np.int64, ()),
    "group_E": (np.int32, ()),
    "grids_M3": (np.int32, (3,)),
    "grid_starts_S": (np.int64, ()),
    "sizes_E3": (np.int32, (3,)),
    "desirable_E": (np.int8, ()),
}


class _Written:
    """Examples as they come: gathered for a batch, then written column by column."""

    def __init__(self, files: dict[str, columns.Growing], name: str):
        self.files, self.name = files, name
        self.groups: dict[str, int] = {}  # in the order of their coming
        self.items: list[tuple[Item, int, int, int]] = []
        for column in ("starts_S", "first_E", "grid_starts_S"):
            files[column].add([0])

    def add(self, item: Item, record: int, group: str, desirable: int = -1) -> None:
        number = self.groups.setdefault(f"{self.name}/{group}", len(self.groups))
        self.items.append((item, record, number, desirable))

    def flush(self) -> None:
        if not self.items:
            return
        sequences = [(ids, learn, item, record) for item, record, _, _ in self.items for ids, learn in item.sequences]
        ends = lambda name, lengths: self.files[name].rows + np.cumsum(np.array(lengths, np.int64))
        files = self.files
        # Counted from what the columns behind them hold already, so before these grow.
        files["starts_S"].add(ends("tokens_T", [len(ids) for ids, *_ in sequences]))
        files["grid_starts_S"].add(ends("grids_M3", [len(item.grids) for _, _, item, _ in sequences]))
        files["first_E"].add(ends("record_S", [len(item.sequences) for item, *_ in self.items]))
        files["tokens_T"].add(np.concatenate([ids for ids, *_ in sequences]))
        files["learn_T"].add(np.concatenate([learn for _, learn, *_ in sequences]))
        files["record_S"].add([record for *_, record in sequences])
        files["grids_M3"].add(np.array([g for _, _, item, _ in sequences for g in item.grids], np.int32).reshape(-1, 3))
        files["group_E"].add([group for _, _, group, _ in self.items])
        files["sizes_E3"].add([item.size for item, *_ in self.items])
        files["desirable_E"].add([desirable for *_, desirable in self.items])
        self.items = []

    def sort_groups(self, folder: Path) -> list[str]:
        """The names of the groups in their order; their numbers in the file are made to count that."""
        names = sorted(self.groups)
        numbers = np.array([names.index(group) for group in self.groups], np.int32)
        if names != list(self.groups) and len(names):
            group_E = np.load(folder / "group_E.npy", mmap_mode="r+")
            for start in range(0, len(group_E), 2**20):
                group_E[start : start + 2**20] = numbers[group_E[start : start + 2**20]]
            group_E.flush()
        return names


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of all that decides ids and masks: the vocabulary, the merges, the special tokens and the template."""
    text = tokenizer.backend_tokenizer.to_str() + "\0" + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
