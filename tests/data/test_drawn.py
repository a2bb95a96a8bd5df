"""Drawings: the same words give the same pixels, their size is told undrawn, and they pass wherever a file does."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ain_jax import sample
from ain_jax.data import drawn, images, visuals
from ain_jax.data.builders.files import build
from ain_jax.data.builders.records import records
from ain_jax.data.builders.sources import Sources
from ain_jax.data.files import Row
from ain_jax.data.formats import open_picture
from ain_jax.data.forms import to_record

FONT = str(sample.FOLDER / "fonts/NotoNaskhArabic-Regular.ttf")
EMOJI = str(sample.FOLDER / "emoji/1f408.png")
LINE = {"draw": "line", "text": "السلام عليكم", "font": FONT, "em": 34, "width": 252, "height": 56}
OBJECT = {"draw": "object", "picture": EMOJI, "width": 84, "height": 84}


@pytest.fixture
def a_map(tmp_path):
    """4 x 6 pixels: sea, a border, and the regions 3 and 4."""
    values = np.array([[0, 0, 0, 0, 0, 0], [0, 3, 3, 1, 4, 4], [0, 3, 3, 1, 4, 4], [2, 2, 2, 2, 2, 2]], np.uint8)
    Image.fromarray(values).save(tmp_path / "map.png")
    return {"draw": "region", "picture": str(tmp_path / "map.png"), "width": 6, "height": 4}


def pixels(fields):
    data = drawn.encode(drawn.drawing(fields))
    picture = drawn.draw(data)
    assert picture.mode == "RGB" and picture.size == drawn.size(data) == (fields["width"], fields["height"])
    assert drawn.is_drawing(data) and len(data) < 400
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("fields", [LINE, OBJECT], ids=["line", "object"])
def test_a_seed_decides_every_pixel_and_none_is_plain(fields):
    plain, one, again, two = (pixels({**fields, "seed": seed}) for seed in (0, 1, 1, 2))
    assert (one == again).all() and (one != two).any() and (plain != one).any()
    assert (plain[0] == 255).all() and (plain[:, 0] == 255).all()  # white at the rim, something within
    assert plain.min() < 128


def test_a_line_sticks_out_nowhere_however_narrow_its_picture():
    ink = pixels({**LINE, "width": 80})[:, :, 0] < 128
    assert ink.any() and not ink[:, [0, -1]].any() and not ink[[0, -1]].any()


def test_one_region_is_marked_and_the_others_are_alike(a_map):
    unmarked, left, other = (
        pixels({**a_map, **more}) for more in ({"region": 0}, {"region": 3}, {"region": 4, "seed": 1})
    )
    assert (unmarked[1, 1] == unmarked[1, 4]).all() and (unmarked[1, 1] == drawn.MAP_COLOURS[3]).all()
    assert (left[1, 1] == drawn.MARKS[0]).all() and (left[1, 4] == drawn.MAP_COLOURS[3]).all()
    assert (other[1, 4] == drawn.MARKS[1]).all() and (other[0] == drawn.MAP_COLOURS[0]).all()
    with pytest.raises(ValueError, match=r"no region 9; there are \[.*4"):
        pixels({**a_map, "region": 9})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"draw": "lines"}, "did you mean 'line'"),
        ({"em": "34"}, "em = '34': expected float"),
        ({"colour": "red"}, "unknown word 'colour'"),
        ({"width": 0}, "width = 0: expected 1 to"),
        ({"text": "a 漢"}, "no glyph for 'a漢'"),
        ({"text": " "}, "not blank"),
    ],
)
def test_what_is_wrong_with_its_words_is_told(change, told):
    with pytest.raises(ValueError, match=told):
        drawn.drawing({**LINE, **change})


def test_a_word_that_lacks_is_named():
    with pytest.raises(ValueError, match="line: font, em is lacking"):
        drawn.drawing({name: value for name, value in LINE.items() if name not in ("font", "em")})


def test_it_is_measured_like_the_file_that_it_draws():
    data = drawn.encode(drawn.drawing({**LINE, "seed": 3}))
    settings = images.ImageSettings(min_pixels=784)
    patches, grid = images.preprocess(data, settings)
    from_file, of_file = images.preprocess(drawn.as_file(data), settings)
    assert grid == of_file == (1, 4, 18) and (patches == from_file).all()
    assert images.image_size(data) == (252, 56) and open_picture(data, "it").size == (252, 56)


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_a_row_names_it_where_it_would_name_a_file(tmp_path):
    (tmp_path / "fonts").mkdir()
    (tmp_path / "fonts/naskh.ttf").write_bytes(Path(FONT).read_bytes())
    line = {**LINE, "font": "fonts/naskh.ttf", "seed": 5}
    rows = [{"id": "a", "messages": turns("<image>\nاقرأ.", LINE["text"]), "images": [line]}]
    rows.append({"id": "b", "prompt": "<image>\nاقرأ.", "chosen": "نعم", "rejected": "لا", "images": [line]})
    (tmp_path / "lines.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    sources = Sources(files={"lines": str(tmp_path / "lines.jsonl")}, images={"lines": str(tmp_path)}, workers=1)
    (record,) = records(build("lines", sources, tmp_path / "built", progress=False), "train")
    assert drawn.size(record.images[0]) == (252, 56)
    assert visuals.measured(record, images.ImageSettings())[0] == [(1, 4, 18)]
    pair = to_record(Row("b", rows[1]), "preference", "lines", images=str(tmp_path))
    assert pair.images == record.images and pair.rejected == "لا"
    line["font"] = "fonts/nask.ttf"
    with pytest.raises(ValueError, match=r"no file .*nask.ttf.*did you mean 'naskh.ttf'"):
        to_record(Row("c", rows[0]), "messages", "lines", images=str(tmp_path))
