"""Files of videos become frames at even times, and broken ones are refused."""

import importlib
import importlib.util
import io
import json
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ain_jax.data import forms_video, images, visuals
from ain_jax.data.builders.files import Sources, build, summary
from ain_jax.data.builders.records import Records
from ain_jax.data.forms_video import Sampling, frames

needs_av = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="PyAV is not installed: pip install ain_jax[video]"
)
KINDS = [("mp4", "mpeg4"), ("webm", "libvpx"), ("webm", "libvpx-vp9"), ("mkv", "libx264"), ("avi", "mpeg4")]
STEP = 4  # how much brighter each frame is than the one before


def film(kind="mp4", codec="mpeg4", count=40, rate=10, size=(64, 48)) -> bytes:
    """Grey frames, each brighter by STEP, so that a frame's brightness tells its number."""
    av: Any = importlib.import_module("av")
    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(kind, kind)) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(count):
            values = np.full((size[1], size[0], 3), 40 + STEP * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, "rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def numbers(pictures) -> list[int]:
    """Which frames these are, told from how bright they are."""
    means = [np.asarray(Image.open(io.BytesIO(data)).convert("L"), float).mean() for data in pictures]
    return [round((mean - 40) / STEP) for mean in means]


@needs_av
@pytest.mark.parametrize(("kind", "codec"), KINDS)
def test_frames_at_even_times(tmp_path, kind, codec):
    av: Any = importlib.import_module("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    data = film(kind, codec)
    (tmp_path / f"a.{kind}").write_bytes(data)
    expected = list(range(0, 40, 5))  # ten frames a second for four seconds, two of them a second
    assert numbers(frames(data, "x", Sampling())) == expected
    assert frames(str(tmp_path / f"a.{kind}"), "x", Sampling()) == frames(data, "x", Sampling())
    assert numbers(frames(data, "x", Sampling(max_frames=4))) == [0, 10, 20, 30]
    assert numbers(frames(data, "x", Sampling(fps=100))) == list(range(40))  # there are no more
    assert len(frames(data, "x", Sampling(fps=0.01))) == 1


def test_uneven_times():
    """Half a second, then nothing new for two seconds: what is shown at a time is the last frame before it."""
    times_F = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 2.4])
    assert forms_video._wanted(times_F, Sampling(fps=1)) == [0, 4]  # at 0, 0.96 and 1.92 s
    assert forms_video._wanted(np.zeros(1), Sampling()) == [0]
    with pytest.raises(ValueError, match=r"fps = 0 and max_frames = 0: expected frames a second above 0"):
        Sampling(0, 0)


@needs_av
def test_broken_files(tmp_path):
    whole = film()
    for data, message in (
        (b"", "x: video of 0 bytes"),
        (b"\0" * 1000, "x: broken video"),
        (whole[: len(whole) // 2], "x: broken video"),  # the table of contents of an MP4 stands at its end
        (b"not a film at all" * 50, "x: broken video"),
    ):
        with pytest.raises(ValueError, match=message):
            frames(data, "x", Sampling())
    with pytest.raises(ValueError, match="x: no such file"):
        frames(str(tmp_path / "none.mp4"), "x", Sampling())


@needs_av
def test_a_source_with_films(tmp_path):
    """From rows that name files to grids and patches; those at fault are rejected with their reasons."""
    (tmp_path / "whole.mp4").write_bytes(film())
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.webm").write_bytes(b"\x1aE\xdf\xa3 cut off")
    rows = [
        {"id": name, "video": name, "conversations": [{"from": "human", "value": "<video>\nWhat?"},
                                                      {"from": "gpt", "value": "Grey."}]}
        for name in ("whole.mp4", "empty.mp4", "cut.webm", "none.mp4")
    ]  # fmt: skip
    (tmp_path / "films.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = Sources({"films": str(tmp_path / "films.jsonl")}, workers=1, bad_share=0.75, fps=1.0, max_frames=3)
    made = build("films", sources, tmp_path / "data", progress=False)
    (record,) = Records(made, "train")
    assert numbers(record.videos[0]) == [0, 13, 26]
    told = [json.loads(line) for line in (tmp_path / "data").rglob("rejects.jsonl").__next__().open()]
    assert [line["reason"].split(": ")[1].split(" (")[0] for line in told] == [
        "video of 0 bytes; expected an encoded file such as MP4 or WebM",
        "broken video",
        f"no such file in {tmp_path}",
    ]
    assert summary(made)["rejected"] == 3
    settings = images.ImageSettings(min_pixels=28 * 28, max_pixels=56 * 56)
    (grid,), (count,) = visuals.measured(record, settings)
    assert grid == (2, 4, 4) and count == 8  # three frames in groups of two, the last repeated
    assert len(visuals.laid(record, np.array([grid]), settings)["patches_PK"]) == 32


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x: files of videos are decoded by PyAV: pip install ain_jax\[video\]"):
        frames(str(tmp_path / "a.mp4"), "x", Sampling())
