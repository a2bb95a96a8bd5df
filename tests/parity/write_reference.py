"""What ain_jax makes of a picture-and-text conversation, for `check_export.py` to compare.

python tests/parity/write_reference.py FOLDER REFERENCE.npz
"""

import json
import sys
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ain_jax.data.images import image_settings, preprocess
from ain_jax.data.positions import feature_count
from ain_jax.generate import Prompt, rows_of
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.tokenizer.chat import encode_prompt, load_tokenizer
from ain_jax.weights.load import load_folder
from ain_jax.weights.shards import read_json

TEXTS = ("ما المكتوب في هذه الصورة؟", "And in this one? Answer in English, please.")


def write_reference(folder: Path, reference: Path) -> None:
    """Two pictures of uneven size, Arabic and English, an answer in between."""
    params, config = load_folder(folder, np.float32)
    settings = image_settings(read_json(folder / "preprocessor_config.json"))
    images = [_picture(61, 40), _picture(33, 95)]
    cut = [preprocess(Image.fromarray(image), settings) for image in images]
    grids = tuple(grid for _, grid in cut)
    counts = [feature_count(grid, settings.merge_size) for grid in grids]
    turns = [("user", "<image>" + TEXTS[0]), ("assistant", "سلام"), ("user", "<image>" + TEXTS[1])]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = encode_prompt(load_tokenizer(folder), messages, counts)
    patches = np.concatenate([patches for patches, _ in cut])
    logits = forward(params, config, Prompt(ids, patches, grids))
    theirs = [{"role": role, "content": _parts(content)} for role, content in turns]
    np.savez(
        reference,
        messages=json.dumps(theirs),
        input_ids=ids,
        pixel_values=patches,
        grids=np.array(grids),
        logits=logits,
        **{f"image_{i}": image for i, image in enumerate(images)},
    )


def forward(params, config, prompt: Prompt, dtype=jnp.float32) -> np.ndarray:
    """logits_LV of one prompt, alone in its row."""
    patches = 0 if prompt.patches_PK is None else len(prompt.patches_PK)
    arrays = rows_of([prompt], config, 1, len(prompt.tokens_L), patches)
    for name in ("length_B", "next_position_B"):
        arrays.pop(name)
    return np.asarray(_compiled(config, dtype)(params, arrays))[0]


@lru_cache
def _compiled(config, dtype):
    model = MultimodalModel(config, dtype)

    def logits(params, arrays):
        return model.apply({"params": params}, model.apply({"params": params}, **arrays), method="logits")

    return jax.jit(logits)


def _picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _parts(content: str) -> list[dict[str, str]]:
    image = [{"type": "image"}] if content.startswith("<image>") else []
    return [*image, {"type": "text", "text": content.removeprefix("<image>")}]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python write_reference.py FOLDER REFERENCE.npz")
    write_reference(Path(sys.argv[1]), Path(sys.argv[2]))
