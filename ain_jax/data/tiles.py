"""Picture -> tiles as LLaVA-NeXT sees them (AnyRes), and which of their features stands at each placeholder token.

The whole picture, squeezed into one tile, comes first. Behind it come the tiles of the picture at its best resolution,
scaled, padded with black to whole tiles and read row by row. The tower sees each tile alone. Afterwards the features
of the black bars are dropped, and each row of the rest is closed by a learnt "newline" vector.

A picture of 60 x 30 pixels, tiles of 28 pixels, patches of 14, one resolution of 28 x 56:

    base    tiles       tokens
    0 1     4 5 8 9     0 1 2 3   4 5 8 9 n   6 7 10 11 n      with n = 12, the newline
    2 3     6 7 10 11

Equal to `LlavaNextImageProcessor` of transformers 5 (with Pillow) bit for bit. Version 4.51 forgets the last pixel of
an odd number of padding pixels and stretches the outer tiles for it; LLaVA-NeXT's own code does as we do. The counts of
the processor and the features of the model agree with one another in both versions, provided `processor_config.json`
holds num_additional_image_tokens = 1, the class token which vision_feature_select_strategy "default" takes off again: a
file without it counts one token too few for each picture.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ain_jax.data.images import CLIP_MEAN, CLIP_STD, config_faults, normalised, open_image, refuse, to_rgb
from ain_jax.models.hf_families import PINPOINTS


@dataclass(frozen=True)
class TileSettings:
    """How pictures become tiles and patches; kept with a model as its `preprocessor_config.json`."""

    tile: int = 336  # pixels of a side
    patch_size: int = 14  # pixels; the tower's, of which the processor knows nothing
    pinpoints: tuple[tuple[int, int], ...] = PINPOINTS  # (height, width) to choose from; none: the base tile alone
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: int = int(Image.Resampling.BICUBIC)
    rescale: float = 1 / 255

    def __post_init__(self):
        object.__setattr__(self, "pinpoints", tuple((int(height), int(width)) for height, width in self.pinpoints))
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        faults = []
        if min(self.tile, self.patch_size) < 1 or self.tile % self.patch_size:
            faults.append(f"tile={self.tile} is no multiple of patch_size={self.patch_size}")
        faults += [
            f"pinpoint {height} x {width} is not made of whole tiles of {self.tile} pixels"
            for height, width in self.pinpoints
            if min(height, width) < 1 or height % self.tile or width % self.tile
        ]
        if len(self.mean) != 3 or len(self.std) != 3:
            faults.append(f"mean={self.mean} and std={self.std} need one value per colour")
        if self.resample not in list(Image.Resampling):
            filters = [int(filter) for filter in Image.Resampling]
            faults.append(f"resample={self.resample} is none of Pillow's filters, {filters}")
        if faults:
            raise ValueError("TileSettings: " + "; ".join(faults))

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.tile // self.patch_size

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch."""
        return 3 * self.patch_size**2

    @property
    def merge_size(self) -> int:
        """Patches along a side of what makes one feature."""
        return 1


def select_resolution(height: int, width: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) among the pinpoints which keeps most of the picture's pixels, then wastes fewest.

    pinpoints 336 x 672, 672 x 336, 672 x 672:   400 x 500 -> 672 x 672;   200 x 400 -> 336 x 672
    """
    if min(height, width) < 1:
        raise ValueError(f"a picture of {width} x {height} pixels; expected one pixel or more on each side")
    if not pinpoints:
        raise ValueError("no pinpoints to select a resolution from")

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(pinpoints, key=merit)  # the first of several equally good ones


def tile_grid(height: int, width: int, settings: TileSettings) -> tuple[int, int]:
    """(rows, columns) of the tiles behind the base tile, (0, 0) where a model has no pinpoints."""
    if not settings.pinpoints:
        return 0, 0
    best_height, best_width = select_resolution(height, width, settings.pinpoints)
    return best_height // settings.tile, best_width // settings.tile


def preprocess_tiles(image: Image.Image | bytes, settings: TileSettings) -> tuple[np.ndarray, tuple[int, ...]]:
    """(patches_PK float32, patches of each tile): the base tile, then the others row by row.

    The patches of a tile stand row by row; K holds colour, row, column, the slowest first.
    """
    picture = to_rgb(open_image(image))
    tile, side, p = settings.tile, settings.side, settings.patch_size
    rows, columns = tile_grid(picture.height, picture.width, settings)
    tiles = 1 + rows * columns
    table = normalised(settings.mean, settings.std, settings.rescale)
    # tile, patch row, patch column, colour, pixel row, pixel column
    patches = np.empty((tiles, side, side, 3, p, p), np.float32)
    base = _resized(picture, tile, tile, settings)
    canvas = _padded(picture, rows * tile, columns * tile, settings)
    for colour in range(3):
        values = table[colour].take(base[..., colour]).reshape(side, p, side, p)
        patches[0, :, :, colour] = values.transpose(0, 2, 1, 3)
        values = table[colour].take(canvas[..., colour]).reshape(rows, side, p, columns, side, p)
        patches[1:].reshape(rows, columns, side, side, 3, p, p)[..., colour, :, :] = values.transpose(0, 3, 1, 4, 2, 5)
    return patches.reshape(tiles * side**2, settings.patch_values), (side**2,) * tiles


def _padded(picture: Image.Image, height: int, width: int, settings: TileSettings) -> np.ndarray:
    """The picture as large as it goes into height x width, in the middle of black; the odd pixel lies behind it."""
    canvas = np.zeros((height, width, 3), np.uint8)
    if not canvas.size:
        return canvas
    scale_height, scale_width = height / picture.height, width / picture.width
    if scale_width < scale_height:
        new_height, new_width = min(math.ceil(picture.height * scale_width), height), width
    else:
        new_height, new_width = height, min(math.ceil(picture.width * scale_height), width)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = _resized(picture, new_height, new_width, settings)
    return canvas


def _resized(picture: Image.Image, height: int, width: int, settings: TileSettings) -> np.ndarray:
    """Bytes of row, column, colour."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling(settings.resample))
    return np.asarray(picture)


def feature_index(height: int, width: int, settings: TileSettings) -> np.ndarray:
    """int32: for each placeholder token of a picture, the feature which stands there; the picture's own are 0 .. P-1.

    Features are numbered as the patches of `preprocess_tiles`, and P is the newline vector. This is transformers'
    `pack_image_features`, for towers whose class token is dropped. A picture without pinpoints is its base tile and
    one newline.
    """
    side = settings.side
    base = np.arange(side**2, dtype=np.int32)
    rows, columns = tile_grid(height, width, settings)
    newline = (1 + rows * columns) * side**2
    if not rows:
        return np.append(base, np.int32(newline))
    # Tile row, row in tile, tile column, column in tile: the rows and columns of the picture.
    tiles = np.arange(side**2, newline, dtype=np.int32).reshape(rows, columns, side, side)
    picture = tiles.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    above, left = _bars(height, width, *picture.shape)
    picture = picture[above : len(picture) - above, left : picture.shape[1] - left]
    closed = np.pad(picture, ((0, 0), (0, 1)), constant_values=newline)
    return np.concatenate([base, closed.reshape(-1)])


def row_features(features: Sequence[np.ndarray], patches: Iterable[int], line_end: int) -> np.ndarray:
    """`feature_index` of each picture, which has so many patches, counted on over the pictures, and `line_end` for the
    end of a line.

    That is P in a row of P patches. Pictures of 4 and 2 in a row of 8, each with one line end: 0 1 2 3 8 4 5 8
    """
    moved, first = [], 0
    for index_M, own in zip(features, patches, strict=True):
        moved.append(np.where(index_M == own, line_end, index_M + first))
        first += own
    return np.concatenate(moved)


def placeholder_tokens(width: int, height: int, settings: TileSettings) -> int:
    """How many image tokens a picture of this size takes: 1176 for 336 x 336 pixels, 2928 for 672 x 672."""
    base = settings.side**2
    rows, columns = (tiles * settings.side for tiles in tile_grid(height, width, settings))
    if not rows:
        return base + 1
    above, left = _bars(height, width, rows, columns)
    return base + (rows - 2 * above) * (columns - 2 * left + 1)


def _bars(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """(rows above, columns to the left) which hold nothing but padding, of a grid of features; as many lie opposite.

    The rounding is that of `unpad_image`. Of a very flat picture no row is left, of a very thin one no column.
    """
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def preprocessor_config(settings: TileSettings) -> dict[str, Any]:
    """`preprocessor_config.json`, for transformers 4.51 and 5 alike."""
    if not settings.pinpoints:
        raise ValueError("TileSettings without pinpoints: LlavaNextImageProcessor needs one or more")
    return {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "resample": settings.resample,
        "rescale_factor": settings.rescale,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "size": {"shortest_edge": settings.tile},
        "crop_size": {"height": settings.tile, "width": settings.tile},
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in settings.pinpoints],
    }


def tile_settings(config: dict[str, Any], patch_size: int = 14) -> TileSettings:
    """The settings that a `preprocessor_config.json` describes; the patch size is the tower's.

    What a file leaves out has transformers' default, which for the tile is 224 pixels. Cropping and a second resizing
    of the tiles change nothing where size and crop_size agree; where they do not, the file is refused.
    """
    kind = config.get("image_processor_type", "LlavaNextImageProcessor")
    if not kind.startswith("LlavaNextImageProcessor"):
        raise ValueError(f"preprocessor_config.json: image_processor_type={kind!r}; expected 'LlavaNextImageProcessor'")
    default = TileSettings()
    read = {"size", "crop_size", "image_grid_pinpoints", "image_mean", "image_std", "resample", "rescale_factor"}
    without_effect = {"do_resize", "do_center_crop", "do_pad"}
    fixed = {"do_convert_rgb": True, "do_rescale": True, "do_normalize": True, "aspect_ratio_setting": "anyres"}
    faults = config_faults(config, read | without_effect, fixed)
    tile = _side(config.get("size"))
    if not tile or tile != _side(config.get("crop_size")):
        faults += [f"size={config.get('size')!r} and crop_size={config.get('crop_size')!r} (expected one square)"]
    refuse(faults)

    def colours(name: str, otherwise: tuple[float, ...]) -> tuple[float, ...]:
        value = config.get(name) or otherwise
        return (float(value),) * 3 if isinstance(value, int | float) else tuple(value)

    return TileSettings(
        tile=tile,
        patch_size=patch_size,
        pinpoints=tuple((height, width) for height, width in config.get("image_grid_pinpoints") or default.pinpoints),
        mean=colours("image_mean", default.mean),
        std=colours("image_std", default.std),
        resample=config.get("resample", default.resample),
        rescale=config.get("rescale_factor", default.rescale),
    )


def _side(size: Any) -> int:
    """Pixels of the square that `size` or `crop_size` names, 0 if it is none."""
    if size is None:
        return 224
    if isinstance(size, int):
        return size
    if isinstance(size, dict):
        named = {name: value for name, value in size.items() if value is not None}
        if named.keys() <= {"shortest_edge", "height", "width"} and len(set(named.values())) == 1:
            return int(next(iter(named.values())))
    return 0
