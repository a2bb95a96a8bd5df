"""A published language model and a published CLIP, joined as a LLaVA-NeXT (LLaVA-1.5, arXiv 2310.03744, section 3).

Pangea (arXiv 2410.16153, section 4) is made so of Qwen2-7B-Instruct and CLIP ViT-L/14 of 336 pixels. Between the two
stands a projector, and behind each line of a picture a learnt vector: neither is published, both begin at random.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ain_jax.data.images import CLIP_MEAN, CLIP_STD
from ain_jax.data.tiles import TileSettings
from ain_jax.models import hf_families
from ain_jax.models.config import ClipConfig, ModelConfig, from_hf, to_hf
from ain_jax.models.multimodal import init_params
from ain_jax.tokenizer.chat_render import IMAGE
from ain_jax.weights.load import load_params
from ain_jax.weights.shards import read_json

TOWER = "vision_tower"
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # tiles; LLaVA-NeXT's own, of 336 pixels
# What transformers takes for a size that a CLIP's config.json leaves out; inside a LLaVA-NeXT's it takes others.
ALONE = dict(zip(hf_families.CLIP, (768, 12, 12, 3072, 224, 32, 3, 1e-5, "quick_gelu"), strict=True))
COLOURS = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
# What a CLIP has beside its image encoder: the encoder of texts, and numbers that older files hold.
BESIDE = ("text_model.", "text_projection", "visual_projection", "logit_scale", "vision_model.embeddings.position_ids")


def joined_config(text: ModelConfig, vision_folder: Path, tokenizer: Any, rows: int) -> ModelConfig:
    """A LLaVA-NeXT of a decoder and of the CLIP in a folder, with so many rows in its tables.

    ValueError where the decoder is of no family that a LLaVA-NeXT can have, where the folder holds no CLIP, or where
    the tokenizer has no token for pictures.
    """
    if text.family not in hf_families.LLAVA_TEXTS:
        known = ", ".join(hf_families.LLAVA_TEXTS)
        raise ValueError(f"Model.vision_folder beside a {text.family}: expected a language model, one of {known}")
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    if image is None or image == tokenizer.unk_token_id:
        raise ValueError(
            f"Model.vision_folder joins two models by the token {IMAGE}, and the tokenizer has none: name a chat "
            'template that brings it, Chat.template = "llava_chatml" or "llava"'
        )
    tower = _clip_attributes(vision_folder)
    return from_hf(
        {
            "model_type": hf_families.LLAVA_NEXT,
            "text_config": to_hf(text) | {"vocab_size": rows},
            "vision_config": {"model_type": "clip_vision_model"} | tower,
            "image_token_id": image,
            "image_grid_pinpoints": [[side * tower["image_size"] for side in grid] for grid in GRIDS],
            "tie_word_embeddings": text.text.tied,
        }
    )


def _clip_attributes(folder: Path) -> dict[str, Any]:
    """The sizes of a CLIP's image encoder, as its `config.json` names them."""
    attributes = read_json(folder / "config.json")
    inner = attributes.get("vision_config") or {} if attributes.get("model_type") == "clip" else attributes
    if inner.get("model_type", "clip_vision_model") != "clip_vision_model" or "model_type" not in attributes:
        raise ValueError(
            f"{folder / 'config.json'} has model_type={attributes.get('model_type')!r}, expected a CLIP: 'clip' or "
            "'clip_vision_model'"
        )
    return ALONE | {name: value for name, value in inner.items() if name in ALONE}


def joined_tiles(vision_folder: Path, config: ModelConfig) -> TileSettings:
    """How pictures are cut for it: in the tower's tiles, with the colours of the CLIP's own processor."""
    assert isinstance(config.vision, ClipConfig), "a joined model sees by a CLIP"
    path, vision = vision_folder / "preprocessor_config.json", config.vision
    processor = read_json(path) if path.is_file() else {}
    mean, std = (tuple(processor.get(name, usual)) for name, usual in COLOURS.items())
    return TileSettings(vision.tile, vision.patch_size, vision.pinpoints, mean, std)


def visual_params(
    vision_folder: Path, config: ModelConfig, key: Any, layout: Any, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """The CLIP's weights, with a projector and an end of lines that are drawn; laid out as `layout` says."""
    drawn = init_params(config, key, layout, part="visual")["visual"]
    dtype = jnp.dtype(layout["visual"]["image_newline"].dtype)
    read = load_params(vision_folder, config, dtype, mesh, part=f"visual/{TOWER}", beside=BESIDE)
    return drawn | {TOWER: read["visual"][TOWER]}
