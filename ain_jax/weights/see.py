"""A published Llama or Qwen2 that has learnt nothing but text -> the folder of a Qwen2-VL whose encoder is drawn.

    python -m ain_jax.weights.see --folder models/SmolLM2-135M-Instruct --out models/SmolLM2-135M-Seeing

On text the two are one function: a Llama is a Qwen2 whose query, key and value biases are 0, and M-RoPE turns text,
whose three positions are one, as plain rotary positions do. The folder opens in transformers as
Qwen2VLForConditionalGeneration, and a run takes it as any published one: while nothing but text is learnt its encoder
is frozen, `Optimizer.rates = {"visual": 0.0}`. The encoder is Qwen2-VL's (arXiv 2409.12191, section 2.1), at random.
"""

import argparse
import dataclasses
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ain_jax.data.images import ImageSettings
from ain_jax.models.config import ModelConfig, VisionConfig
from ain_jax.models.multimodal import init_params
from ain_jax.tokenizer.chat import load_tokenizer
from ain_jax.tokenizer.with_template import Templated, with_template
from ain_jax.weights import embeddings
from ain_jax.weights.export import card, export_folder
from ain_jax.weights.load import load_config, load_params

TEXTS = ("llama", "qwen2")
TEMPLATE = "qwen2_vl"
TOKENS = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
BIASED = ("q_proj", "k_proj", "v_proj")


def seeing_config(text: ModelConfig, vision: VisionConfig, tokens: Templated, ids: dict[str, int]) -> ModelConfig:
    """The Qwen2-VL of a decoder and of an encoder's sizes; a ValueError tells what of the decoder a Qwen2-VL has not.

    `ids` are those of the tokens for pictures and videos.
    """
    told, half = text.text, text.text.head_width // 2
    faults = []
    if text.family not in TEXTS:
        faults.append(f"a {text.family}; expected one of {', '.join(TEXTS)}")
    if told.head_width * told.heads != told.width:
        faults.append(f"heads of width {told.head_width} x {told.heads}, not its width of {told.width}")
    if any(told.windows):
        faults.append(f"windows of {told.windows} positions")
    faults += [f"{name}" for name in ("o_bias", "mlp_bias", "rope_scaling") if getattr(told, name)]
    if faults:
        raise ValueError(f"a Qwen2-VL cannot have the decoder's {'; '.join(faults)}")
    quarter = half // 4
    grown = dataclasses.replace(
        told, vocabulary=tokens.rows, qkv_bias=True, mrope_section=(half - 2 * quarter, quarter, quarter)
    )
    named = {f"{name}_token_id": index for name, index in ids.items()}
    return dataclasses.replace(
        text, text=grown, vision=vision, family="qwen2_vl", eos_token_id=tokens.stop_token_ids, **named
    )


def with_biases(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The decoder's parameters with biases of 0 where a Qwen2 has some."""
    heads = {"q_proj": config.text.heads, "k_proj": config.text.kv_heads, "v_proj": config.text.kv_heads}
    model = dict(params["model"])
    for stack, _, layers in config.text.stacks():
        attention = dict(model[stack]["self_attn"])
        for name in BIASED:
            if "bias" not in attention[name]:
                kernel = next(iter(attention[name].values()))
                shape = (layers, heads[name], config.text.head_width)
                attention[name] = {**attention[name], "bias": jnp.zeros(shape, kernel.dtype)}
        model[stack] = {**model[stack], "self_attn": attention}
    return {**params, "model": model}


def see(
    folder: Path, out: Path, vision: VisionConfig, images: ImageSettings, seed: int = 0, multiple: int = 64
) -> Path:
    """Writes the folder in one piece, float32."""
    config = load_config(folder)
    if out.exists():
        raise ValueError(f"{out} already exists and is not overwritten; remove it or give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        tokens = with_template(folder, TEMPLATE, Path(scratch) / "tokenizer", config.text.vocabulary, multiple)
        tokenizer = load_tokenizer(tokens.folder)
        ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in TOKENS.items()}
        whole = seeing_config(config, vision, tokens, ids)
        params = load_params(folder, config, jnp.float32)
        new = tokens.special_tokens
        if new:  # rows of the mean of all others, as for any new token without pieces
            first = min(new.values())
            made = embeddings.make_rows(params, config, first, [()] * len(new), embeddings.Embeddings())
            params = embeddings.grow_tables(params, made, first, tokens.rows)
        params = with_biases(params, whole)
        key = jax.random.key(zlib.crc32(f"{seed}/visual".encode()))
        params["visual"] = init_params(whole, key, part="visual")["visual"]
        params = jax.tree.map(np.asarray, params)
        text = card(
            f"{folder.name}, with an image encoder that has learnt nothing yet", base=folder.name, pictures=True
        )
        return export_folder(params, whole, tokens.folder, images, out, model_card=text)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ain_jax.weights.see",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="the language model's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=384, help="of the image encoder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--max_pixels", type=int, default=784 * 56, help="of a picture; larger ones are shrunk")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    vision = VisionConfig(given.width, given.layers, given.heads, 4 * given.width)
    images = ImageSettings(min_pixels=784, max_pixels=given.max_pixels, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    try:
        print(see(given.folder, given.out, vision, images, given.seed))
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
