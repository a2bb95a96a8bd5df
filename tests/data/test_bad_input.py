"""One source with every kind of bad row: each is counted and told with its reason, and the rest goes on."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ain_jax.data.builders.files import Sources, build, summary
from ain_jax.data.builders.records import Records
from ain_jax.data.formats import open_picture


def encoded(kind="PNG", size=(40, 30), **options) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


def head_of(width: int, height: int) -> bytes:
    """A PNG whose head tells this size, with the few bytes of a black picture of it: a bomb when large."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.new("P", (20, 20), colour) for colour in (1, 2, 3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


PICTURES = {
    "whole.png": encoded(),
    "wrong_extension.png": encoded("JPEG"),
    "animated.gif": animated(),
    "corrupt.jpg": encoded("JPEG")[:200] + bytes(400),
    "truncated.png": encoded()[:1500],
    "empty.png": b"",
    "wide.png": head_of(30_000, 1_000),
    "bomb.png": head_of(30_000, 30_000),
    "text.jpg": b"this is no picture",
}
REASONS = {
    "corrupt.jpg": "broken picture",
    "truncated.png": "broken picture",
    "empty.png": "picture of 0 bytes",
    "wide.png": "picture of 30000 x 1000 pixels",
    "bomb.png": "picture of far more than 40,000,000 pixels",
    "text.jpg": "are no picture",
}


def row(name, **more) -> bytes:
    turns = [{"role": "user", "content": "<image>?" if more else "?"}, {"role": "assistant", "content": "Yes."}]
    return json.dumps({"id": name, "messages": turns, **more}).encode()


def write(folder):
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    lines = [row(name, images=[name]) for name in PICTURES]
    lines += [row("utf8").replace(b"Yes.", b"\xff\xfe Yes."), row("once"), row("once"), row("text")]
    lines += [row("long").replace(b"Yes.", b"x" * 11_000_000)]
    (folder / "talks.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return len(lines)


def test_every_kind_of_bad_row(tmp_path):
    count = write(tmp_path)
    sources = Sources({"talks": str(tmp_path / "talks.jsonl")}, workers=1, bad_share=0.7)
    made = build("talks", sources, tmp_path / "data", progress=False)
    records = list(Records(made, "train"))
    kept = {record.id for record in records}
    assert kept == {"whole.png", "wrong_extension.png", "animated.gif", "once", "text"}
    sizes = {r.id: open_picture(r.images[0], "here").size for r in records if r.images}
    assert sizes == {"whole.png": (40, 30), "wrong_extension.png": (40, 30), "animated.gif": (20, 20)}
    (rejects,) = (tmp_path / "data").rglob("rejects.jsonl")
    told = {line["where"]: line["reason"] for line in map(json.loads, rejects.read_text("utf-8").splitlines())}
    numbers = {name: number for number, name in enumerate(PICTURES, start=1)}
    reasons = {numbers[name]: reason for name, reason in REASONS.items()}
    first = len(PICTURES) + 1
    reasons |= {first: "UTF-8", first + 2: "once", count: "11,000,001 characters of text; at most"}
    assert len(told) == len(reasons) == summary(made)["rejected"] == count - len(kept)
    for number, reason in reasons.items():
        assert reason in told[f"talks.jsonl:{number}"], told[f"talks.jsonl:{number}"]


def test_too_large_a_share_stops_the_build(tmp_path):
    """Nine rows of 14 are bad: with half of them allowed it stops, counts them, and says where they are told."""
    count = write(tmp_path)
    sources = Sources({"talks": str(tmp_path / "talks.jsonl")}, workers=1, bad_share=0.5)
    with pytest.raises(ValueError, match=rf"talks: {count} rows, 9 rejected .*; {count // 2} may be .*rejects\.jsonl"):
        build("talks", sources, tmp_path / "data", progress=False)
    (rejects,) = (tmp_path / "data").rglob("rejects.jsonl")
    assert len(rejects.read_text("utf-8").splitlines()) == 9
