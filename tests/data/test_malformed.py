"""Whatever a row or a file holds: a sound Record, a Row with its fault, or a ValueError in words; nothing else.

Sound rows of every form, and sound files of every kind, are damaged at random: bytes changed, cut out and doubled,
keys dropped and renamed, types swapped, junk nested in them. More than 10,000 rows are thrown at the forms alone.
"""

import io
import json
import os
import random
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_files import NAMES, PACK, WRITERS

from ain_jax.data.files import Part, Row, parts, rows
from ain_jax.data.formats import Record, faults, open_picture
from ain_jax.data.forms import FORMS, detect, to_record


def picture(kind="PNG", mode="RGB") -> bytes:
    out = io.BytesIO()
    frames = [Image.new(mode, (9, 7), shade) for shade in (0, 90)]
    more = {"save_all": True, "append_images": frames[1:]} if kind in ("GIF", "TIFF", "WEBP") else {}
    frames[0].save(out, kind, **more)
    return out.getvalue()


CAT = picture()
PROMPT = [{"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "Yes"}
TALK = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yes"}]
SOUND = {
    "text": [{"id": 1, "text": "قطة", "language": "ar"}],
    "parallel": [{"ar": "a", "en": "b"}, {"translation": {"ar": "a", "en": "b"}}, {"source": "a", "target": "b"}],
    "caption": [{"image": {"bytes": CAT, "path": "a.png"}, "caption": "a"}],
    "alpaca": [{"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]}],
    "instar": [{"instruction": "a", "output": "b", "system": "", "task": "qa", "topic": "t", "uuid": "u"}],
    "sharegpt": [{"conversations": TALK, "images": [CAT], "system": "s"}],
    "llava": [{"id": 2.0, "conversations": TALK, "image": CAT}, {"conversations": TALK, "videos": [[CAT, CAT]]}],
    "messages": [
        {"messages": [*PROMPT, ANSWER]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": CAT}, {"type": "text", "text": "a"}]},
                ANSWER,
            ]
        },
    ],
    "preference": [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "No"}, "images": [CAT]},
        {"chosen": [*PROMPT, ANSWER], "rejected": [*PROMPT, {**ANSWER, "content": "No"}]},
    ],
    "kto": [{"prompt": "a", "completion": "b", "label": True}, {"messages": [*PROMPT, ANSWER], "kto_tag": False}],
    "record": [{"messages": [*PROMPT, ANSWER], "kind": "k", "rejected": "No"}, {"text": "a", "kind": "k"}],
}
KEYS = sorted({key for some in SOUND.values() for row in some for key in row} | {"role", "content", "from", "value"})
JUNK = [
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "<image>",
    "<video>",
    "\ud800",
    "a\0b",
    "x" * 300,
]
JUNK += [
    "https://x.org/a.png",
    "ftp://x.org/a.mp4",
    "data:image/png;base64,AAAA",
    "../..",
    "gpt",
    "[1",
    "[]",
    b"",
    b"\xff",
    CAT[:40],
    [],
    {},
]
JUNK += [[[]], [None], {"": {}}, {"type": "image"}, {"bytes": b"x"}, {"path": 3}, {"from": []}, [["a"]], (1, 2), {3: 4}]


def changed(value, rng: random.Random):
    """The value with one thing in it dropped, renamed, doubled or exchanged for junk."""
    fault = rng.randrange(5)
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        if fault == 0:
            return {k: v for k, v in value.items() if k != key}
        if fault == 1:
            return {rng.choice(KEYS) if k == key else k: v for k, v in value.items()}
        if fault == 2:
            return {**value, rng.choice(KEYS): rng.choice(JUNK)}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and fault:
        at = rng.randrange(len(value))
        if fault == 1:
            return value[:at] + value[at + 1 :]
        if fault == 2:
            return [*value, *value[: at + 1]]
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    if isinstance(value, str) and value and fault == 1:
        at = rng.randrange(len(value))
        return value[:at] + value[at + rng.randrange(3) :]
    if isinstance(value, bytes) and fault:
        return damaged(value, rng)
    return [[value]] if fault == 2 else rng.choice(JUNK)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four places changed, cut out, doubled or cut off."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 8, 64, 600))
        fault = rng.randrange(6)
        if fault < 2:
            out[at : at + length] = rng.randbytes(len(out[at : at + length]))
        elif fault == 2:
            del out[at : at + length]
        elif fault == 3:
            out[at:at] = out[at : at + length]
        elif fault == 4:
            out[at:at] = rng.choice((b"\0" * length, b'"', b"{", b"]", b"\\", b"\n", b"\xff\xfe", b"\xef\xbb\xbf"))
        elif rng.random() < 0.2:
            del out[at:]
    return bytes(out)


def judged(row: Row, form: str = "") -> None:
    """The row becomes a sound record, or is refused in words that name it."""
    assert isinstance(row.values, dict) != bool(row.fault), row
    try:
        if row.values is not None:
            form = form or detect(row.values)
        record = to_record(row, form or "text", "set")
        assert isinstance(record, Record) and not faults(record, pictures=False), record
        assert record.id.encode() and record.language.encode()
    except ValueError as error:
        assert type(error) is ValueError and len(str(error)) > 10, row


quick = settings(max_examples=50, deadline=None, database=None, suppress_health_check=[*HealthCheck])  # pyright: ignore
seeds = st.integers(0, 2**32).map(random.Random)


def test_rows_of_every_form():
    thrown = 0

    @quick
    @given(seeds)
    def throw(rng):
        nonlocal thrown
        for form, some in SOUND.items():
            for values in some:
                for _ in range(5):
                    values = changed(values, rng)
                    row = Row("a:1", values if isinstance(values, dict) else {"text": values})
                    judged(row)
                    judged(row, form)
                    judged(row, rng.choice(list(FORMS)))
                    thrown += 3

    assert SOUND.keys() == FORMS.keys()
    throw()
    assert thrown >= 10_000, thrown


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_kind(tmp_path, name):
    thrown = 0
    stem, end = os.path.splitext(name)
    write = WRITERS["a.tar" if end == ".tgz" else stem if end in PACK else name]
    flat = [{"id": i, "text": f"قطة {i}", "image": "a\\n{["} for i in range(8)]
    if not name.endswith((".parquet", ".arrow", ".txt")) and ".txt" not in name:
        flat += json.loads(json.dumps([row for some in SOUND.values() for row in some], default=str))
    data = write(flat)
    path = str(tmp_path / name)

    @settings(quick, max_examples=25)
    @given(seeds)
    def throw(rng):
        nonlocal thrown
        if end in PACK and rng.random() < 0.5:
            torn = damaged(PACK[end](data), rng)
        else:
            torn = PACK.get(end, bytes)(damaged(data, rng))
        with open(path, "wb") as file:
            file.write(torn)
        for part in parts([path], 3) if rng.random() < 0.3 else [Part(path)]:
            for row in rows(part):
                judged(row)
                thrown += 1

    throw()
    assert thrown >= 25, thrown


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_pictures_of_every_kind(kind):
    data = picture(kind)
    assert open_picture(data, "x").size == (9, 7)

    @settings(quick, max_examples=20)
    @given(seeds)
    def throw(rng):
        for _ in range(10):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nor does a warning reach the user
                try:
                    assert open_picture(damaged(data, rng), "x").mode == "RGB"
                except ValueError as error:
                    assert type(error) is ValueError and str(error).startswith("x: ")

    throw()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)


@settings(quick, max_examples=100)
@given(st.dictionaries(st.sampled_from(KEYS), anything, max_size=5), st.sampled_from(list(FORMS)))
def test_rows_of_nothing_in_particular(values, form):
    judged(Row("a:1", values))
    judged(Row("a:1", values), form)
