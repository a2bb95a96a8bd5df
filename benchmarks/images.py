"""Milliseconds to prepare a picture: ours beside transformers' processors, both resizing with Pillow.

    python benchmarks/images.py [--rounds 9]

Every round prepares the picture once with either side, in turn. Decoded pictures are handed over, as a data loader has
them; the JPEG is decoded by both. Both sides run in one thread, and its own processor time is counted, because that
stays true beside other work. That the values are equal is the affair of tests/parity/test_image_processor.py.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor, __version__

from ain_jax.data import images, tiles

SIZES = ((64, 64), (320, 240), (1280, 853), (1240, 1754), (5000, 3000))


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Slow changes of colour with grain on them."""
    rng = np.random.default_rng(width)
    rows, columns = np.linspace(0, 9, height)[:, None, None], np.linspace(0, 9, width)[None, :, None]
    slow = 128 + 110 * np.sin(rows + columns + np.arange(4))
    return Image.fromarray((slow + rng.normal(0, 12, slow.shape)).clip(0, 255).astype(np.uint8), "RGBA").convert(mode)


def pictures() -> dict[str, Image.Image | bytes]:
    """Several sizes; a transparent, a grey and an encoded one."""
    result: dict[str, Image.Image | bytes] = {
        f"{width} x {height}": photograph(width, height) for width, height in SIZES
    }
    for mode in ("RGBA", "L"):
        result[f"{mode} 1280 x 853"] = photograph(1280, 853, mode)
    file = io.BytesIO()
    photograph(1280, 853).save(file, "JPEG", quality=90)
    return {**result, "JPEG 1280 x 853": file.getvalue()}


def opened(picture: Image.Image | bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture


def processor(config: dict):
    """transformers' processor that resizes with Pillow."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config))
        pillow = {"use_fast": False} if __version__.startswith("4.") else {"backend": "pil"}
        return AutoImageProcessor.from_pretrained(folder, **pillow)


def sides() -> dict[str, tuple]:
    """For each family, ours, theirs, and where either keeps its values."""
    qwen, llava = images.ImageSettings(), tiles.TileSettings()
    qwen_processor = processor(images.preprocessor_config(qwen))
    llava_processor = processor(tiles.preprocessor_config(llava))

    def frames(picture):
        return images.preprocess_frames([picture] * 4, qwen)[0]

    def their_frames(picture):  # their videos need torchvision: the same work, picture by picture
        return qwen_processor([opened(picture)] * 4, temporal_patch_size=1, return_tensors="np")["pixel_values"]

    return {
        "Qwen2-VL": (
            lambda picture: images.preprocess(picture, qwen)[0],
            lambda picture: qwen_processor(opened(picture), return_tensors="np")["pixel_values"],
        ),
        "Qwen2-VL, 4 frames": (frames, their_frames),
        "LLaVA-NeXT": (
            lambda picture: tiles.preprocess_tiles(picture, llava)[0],
            lambda picture: llava_processor(opened(picture), return_tensors="np")["pixel_values"],
        ),
    }


def milliseconds(prepare, picture) -> float:
    start = time.process_time()
    prepare(picture)
    return 1e3 * (time.process_time() - start)


def main(rounds: int) -> None:
    table = Table("processor", "picture", title=f"milliseconds, medians of {rounds}; transformers {__version__}")
    for column in ("theirs", "ours", "theirs / ours"):
        table.add_column(column, justify="right")
    examples = pictures()
    for family, (ours, theirs) in sides().items():
        for name, picture in examples.items():
            mine, other = ours(picture).size, theirs(picture).size  # the first, slower call is not counted
            if mine != other:
                raise SystemExit(f"{family}, {name}: {mine} values are ours and {other} theirs; expected equal work")
            spent = [(milliseconds(theirs, picture), milliseconds(ours, picture)) for _ in range(rounds)]
            other, mine = (statistics.median(column) for column in zip(*spent, strict=True))
            table.add_row(family, name, f"{other:.1f}", f"{mine:.1f}", f"{other / mine:.2f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    main(parser.parse_args().rounds)
