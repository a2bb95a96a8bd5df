"""Examples -> rows of fixed length: which go together (pure sizes), and the arrays of a row (pure numpy)."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packing:
    """The budgets of a row, each a static shape of the compiled step.

    A row is closed when nothing waiting fits into it. `row_targets` bounds the learnt tokens of a row, because the
    output head, the dearest part of a small model, runs on those alone; 0 sets no bound but `row_tokens`.
    """

    row_tokens: int = 256
    row_patches: int = 0  # vision patches before merging; 0 for stages without pictures
    row_targets: int = 0
    window: int = 512  # examples looked over at once; more fills rows better and mixes sources less finely

    def __post_init__(self):
        for name in ("row_tokens", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 1 or more")
        if self.row_patches < 0 or self.row_targets < 0:
            raise ValueError("row_patches and row_targets: expected 0 (no such budget) or more")

    @property
    def budgets(self) -> np.ndarray:
        """Tokens, patches, targets of a row."""
        return np.array([self.row_tokens, self.row_patches, self.row_targets or self.row_tokens], np.int64)


def pack(sizes: Iterable[Sequence[int]], packing: Packing) -> Iterator[list[int]]:
    """Rows, each the numbers of the examples in it, in a fixed order, without end if `sizes` has none.

    `sizes` gives (tokens, patches, targets) of each example. Best-fit decreasing over a window: the largest waiting
    example opens or joins the fullest row that still holds it. The emptier half of the rows is given back to wait,
    so that only the very last rows of a finite list are poorly filled.

    >>> list(pack([(5, 0, 5), (4, 0, 4), (3, 0, 3)], Packing(row_tokens=8, window=3)))
    [[0, 2], [1]]
    """
    budgets = packing.budgets
    waiting: list[tuple[int, np.ndarray]] = []
    stream = enumerate(sizes)
    ended = False
    while not ended or waiting:
        while not ended and len(waiting) < packing.window:
            item = next(stream, None)
            if item is None:
                ended = True
                break
            number, size = item[0], np.asarray(item[1], np.int64)
            if (size > budgets).any():
                raise ValueError(
                    f"example {number} has {size[0]} tokens, {size[1]} patches and {size[2]} learnt tokens; a row "
                    f"holds {budgets[0]}, {budgets[1]} and {budgets[2]}: raise Packing's budget, or leave it out"
                )
            waiting.append((number, size))
        if not waiting:
            return
        rows = _best_fit_decreasing(waiting, budgets)
        by_number = dict(waiting)
        if not ended:
            filled = np.array([max(sum(by_number[n] for n in row) / np.maximum(budgets, 1)) for row in rows])
            kept = np.argsort(-filled, kind="stable")[: max(1, (len(rows) + 1) // 2)]
            rows = [rows[r] for r in sorted(kept)]
        taken = {n for row in rows for n in row}
        waiting = [(n, s) for n, s in waiting if n not in taken]
        # In the order of their oldest example, so that a row of large ones does not always come first.
        yield from sorted((sorted(row) for row in rows), key=lambda row: row[0])


def _best_fit_decreasing(items: Sequence[tuple[int, np.ndarray]], budgets: np.ndarray) -> list[list[int]]:
    sizes = np.stack([s for _, s in items])
    scale = np.where(budgets > 0, budgets, 1)
    order = np.argsort(-(sizes / scale).max(axis=1), kind="stable")
    room = np.tile(budgets, (len(items), 1))
    rows: list[list[int]] = []
    for i in order:
        fits = (room[: len(rows)] >= sizes[i]).all(axis=1)
        if fits.any():
            left = np.where(fits, (room[: len(rows)] / scale).sum(axis=1), np.inf)
            row = int(left.argmin())
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(items[i][0])
        room[row] -= sizes[i]
    return rows


LINE_END = -1


@dataclasses.dataclass(frozen=True)
class Segment:
    """One example's arrays, ready to be laid into a row."""

    tokens_L: np.ndarray  # int32
    learn_L: np.ndarray  # bool; the first token of a segment is never learnt, nothing stands before it
    positions_3L: np.ndarray  # int32
    group: int
    is_picture_L: np.ndarray | None = None  # bool, where a merged picture feature stands
    patches_PK: np.ndarray | None = None  # float32, all pictures of the example in order
    patch_positions_P2: np.ndarray | None = None  # int32
    patch_counts: tuple[int, ...] = ()  # patches of each picture
    # Which feature of the example stands at each picture place, LINE_END for the vector that ends a line of a picture
    # (LLaVA-NeXT); None: each feature once, in order.
    features_M: np.ndarray | None = None


def lay_row(segments: Sequence[Segment], packing: Packing, patch_width: int, merge: int) -> dict[str, np.ndarray]:
    """The arrays of one row, named as the fields of `Batch` without their B.

    `patch_width` is the number of values of a patch; `merge` squared patches make one feature. The counts of picture
    places and of features are compared here, before any device sees them: a shifted span corrupts silently.
    """
    tokens, patches, targets = (int(b) for b in packing.budgets)
    row = {
        "tokens_BL": np.zeros(tokens, np.int32),
        "segments_BL": np.zeros(tokens, np.int32),
        "positions_B3L": np.zeros((3, tokens), np.int32),
        "predict_at_BC": np.zeros(targets, np.int32),
        "targets_BC": np.zeros(targets, np.int32),
        "target_segments_BC": np.zeros(targets, np.int32),
        "target_groups_BC": np.zeros(targets, np.int32),
    }
    if patches:
        row |= {
            "feature_index_BL": np.full(tokens, -1, np.int32),
            "patches_BPK": np.zeros((patches, patch_width), np.float32),
            "patch_positions_BP2": np.zeros((patches, 2), np.int32),
            "patch_segments_BP": np.zeros(patches, np.int32),
        }
    at = patch_at = target_at = pictures = 0
    for number, segment in enumerate(segments, start=1):
        here = slice(at, at + len(segment.tokens_L))
        row["tokens_BL"][here] = segment.tokens_L
        row["segments_BL"][here] = number
        row["positions_B3L"][:, here] = segment.positions_3L
        learnt = np.flatnonzero(segment.learn_L[1:])
        there = slice(target_at, target_at + len(learnt))
        row["predict_at_BC"][there] = at + learnt
        row["targets_BC"][there] = segment.tokens_L[1:][learnt]
        row["target_segments_BC"][there] = number
        row["target_groups_BC"][there] = segment.group
        target_at = there.stop
        if segment.patches_PK is not None:
            count = len(segment.patches_PK)
            assert segment.is_picture_L is not None and segment.patch_positions_P2 is not None
            places = np.flatnonzero(segment.is_picture_L)
            features_M = np.arange(count // merge**2) if segment.features_M is None else segment.features_M
            if len(places) != len(features_M) or count % merge**2:
                raise ValueError(
                    f"segment {number} of a row: {len(places)} picture places but {count} patches, which make "
                    f"{count / merge**2:g} features and take {len(features_M)} places; each needs one of its own"
                )
            # The vector that ends a line stands behind the features of the whole row.
            moved_M = np.where(features_M == LINE_END, patches // merge**2, features_M + patch_at // merge**2)
            row["feature_index_BL"][at + places] = moved_M
            span = slice(patch_at, patch_at + count)
            row["patches_BPK"][span] = segment.patches_PK
            row["patch_positions_BP2"][span] = segment.patch_positions_P2
            owners = np.arange(1, len(segment.patch_counts) + 1) + pictures
            row["patch_segments_BP"][span] = np.repeat(owners, segment.patch_counts)
            pictures += len(segment.patch_counts)
            patch_at = span.stop
        at = here.stop
    return row
