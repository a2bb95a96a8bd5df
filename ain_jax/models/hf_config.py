"""`config.json` of Qwen2-VL to our settings and back, from one list of attribute names read in both directions."""

import difflib
from typing import Any

# published attribute, our field
TEXT = (
    ("vocab_size", "vocabulary"),
    ("hidden_size", "width"),
    ("intermediate_size", "mlp_width"),
    ("num_hidden_layers", "layers"),
    ("num_attention_heads", "heads"),
    ("num_key_value_heads", "kv_heads"),
    ("rms_norm_eps", "norm_eps"),
    ("max_position_embeddings", "max_positions"),
    ("tie_word_embeddings", "tied"),
)
VISION = (
    ("embed_dim", "width"),
    ("depth", "layers"),
    ("num_heads", "heads"),
    ("patch_size", "patch_size"),
    ("temporal_patch_size", "temporal_patch_size"),
    ("spatial_merge_size", "merge_size"),
    ("in_channels", "channels"),
)
IDS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# What the published code assumes where config.json is silent.
TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
VISION_DEFAULTS = {
    "embed_dim": 1280,
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
    "mlp_ratio": 4,
}
ROPE_THETA = 1_000_000.0
MROPE_SECTION = (16, 24, 24)
# Attributes that would change the model: we do one value of each.
ONLY = {
    "model_type": ("qwen2_vl", "qwen2_vl_text"),
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, 0, None),
    "use_sliding_window": (False, None),
}
ONLY_VISION = {
    "model_type": ("qwen2_vl", "qwen2_vl_vision"),
    "hidden_act": ("quick_gelu",),
    "rope_parameters": ({"rope_type": "axial", "rope_theta": 10000.0}, None),
}
# Attributes that change no number of the forward pass (a sliding window counts only with use_sliding_window).
SILENT = {
    *("architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range"),
    *("_name_or_path", "_attn_implementation_autoset", "output_hidden_states", "output_attentions", "return_dict"),
    *("sliding_window", "max_window_layers", "layer_types", "vision_token_id"),
    *("vision_config", "text_config", "rope_theta", "rope_scaling", "rope_parameters"),  # read apart
}
SILENT_VISION = {
    *("hidden_size", "mlp_ratio", "in_chans"),  # read apart
    *("initializer_range", "spatial_patch_size", "torch_dtype", "dtype"),
}


def read(attributes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(text, vision, ids): keyword arguments of our configs, from the flat layout or that of transformers 5."""
    flat = attributes | (attributes.get("text_config") or {})
    # In the nested layout the outer value counts for the head; the inner one is a default that says nothing.
    flat["tie_word_embeddings"] = any(
        (a or {}).get("tie_word_embeddings", False) for a in (attributes, attributes.get("text_config"))
    )
    vision = dict(attributes.get("vision_config") or {})
    vision.setdefault("in_channels", vision.get("in_chans", 3))
    faults = _faults(flat, ONLY, {name for name, _ in TEXT} | set(IDS) | SILENT, "")
    faults += _faults(vision, ONLY_VISION, {name for name, _ in VISION} | SILENT_VISION, "vision_config.")

    text = {ours: (TEXT_DEFAULTS | flat)[theirs] for theirs, ours in TEXT}
    head_width, remainder = divmod(text["width"], text["heads"])
    if remainder:
        faults.append(f"hidden_size={text['width']} is no multiple of num_attention_heads={text['heads']}")
    theta, section, rope_faults = _rope(flat)
    text |= {"head_width": head_width, "rope_theta": theta, "mrope_section": section, "qkv_bias": True}
    if vision.get("hidden_size", text["width"]) != text["width"]:
        faults.append(f"vision_config.hidden_size={vision['hidden_size']}, expected hidden_size={text['width']}")
    faults += rope_faults
    if faults:
        raise ValueError("config.json describes a model that ain_jax does not build: " + "; ".join(faults))

    vision = VISION_DEFAULTS | vision
    towers = {ours: vision[theirs] for theirs, ours in VISION}
    towers["mlp_width"] = int(towers["width"] * vision["mlp_ratio"])
    return text, towers, {name: flat[name] for name in IDS if name in flat}


def _rope(flat: dict[str, Any]) -> tuple[float, tuple[int, ...], list[str]]:
    """theta and sections from either spelling: rope_theta with rope_scaling, or rope_parameters."""
    rope = flat.get("rope_scaling") or flat.get("rope_parameters") or {}
    theta = flat.get("rope_theta", (flat.get("rope_parameters") or {}).get("rope_theta", ROPE_THETA))
    theta = rope.get("rope_theta", theta)
    kinds = {rope[key] for key in ("type", "rope_type") if key in rope}
    faults = [
        f"rotary positions of type {kind!r}; expected 'mrope' or 'default'" for kind in kinds - {"mrope", "default"}
    ]
    unknown = rope.keys() - {"type", "rope_type", "mrope_section", "rope_theta"}
    faults += [f"rope setting {key}={rope[key]!r} is not handled" for key in sorted(unknown)]
    return float(theta), tuple(rope.get("mrope_section", MROPE_SECTION)), faults


def _faults(given: dict[str, Any], only: dict[str, tuple], known: set[str], prefix: str) -> list[str]:
    faults = []
    for name, value in given.items():
        if name in only:
            if value not in only[name]:
                faults.append(f"{prefix}{name}={value!r}; expected {only[name][0]!r}")
        elif name not in known:
            near = difflib.get_close_matches(name, known, 1)
            faults.append(f"{prefix}{name}={value!r} is not handled" + (f" (did you mean {near[0]}?)" if near else ""))
    return faults


def write(config: Any, dtype: str) -> dict[str, Any]:
    """The flat published layout. Rotary settings stand in both spellings; each transformers version reads its own."""
    text, vision = config.text, config.vision
    faults = []
    if vision is None:
        raise ValueError("a model without an image encoder is no Qwen2-VL; give the config a vision part to export it")
    if text.head_width * text.heads != text.width:
        faults.append(f"head_width={text.head_width}, but Qwen2-VL has width / heads = {text.width / text.heads:g}")
    if not text.qkv_bias:
        faults.append("qkv_bias=False, but Qwen2-VL has biases on q, k and v")
    if text.mrope_section is None:
        faults.append("mrope_section=None, but Qwen2-VL turns by time, height and width")
    if vision.mlp_width % vision.width:
        faults.append(f"vision mlp_width={vision.mlp_width} is no multiple of its width={vision.width}")
    if text.norm_eps <= 0 or vision.norm_eps != 1e-6:
        faults.append(f"norm_eps={text.norm_eps} (above 0) and vision norm_eps={vision.norm_eps} (1e-6 in Qwen2-VL)")
    if faults:
        raise ValueError("these settings have no place in a Qwen2-VL config.json: " + "; ".join(faults))
    section = list(text.mrope_section or ())
    written = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **{theirs: getattr(text, ours) for theirs, ours in TEXT},
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": text.max_positions,
        "max_window_layers": text.layers,
        "initializer_range": 0.02,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta, "mrope_section": section},
        "vision_config": {
            "model_type": "qwen2_vl",
            **{theirs: getattr(vision, ours) for theirs, ours in VISION},
            "in_chans": vision.channels,
            "hidden_size": text.width,
            "hidden_act": "quick_gelu",
            "mlp_ratio": vision.mlp_width // vision.width,
            "spatial_patch_size": vision.patch_size,
        },
        "torch_dtype": dtype,
    }
    # Ids that we lack are written as null: left out, transformers would put those of the published vocabulary.
    return written | {name: getattr(config, name) for name in IDS}
