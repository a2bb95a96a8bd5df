"""Questions to a model's folder: a picture gets the answer in a folder that it gets alone; a broken one is told."""

import dataclasses
import json
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ain_jax import ask
from ain_jax.ask import Answering
from ain_jax.data.images import ImageSettings
from ain_jax.generate import main
from ain_jax.models.config import VisionConfig
from ain_jax.twins.models import write_models
from ain_jax.weights.see import see


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("models")
    images = ImageSettings(min_pixels=784, max_pixels=50176)
    return see(write_models(out, ["qwen2_twin"])[0], out / "seeing", VisionConfig(32, 2, 2, 64), images)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of uneven size, one of them in a folder below, a broken one, and what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for number, name in enumerate(("b.png", "d.JPG", "more/a.png")):
        noise = np.random.default_rng(number).integers(0, 256, (30 + 40 * number, 60, 3), np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:40])
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_gives_each_picture_the_answer_it_gets_alone(model, pictures, capsys):
    asked = ["--model", str(model), "--max_new_tokens", "6", "read"]
    with pytest.raises(SystemExit) as stopped:
        main([*asked, "--folder", str(pictures), "--rows", "2"])
    written = capsys.readouterr()
    lines = [json.loads(line) for line in written.out.splitlines()]
    names = ["b.png", "c.png", "d.JPG", "more/a.png"]
    assert [line["image"] for line in lines] == [str(pictures / name) for name in names]
    assert stopped.value.code == 1 and "1 of what looked like pictures could not be read" in written.err
    assert lines[1].keys() == {"image", "fault"} and "c.png" in lines[1]["fault"]
    alone = []
    for line in (lines[0], *lines[2:]):
        main([*asked, "--image", line["image"]])
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    assert alone == [line["text"] for line in (lines[0], *lines[2:])] and all(alone)
    assert len(set(alone)) > 1  # the pictures are seen


def test_what_is_drawn_differs_from_call_to_call(model):
    drawing = Answering.load(model, max_new_tokens=8, sampling={"temperature": 2.0, "seed": 3})
    prompt = drawing.prompt("w")
    first, again, later = (drawing.answers([prompt], rows=1, before=n) for n in (0, 0, 1))
    assert first == again != later


def test_wrong_calls_are_told(model, pictures, tmp_path, capsys):
    for arguments, words in (
        (["--folder", str(tmp_path)], "holds no picture; expected files that end in .png"),
        (["--rows", "4"], "--rows 4: expected 1 or more, and --folder beside it"),
        (["--folder", str(pictures), "--rows", "0"], "--rows 0: expected 1 or more"),
        (["--folder", str(pictures), "--image", "a.png"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["--model", str(model), "read", *arguments])
        assert stopped.value.code == 2 and words in capsys.readouterr().err, arguments
    (plain,) = (path for path in model.parent.iterdir() if path.name.startswith("qwen2"))
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(plain), "read", "--folder", str(pictures)])
    assert stopped.value.code == 2 and "is a qwen2 without an image encoder" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "read", "activations"), [(None, None, "float32"), ("bfloat16",) * 3])
def test_parameters_stay_as_the_files_have_them_unless_asked_otherwise(model, monkeypatch, asked, read, activations):
    given, load = [], ask.load_folder
    monkeypatch.setattr(ask, "load_folder", lambda folder, dtype: given.append(dtype) or load(folder, dtype))
    found = Answering.load(model, asked)
    assert given == [read] and jnp.dtype(found.dtype) == activations


def test_a_picture_that_cannot_be_read_is_named(model, tmp_path, capsys):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    (tmp_path / "vast.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    Image.fromarray(np.full((30, 30), 40_000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "deep.png").read_bytes()[:60])
    for name, words in (("vast.png", "far more than"), ("deep.png", "16"), ("cut.png", "picture")):
        with pytest.raises(SystemExit) as stopped:
            main(["--model", str(model), "read", "--image", str(tmp_path / name)])
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and str(tmp_path / name) in told and words in told, told


def test_a_prompt_that_is_too_long_is_its_picture_s_fault_alone(model, pictures):
    answering = Answering.load(model, max_new_tokens=4)
    lengths = [len(answering.prompt("read", [(pictures / n).read_bytes()]).tokens_L) for n in ("b.png", "d.JPG")]
    assert lengths[0] < lengths[1]
    text = dataclasses.replace(answering.config.text, max_positions=lengths[0] + 4)
    answering = dataclasses.replace(answering, config=dataclasses.replace(answering.config, text=text))
    lines = {line["image"]: line for line in answering.of_folder("read", pictures)}
    assert "text" in lines[str(pictures / "b.png")]
    fault = lines[str(pictures / "d.JPG")]["fault"]
    assert "d.JPG" in fault and f"of {lengths[1]} tokens and 4 new ones exceed" in fault


def test_a_special_token_may_be_a_stop_string(model):
    answering = Answering.load(model, stop=("<|vision_end|>", "and"))
    (end,) = answering.tokenizer("<|vision_end|>")["input_ids"]
    assert answering.stop_ids == (*answering.config.stop_ids, end) and end not in answering.config.stop_ids
