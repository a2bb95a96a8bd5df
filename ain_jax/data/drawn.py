"""Pictures that are told, not stored: a few words that say what is drawn, drawn where a file would be decoded.

    {"draw": "line", "text": "السلام عليكم", "font": "fonts/Amiri-Regular.ttf", "em": 34, "width": 252, "height": 56}
    {"draw": "object", "picture": "emoji/noto/1f600.png", "width": 84, "height": 84, "seed": 7}
    {"draw": "region", "picture": "maps/egypt.png", "region": 12, "width": 168, "height": 140, "seed": 7}

stands where a row names a picture's file. It takes some hundred bytes in a record instead of kilobytes, its size is
told without drawing, and the same words give the same pixels in every process. Paths are as those of pictures: relative
ones begin at the folder of the row's file, or at `Sources.images`. A `seed` of 0 draws plainly: black on white, level,
in the middle; any other one draws ground, colour, place and turn from it.
"""

import abc
import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ain_jax.experiment import nearest

MAGIC = b"%ain-drawing "
MAX_SIDE = 4096  # pixels
SEA, BORDER, AROUND, FIRST = 0, 1, 2, 3  # values of a map's pixels; regions count from FIRST
MAP_COLOURS = ((214, 230, 244), (70, 70, 70), (236, 236, 232), (247, 240, 214))  # of these, and of a region
MARKS = ((220, 40, 40), (30, 110, 210), (20, 150, 70), (225, 120, 0), (130, 50, 160))  # what one region is shown in


@dataclass(frozen=True, kw_only=True)
class Drawing(abc.ABC):
    width: int
    height: int
    seed: int = 0
    FILES: ClassVar[tuple[str, ...]] = ()  # fields that name files

    def __post_init__(self):
        for name in ("width", "height"):
            if not 0 < getattr(self, name) <= MAX_SIDE:
                raise ValueError(f"{name} = {getattr(self, name)}: expected 1 to {MAX_SIDE} pixels")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: expected 0 or more")

    @abc.abstractmethod
    def image(self) -> Image.Image:
        """The picture, RGB."""


@dataclass(frozen=True, kw_only=True)
class Line(Drawing):
    """A line of text; `em` is the font's size in pixels, and smaller where the text would stick out."""

    text: str
    font: str
    em: float
    FILES = ("font",)

    def __post_init__(self):
        super().__post_init__()
        from ain_jax.data import render  # matplotlib: 0.2 s that a process without drawings need not wait

        if not self.text.strip():
            raise ValueError(f"text = {self.text!r}: expected a line that is not blank")
        if not 1 <= self.em <= MAX_SIDE:
            raise ValueError(f"em = {self.em}: expected 1 pixel or more")
        if Path(self.font).is_file() and (missing := render.missing_characters(self.text, self.font)):
            raise ValueError(f"text {self.text!r}: {Path(self.font).name} has no glyph for {missing!r}")

    def image(self) -> Image.Image:
        from ain_jax.data import render

        fill = (self.em / self.height,) * 2
        place: dict[str, Any] = {"height": self.height, "width": self.width, "multiple": 1, "fill": fill}
        if self.seed:
            return render.text_picture(self.text, self.font, np.random.default_rng(self.seed), angle=1.5, **place)
        return render.plain_text_picture(self.text, self.font, self.em, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class Object(Drawing):
    """A cut-out (a picture with transparency) on a ground; width and height are equal."""

    picture: str
    FILES = ("picture",)

    def __post_init__(self):
        super().__post_init__()
        if self.width != self.height:
            raise ValueError(f"an object of {self.width} x {self.height} pixels; expected as wide as high")

    def image(self) -> Image.Image:
        from ain_jax.data import render

        cutout = _opened(self.picture).convert("RGBA")
        if self.seed:
            rng = np.random.default_rng(self.seed)
            return render.object_picture(cutout, rng, self.width, multiple=1, scale=(0.7, 0.95), angle=12.0)
        ratio = 0.9 * self.width / max(cutout.size)
        width, height = (max(1, round(side * ratio)) for side in cutout.size)
        small = cutout.resize((width, height), Image.Resampling.BILINEAR)
        picture = Image.new("RGB", (self.width, self.height), "white")
        picture.paste(small, ((self.width - width) // 2, (self.height - height) // 2), small)
        return picture


@dataclass(frozen=True, kw_only=True)
class Region(Drawing):
    """A map (one channel, a value a region: see SEA and FIRST) with one region marked, none if `region` is 0."""

    picture: str
    region: int
    FILES = ("picture",)

    def image(self) -> Image.Image:
        values_HW = np.asarray(_opened(self.picture))
        if values_HW.ndim != 2:
            raise ValueError(f"{self.picture}: a picture of one channel is expected, a value a region")
        if self.region and (self.region < FIRST or not (values_HW == self.region).any()):
            raise ValueError(f"{self.picture}: no region {self.region}; there are {sorted(set(values_HW.ravel()))}")
        colours_V3 = np.array(MAP_COLOURS, np.uint8)[np.minimum(np.arange(256), FIRST)]
        if self.region:
            colours_V3[self.region] = MARKS[self.seed % len(MARKS)]
        picture = Image.fromarray(colours_V3[values_HW])
        return picture.resize((self.width, self.height), Image.Resampling.BOX)


KINDS: Mapping[str, type[Drawing]] = {"line": Line, "object": Object, "region": Region}


@lru_cache(maxsize=256)
def _opened(path: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(Path(path).read_bytes()))
        picture.load()
    except OSError as error:
        raise ValueError(f"picture {path!r}, which a drawing needs: {error.strerror or error}") from None
    return picture


def is_drawing(data: Any) -> bool:
    return isinstance(data, bytes) and data.startswith(MAGIC)


def drawing(fields: Mapping[str, Any]) -> Drawing:
    """The drawing that a row's words tell; a ValueError says what is wrong with them."""
    kind = KINDS.get(str(fields.get("draw")))
    if kind is None:
        raise ValueError(f"draw = {fields.get('draw')!r}: {nearest(str(fields.get('draw')), list(KINDS))}")
    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    lacking = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in fields]
    values = {name: value for name, value in fields.items() if name != "draw"}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{fields['draw']}: unknown word {name!r}: {nearest(name, list(types))}")
        known: Any = {int: int, str: str, float: (int, float)}[types[name]]
        if not isinstance(value, known) or isinstance(value, bool):
            raise ValueError(f"{fields['draw']}: {name} = {value!r}: expected {types[name].__name__}")
    if lacking:
        raise ValueError(f"{fields['draw']}: {', '.join(lacking)} is lacking")
    return kind(**values)


def encode(told: Drawing) -> bytes:
    """The drawing as it stands in a record where others hold a file's bytes."""
    (name,) = (name for name, kind in KINDS.items() if kind is type(told))
    values = {"draw": name} | dataclasses.asdict(told)
    return MAGIC + json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def decode(data: bytes) -> Drawing:
    try:
        return drawing(json.loads(data.removeprefix(MAGIC)))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"a broken drawing of {len(data)} bytes: {error}") from None


def draw(data: bytes) -> Image.Image:
    """The picture, RGB."""
    return decode(data).image()


def size(data: bytes) -> tuple[int, int]:
    """Width and height, without drawing it."""
    told = decode(data)
    return told.width, told.height


def as_file(data: bytes) -> bytes:
    """A file of the picture: a drawing as PNG, any other as it is."""
    if not is_drawing(data):
        return data
    from ain_jax.data import render

    return render.encode_png(draw(data))
