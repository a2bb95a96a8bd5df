"""Arabic is drawn joined, in order and without system libraries; pictures are as they were asked for."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from ain_jax import sample
from ain_jax.data.render import (
    background,
    draw_text,
    encode_png,
    missing_characters,
    object_picture,
    text_picture,
)

FONTS = sorted((sample.FOLDER / "fonts").glob("*.ttf"))
NASKH = next(font for font in FONTS if "Naskh" in font.name)
each_font = pytest.mark.parametrize("font", FONTS, ids=lambda font: font.stem)


def longest_stroke(ink_HW) -> int:
    """The longest run of ink in any row, in pixels."""
    rows = ("".join("x" if value > 60 else " " for value in row) for row in ink_HW)
    return max(len(run) for row in rows for run in row.split(" "))


@each_font
def test_neighbours_join(font):
    alone, joined = draw_text("ب", font, 40), draw_text("ببب", font, 40)
    apart = draw_text("ب\u200cب\u200cب", font, 40)  # non-joiners keep three letters that stand alone
    assert joined.shape[1] < 0.7 * apart.shape[1]
    assert apart.shape[1] > 2.5 * alone.shape[1]
    assert longest_stroke(joined) / joined.shape[1] > 1.5 * longest_stroke(apart) / apart.shape[1]


@each_font
def test_lam_and_alef_become_one_shape(font):
    lam_alef = draw_text("لا", font, 40)
    lam, alef = draw_text("ل", font, 40), draw_text("ا", font, 40)
    assert lam_alef.shape[1] < 0.85 * (lam.shape[1] + alef.shape[1])
    assert draw_text("ل\u200cا", font, 40).shape[1] > lam_alef.shape[1]


@each_font
def test_first_letter_stands_on_the_right(font):
    ink_HW = draw_text("اب", font, 40)  # alef, the tall one, comes first
    heights_W = (ink_HW > 127).sum(axis=0)
    assert heights_W.argmax() > 0.7 * ink_HW.shape[1]
    ink_HW = draw_text("با", font, 40)
    assert (ink_HW > 127).sum(axis=0).argmax() < 0.5 * ink_HW.shape[1]


@each_font
def test_digits_inside_arabic_keep_their_order(font):
    line_HW = draw_text("ب 12", font, 40)

    def difference(digits):  # the number ends the line, so it stands on the left
        digits_HW = draw_text(digits, font, 40)
        rows, columns = digits_HW.shape
        top = np.flatnonzero(line_HW[:, :columns].any(axis=1))[0]
        return np.abs(line_HW[top : top + rows, :columns].astype(int) - digits_HW[: len(line_HW) - top]).mean()

    assert difference("12") < 0.5 * difference("21")


def test_dots_are_drawn():
    with_dot, without = draw_text("ب", NASKH, 40), draw_text("ٮ", NASKH, 40)
    assert with_dot.shape[0] > without.shape[0] + 4


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow finds no fribidi here")
@each_font
@pytest.mark.parametrize("text", ["السلام", "المستخدمين", "لا إله", "كتاب عربي", "عام 2024", "قُرْآن"])
def test_looks_as_pillows_own_shaping(font, text):
    ours_HW = draw_text(text, font, 40)
    canvas = Image.new("L", (400, 120))
    pillow_font = ImageFont.truetype(str(font), 40, layout_engine=ImageFont.Layout.RAQM)
    ImageDraw.Draw(canvas).text((20, 20), text, font=pillow_font, fill=255, language="ar")
    theirs_HW = np.asarray(canvas.crop(canvas.getbbox()))
    assert abs(ours_HW.shape[0] - theirs_HW.shape[0]) <= 3
    assert abs(ours_HW.shape[1] - theirs_HW.shape[1]) <= 6  # Pillow rounds each step to whole pixels
    size = (40, 12)  # blurred to forgive that rounding
    ours, theirs = (np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BOX)) for x in (ours_HW, theirs_HW))
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.88
    mirrored = np.asarray(Image.fromarray(ours_HW[:, ::-1].copy()).resize(size, Image.Resampling.BOX))
    assert np.corrcoef(mirrored.ravel(), theirs.ravel())[0, 1] < 0.6


HIDDEN = """
import ctypes, ctypes.util, hashlib, os, sys
sys.modules["PIL._imagingft"] = None  # Pillow's own text drawing, with RAQM in it
def no_library(name): raise OSError(f"{name}: hidden by this test")
ctypes.util.find_library = lambda name: None
from ain_jax.data.render import draw_text
ink = draw_text("السلام عليكم 12", sys.argv[1], 40)
print(hashlib.sha256(ink.tobytes()).hexdigest())
if os.path.exists("/proc/self/maps"):
    assert "fribidi" not in open("/proc/self/maps").read(), "the system's fribidi was loaded"
"""


def test_needs_no_fribidi_and_no_raqm():
    done = subprocess.run([sys.executable, "-c", HIDDEN, str(NASKH)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = hashlib.sha256(draw_text("السلام عليكم 12", NASKH, 40).tobytes()).hexdigest()
    assert done.stdout.strip() == here


def test_character_without_glyph_is_refused():
    assert missing_characters("عام Linux", NASKH) == "Linux"
    with pytest.raises(ValueError, match="no glyph for 'Linux'"):
        draw_text("عام Linux", NASKH, 30)
    with pytest.raises(ValueError, match="leaves no ink"):
        draw_text(" ", NASKH, 30)
    with pytest.raises(ValueError, match="no such file"):
        draw_text("ب", "nowhere.ttf", 30)


@each_font
@pytest.mark.parametrize("height", [28, 56])
def test_text_picture_holds_all_the_ink(font, height):
    for seed in range(20):
        picture = text_picture("والمستخدمين جميعًا", font, np.random.default_rng(seed), height=height)
        assert picture.mode == "RGB" and picture.height == height and picture.width % 28 == 0
        luminance_HW = np.asarray(picture.convert("L")).astype(int)
        assert luminance_HW.max() - luminance_HW.min() > 80  # dark on light
        dark_HW = luminance_HW < 110
        rows = np.flatnonzero(dark_HW.any(axis=1))
        assert len(rows) > 0.4 * height  # the text fills most of the picture


def test_jitter_says_how_far_the_ink_strays_from_its_place():
    def places(jitter):
        found = []
        for seed in range(30):
            picture = text_picture("د", NASKH, np.random.default_rng(seed), 56, 56, fill=(0.5, 0.5), jitter=jitter)
            ink_HW = np.asarray(picture.convert("L")).astype(int) < 140
            rows, columns = np.flatnonzero(ink_HW.any(axis=1)), np.flatnonzero(ink_HW.any(axis=0))
            found.append((rows[0] + rows[-1] - 55, 55 - columns[-1]))  # twice off the middle, room on the right
        return np.array(found)

    still, near, free = places(0.0), places(0.3), places(1.0)
    assert np.abs(still).max() <= 2  # half covered pixels at the edge of the ink
    assert near[:, 1].max() <= 0.3 * 50 and np.ptp(near, axis=0).min() > 4
    assert (np.ptp(free, axis=0) > 2 * np.ptp(near, axis=0)).all()


def test_text_picture_fits_a_given_width():
    picture = text_picture("والمستخدمين", NASKH, np.random.default_rng(0), height=56, width=56)
    assert picture.size == (56, 56)


def test_sizes_off_the_grid_are_refused():
    with pytest.raises(ValueError, match="height 30: expected a positive multiple of 28 pixels; 28 is near"):
        text_picture("ب", NASKH, np.random.default_rng(0), height=30)
    with pytest.raises(ValueError, match="size 50"):
        object_picture(Image.new("RGBA", (8, 8)), np.random.default_rng(0), size=50)
    assert text_picture("ب", NASKH, np.random.default_rng(0), height=30, multiple=10).size[1] == 30


def test_same_generator_same_bytes():
    def draw(seed):
        return encode_png(text_picture("كتاب", NASKH, np.random.default_rng(seed)))

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_object_lies_whole_inside_at_the_asked_scale():
    cutout = Image.new("RGBA", (64, 48), (255, 0, 0, 255))
    for seed in range(20):
        picture = object_picture(cutout, np.random.default_rng(seed), size=56, scale=(0.5, 0.6))
        pixels_HWC = np.asarray(picture).astype(int)
        red_HW = (pixels_HWC[..., 0] > 240) & (pixels_HWC[..., 1:] < 20).all(axis=-1)
        rows, columns = np.flatnonzero(red_HW.any(axis=1)), np.flatnonzero(red_HW.any(axis=0))
        longest = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 0.5 * 56 - 4 <= longest <= 0.6 * 56 + 1
        share = red_HW.sum() / (64 * 48)  # turning keeps the area, shrinking squares it
        assert 0.1 < share < (0.6 * 56 / 64) ** 2 * 1.05


def test_background_stays_between_its_bounds():
    for seed in range(30):
        ground_HWC = background(28, 56, np.random.default_rng(seed), 185, 250)
        assert ground_HWC.shape == (28, 56, 3)
        assert ground_HWC.min() >= 185 and ground_HWC.max() <= 250


def test_fonts_cover_letters_and_digits():
    letters = "".join(chr(c) for c in (*range(0x621, 0x63B), *range(0x641, 0x64B)))
    assert len(FONTS) >= 2
    for font in FONTS:
        assert missing_characters(letters + "0123456789", font) == ""
        assert Path(font).stat().st_size < 250_000


def test_threads_draw_what_one_draws():
    told = [(word, FONTS[n % len(FONTS)], 12 + n % 37) for n, word in enumerate(["كتاب", "مدرسة", "هذه", "لا"] * 60)]
    alone = [draw_text(*one) for one in told]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: draw_text(*one), told * 4))
    for found, wanted in zip(together, alone * 4, strict=True):
        np.testing.assert_array_equal(found, wanted)
