"""A tiny random model of every family as an exported folder, and its logits, for `check_export.py` to compare.

    python tests/parity/write_families.py OUT

makes OUT/NAME, as `export_folder` writes it, and OUT/NAME.npz for each case of `tests/families.py`: the text, its ids
and, where the family sees, pictures in between, as arrays and as they are cut for the tower.
"""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

sys.path.insert(0, str(Path(__file__).parents[1]))
# Tiny models run for milliseconds and compile for seconds: code that is not optimised comes sooner.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import families
from write_reference import forward

from ain_jax.data.positions import feature_count
from ain_jax.generate import Prompt, prompt_with_images
from ain_jax.models.config import ClipConfig, ModelConfig
from ain_jax.weights.export import export_folder, write_json

LENGTH = 40  # words: more than any window, and than the positions of pretraining where these are scaled
# Width and height. No bar beside the picture has an odd number of pixels: LLaVA-NeXT's processor in transformers 4.51
# forgets one, see `ain_jax/data/tiles.py`.
PICTURES = ((48, 14), (20, 20))


def write_family(name: str, config: ModelConfig, out: Path) -> None:
    """The folder of one case, and its reference beside. A model whose logits are too small to compare is refused."""
    params = families.random_params(config)
    folder = write_folder(name, config, params, out)
    pictures = pictures_for(config)
    prompt = words_and(pictures, config)
    logits_LV = forward(params, config, prompt)
    assert logits_LV.std() >= 1, f"{name}: the logits have a standard deviation of {logits_LV.std():.2f}"
    given: dict[str, Any] = {f"image_{i}": np.asarray(image) for i, image in enumerate(pictures)}
    if prompt.patches_PK is not None:
        given["pixel_values"] = prompt.patches_PK
    if isinstance(config.vision, ClipConfig):
        given["tiles"] = np.array([tiles for tiles, *_ in prompt.grids])
    np.savez(
        folder.with_suffix(".npz"),
        case=name,
        text="".join(word(int(i)) for i in prompt.tokens_L),
        input_ids=prompt.tokens_L,
        logits=logits_LV,
        **given,
    )


def write_folder(name: str, config: ModelConfig, params: dict[str, Any], out: Path) -> Path:
    """The parameters as an exported folder, with a tokenizer of characters."""
    write_tokenizer(config.text.vocabulary, out / "tokenizer")
    folder = out / re.sub(r"\W+", "_", name)
    return export_folder(params, config, out / "tokenizer", families.picture_settings(config), folder)


def pictures_for(config: ModelConfig) -> list[Image.Image]:
    """Two of uneven size for a model that sees."""
    return [picture(*size) for size in PICTURES] if config.vision else []


def words_and(pictures: list[Image.Image], config: ModelConfig) -> Prompt:
    """Random words; with pictures, these in between, each placeholder as often as the picture has features."""
    words = np.random.default_rng(0).integers(2, 80, LENGTH).tolist()
    if not pictures:
        return Prompt(np.array(words, np.int32))
    settings = families.picture_settings(config)
    assert settings is not None
    cut = prompt_with_images([], pictures, settings)
    counts = [len(index_M) for index_M in cut.features] or [feature_count(grid, 2) for grid in cut.grids]
    ids = words[:3]
    for count in counts:
        image = [config.image_token_id] * count
        if config.vision_start_token_id is not None:
            image = [config.vision_start_token_id, *image, config.vision_end_token_id]
        ids += [*image, *words[3:9]]
    return dataclasses.replace(cut, tokens_L=np.array(ids, np.int32))


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A byte-level tokenizer without merges, one character an id: "#*" is 3, 10. Other ids have special tokens.

    It is built as Qwen2's is: transformers 5 takes that class for any text model of the family.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = [word(i) for i in range(vocabulary) if i not in CHARACTERS]
    tokenizer = Tokenizer(models.BPE({word(i): i for i in range(vocabulary)}, []))
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(others)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": word(0)})


CHARACTERS = range(1, 95)  # the printable ones of ASCII


def word(i: int) -> str:
    return chr(0x20 + i) if i in CHARACTERS else "<|endoftext|>" if i == 0 else f"<|{i}|>"


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python write_families.py OUT")
    for case, settings_of_case in families.every().items():
        write_family(case, settings_of_case, Path(sys.argv[1]))
