"""Pictures from text and from cut-out objects, the same for the same numpy Generator.

Arabic is shaped (joining forms, lam-alef, right to left) by matplotlib's FT2Font, which carries its own
HarfBuzz and bidirectional algorithm. Pillow's RAQM layout would need a system library (fribidi) that a fresh
machine may lack.
"""

import io
import math
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.ft2font import FT2Font, LoadFlags
from PIL import Image

# A font holds the size, the text and the bitmap that were set last, and all fonts share one FreeType: batches are made
# by several threads, which would draw into one another's lines.
ONE_AT_A_TIME = threading.Lock()


@lru_cache(maxsize=128)
def _font(path: str) -> tuple[FT2Font, frozenset[int]]:
    if not Path(path).is_file():
        raise ValueError(f"font {path!r}: no such file; give the path of a .ttf or .otf file")
    with ONE_AT_A_TIME:
        font = FT2Font(path)
    return font, frozenset(font.get_charmap())


def missing_characters(text: str, font_path: str | Path) -> str:
    """The characters of `text` that the font has no glyph for, each once."""
    _, covered = _font(str(font_path))
    return "".join(dict.fromkeys(c for c in text if ord(c) not in covered))


def draw_text(text: str, font_path: str | Path, size_px: float, angle: float = 0.0) -> np.ndarray:
    """Coverage of one line of text, uint8 (h, w), 255 where the ink is full, cut to the ink.

    `size_px` is the font's em in pixels, `angle` turns the line counter-clockwise, in degrees.
    A character that the font lacks is an error: it would silently leave a hole in the line.
    """
    missing = missing_characters(text, font_path)
    if missing:
        raise ValueError(f"text {text!r}: {Path(font_path).name} has no glyph for {missing!r}; choose another font")
    font, _ = _font(str(font_path))
    with ONE_AT_A_TIME:
        font.set_size(size_px, 72)  # at 72 dots per inch a point is a pixel
        font.set_text(text, angle, flags=LoadFlags.NO_HINTING)
        font.draw_glyphs_to_bitmap(antialiased=True)
        ink_HW = np.array(font.get_image())
    if not ink_HW.any():
        raise ValueError(f"text {text!r}: leaves no ink; give at least one visible character")
    rows, columns = np.flatnonzero(ink_HW.any(axis=1)), np.flatnonzero(ink_HW.any(axis=0))
    return ink_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def background(height: int, width: int, rng: np.random.Generator, low: int = 60, high: int = 255) -> np.ndarray:
    """A plain, graded or noisy ground, float32 (height, width, 3), between `low` and `high`."""
    style = rng.integers(3)
    colour_C = rng.uniform(low, high, 3).astype(np.float32)
    ground_HWC = np.broadcast_to(colour_C, (height, width, 3)).astype(np.float32)
    if style == 1:
        turn = rng.uniform(0, 2 * math.pi)
        slope_HW = np.add.outer(
            np.linspace(-0.5, 0.5, height) * math.sin(turn), np.linspace(-0.5, 0.5, width) * math.cos(turn)
        )
        ground_HWC = ground_HWC + (slope_HW * rng.uniform(20, 60)).astype(np.float32)[:, :, None]
    elif style == 2:  # one value for the three channels, on pairs of rows: grain that PNG still compresses
        grain = rng.integers(-12, 13, ((height + 1) // 2, (width + 1) // 2)).astype(np.float32)
        ground_HWC = ground_HWC + grain.repeat(2, 0).repeat(2, 1)[:height, :width, None]
    return np.clip(ground_HWC, low, high)


def text_picture(
    text: str,
    font_path: str | Path,
    rng: np.random.Generator,
    height: int = 28,
    width: int | None = None,
    multiple: int = 28,
    fill: tuple[float, float] = (0.65, 0.9),
    angle: float = 3.0,
    jitter: float = 1.0,
) -> Image.Image:
    """A line of dark text on a light ground, at a random size, place, turn and colour; RGB.

    `jitter` is the share of the free room that the place is drawn from: 1 puts the ink anywhere, 0 on the right, where
    an Arabic line begins, and halfway down.

    `fill` bounds the font's em as a share of the height; text that would stick out is drawn smaller. Without
    `width` the picture is as wide as the text asks, rounded up to `multiple` (28 = Qwen2-VL's patch of 14
    times its 2 x 2 merge).
    """
    _check_multiple("height", height, multiple)
    if width is not None:
        _check_multiple("width", width, multiple)
    size, turn = height * rng.uniform(*fill), rng.uniform(-angle, angle)
    ink_HW = draw_text(text, font_path, size, turn)
    for _ in range(4):  # rounding to whole pixels may take a second pass
        excess = max(ink_HW.shape[0] / (height - 2), ink_HW.shape[1] / (width - 2) if width else 0)
        if excess <= 1:
            break
        size = size / excess * 0.99
        ink_HW = draw_text(text, font_path, size, turn)
    rows, columns = ink_HW.shape
    across = -(-(columns + 2) // multiple) * multiple if width is None else width
    low, side = height - rows, across - columns  # the room that is free
    top = round(low / 2 + jitter * low * (rng.random() - 0.5))
    left = round(side - jitter * side * rng.random())
    picture_HWC = background(height, across, rng, low=185)
    ink_C = rng.uniform(0, 85, 3).astype(np.float32)
    cover_HW1 = ink_HW[:, :, None].astype(np.float32) / 255
    place = picture_HWC[top : top + rows, left : left + columns]
    place += cover_HW1 * (ink_C - place)
    return Image.fromarray(picture_HWC.round().astype(np.uint8))


def plain_text_picture(text: str, font_path: str | Path, em: float, height: int, width: int) -> Image.Image:
    """A line of black text on white, level, its ink in the middle; RGB. Smaller where it would stick out."""
    ink_HW = draw_text(text, font_path, em)
    for _ in range(4):
        excess = max(ink_HW.shape[0] / (height - 2), ink_HW.shape[1] / (width - 2))
        if excess <= 1:
            break
        em = em / excess * 0.99
        ink_HW = draw_text(text, font_path, em)
    rows, columns = ink_HW.shape
    picture_HW = np.full((height, width), 255, np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    picture_HW[top : top + rows, left : left + columns] -= ink_HW
    return Image.fromarray(picture_HW).convert("RGB")


def text_width(text: str, font_path: str | Path, em: float) -> float:
    """Pixels that a level line of text takes, without drawing it."""
    font, _ = _font(str(font_path))
    font.set_size(em, 72)
    font.set_text(text, 0.0, flags=LoadFlags.NO_HINTING)
    return font.get_width_height()[0] / 64  # it counts in 64ths of a pixel


def object_picture(
    cutout: Image.Image,
    rng: np.random.Generator,
    size: int = 56,
    multiple: int = 28,
    scale: tuple[float, float] = (0.6, 0.95),
    angle: float = 20.0,
) -> Image.Image:
    """The cut-out (RGBA) at a random scale, place and turn on a random ground; RGB, size x size.

    `scale` bounds the longer side of the turned cut-out as a share of the picture.
    """
    _check_multiple("size", size, multiple)
    turn = math.radians(rng.uniform(-angle, angle))
    width, height = cutout.size  # shrunk first, turned after: quicker, and free of aliasing
    turned_sides = (
        width * math.cos(turn) + height * abs(math.sin(turn)),
        height * math.cos(turn) + width * abs(math.sin(turn)),
    )
    ratio = (size * rng.uniform(*scale) - 1) / max(turned_sides)
    small = cutout.convert("RGBA").resize(
        (max(1, int(width * ratio)), max(1, int(height * ratio))), Image.Resampling.BILINEAR
    )
    turned = small.rotate(math.degrees(turn), Image.Resampling.BILINEAR, expand=True)
    left, top = (int(rng.integers(0, size - side + 1)) for side in turned.size)
    picture = Image.fromarray(background(size, size, rng).round().astype(np.uint8))
    picture.paste(turned, (left, top), turned)
    return picture


def encode_png(picture: Image.Image) -> bytes:
    """The picture as a PNG file, lightly compressed because speed matters more here than bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _check_multiple(name: str, value: int, multiple: int) -> None:
    if value <= 0 or value % multiple:
        near = max(multiple, round(value / multiple) * multiple)
        raise ValueError(f"{name} {value}: expected a positive multiple of {multiple} pixels; {near} is near")
