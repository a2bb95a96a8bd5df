"""Picture or video -> patches, grid and number of placeholder tokens; equal to Qwen2-VL's processor bit for bit."""

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ain_jax.data import drawn
from ain_jax.data.formats import PICTURE_FORMATS
from ain_jax.data.positions import Grid, feature_count

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become patches; kept with a model as its `preprocessor_config.json`."""

    patch_size: int = 14  # pixels
    merge_size: int = 2  # merge_size x merge_size patches make one feature, that is one token
    temporal_patch_size: int = 2  # a still picture is repeated so often
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self):
        block = (self.patch_size * self.merge_size) ** 2
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < block:
            raise ValueError(
                f"ImageSettings: min_pixels={self.min_pixels} and max_pixels={self.max_pixels}; expected "
                f"0 < min_pixels <= max_pixels, and max_pixels at least one merged feature of {block} pixels"
            )
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(f"ImageSettings: mean={self.mean} and std={self.std} need one value per colour")
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    @property
    def factor(self) -> int:
        """Pixels of a merged feature's side; both sides of a resized picture are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def smart_resize(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """(height, width), multiples of the factor, near the given shape and with min_pixels <= area <= max_pixels.

    factor 28, at most 1,003,520 pixels:  100 x 300 -> 112 x 308;  3000 x 4000 -> 840 x 1148
    """
    factor = settings.factor
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {width} x {height} pixels; one side may be at most 200 times the other")
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        new_height, new_width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif new_height * new_width < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def image_grid(width: int, height: int, settings: ImageSettings) -> Grid:
    """(1, patch rows, patch columns) of a picture of this size, without decoding it."""
    new_height, new_width = smart_resize(height, width, settings)
    return 1, new_height // settings.patch_size, new_width // settings.patch_size


def placeholder_tokens(width: int, height: int, settings: ImageSettings) -> int:
    """How many image tokens a picture of this size takes: 56 x 56 pixels give 4 with patches of 14 merged 2 x 2."""
    return feature_count(image_grid(width, height, settings), settings.merge_size)


def video_grid(frames: int, width: int, height: int, settings: ImageSettings) -> Grid:
    """(groups of frames, patch rows, patch columns): 5 frames in groups of 2 make 3, the last one being repeated."""
    return -(-frames // settings.temporal_patch_size), *image_grid(width, height, settings)[1:]


def share_pixels(settings: ImageSettings, frames: int, video_tokens: int = 128_000) -> ImageSettings:
    """The settings for each of so many frames, when the whole video may take nine tenths of `video_tokens`.

    The rule of qwen-vl-utils, and of transformers' `cap_pixels_per_frame`: a frame's max_pixels is at most its even
    share, and never less than 1.05 min_pixels. Without it a frame may be as large as a still picture.

    factor 28, groups of 2, min 100,352, max 602,112:  100 frames -> 602,112;  800 -> 225,792;  9000 -> 105,369
    """
    budget = int(video_tokens * settings.factor**2 * 0.9)
    share = min(settings.max_pixels, budget * settings.temporal_patch_size // frames)
    return dataclasses.replace(settings, max_pixels=max(share, int(settings.min_pixels * 1.05)))


def open_image(image: Image.Image | bytes) -> Image.Image:
    """The picture; an encoded one is opened, not yet decoded, so that its size costs little. A drawing is drawn.

    A camera's note that the picture is to be turned is not followed, as transformers' processors do not either (its
    `load_image` does, before them): turn with `PIL.ImageOps.exif_transpose` where records are written.
    """
    if isinstance(image, Image.Image):
        return image
    if drawn.is_drawing(image):
        return drawn.draw(image)
    try:
        return Image.open(io.BytesIO(image), formats=PICTURE_FORMATS)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{len(image)} bytes beginning with {image[:8]!r} are no picture that Pillow reads; "
            f"expected PNG or JPEG: {error}"
        ) from error


def image_size(image: Image.Image | bytes) -> tuple[int, int]:
    """Width and height, with nothing decoded or drawn."""
    return drawn.size(image) if isinstance(image, bytes) and drawn.is_drawing(image) else open_image(image).size


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in three colours, transparent parts on white, as transformers 5 does it.

    transformers 4.51 drops the transparency instead and shows what lies under it: for the same pixels everywhere,
    hand on pictures without transparency. Pictures of 16 bits are clipped at 255, not scaled, there as here.
    """
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # converting to the same mode would copy
    except (OSError, SyntaxError) as error:
        raise ValueError(f"a broken picture of {image.size[0]} x {image.size[1]} pixels: {error}") from error


def preprocess(image: Image.Image | bytes, settings: ImageSettings) -> tuple[np.ndarray, Grid]:
    """(patches_PK float32, grid): resized, normalised, cut into patches in merge-block order.

    C holds colour, frame, row, column, the slowest first; the frames of a still picture are equal.
    """
    picture = to_rgb(open_image(image))
    grid = image_grid(picture.width, picture.height, settings)
    return _cut([_resized(picture, grid, settings)], grid, settings), grid


def preprocess_frames(frames: Sequence[Image.Image | bytes], settings: ImageSettings) -> tuple[np.ndarray, Grid]:
    """(patches_PK float32, grid) of a video: temporal_patch_size frames make one patch, the last is repeated to fill.

    The settings are those of `video_preprocessor_config.json`, or the pictures' where a model has none, as in
    transformers; `share_pixels` bounds a long video. Frames of different sizes are refused: all would silently be
    stretched to the shape of the first.
    """
    if not frames:
        raise ValueError("a video without frames; expected one or more")
    width, height = image_size(frames[0])
    for number, frame in enumerate(frames):
        size = image_size(frame)
        if size != (width, height):
            raise ValueError(
                f"frame {number} of a video has {size[0]} x {size[1]} pixels and frame 0 has {width} x {height}; "
                "expected one size for all frames"
            )
    grid = video_grid(len(frames), width, height, settings)
    return _cut((_resized(to_rgb(open_image(frame)), grid, settings) for frame in frames), grid, settings), grid


def _resized(picture: Image.Image, grid: Grid, settings: ImageSettings) -> np.ndarray:
    """Bytes of row, column, colour: as large as the grid's patches together."""
    size = grid[2] * settings.patch_size, grid[1] * settings.patch_size
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC))


def _cut(frames: Iterable[np.ndarray], grid: Grid, settings: ImageSettings) -> np.ndarray:
    """patches_PK float32, normalised, in merge-block order."""
    p, m, together = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    groups, rows, columns = grid
    table = normalised(settings.mean, settings.std)
    # group of frames, block row, block column, row in block, column in block, colour, frame, pixel row, pixel column
    patches = np.empty((groups, rows // m, columns // m, m, m, 3, together, p, p), np.float32)
    for number, frame in enumerate(frames):
        group, at = divmod(number, together)
        for colour in range(3):
            values = table[colour].take(frame[..., colour]).reshape(rows // m, m, p, columns // m, m, p)
            # Also into the places of the frames that follow: they overwrite it, or the last frame stays there.
            patches[group, ..., colour, at:, :, :] = values.transpose(0, 3, 1, 4, 2, 5)[..., None, :, :]
    return patches.reshape(groups * rows * columns, settings.patch_values)


@lru_cache
def normalised(mean: tuple[float, ...], std: tuple[float, ...], rescale: float = 1 / 255) -> np.ndarray:
    """(3, 256): the value of each byte in each colour, rounded where the published processors round."""
    unit = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    means, stds = np.array(mean, np.float32)[:, None], np.array(std, np.float32)[:, None]
    return (unit[None] - means) / stds


def preprocessor_config(settings: ImageSettings) -> dict[str, Any]:
    """`preprocessor_config.json`. transformers 4.51 reads min_pixels and max_pixels, later ones also `size`."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": int(Image.Resampling.BICUBIC),
        "rescale_factor": 1 / 255,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "patch_size": settings.patch_size,
        "merge_size": settings.merge_size,
        "temporal_patch_size": settings.temporal_patch_size,
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
        "size": {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
    }


def image_settings(config: dict[str, Any]) -> ImageSettings:
    """The settings that a `preprocessor_config.json` describes."""
    size = config.get("size") or {}
    kind = config.get("image_processor_type", "Qwen2VLImageProcessor")
    if not kind.startswith("Qwen2VLImageProcessor"):
        raise ValueError(f"preprocessor_config.json: image_processor_type={kind!r}; expected 'Qwen2VLImageProcessor'")
    default = ImageSettings()
    fixed = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": int(Image.Resampling.BICUBIC),
        "rescale_factor": 1 / 255,
    }
    read = {"size", "patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels"}
    refuse(config_faults(config, read | {"image_mean", "image_std"}, fixed))
    return ImageSettings(
        patch_size=config.get("patch_size", default.patch_size),
        merge_size=config.get("merge_size", default.merge_size),
        temporal_patch_size=config.get("temporal_patch_size", default.temporal_patch_size),
        min_pixels=config.get("min_pixels") or size.get("shortest_edge", default.min_pixels),
        max_pixels=config.get("max_pixels") or size.get("longest_edge", default.max_pixels),
        mean=tuple(config.get("image_mean", default.mean)),
        std=tuple(config.get("image_std", default.std)),
    )


# Attributes of a preprocessor_config.json that leave a picture's pixels as they are, whatever their value.
WITHOUT_EFFECT = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_processor_class",
    "_valid_processor_keys",
    "return_tensors",
    "device",
    "disable_grouping",
    "default_to_square",
)


def config_faults(config: dict[str, Any], read: Iterable[str], fixed: dict[str, Any]) -> list[str]:
    """What a `preprocessor_config.json` asks for and we do not do: nothing unknown, the fixed ones at their value.

    An attribute that is null says nothing.
    """
    fixed = {"data_format": "channels_first", **fixed}
    read = {*read, *WITHOUT_EFFECT}
    return [
        f"{name}={value!r}" + (f" (expected {fixed[name]!r})" if name in fixed else " (unknown)")
        for name, value in config.items()
        if value is not None and name not in read and (name not in fixed or value != fixed[name])
    ]


def refuse(faults: Sequence[str]) -> None:
    """Nothing, or one ValueError which names every fault."""
    if faults:
        raise ValueError(
            "preprocessor_config.json asks for what is not done here, so that the pixels would differ: "
            + "; ".join(faults)
        )
