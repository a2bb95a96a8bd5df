"""Examples -> rows of fixed length: which go together (pure sizes), and the arrays of a row (pure numpy)."""

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packing:
    """The budgets of a row, each a static shape of the compiled step, and what becomes of what they cannot hold.

    A row is closed when nothing waiting fits into it. `row_targets` bounds the learnt tokens of a row, because the
    output head, the dearest part of a small model, runs on those alone; 0 sets no bound but `row_tokens`.

    Plain text longer than a row is cut into windows. By "even" they are of nearly equal size; by "full" all but the
    last fill a row, which wastes less where most documents are longer than a row.

    A conversation, or a preference pair, that no row holds stops the run ("refuse"), or is left out ("drop"), or is
    cut before a user's turn as far as no picture stands before the cut, and left out where that is not enough
    ("split"). What is left out or cut is counted, and listed in the rejects file of its source.

    With `text_batches` batches without any picture are compiled as a second shape, which has no arrays for pictures.
    """

    row_tokens: int = 256
    row_patches: int = 0  # vision patches before merging; 0 for stages without pictures
    row_targets: int = 0
    window: int = 512  # examples looked over at once; more fills rows better and mixes sources less finely
    windows: Literal["even", "full"] = "even"
    too_long: Literal["refuse", "drop", "split"] = "refuse"
    text_batches: bool = False

    def __post_init__(self):
        for name in ("row_tokens", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 1 or more")
        if self.row_patches < 0 or self.row_targets < 0:
            raise ValueError("row_patches and row_targets: expected 0 (no such budget) or more")
        if self.text_batches and not self.row_patches:
            raise ValueError("text_batches = True, and row_patches = 0: every batch is without pictures, leave it out")

    @property
    def budgets(self) -> np.ndarray:
        """Tokens, patches, targets of a row."""
        return np.array([self.row_tokens, self.row_patches, self.row_targets or self.row_tokens], np.int64)


WAITED = 0.02  # of a row: what a window of waiting weighs


def pack(sizes: Iterable[Sequence[int]], packing: Packing) -> Iterator[list[int]]:
    """Rows, each the numbers of the examples in it, in a fixed order, without end if `sizes` has none.

    `sizes` gives (tokens, patches, targets) of each example. Best-fit decreasing over a window: the largest waiting
    example opens or joins the fullest row that still holds it. The emptier half of the rows is given back to wait,
    so that only the very last rows of a finite list are poorly filled. A row counts as fuller for each window that its
    oldest example has waited, so that none waits for ever and every source comes in its share.

    >>> list(pack([(5, 0, 5), (4, 0, 4), (3, 0, 3)], Packing(row_tokens=8, window=3)))
    [[0, 2], [1]]
    """
    return (numbers for numbers, _ in packed(sizes, packing))


def packed(sizes: Iterable[Sequence[int]], packing: Packing) -> Iterator[tuple[list[int], int]]:
    """As `pack`, and with each row the patches in it. With `text_batches` pictures are laid before any text: then as
    few rows as possible hold one."""
    tokens, patches, targets = budgets = tuple(packing.budgets.tolist())
    scale = tuple(max(budget, 1) for budget in budgets)
    waiting: list[tuple[int, int, int, int]] = []
    came: dict[int, int] = {}  # which window each that waits came in
    windows = 0
    stream = enumerate(sizes)
    ended = False
    while not ended or waiting:
        while not ended and len(waiting) < packing.window:
            item = next(stream, None)
            if item is None:
                ended = True
                break
            number, (t, p, g) = item
            if t > tokens or p > patches or g > targets:
                raise ValueError(
                    f"example {number} has {t} tokens, {p} patches and {g} learnt tokens; a row "
                    f"holds {tokens}, {patches} and {targets}: raise Packing's budget, or leave it out"
                )
            waiting.append((number, t, p, g))
            came[number] = windows
        if not waiting:
            return
        rows = _best_fit_decreasing(np.array(waiting, np.int64), budgets, scale, packing.text_batches)
        if not ended:
            merits = [
                max((b - left) / s for b, left, s in zip(budgets, room, scale, strict=True))
                + WAITED * (windows - min(came[number] for number in row))
                for room, row in rows
            ]
            fullest = sorted(range(len(rows)), key=lambda r: -merits[r])[: max(1, (len(rows) + 1) // 2)]
            rows = [rows[r] for r in sorted(fullest)]
        taken = {number for _, row in rows for number in row}
        waiting = [item for item in waiting if item[0] not in taken]
        came = {item[0]: came[item[0]] for item in waiting}
        windows += 1
        # In the order of their oldest example, so that a row of large ones does not always come first.
        yield from sorted(((sorted(row), patches - room[1]) for room, row in rows), key=lambda made: made[0][0])


def _best_fit_decreasing(
    items_N4: np.ndarray, budgets: tuple[int, ...], scale: tuple[int, ...], pictures_first: bool
) -> list[tuple[list[int], list[int]]]:
    """(room left, numbers) of each row, of items (number, tokens, patches, targets).

    The rows that may take something are kept in the order of their room, the shares of all budgets added up. A row
    that holds an item has at least the item's own shares left: the search begins there. A row with less than the
    smallest of the items to come is closed.
    """
    shares_N3 = items_N4[:, 1:] / np.array(scale)
    largest_N = shares_N3.max(axis=1)
    order_N = np.lexsort((-largest_N, items_N4[:, 2] == 0)) if pictures_first else np.argsort(-largest_N, kind="stable")
    items_N4 = items_N4[order_N]
    least_N = shares_N3[order_N].sum(axis=1) - 1e-9
    to_come_N3 = np.minimum.accumulate(items_N4[::-1, 1:])[::-1]
    to_come_N3 = np.concatenate([to_come_N3[1:], np.zeros_like(to_come_N3[:1])])
    of_tokens, of_patches, of_targets = scale
    rows: list[tuple[list[int], list[int]]] = []
    open_rows: list[tuple[float, int]] = []
    columns = items_N4.tolist(), least_N.tolist(), to_come_N3.tolist()
    for (number, t, p, g), least, (next_t, next_p, next_g) in zip(*columns, strict=True):
        for place in range(bisect_left(open_rows, (least,)), len(open_rows)):
            at = open_rows[place][1]
            room, row = rows[at]
            if room[0] >= t and room[1] >= p and room[2] >= g:
                del open_rows[place]
                row.append(number)
                break
        else:
            at, room = len(rows), list(budgets)
            rows.append((room, [number]))
        room[0] -= t
        room[1] -= p
        room[2] -= g
        if room[0] >= next_t and room[1] >= next_p and room[2] >= next_g:
            insort(open_rows, (room[0] / of_tokens + room[1] / of_patches + room[2] / of_targets, at))
    return rows


def batched(rows: Iterable[tuple[list[int], int]], size: int) -> Iterator[tuple[list[list[int]], bool]]:
    """(`size` rows, whether they are without pictures): rows of one kind are brought together, in their order.

    A row that has waited for PATIENCE batches goes into a mixed one, laid as rows with pictures are. So do the rows
    left over at the end, the very last batch of which may be short.

    patches 4 0 0 8 0 and batches of two rows:   (1, 2) without pictures, (0, 3) with, (4,) without
    """
    waiting: list[tuple[list[int], bool, int]] = []  # row, whether it is without pictures, batches before it came
    count = {True: 0, False: 0}
    done = 0
    for numbers, patches in rows:
        plain = patches == 0
        waiting.append((numbers, plain, done))
        count[plain] += 1
        if count[plain] == size:
            chosen = [item for item in waiting if item[1] == plain]
            waiting = [item for item in waiting if item[1] != plain]
        elif len(waiting) >= size and done - waiting[0][2] >= PATIENCE:
            chosen, waiting = waiting[:size], waiting[size:]
        else:
            continue
        done += 1
        count = {kind: sum(item[1] == kind for item in waiting) for kind in (True, False)}
        yield [item[0] for item in chosen], all(item[1] for item in chosen)
    waiting.sort(key=lambda item: item[1])  # those with pictures together
    for start in range(0, len(waiting), size):
        chosen = waiting[start : start + size]
        yield [item[0] for item in chosen], all(item[1] for item in chosen)


PATIENCE = 64


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
