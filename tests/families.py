"""Tiny models of every published family, and weights for them: what parity, faults and exports are tested with.

Each case has a setting that the others lack.
"""

import dataclasses
import math
from collections import defaultdict
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from ain_jax.data.images import ImageSettings
from ain_jax.data.tiles import TileSettings
from ain_jax.models.config import ClipConfig, ModelConfig, RopeScaling, TextConfig, VisionConfig, tiny
from ain_jax.weights.table import published, rearrange, sizes, their_shape

IMAGE = 90  # the placeholder's id of a LLaVA-NeXT


def text(family: str, **settings) -> ModelConfig:
    """A decoder of three layers and 96 pieces."""
    layout = ("vocabulary", "width", "mlp_width", "layers", "heads", "kv_heads", "head_width")
    sizes: dict[str, Any] = dict(zip(layout, (96, 32, 80, 3, 4, 2, 8), strict=True))
    sizes |= {"qkv_bias": family == "qwen2", "rope_theta": 1000.0, "max_positions": 64}
    if family.startswith("gemma"):
        sizes |= {"norm_plus_one": True, "scale_embedding": True, "activation": "gelu_tanh", "tied": True}
    if family in ("gemma2", "gemma3_text"):
        sizes |= {"sandwich_norms": True}
    if family == "gemma3_text":
        sizes |= {"qk_norm": True}
    return ModelConfig(TextConfig(**(sizes | settings)), family=family, eos_token_id=1)


def qwen_2_5(**settings) -> ModelConfig:
    """A Qwen2.5-VL: windows of 4 x 4 patches of 4 pixels in two layers of four."""
    tower: dict[str, Any] = {"width": 24, "layers": 4, "heads": 2, "mlp_width": 60, "patch_size": 4}
    tower |= {"gated": True, "window": 16, "full_layers": (1, 3), "tokens_per_second": 2}
    return dataclasses.replace(tiny(tied=False), family="qwen2_5_vl", vision=VisionConfig(**(tower | settings)))


def llava(text_family: str, tied: bool = False, **clip) -> ModelConfig:
    """A LLaVA-NeXT: tiles of 16 pixels, 4 x 4 patches; grids of one to four tiles."""
    decoder = TextConfig(
        *(96, 32, 80, 2, 4, 2, 8),
        rope_theta=1000.0,
        qkv_bias=text_family == "qwen2",
        tied=tied,
        max_positions=256,
        windows=(12,) if text_family == "mistral" else (0,),
    )
    tower: dict[str, Any] = {"width": 24, "layers": 3, "heads": 2, "mlp_width": 48, "tile": 16, "patch_size": 4}
    tower |= {"pinpoints": ((16, 32), (32, 16), (32, 32), (48, 16), (16, 48))}
    return ModelConfig(decoder, ClipConfig(**(tower | clip)), "llava_next", text_family, image_token_id=IMAGE)


LLAMA3 = RopeScaling("llama3", factor=4.0, original_positions=16, low=1.0, high=4.0)
YARN = RopeScaling("yarn", factor=4.0, original_positions=16, low=1.0, high=32.0)
TEXTS = {
    "llama": text("llama"),
    "llama, heads wider than the width": text("llama", head_width=16, kv_heads=4, tied=True),
    "llama, biases": text("llama", qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama, linear": text("llama", rope_scaling=RopeScaling("linear", factor=4.0)),
    "llama, dynamic": text(
        "llama", max_positions=16, rope_scaling=RopeScaling("dynamic", factor=4.0, original_positions=16)
    ),
    "llama 3.1": text("llama", rope_scaling=LLAMA3),
    "llama, yarn": text("llama", rope_scaling=YARN),
    "llama, yarn of mscales": text(
        # A ramp over several pairs, so that its ends, whole or not, are felt.
        "llama",
        rope_scaling=dataclasses.replace(YARN, mscale=1.2, mscale_all_dim=0.6, low=0.1, high=1.0, truncate=False),
    ),
    "mistral": text("mistral"),
    "mistral, windows": text("mistral", windows=(8,)),
    "qwen2": text("qwen2", kv_heads=1, norm_eps=1e-5),
    "qwen2, yarn": text("qwen2", rope_scaling=dataclasses.replace(YARN, attention_factor=1.5)),
    "qwen2, windows after a layer": text("qwen2", windows=(0, 8, 8)),
    "gemma": text("gemma", head_width=16, kv_heads=1),
    "gemma 2": text("gemma2", windows=(8, 0), query_scale=24, attention_softcap=5.0, logit_softcap=8.0, layers=4),
    "gemma 3": text("gemma3_text", windows=(8, 8, 0), window_theta=50.0, query_scale=24, layers=6),
    "gemma 3, a turn cut short": text("gemma3_text", windows=(8, 8, 0), window_theta=50.0, layers=8),
    "gemma 3, scaled": text(
        "gemma3_text", windows=(8, 8, 0), window_theta=50.0, rope_scaling=RopeScaling("linear", factor=8.0)
    ),
}
QWENS = {
    "tied": tiny(tied=True),
    "untied": tiny(tied=False, norm_eps=1e-5),
    "one key head": tiny(tied=True, kv_heads=1, rope_theta=1e6),
    "no groups": tiny(tied=False, kv_heads=4, mrope_section=(1, 2, 1)),
    "qwen 2.5": qwen_2_5(),
    "qwen 2.5, full layers last": qwen_2_5(full_layers=(2, 3), window=24),
}
LLAVAS = {
    "qwen2": llava("qwen2"),
    "llama": llava("llama", feature_layer=-1),
    "mistral": llava("mistral", activation="gelu", norm_eps=1e-4),
    "tied": llava("qwen2", tied=True, feature_layer=-3),
}


def every() -> dict[str, ModelConfig]:
    """All cases under names of their own: "gemma 2", "qwen2_vl, tied", "llava_next, llama" ..."""
    qwens = {name if "2.5" in name else f"qwen2_vl, {name}": config for name, config in QWENS.items()}
    return TEXTS | qwens | {f"llava_next, {name}": config for name, config in LLAVAS.items()}


def picture_settings(config: ModelConfig) -> ImageSettings | TileSettings | None:
    """How pictures are cut for a tower of these."""
    if isinstance(config.vision, ClipConfig):
        vision = config.vision
        return TileSettings(tile=vision.tile, patch_size=vision.patch_size, pinpoints=vision.pinpoints)
    return ImageSettings(patch_size=4, min_pixels=64, max_pixels=1024) if config.vision else None


def felt(name: str, normal: Any, plus_one: bool) -> Any:
    """Normal values, brought to a size at which logits have a standard deviation of 1 or more and all are felt.

    `name` is the published one, and so is the layout of the values, an array of numpy or torch.
    """
    if name.endswith("bias"):
        return 0.3 * normal
    if name.endswith(("class_embedding", "image_newline")):
        return normal
    if normal.ndim == 1:  # a norm
        return (not plus_one) + 0.2 * normal
    if any(table in name for table in ("embed_tokens", "lm_head", "position_embedding")):
        return 0.3 * normal
    return normal / math.prod(normal.shape[1:]) ** 0.5


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Weights for the config in float32, as `felt` has them."""
    rng, letters = np.random.default_rng(seed), sizes(config)
    arrays = defaultdict(list)
    stacks = {}
    for place in published(config):
        normal = rng.standard_normal(their_shape(place.layout, letters), np.float32)
        theirs = felt(place.name, normal, config.text.norm_plus_one)
        arrays[place.path].append(rearrange(theirs, place.layout, letters))
        stacks[place.path] = place.layers
    whole = {path: np.stack(layers) if stacks[path] else layers[0] for path, layers in arrays.items()}
    return unflatten_dict(whole, sep="/")
