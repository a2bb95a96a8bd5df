"""Records are taken apart and put together unchanged, and each fault of a record is told."""

import io
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from ain_jax.data import files, formats, forms, forms_record
from ain_jax.data.formats import (
    NO_MEDIA,
    Message,
    Record,
    faults,
    from_example,
    open_picture,
    to_example,
    validate,
)


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
FILM = Record(
    "r3", "s", "en", "k", messages=(Message("user", "<video>?"), Message("assistant", "x")), videos=((png(),),)
)
TEXT = Record("r2", "udhr", "en", "prose", text="All human beings")


def test_sound_records_pass():
    validate(TALK)
    validate(TEXT)
    validate(replace(TALK, rejected="dog"))
    validate(replace(TALK, desirable=False))
    validate(FILM)


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
        (replace(TEXT, text="a <image>", images=(png(),)), "pictures beside plain text are not read; give messages"),
        (replace(TALK, videos=((png(),),)), '0 "<video>" but 1 video; each video needs one'),
        (replace(FILM, videos=()), '1 "<video>" but 0 videos; each video needs one'),
        (replace(FILM, videos=((),)), "video 0 has no frames; give one or more"),
        (replace(FILM, videos=((png(), b"x"),)), "video 0, frame 1: 1 bytes that begin with b'x' are no picture"),
        (
            replace(FILM, videos=((png(), png(size=(8, 7))),)),
            "video 0: frame 1 has 8 x 7 pixels and frame 0 has 8 x 6 pix",
        ),
        (replace(TEXT, text="a <video>", videos=((png(),),)), "videos beside plain text are not read; give messages"),
        (replace(TALK, rejected="<video>"), 'the rejected answer holds "<video>"; an answer cannot hold a picture'),
        (
            replace(TALK, messages=TALK.messages[:4], desirable=True),
            "a verdict on the last answer, but the last message",
        ),
        (replace(TALK, rejected="dog", desirable=False), "a verdict on the last answer and a rejected answer are both"),
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


def sized(width, height) -> bytes:
    """A PNG whose head tells this size, with the pixels of a small one."""
    data = bytearray(png())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    "size, told",
    [
        ((30_000, 30_000), "picture of far more than 40,000,000 pixels; at most so many are read: shrink it"),
        ((30_000, 4_000), "picture of 30000 x 4000 pixels; at most 40,000,000 pixels are read: shrink it"),
        ((30_000, 1_000), "picture of 30000 x 1000 pixels; a side of at most 20,000 pixels is read: shrink it"),
        ((10_000, 40), "picture of 10000 x 40 pixels; one side may be at most 200 times the other: cut it"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_huge_sides_are_refused_by_the_head_alone(monkeypatch, size, told):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError) as error:
        open_picture(sized(*size), "x")
    assert str(error.value) == f"x: {told}"


def saved(kind, picture, **more) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def test_odd_pictures():
    still, moved = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):  # the first frame
        data = saved(kind, still, save_all=True, append_images=[moved])
        assert np.asarray(open_picture(data, "x")).reshape(-1, 3).max(0)[0] > 200
    # Inks, as Pillow turns them into light: none is white, all cyan leaves no red.
    inks = Image.fromarray(np.full((8, 8, 4), [255, 0, 0, 0], np.uint8), "CMYK")
    assert open_picture(saved("TIFF", inks), "x").getpixel((3, 3)) == (0, 255, 255)
    assert open_picture(saved("BMP", still), "a.jpg").getpixel((0, 0)) == (255, 0, 0)  # contents decide
    deep = Image.fromarray(np.full((4, 4), 300, np.uint16))
    for kind in ("PNG", "TIFF"):
        with pytest.raises(ValueError, match="^x: picture of mode 'I;16', with more than 8 bits a channel, would turn"):
            open_picture(saved(kind, deep), "x")
    with pytest.raises(ValueError, match="are no picture"):  # Pillow would start Ghostscript
        open_picture(saved("EPS", still), "x")


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
    videos=st.lists(st.lists(st.binary(max_size=3), max_size=3).map(tuple), max_size=3).map(tuple),
    desirable=st.sampled_from([None, True, False]),
)


@settings(max_examples=60, deadline=None)
@given(records)
def test_example_and_back(record):
    example = to_example(record)
    assert from_example(example) == record
    as_read = {  # what tensorflow-datasets gives back: bytes, and a dict of sequences
        **{k: v.encode() for k, v in example.items() if isinstance(v, str)},
        "messages": {key: [m[key].encode() for m in example["messages"]] for key in ("role", "content")},
        **{key: np.array(example[key], object) for key in ("images", "frames") if key in example},
        **{key: np.array(example[key]) for key in ("frame_counts", "desirable") if key in example},
    }
    assert from_example(as_read) == record
    assert NO_MEDIA.keys() & example.keys() == (
        NO_MEDIA.keys() if record.videos or record.desirable is not None else set()
    )


def test_videos_are_stored_as_frames_and_counts():
    example = to_example(replace(FILM, videos=((b"a", b"b"), (b"c",)), desirable=True))
    assert (example["frames"], example["frame_counts"], example["desirable"]) == ([b"a", b"b", b"c"], [2, 1], 1)
    with pytest.raises(ValueError, match=r"3 frames, but the counts \[2, 2\] of the videos say 4"):
        from_example(example | {"frame_counts": [2, 2]})


# Files of JSON lines

ASKED = [{"role": "user", "content": "<image> What is this?"}, {"role": "assistant", "content": "A cat"}]
SPOKEN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def write(folder, *lines):
    """A file of these lines, objects written as JSON, beside the pictures cat.png and dog.png."""
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "cat.png").write_bytes(png())
    (folder / "pictures" / "dog.png").write_bytes(png(colour="blue"))
    path = folder / "talks.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def read(path):
    """The records of the file; one ValueError of all its faults."""
    records, found = [], []
    for row in (row for part in files.parts(files.find(str(path)), 1) for row in files.rows(part)):
        try:
            if row.values is None:
                raise ValueError(f"{row.where}: {row.fault}")
            records.append(forms.to_record(row, "record", "talks"))
        except ValueError as error:
            found.append(str(error))
    if found:
        raise ValueError("\n".join(found))
    return records


def told(path):
    with pytest.raises(ValueError) as error:
        read(path)
    return str(error.value)


def test_lines_become_records(tmp_path, monkeypatch):
    monkeypatch.chdir("/")  # pictures are found beside the file
    path = write(
        tmp_path,
        {"text": "قطة"},
        b"  ",
        {"id": "x", "messages": ASKED, "images": ["pictures/cat.png"], "language": "en", "source": "s", "kind": "k"},
        {"messages": SPOKEN, "rejected": "No"},
    )
    plain, asked, pair = read(path)
    assert plain == Record("talks.jsonl:1", "talks", "und", "example", text="قطة")
    messages = tuple(Message(**message) for message in ASKED)
    assert asked == Record("x", "s", "en", "k", messages=messages, images=(png(),))
    assert (pair.id, pair.kind, pair.rejected) == ("talks.jsonl:4", "pair", "No")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as an editor on Windows saves it
    assert read(path) == [plain, asked, pair]


@pytest.mark.parametrize(
    "line, fault",
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter at character 13 of "),
        (b'{"text": "\xe9"}', "not UTF-8 text (invalid continuation byte at byte 10 of the line)"),
        (b'"text"', "expected a JSON object such as {\"text\": ...}, found \"text\""),
        (b'{"text": "a", "text": "b"}', "the key 'text' stands more than once"),
        (b"[" * 100_000, "brackets within brackets"),
        ({"txt": "a"}, "unknown key 'txt': did you mean 'text'?"),
        ({"conversations": SPOKEN}, "unknown key 'conversations': "),
        ({"text": ""}, 'text = "": expected text that is not blank, or no such key'),
        ({"text": 3}, "text = 3: expected text"),
        ({"text": "a", "id": ["x"]}, 'id = ["x"]: expected text'),
        ({}, "text and messages are both empty; one is needed"),
        ({"text": "a", "messages": SPOKEN}, "text and messages are both given; keep one"),
        ({"text": "<image>"}, '1 "<image>" but 0 pictures; each picture needs one'),
        ({"text": "<image>", "images": ["pictures/cat.png"]}, "pictures beside plain text are not read"),
        ({"messages": []}, 'messages = []: expected a list of {"role": ..., "content": ...}'),
        ({"messages": "Hi"}, 'messages = "Hi": expected a list'),
        ({"messages": ["Hi", SPOKEN[1]]}, 'message 0 = "Hi": expected {"role": text, "content": text}'),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "with <image> where a picture stands"),
        ({"messages": [{"role": "user", "contnt": "Hi"}, SPOKEN[1]]}, "message 0 = "),
        ({"messages": [SPOKEN[0] | {"nme": "x"}, SPOKEN[1]]}, "message 0: unknown key 'nme'"),
        ({"messages": [{"role": "human", "content": "Hi"}, SPOKEN[1]]}, "role 'human'; expected one of system, user"),
        ({"messages": SPOKEN[:1]}, "no assistant turn with content among the roles ['user']"),
        ({"messages": SPOKEN, "rejected": "Yes"}, "the rejected answer 'Yes' equals the better one"),
        ({"messages": ASKED}, '1 "<image>" but 0 pictures'),
        ({"messages": SPOKEN, "images": ["pictures/cat.png"]}, '0 "<image>" but 1 picture;'),
        ({"messages": ASKED, "images": "pictures/cat.png"}, 'images = "pictures/cat.png": expected a list of paths'),
        ({"messages": ASKED, "images": [None]}, "images = [null]: expected a list of paths"),
        ({"messages": ASKED, "images": ["pictures/kat.png"]}, "no picture 'pictures/kat.png' in "),
        ({"messages": ASKED, "images": ["pictures/kat.png"]}, "did you mean 'cat.png'?"),
        ({"messages": ASKED, "images": ["pictures"]}, "no picture 'pictures' in "),
        ({"messages": ASKED, "images": ["talks.jsonl"]}, "picture 'talks.jsonl': "),
    ],
)  # fmt: skip
def test_each_fault_of_a_line_is_told_with_its_place(tmp_path, line, fault):
    path = write(tmp_path, {"text": "sound"}, line)
    message = told(path)
    assert fault in message
    assert all(line.startswith("talks.jsonl:2: ") for line in message.splitlines())


def test_a_torn_picture_is_told_by_its_name(tmp_path):
    path = write(tmp_path, {"messages": ASKED, "images": ["pictures/cat.png"]})
    (tmp_path / "pictures" / "cat.png").write_bytes(png()[:48])
    assert told(path).startswith("talks.jsonl:1: picture 'pictures/cat.png': broken picture of 48 bytes")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*forms_record.LINE_KEYS, "role", "content"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(anything, min_size=1, max_size=3))
def test_whatever_a_line_holds_it_is_read_or_refused_in_words(tmp_path_factory, lines):
    path = write(tmp_path_factory.mktemp("lines"), *lines)
    try:
        assert [faults(record) for record in read(path)] == [[]] * len(lines)
    except ValueError as error:
        assert str(error).startswith("talks.jsonl:")
