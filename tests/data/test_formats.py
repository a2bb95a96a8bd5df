"""Records are taken apart and put together unchanged, and each fault of a record is told."""

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from ain_jax.data import formats
from ain_jax.data.formats import Message, Record, faults, from_example, open_picture, to_example, validate


def png(mode="RGB", size=(8, 6), colour: object = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


TALK = Record(
    "r1",
    "emoji",
    "ar",
    "name",
    messages=(
        Message("system", "أجب"),
        Message("user", "<image>\nما هذا؟"),
        Message("assistant", "قطة"),
        Message("user", "بالإنجليزية؟"),
        Message("assistant", "cat"),
    ),
    images=(png(),),
)
TEXT = Record("r2", "udhr", "en", "prose", text="All human beings")


def test_sound_records_pass():
    validate(TALK)
    validate(TEXT)
    validate(replace(TALK, rejected="dog"))


@pytest.mark.parametrize(
    "record, told",
    [
        (replace(TALK, images=()), "record 'r1': 1 \"<image>\" but 0 pictures"),
        (replace(TALK, images=(png(), png())), '1 "<image>" but 2 pictures'),
        (replace(TEXT, text="a <image>"), '1 "<image>" but 0 pictures'),
        (replace(TEXT, text=""), "both empty"),
        (replace(TALK, text="x"), "both given"),
        (replace(TEXT, id=""), "empty id"),
        (replace(TALK, messages=TALK.messages[:2]), "no assistant turn"),
        (replace(TALK, messages=(*TALK.messages[:2], Message("assistant", "  "))), "no assistant turn"),
        (replace(TALK, messages=(Message("human", "<image>"), Message("assistant", "x"))), "role 'human'"),
        (replace(TALK, messages=TALK.messages[1:3] * 2, images=(png(),)), '2 "<image>" but 1 picture'),
        (replace(TALK, messages=(*TALK.messages[:2], *TALK.messages[1:3])), "message 2: role 'user'"),
        (replace(TALK, messages=TALK.messages[2:], images=()), "message 0: role 'assistant'"),
        (replace(TALK, messages=(TALK.messages[1], TALK.messages[0], TALK.messages[2])), "role 'system'"),
        (replace(TALK, rejected="cat"), "equals the better one"),
        (replace(TALK, rejected="<image>"), "cannot hold a picture"),
        (replace(TALK, messages=TALK.messages[:4], rejected="dog"), "last message is no assistant turn"),
        (replace(TALK, images=(b"",)), "picture 0: picture of 0 bytes"),
        (replace(TALK, images=(b"GIF nonsense",)), "are no picture"),
    ],
)
def test_each_fault_is_told(record, told):
    with pytest.raises(ValueError) as error:
        validate(record)
    assert told in str(error.value)


def test_all_faults_are_told_at_once():
    assert len(faults(replace(TALK, images=(b"", b"x"), rejected="cat"))) == 4
    assert faults(replace(TALK, images=(b"broken",)), pictures=False) == []


def test_truncated_picture_names_its_place():
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    with pytest.raises(ValueError, match="row 7: broken picture of 2000 bytes"):
        open_picture(buffer.getvalue()[:2000], "row 7")


def test_huge_picture_is_refused_before_it_is_decoded(monkeypatch):
    data = png()
    monkeypatch.setattr(formats, "MAX_PIXELS", 47)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="picture of 8 x 6 pixels; at most 47"):
        open_picture(data, "row 1")


def test_transparency_is_laid_on_white():
    assert open_picture(png("RGBA", colour=(0, 0, 0, 0)), "x").getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(png("L", colour=7), "x").getpixel((0, 0)) == (7, 7, 7)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    assert open_picture(buffer.getvalue(), "x").getpixel((0, 0)) == (255, 255, 255)


text = st.text(st.characters(exclude_categories=["Cs"]))
records = st.builds(
    Record,
    id=text,
    source=text,
    language=text,
    kind=text,
    text=text,
    messages=st.lists(st.builds(Message, text, text)).map(tuple),
    rejected=text,
    images=st.lists(st.binary()).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(records)
def test_example_and_back(record):
    example = to_example(record)
    assert from_example(example) == record
    as_read = {  # what tensorflow-datasets gives back: bytes, and a dict of sequences
        **{k: v.encode() for k, v in example.items() if isinstance(v, str)},
        "messages": {key: [m[key].encode() for m in example["messages"]] for key in ("role", "content")},
        "images": example["images"],
    }
    assert from_example(as_read) == record
