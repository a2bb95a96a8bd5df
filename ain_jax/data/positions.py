"""Where each token and each patch stands: numpy, one conversation or one picture at a time."""

from collections.abc import Sequence

import numpy as np

Grid = tuple[int, int, int]  # (frames, patch rows, patch columns) of one picture


def feature_count(grid: Grid, merge_size: int = 2) -> int:
    """Merged features of a picture, which is how many placeholder tokens it takes: grid (1, 4, 6) gives 6."""
    frames, rows, columns = grid
    return frames * (rows // merge_size) * (columns // merge_size)


def visual_tokens(tokens_L: np.ndarray, image_token_id: int | None, video_token_id: int | None = None) -> np.ndarray:
    """True where a feature of a picture or of a video stands."""
    found_L = np.zeros(np.shape(tokens_L), bool)
    for token in (image_token_id, video_token_id):
        if token is not None:
            found_L |= np.asarray(tokens_L) == token
    return found_L


def patch_positions(grid: Grid, merge_size: int = 2) -> np.ndarray:
    """positions_P2: row and column of each patch, in the order of the patches: merge block by merge block.

    grid (1, 2, 4):   row 0 0 1 1 | 0 0 1 1
                      col 0 1 0 1 | 2 3 2 3
    """
    frames, rows, columns = grid
    block = (rows // merge_size, merge_size, columns // merge_size, merge_size)
    both = np.indices((rows, columns), dtype=np.int32).reshape(2, *block)
    positions_P2 = both.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    return np.tile(positions_P2, (frames, 1))


def mrope_positions(
    tokens_L,
    grids: Sequence[Grid],
    image_token_id: int | None,
    merge_size: int = 2,
    video_token_id: int | None = None,
    intervals: Sequence[float] | None = None,
) -> np.ndarray:
    """positions_3L: time, height and width of each token of one conversation, as Qwen2-VL counts them.

    Text counts on by one in all three. A picture starts where the text before it ends, stands still in time, and
    runs over its merged rows and columns; the text after it goes on behind the largest of these. A video besides counts
    its frames in time, by `intervals` (one for each grid, 1 where none are given; Qwen2.5-VL: tokens_per_second times
    the seconds between two patches in time). With a picture of grid (1, 4, 6), that is 2 x 3 merged features, marked o:

    tokens  a b o o o o o o c d
    time    0 1 2 2 2 2 2 2 5 6
    height  0 1 2 2 2 3 3 3 5 6
    width   0 1 2 3 4 2 3 4 5 6

    Behind a video of more steps in time than rows or columns transformers 5 lets the text begin earlier, inside the
    video's time; the published models were trained as written here.

    Raises ValueError where the runs of image and video tokens are not those of the grids, in their order.
    """
    tokens_L = np.asarray(tokens_L)
    is_image_L = visual_tokens(tokens_L, image_token_id, video_token_id)
    edges = np.diff(np.concatenate(([0], is_image_L.astype(np.int8), [0])))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    found = (stops - starts).tolist()
    expected = [feature_count(grid, merge_size) for grid in grids]
    if found != expected:
        raise ValueError(
            f"spans of {found} image tokens, but the {len(grids)} pictures take {expected}; each picture needs one "
            "span of its own, between a vision start and a vision end token"
        )
    positions_3L = np.empty((3, len(tokens_L)), np.int32)
    done = after = 0  # tokens placed, and the position of the next text token
    each = intervals if intervals is not None else [1.0] * len(grids)
    for start, stop, (frames, rows, columns), interval in zip(starts, stops, grids, each, strict=True):
        positions_3L[:, done:start] = after + np.arange(start - done)
        after += start - done
        merged = (frames, rows // merge_size, columns // merge_size)
        own_3M = np.indices(merged).reshape(3, -1)
        own_3M[0] = (own_3M[0] * interval).astype(int)
        positions_3L[:, start:stop] = after + own_3M
        done, after = stop, after + int(own_3M.max()) + 1
    positions_3L[:, done:] = after + np.arange(len(tokens_L) - done)
    return positions_3L
