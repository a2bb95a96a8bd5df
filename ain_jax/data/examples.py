"""Records -> tokenised examples, kept as flat arrays: what planning measures and what rows are laid from.

An example is one sequence of tokens, or two for a preference pair (the better answer, then the worse one). Pictures
are not decoded here: their size, read from the file's head, gives the number of places that they take.
"""

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ain_jax.data import images, positions
from ain_jax.data.formats import Record
from ain_jax.data.packing import LINE_END, Segment
from ain_jax.data.tiles import (
    TileSettings,
    feature_index,
    placeholder_tokens,
    preprocess_tiles,
    row_features,
    tile_grid,
)
from ain_jax.tokenizer import chat

PictureSettings = images.ImageSettings | TileSettings
BATCH = 1024  # records tokenised at a time


@dataclasses.dataclass(frozen=True)
class Examples:
    """The tokenised examples of one source. S sequences, E examples, T tokens in all, M pictures in all."""

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

    def __len__(self) -> int:
        return len(self.first_E) - 1

    def sizes(self) -> np.ndarray:
        """(E, 3): tokens, patches and learnt tokens of each example."""
        patches_M = self.grids_M3.prod(axis=1) if len(self.grids_M3) else np.zeros(0, np.int64)
        learn_T = self.learn_T.copy()
        learn_T[self.starts_S[:-1]] = False  # nothing stands before the first token
        columns = []
        for values, starts_S in (
            (np.ones_like(self.tokens_T), self.starts_S),
            (patches_M, self.grid_starts_S),
            (learn_T, self.starts_S),
        ):
            total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
            columns.append(np.diff(total[starts_S[self.first_E]]))
        return np.stack(columns, axis=1)

    def segments(self, example: int, image_token: int | None, settings: PictureSettings | None) -> list[Segment]:
        """The segments of one example, its pictures decoded."""
        result = []
        for s in range(self.first_E[example], self.first_E[example + 1]):
            span = slice(self.starts_S[s], self.starts_S[s + 1])
            tokens_L = self.tokens_T[span]
            grids_m3 = self.grids_M3[self.grid_starts_S[s] : self.grid_starts_S[s + 1]]
            fields: dict[str, Any] = {}
            if len(grids_m3):
                assert settings is not None, "pictures need image settings"
                record = self.records[int(self.record_S[s])]
                try:
                    fields = _laid(record.images, settings)
                except ValueError as error:
                    raise ValueError(f"record {record.id}: {error}") from None
                fields |= {
                    "is_picture_L": tokens_L == image_token,
                    "patch_positions_P2": np.concatenate(
                        [positions.patch_positions(tuple(g), settings.merge_size) for g in grids_m3]
                    ),
                    "patch_counts": tuple(int(g.prod()) for g in grids_m3),
                }
            if isinstance(settings, TileSettings):  # such a decoder counts on by one, over pictures too
                positions_3L = np.tile(np.arange(len(tokens_L), dtype=np.int32), (3, 1))
            else:
                positions_3L = positions.mrope_positions(
                    tokens_L, [tuple(g) for g in grids_m3], image_token, settings.merge_size if settings else 1
                )
            result.append(Segment(tokens_L, self.learn_T[span], positions_3L, int(self.group_E[example]), **fields))
        return result


def _laid(pictures: Sequence[bytes], settings: PictureSettings) -> dict[str, Any]:
    """The patches of an example's pictures, and of tiles which feature stands where."""
    if not isinstance(settings, TileSettings):
        return {"patches_PK": np.concatenate([images.preprocess(picture, settings)[0] for picture in pictures])}
    opened = [images.open_image(picture) for picture in pictures]
    indices = [feature_index(picture.height, picture.width, settings) for picture in opened]
    patches = [preprocess_tiles(picture, settings)[0] for picture in opened]
    return {"patches_PK": np.concatenate(patches), "features_M": row_features(indices, LINE_END)}


def tokenise(
    records: Sequence[Record],
    name: str,
    tokenizer: Any,
    settings: PictureSettings | None,
    row_tokens: int,
    mark: str,
    cache: Path,
) -> Examples:
    """The examples of a source, read from `cache` where its fingerprint fits, else made and written there.

    `mark` stands for the records (the builder's fingerprint). Plain text longer than a row is cut into windows; a
    conversation longer than a row is refused with its id and length.
    """
    parts = (name, mark, tokenizer_fingerprint(tokenizer), repr(settings), str(row_tokens))
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    path = cache / f"{name}-{fingerprint}.npz"
    if not path.exists():
        columns = _Columns(name)
        for start in range(0, len(records), BATCH):
            batch = [records[i] for i in range(start, min(start + BATCH, len(records)))]
            _tokenise_batch(batch, start, tokenizer, settings, row_tokens, columns)
        cache.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp.npz")
        np.savez(beside, **columns.arrays())  # pyright: ignore[reportArgumentType]
        beside.replace(path)
    with np.load(path) as arrays:
        columns = {k: arrays[k] for k in arrays.files}
    groups = tuple(str(g) for g in columns.pop("groups"))
    return Examples(records=records, groups=groups, fingerprint=fingerprint, **columns)


class _Columns:
    """Examples as they come, column by column."""

    def __init__(self, name: str):
        self.name = name
        self.tokens: list[np.ndarray] = []
        self.learn: list[np.ndarray] = []
        self.record: list[int] = []
        self.grids: list[list[tuple[int, int, int]]] = []
        self.examples: list[int] = []  # sequences of each example
        self.group: list[str] = []

    def add(self, sequences: Sequence[tuple[np.ndarray, np.ndarray]], record: int, group: str, grids: Any) -> None:
        self.examples.append(len(sequences))
        self.group.append(f"{self.name}/{group}")
        for tokens, learn in sequences:
            self.tokens.append(np.asarray(tokens, np.int32))
            self.learn.append(np.asarray(learn, bool))
            self.record.append(record)
            self.grids.append(list(grids))

    def arrays(self) -> dict[str, np.ndarray]:
        def starts(lengths):
            return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

        groups = sorted(set(self.group))
        number = {g: i for i, g in enumerate(groups)}
        flat = list(itertools.chain.from_iterable(self.grids))
        return {
            "tokens_T": np.concatenate([*self.tokens, np.zeros(0, np.int32)]),
            "learn_T": np.concatenate([*self.learn, np.zeros(0, bool)]),
            "starts_S": starts([len(t) for t in self.tokens]),
            "record_S": np.array(self.record, np.int32),
            "first_E": starts(self.examples),
            "group_E": np.array([number[g] for g in self.group], np.int32),
            "grids_M3": np.array(flat, np.int32).reshape(-1, 3),
            "grid_starts_S": starts([len(g) for g in self.grids]),
            "groups": np.array(groups),
        }


def _tokenise_batch(batch, start, tokenizer, settings, row_tokens, columns) -> None:
    texts = [(i, r) for i, r in enumerate(batch) if not r.messages]
    chats = [(i, r) for i, r in enumerate(batch) if r.messages]
    for (i, record), ids in zip(texts, encode_documents(tokenizer, [r.text for _, r in texts]), strict=True):
        for window in _windows(ids, row_tokens):
            columns.add([(window, np.ones(len(window), bool))], start + i, record.language, [])
    measured = [[_measured(picture, settings, r.id) for picture in r.images] for _, r in chats]
    grids = [[grid for grid, _ in of_record] for of_record in measured]
    counts = [[places for _, places in of_record] for of_record in measured]
    better = _encode(tokenizer, [r for _, r in chats], counts)
    paired = [k for k, (_, r) in enumerate(chats) if r.rejected]
    rejected = [_with_rejected(chats[k][1]) for k in paired]
    worse = dict(zip(paired, _encode(tokenizer, rejected, [counts[k] for k in paired]), strict=True))
    for k, (i, record) in enumerate(chats):
        sequences = [better[k], worse[k]] if k in worse else [better[k]]
        length = sum(len(tokens) for tokens, _ in sequences)
        if length > row_tokens:
            raise ValueError(
                f"record {record.id}: {length} tokens, and a row holds {row_tokens}: raise Packing.row_tokens, use "
                "smaller pictures, or leave the record out (nothing is cut from a conversation)"
            )
        label = record.kind if record.rejected else record.language
        columns.add(sequences, start + i, label, grids[k])


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of all that decides ids and masks: the vocabulary, the merges, the special tokens and the template."""
    text = tokenizer.backend_tokenizer.to_str() + "\0" + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_token(tokenizer: Any) -> int:
    """The id that opens a document: the beginning token, or the end token where there is none."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("the tokenizer has neither a beginning nor an end token; one of them must open a document")
    return first


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text, the beginning token first; a text of its own language model has nothing else around it."""
    first = first_token(tokenizer)
    return [np.concatenate([[first], ids]).astype(np.int32) for ids in chat.encode_texts(tokenizer, texts)]


def _encode(tokenizer: Any, records: Sequence[Record], counts: Sequence[Sequence[int]]) -> list[chat.Encoded]:
    """The ids and masks of conversations, with the record's id in the message where one cannot be rendered."""
    pairs = [(r.messages, c) for r, c in zip(records, counts, strict=True)]
    try:
        return chat.encode_chats(tokenizer, pairs)
    except ValueError:
        for record, pair in zip(records, pairs, strict=True):  # again one by one, to name the first at fault
            try:
                chat.encode_chats(tokenizer, [pair])
            except ValueError as error:
                raise ValueError(f"record {record.id}: {error}") from None
        raise


def _with_rejected(record: Record) -> Record:
    """The record with the worse answer in place of the better one."""
    worse = dataclasses.replace(record.messages[-1], content=record.rejected)
    return dataclasses.replace(record, messages=(*record.messages[:-1], worse))


def _windows(ids: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Stretches of at most `length` tokens, of nearly equal size. Each begins with the last token of the one before,
    so that every token but the very first is predicted once: 1 2 3 4 5 6 in windows of 4 is 1 2 3 4 and 4 5 6.
    """
    count = -(-(len(ids) - 1) // max(length - 1, 1))
    for part in np.array_split(np.arange(1, len(ids)), count) if count else ():
        yield ids[part[0] - 1 : part[-1] + 1]


def _measured(picture: bytes, settings: PictureSettings | None, record: str) -> tuple[positions.Grid, int]:
    """(grid of patches, places that it takes among the tokens) of a picture; of tiles the grid's frames."""
    if settings is None:
        raise ValueError(f"record {record} holds pictures, and this stage reads none: take its source out of Mixture")
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            if isinstance(settings, TileSettings):
                rows, columns = tile_grid(opened.height, opened.width, settings)
                grid = (1 + rows * columns, settings.side, settings.side)
                return grid, placeholder_tokens(opened.width, opened.height, settings)
            grid = images.image_grid(opened.width, opened.height, settings)
            return grid, positions.feature_count(grid, settings.merge_size)
    except ValueError as error:
        raise ValueError(f"record {record}: {error}") from None
    except OSError as error:
        raise ValueError(f"record {record}: a picture of {len(picture)} bytes cannot be read ({error})") from None
