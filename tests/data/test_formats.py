"""Records are taken apart and put together unchanged, and each fault of a record is told."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from ain_jax.data import formats
from ain_jax.data.formats import (
    Message,
    Record,
    faults,
    file_mark,
    from_example,
    open_picture,
    read_jsonl,
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
        (replace(TEXT, text="a <image>", images=(png(),)), "pictures beside plain text are not read; give messages"),
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


def told(path):
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
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
    plain, asked, pair = read_jsonl(path)
    assert plain == Record("talks.jsonl:1", "talks", "und", "example", text="قطة")
    messages = tuple(Message(**message) for message in ASKED)
    assert asked == Record("x", "s", "en", "k", messages=messages, images=(png(),))
    assert (pair.id, pair.kind, pair.rejected) == ("talks.jsonl:4", "pair", "No")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as an editor on Windows saves it
    assert read_jsonl(path) == [plain, asked, pair]


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
        ({"text": "a", "language": None}, "language = null: expected text"),
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
    assert all(line.startswith(f"{path}:2: ") for line in message.splitlines())


def test_the_faults_of_all_lines_are_told_at_once(tmp_path):
    path = write(tmp_path, {"txt": "a", "id": 3}, {"text": "sound"}, {"messages": SPOKEN[:1]})
    places = [line.removeprefix(f"{path}:").partition(":")[0] for line in told(path).splitlines()]
    assert places == ["1", "1", "3"]
    path = write(tmp_path, *[{"messages": SPOKEN[:1]}] * 14)
    lines = told(path).splitlines()
    assert len(lines) == 11 and lines[9].startswith(f"{path}:10: ") and lines[10] == "and 4 more"


def test_two_records_of_one_name_are_refused(tmp_path):
    path = write(tmp_path, {"text": "a", "id": "x"}, {"text": "b"}, {"text": "c", "id": "x"})
    assert told(path) == f"{path}:3: id 'x' stands in line 1 already; every record needs a name of its own"


def test_a_torn_picture_is_told_by_its_name(tmp_path):
    path = write(tmp_path, {"messages": ASKED, "images": ["pictures/cat.png"]})
    (tmp_path / "pictures" / "cat.png").write_bytes(png()[:48])
    assert told(path).startswith(f"{path}:1: picture 'pictures/cat.png': broken picture of 48 bytes")


def test_a_missing_or_empty_file_is_refused(tmp_path):
    path = write(tmp_path, {"text": "a"})
    assert "talk.jsonl: cannot be read (No such file or directory); did you mean 'talks.jsonl'?" in told(
        tmp_path / "talk.jsonl"
    )
    for nothing in (b"", b"\n \n"):
        path.write_bytes(nothing)
        assert told(path) == f"{path}: no line that is not blank; expected one JSON object a line"


def test_the_mark_changes_with_every_byte_of_file_and_pictures(tmp_path):
    line = {"messages": ASKED, "images": ["pictures/cat.png"]}
    path = write(tmp_path, line)
    marks = [file_mark(path)]
    assert file_mark(path) == marks[0]
    (tmp_path / "pictures" / "cat.png").write_bytes(png(colour="green"))
    marks.append(file_mark(path))
    path = write(tmp_path, line | {"images": ["pictures/dog.png"]})
    marks.append(file_mark(path))
    path = write(tmp_path, line, {"text": "more"})
    marks.append(file_mark(path))
    assert len(set(marks)) == 4
    with pytest.raises(ValueError, match="cannot be read"):
        file_mark(tmp_path / "none.jsonl")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*formats.LINE_KEYS, "role", "content"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(anything, min_size=1, max_size=3))
def test_whatever_a_line_holds_it_is_read_or_refused_in_words(tmp_path_factory, lines):
    path = write(tmp_path_factory.mktemp("lines"), *lines)
    try:
        assert [faults(record) for record in read_jsonl(path)] == [[]] * len(lines)
    except ValueError as error:
        assert str(error).startswith(str(path))
