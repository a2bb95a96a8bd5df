"""The pictures and videos of a record: how many places they take, told from the heads of their files, and their arrays.

Both go by the order in which "<image>" and "<video>" stand in the messages, and so do the patches of a row.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ain_jax.data import images, positions
from ain_jax.data.formats import IMAGE, VIDEO, Record
from ain_jax.data.packing import LINE_END
from ain_jax.data.tiles import (
    TileSettings,
    feature_index,
    placeholder_tokens,
    preprocess_tiles,
    row_features,
    tile_grid,
)

PictureSettings = images.ImageSettings | TileSettings
_PLACE = re.compile(f"{re.escape(IMAGE)}|{re.escape(VIDEO)}")


def in_order(record: Record) -> Iterator[bytes | tuple[bytes, ...]]:
    """Each picture (a file) and each video (its frames' files) as they stand in the messages."""
    pictures, videos = iter(record.images), iter(record.videos)
    places = [place for message in record.messages for place in _PLACE.findall(message.content)]
    for place in places:
        medium = next(pictures if place == IMAGE else videos, None)
        if medium is not None:  # the chat encoder counts them, and tells
            yield medium
    yield from pictures
    yield from videos


def measured(record: Record, settings: PictureSettings | None) -> tuple[list[positions.Grid], list[int]]:
    """(grid of patches, places among the tokens) of each; of tiles the grid's frames are the tiles.

    Raises ValueError, the record named, where one cannot be read or this model reads none.
    """
    grids, counts = [], []
    try:
        for medium in in_order(record):
            grid, count = _measured(medium, settings)
            grids.append(grid)
            counts.append(count)
    except ValueError as error:
        raise ValueError(f"record {record.id}{error}") from None
    return grids, counts


def _measured(medium: bytes | tuple[bytes, ...], settings: PictureSettings | None) -> tuple[positions.Grid, int]:
    if settings is None:
        raise ValueError(" holds pictures, and this stage reads none: take its source out of Mixture")
    if isinstance(medium, bytes):
        width, height = _size(medium)
        if isinstance(settings, TileSettings):
            rows, columns = tile_grid(height, width, settings)
            grid = (1 + rows * columns, settings.side, settings.side)
            return grid, placeholder_tokens(width, height, settings)
        grid = images.image_grid(width, height, settings)
    elif isinstance(settings, TileSettings):
        raise ValueError(" holds a video, and LLaVA-NeXT reads none: leave it out, or give its frames as pictures")
    else:
        sizes = [_size(frame) for frame in medium]
        if len(set(sizes)) != 1:
            raise ValueError(f": a video whose frames have the sizes {sorted(set(sizes))}; expected frames of one size")
        grid = images.video_grid(len(sizes), *sizes[0], images.share_pixels(settings, len(sizes)))
    return grid, positions.feature_count(grid, settings.merge_size)


def _size(picture: bytes) -> tuple[int, int]:
    """Width and height, from the head of the file."""
    try:
        return images.image_size(picture)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f": a picture of {len(picture)} bytes cannot be read ({error})") from None


def laid(record: Record, grids_m3: np.ndarray, settings: PictureSettings) -> dict[str, Any]:
    """The fields of a `Segment` that hold the record's pictures and videos, decoded.

    Patches see those of their own picture, and of a video those of their own frames.
    """
    media = list(in_order(record))
    grids = [tuple(grid) for grid in grids_m3.tolist()]
    fields: dict[str, Any] = {}
    if isinstance(settings, TileSettings):
        opened = [images.open_image(picture) for picture in media if isinstance(picture, bytes)]
        indices = [feature_index(picture.height, picture.width, settings) for picture in opened]
        patches = [preprocess_tiles(picture, settings)[0] for picture in opened]
        fields["patch_counts"] = tuple(int(np.prod(grid)) for grid in grids)
        fields["features_M"] = row_features(indices, fields["patch_counts"], LINE_END)
    else:
        patches = [_patches(medium, settings) for medium in media]
        fields["patch_counts"] = tuple(rows * columns for frames, rows, columns in grids for _ in range(frames))
    return fields | {
        "patches_PK": np.concatenate(patches),
        "patch_positions_P2": np.concatenate([positions.patch_positions(g, settings.merge_size) for g in grids]),
    }


def _patches(medium: bytes | Sequence[bytes], settings: images.ImageSettings) -> np.ndarray:
    if isinstance(medium, bytes):
        return images.preprocess(medium, settings)[0]
    return images.preprocess_frames(medium, images.share_pixels(settings, len(medium)))[0]
