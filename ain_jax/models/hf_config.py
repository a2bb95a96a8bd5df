"""`config.json` of every family to our settings and back: attribute names, defaults and refusals as data.

A family lists each published attribute with the value that the published code assumes where it is absent; an attribute
that neither a list nor SILENT holds is refused by name, since an ignored one is a model that is slightly wrong.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# published attribute -> our field
TEXT = {
    "vocab_size": "vocabulary",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tied",
    "hidden_act": "activation",
    "hidden_activation": "activation",
    "mlp_bias": "mlp_bias",
    "query_pre_attn_scalar": "query_scale",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
QWEN2_VISION = {
    "embed_dim": "width",
    "depth": "layers",
    "num_heads": "heads",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "merge_size",
    "in_channels": "channels",
}
QWEN2_5_VISION = {
    "hidden_size": "width",
    **{name: ours for name, ours in QWEN2_VISION.items() if name != "embed_dim"},
    "intermediate_size": "mlp_width",
    "window_size": "window",
    "fullatt_block_indexes": "full_layers",
    "tokens_per_second": "tokens_per_second",
}
# Attributes that change no number of the forward pass, or that are read apart.
SILENT = {
    *("architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "model_type"),
    *("_name_or_path", "_attn_implementation_autoset", "output_hidden_states", "output_attentions", "return_dict"),
    *("rope_theta", "rope_scaling", "rope_parameters", "pretraining_tp", "auto_map", "cache_implementation"),
    *("vision_token_id", "chunk_size_feed_forward", "problem_type", "id2label", "label2id", "is_encoder_decoder"),
    *("is_llama_config", "transformers.js_config"),
}
SILENT_VISION = {
    *("model_type", "mlp_ratio", "in_chans", "initializer_range", "spatial_patch_size", "torch_dtype", "dtype"),
    *("rope_parameters", "transformers_version", "_attn_implementation_autoset", "output_hidden_states"),
    *("output_attentions", "return_dict", "chunk_size_feed_forward", "problem_type", "id2label", "label2id"),
    *("is_encoder_decoder", "architectures", "_name_or_path"),
}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
VISION_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
NO_ROPE = ("default", "mrope")  # kinds that stretch nothing
# What the value of an attribute must be, wherever in the file it stands: in words, and the test of it.
COUNT = ("a whole number above 0", lambda value: type(value) is int and value > 0)
WHOLE = ("a whole number", lambda value: type(value) is int)
NUMBER = ("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf)
FLAG = ("true or false", lambda value: type(value) is bool)
STRING = ("a string", lambda value: isinstance(value, str))
STRINGS = ("a list of strings", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
WHOLES = ("a list of whole numbers", lambda value: isinstance(value, list) and all(type(v) is int for v in value))
IDS_OR_ID = ("an id or a list of ids", lambda value: type(value) is int or WHOLES[1](value))
PAIRS = ("a list of pairs", lambda value: isinstance(value, list) and all(WHOLES[1](v) and len(v) == 2 for v in value))
OBJECT = ("an object", lambda value: isinstance(value, Mapping))
KINDS = {
    **dict.fromkeys([*list(TEXT)[:7], "max_position_embeddings", "sliding_window_pattern"], COUNT),
    **dict.fromkeys([*QWEN2_VISION, "image_size", "num_channels", "in_chans", "window_size"], COUNT),
    **dict.fromkeys(["out_hidden_size", "original_max_position_embeddings", "_sliding_window_pattern"], COUNT),
    **dict.fromkeys(["sliding_window", "max_window_layers", "bos_token_id", "pad_token_id", *VISION_IDS], WHOLE),
    **dict.fromkeys(["image_token_index"], WHOLE),
    **dict.fromkeys(["rms_norm_eps", "layer_norm_eps", "mlp_ratio", "rope_theta", "rope_local_base_freq"], NUMBER),
    **dict.fromkeys(["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"], NUMBER),
    **dict.fromkeys(["factor", "low_freq_factor", "high_freq_factor", "beta_slow", "beta_fast"], NUMBER),
    **dict.fromkeys(["attention_factor", "tokens_per_second"], NUMBER),
    **dict.fromkeys(["tie_word_embeddings", "mlp_bias", "attention_bias", "use_sliding_window", "truncate"], FLAG),
    **dict.fromkeys(["hidden_act", "hidden_activation", "rope_type", "type"], STRING),
    **dict.fromkeys(["mrope_section", "fullatt_block_indexes"], WHOLES),
    **dict.fromkeys(["text_config", "vision_config", "rope_scaling", "rope_parameters"], OBJECT),
    **dict.fromkeys(["full_attention", "sliding_attention"], OBJECT),
    "eos_token_id": IDS_OR_ID,
    "layer_types": STRINGS,
    "image_grid_pinpoints": PAIRS,
}
# Where null says something else than that the attribute is absent.
NEVER_NULL = {*list(TEXT)[:5], "max_position_embeddings", "rms_norm_eps", *QWEN2_VISION, "image_size", "num_channels"}


@dataclass(frozen=True)
class Family:
    """One published architecture."""

    architecture: str  # the class in `architectures`
    text: Mapping[str, Any]  # attribute -> what is assumed where it is absent
    theta: float = 10_000.0
    fixed: Mapping[str, Any] = field(default_factory=dict)  # our settings that all its models share
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # attributes of which we do these values
    windows: str = ""  # how windows are told: "all", "after", "alternating", "pattern"
    ids: Mapping[str, int | None] = field(default_factory=dict)
    vision: Mapping[str, str] | None = None
    vision_defaults: Mapping[str, Any] = field(default_factory=dict)
    vision_only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def _sizes(vocabulary, width, mlp_width, layers, heads, kv_heads, positions, eps=1e-6, tied=False) -> dict[str, Any]:
    values = (vocabulary, width, mlp_width, layers, heads, kv_heads, positions, eps, tied)
    names = (*list(TEXT)[:6], "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    return dict(zip(names, values, strict=True))


NO_DROPOUT = {"attention_dropout": (0.0, None)}
NOT_QUANTISED = {"quantization_config": (None,)}
CAUSAL = {"use_bidirectional_attention": (None, False)}
GEMMA = {"norm_plus_one": True, "scale_embedding": True, "qkv_bias": False}
QWEN2_IDS: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": None,
}
GEMMA_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
AXIAL = ({"rope_type": "axial", "rope_theta": 10000.0}, None)

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _sizes(32000, 4096, 11008, 32, 32, None, 2048)
        | {"hidden_act": "silu", "head_dim": None, "mlp_bias": False, "attention_bias": False},
        only=NO_DROPOUT | {"rope_interleaved": (False,)},
        ids=LLAMA_IDS,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _sizes(32000, 4096, 14336, 32, 32, 8, 131072) | {"hidden_act": "silu", "head_dim": None},
        fixed={"qkv_bias": False},
        only=NO_DROPOUT,
        windows="all",
        ids=LLAMA_IDS,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _sizes(151936, 4096, 22016, 32, 32, 32, 32768) | {"hidden_act": "silu"},
        only=NO_DROPOUT,
        windows="after",
        ids=dict.fromkeys(IDS),
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _sizes(256000, 3072, 24576, 28, 16, 16, 8192, tied=True)
        | {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "attention_bias": False},
        fixed=GEMMA,
        only=NO_DROPOUT | CAUSAL | {"hidden_activation": (None, "gelu_pytorch_tanh")},
        ids=GEMMA_IDS,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _sizes(256000, 2304, 9216, 26, 8, 4, 8192, tied=True)
        | {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "attention_bias": False}
        | {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fixed=GEMMA | {"sandwich_norms": True},
        only=NO_DROPOUT | CAUSAL | {"hidden_act": (None, "gelu_pytorch_tanh")},
        windows="alternating",
        ids=GEMMA_IDS,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _sizes(262208, 2304, 9216, 26, 8, 4, 131072, tied=True)
        | {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "attention_bias": False}
        | {"query_pre_attn_scalar": 256, "final_logit_softcapping": None},
        theta=1_000_000.0,
        fixed=GEMMA | {"sandwich_norms": True, "qk_norm": True},
        # The published code has a setting for capped scores and does not apply it.
        only=NO_DROPOUT | CAUSAL | {"attn_logit_softcapping": (None,)},
        windows="pattern",
        ids=GEMMA_IDS,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        _sizes(152064, 8192, 29568, 80, 64, 8, 32768, 1e-5) | {"hidden_act": "silu"},
        theta=1_000_000.0,
        only=NO_DROPOUT | {"use_sliding_window": (False, None)},
        ids=QWEN2_IDS,
        vision=QWEN2_VISION,
        vision_defaults=dict(zip(QWEN2_VISION, (1280, 32, 16, 14, 2, 2, 3), strict=True)) | {"mlp_ratio": 4},
        vision_only={"hidden_act": ("quick_gelu",), "rope_parameters": AXIAL},
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _sizes(152064, 8192, 29568, 80, 64, 8, 32768, 1e-5) | {"hidden_act": "silu"},
        theta=1_000_000.0,
        only=NO_DROPOUT | {"use_sliding_window": (False, None)},
        ids=QWEN2_IDS,
        vision=QWEN2_5_VISION,
        vision_defaults=dict(
            zip(QWEN2_5_VISION, (3584, 32, 16, 14, 2, 2, 3, 3420, 112, (7, 15, 23, 31), 4), strict=True)
        ),
        vision_only={"hidden_act": ("silu",), "rope_parameters": AXIAL},
    ),
}
MROPE_SECTION = (16, 24, 24)


# LLaVA-NeXT: an encoder of CLIP, a projector, and a decoder of one of these families with a config of its own.
LLAVA_NEXT = "llava_next"
LLAVA_TEXTS = ("llama", "mistral", "qwen2")
CLIP = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "image_size": "tile",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
}
CLIP_DEFAULTS = dict(zip(CLIP, (1024, 24, 16, 4096, 336, 14, 3, 1e-5, "quick_gelu"), strict=True))
CLIP_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
LLAVA_ONLY = {
    "projector_hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("default",),
    "multimodal_projector_bias": (True,),
    "use_image_newline_parameter": (True,),
    **NOT_QUANTISED,
}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SILENT_LLAVA = {"image_seq_length", "ignore_index", "image_token_index", "image_token_id", "image_grid_pinpoints"}
SILENT_LLAVA |= {"vision_feature_layer", "tie_word_embeddings", "vocab_size", "hidden_size", "projection_dim"}
SILENT_LLAVA |= {"text_config", "vision_config"}
SILENT_CLIP = {"projection_dim", "initializer_factor", "vocab_size"}


def read(attributes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `ModelConfig`, its text and vision as dicts, from the flat layout or that of transformers 5."""
    if not isinstance(attributes, Mapping):
        raise ValueError(f"config.json holds {attributes!r}, expected an object")
    name = attributes.get("model_type")
    known = [*FAMILIES, LLAVA_NEXT]
    if name not in known:
        raise ValueError(
            f"config.json has model_type={name!r}, expected one of {', '.join(known)}; a newer family needs a newer "
            "ain_jax"
        )
    if wrong := _wrong(attributes):  # by such values nothing can be read
        raise ValueError("config.json: " + "; ".join(wrong))
    if name == LLAVA_NEXT:
        return _read_llava(attributes)
    family = FAMILIES[name]
    inner = attributes.get("text_config") or {}
    flat = attributes | inner
    # In the nested layout the outer value counts for the head; the inner one is a default that says nothing.
    tied = [a["tie_word_embeddings"] for a in (attributes, inner) if "tie_word_embeddings" in a]
    flat["tie_word_embeddings"] = any(tied) if tied else family.text["tie_word_embeddings"]
    faults: list[str] = []
    if inner.get("model_type", name) not in (name, f"{name}_text"):
        faults.append(f"text_config.model_type={inner['model_type']!r}; expected {name}_text")
    text = _text(family, flat, faults)
    vision = _vision(family, attributes.get("vision_config") or {}, text, faults) if family.vision else None
    _stop(name, faults)
    ids = {k: flat.get(k, default) for k, default in family.ids.items()}
    return {"family": name, "text": text, "vision": vision, **ids}


def _read_llava(attributes: dict[str, Any]) -> dict[str, Any]:
    inner: dict[str, Any] = dict(attributes.get("text_config") or {"model_type": "llama"})
    name = inner.get("model_type")
    if name not in LLAVA_TEXTS:
        raise ValueError(f"text_config.model_type={name!r} in a llava_next: expected one of {', '.join(LLAVA_TEXTS)}")
    family = FAMILIES[name]
    faults = _faults(attributes, LLAVA_ONLY, {*SILENT, *SILENT_LLAVA, *IDS}, "")
    if attributes.get("tie_word_embeddings"):
        inner["tie_word_embeddings"] = True
    text = _text(family, inner, faults)
    given = attributes.get("vision_config") or {}
    only = NO_DROPOUT | {"model_type": ("clip_vision_model",)}
    faults += _faults(given, only, {*CLIP, *SILENT_VISION, *SILENT_CLIP}, "vision_config.")
    vision = {ours: (CLIP_DEFAULTS | given)[theirs] for theirs, ours in CLIP.items()}
    if vision["activation"] in CLIP_ACTIVATIONS:
        vision["activation"] = CLIP_ACTIVATIONS[vision["activation"]]
    else:
        faults.append(f"vision_config.hidden_act={vision['activation']!r}; expected {', '.join(CLIP_ACTIVATIONS)}")
    layer = attributes.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        faults.append(f"vision_feature_layer={layer!r}; expected one layer")
    _stop(LLAVA_NEXT, faults)
    vision |= {"feature_layer": layer, "pinpoints": attributes.get("image_grid_pinpoints") or PINPOINTS}
    outer = {k: attributes[k] for k in IDS if attributes.get(k) is not None}
    ids = {k: (inner | outer).get(k, default) for k, default in family.ids.items()}
    ids["image_token_id"] = attributes.get("image_token_id", attributes.get("image_token_index", 32000))
    return {"family": LLAVA_NEXT, "text_family": name, "text": text, "vision": vision, **ids}


def _wrong(given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The attributes whose value is of no kind that they may have, those of inner objects too."""
    faults = []
    for name, value in given.items():
        words, fits = KINDS.get(name, ("", None))
        if fits is None or (value is None and name not in NEVER_NULL):
            continue
        if not fits(value):
            faults.append(f"{prefix}{name}={value!r}; expected {words}")
        elif isinstance(value, Mapping):
            faults += _wrong(value, f"{prefix}{name}.")
    return faults


def _stop(name: str, faults: list[str]) -> None:
    if faults:
        raise ValueError(f"config.json describes a {name} that ain_jax does not build: " + "; ".join(faults))


def _text(family: Family, flat: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """Arguments of `TextConfig`."""
    known = {*family.text, *IDS, *_window_names(family), *_rope_names(family)}
    known |= {*VISION_IDS, "text_config", "vision_config"} if family.vision else set()
    faults += _faults(flat, {**family.only, **NOT_QUANTISED}, known | SILENT, "")
    given = dict(family.text) | {k: v for k, v in flat.items() if k in family.text}
    text = {TEXT[k]: v for k, v in given.items() if k in TEXT} | dict(family.fixed)
    if text["activation"] in ACTIVATIONS:
        text["activation"] = ACTIVATIONS[text["activation"]]
    else:
        faults.append(f"activation {text['activation']!r}; expected one of {', '.join(ACTIVATIONS)}")
    if "attention_bias" in given:
        text |= {"qkv_bias": bool(given["attention_bias"]), "o_bias": bool(given["attention_bias"])}
    text["kv_heads"] = text["heads"] if text["kv_heads"] is None else text["kv_heads"]
    if text.get("head_width") is None:
        text["head_width"], remainder = divmod(text["width"], text["heads"])
        if remainder:
            faults.append(f"hidden_size={text['width']} is no multiple of num_attention_heads={text['heads']}")
    text["windows"] = _windows(family, flat, text["layers"], faults)
    return text | _rope(family, flat, text, faults)


def _vision(family: Family, given: dict[str, Any], text: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    assert family.vision is not None
    gated = "window_size" in family.vision
    given = dict(given)
    if "in_chans" in given:
        given.setdefault("in_channels", given["in_chans"])
    out = "out_hidden_size" if gated else "hidden_size"  # the width of what the tower gives
    faults += _faults(given, family.vision_only, {*family.vision, *SILENT_VISION, out}, "vision_config.")
    if given.get(out, text["width"]) != text["width"]:
        faults.append(f"vision_config.{out}={given[out]}, expected hidden_size={text['width']}")
    values = dict(family.vision_defaults) | given
    vision = {ours: values[theirs] for theirs, ours in family.vision.items()}
    if gated:
        return vision | {"gated": True}
    return vision | {"mlp_width": int(vision["width"] * values["mlp_ratio"])}


def _window_names(family: Family) -> set[str]:
    names = {"layer_types"}
    if family.windows:
        names |= {"sliding_window"}
    if family.windows == "after" or family.vision:
        names |= {"use_sliding_window", "max_window_layers", "sliding_window"}
    if family.windows == "pattern":
        names |= {"sliding_window_pattern", "_sliding_window_pattern"}
    return names


def _rope_names(family: Family) -> set[str]:
    return {"rope_local_base_freq"} if family.windows == "pattern" else set()


def _windows(family: Family, flat: dict[str, Any], layers: int, faults: list[str]) -> tuple[int, ...]:
    """The window of each layer, 0 for none; by `layer_types` where that is given, else by the family's own rule."""
    if not family.windows or (family.windows == "after" and not flat.get("use_sliding_window", False)):
        windowed = [kind for kind in flat.get("layer_types") or () if kind != "full_attention"]
        if windowed:
            faults.append(f"layer_types hold {windowed[0]!r}; expected full_attention alone")
        return (0,)
    window = flat.get("sliding_window", 4096) or 0
    kinds = flat.get("layer_types")
    if kinds is None:
        return tuple(window if windowed else 0 for windowed in _rule(family, flat, layers))
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        faults.append(f"layer_types={kinds}; expected {layers} of full_attention and sliding_attention")
        return (0,)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rule(family: Family, flat: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers have windows where `layer_types` is silent, as transformers 4 has it."""
    every = flat.get("sliding_window_pattern") or flat.get("_sliding_window_pattern") or 6
    rules = {
        "all": lambda i: True,
        "after": lambda i: i >= flat.get("max_window_layers", 28),
        "alternating": lambda i: i % 2 == 0,
        "pattern": lambda i: bool((i + 1) % every),
    }
    return [rules[family.windows](i) for i in range(layers)]


def _rope(family: Family, flat: dict[str, Any], text: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """theta, scaling and sections from either spelling: rope_theta with rope_scaling, or rope_parameters."""
    new = flat.get("rope_parameters") or {}
    local = {}
    if family.windows == "pattern" and "full_attention" in new:
        local, new = new.get("sliding_attention") or {}, new["full_attention"]
    rope = new | (flat.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or flat.get("rope_theta") or family.theta)
    settings: dict[str, Any] = {"rope_theta": theta, "rope_scaling": _scaling(rope, text["max_positions"], faults)}
    if family.vision:
        settings["mrope_section"] = tuple(rope.get("mrope_section", MROPE_SECTION))
    elif "mrope_section" in rope:
        faults.append(
            f"rope setting mrope_section={rope['mrope_section']!r}, but {family.architecture} reads text alone"
        )
    if family.windows == "pattern":
        if local.get("rope_type", "default") not in NO_ROPE:
            faults.append(f"windowed layers with rope_type={local['rope_type']!r}; expected default")
        base = float(local.get("rope_theta") or flat.get("rope_local_base_freq") or 10_000.0)
        settings["window_theta"] = base if any(text["windows"]) else None
    return settings


# our field -> its name in a rope setting, by kind
SCALINGS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "low": "low_freq_factor",
        "high": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "low": "beta_slow",
        "high": "beta_fast",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}


def _scaling(rope: Mapping[str, Any], max_positions: int, faults: list[str]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SCALINGS and kind not in NO_ROPE:
        faults.append(f"rotary positions of type {kind!r}; expected one of {', '.join([*NO_ROPE, *SCALINGS])}")
        return None
    names = SCALINGS.get(kind, {})
    unknown = rope.keys() - {"type", "rope_type", "mrope_section", "rope_theta"} - set(names.values())
    if kind in ("linear", "dynamic"):
        unknown -= {"original_max_position_embeddings"}
    faults += [f"rope setting {key}={rope[key]!r} is not handled" for key in sorted(unknown)]
    if kind in NO_ROPE:
        return None
    if "factor" not in rope:
        faults.append(f"rope setting factor is missing, which {kind} needs")
        return None
    defaults = {"yarn": {"low": 1.0, "high": 32.0}}.get(kind, {})
    found = {ours: rope[theirs] for ours, theirs in names.items() if rope.get(theirs) is not None}
    if kind != "linear":
        found.setdefault("original_positions", max_positions)
    return {"kind": kind} | defaults | found


def _faults(given: Mapping[str, Any], only: Mapping[str, tuple], known: set[str], prefix: str) -> list[str]:
    faults = []
    for name, value in given.items():
        if name in only:
            if value not in only[name]:
                faults.append(f"{prefix}{name}={value!r}; expected {only[name][0]!r}")
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            faults.append(f"{prefix}{name}={value!r} is not handled{hint}")
    return faults


def write(config: Any, dtype: str) -> dict[str, Any]:
    """The published layout. Rotary settings stand in both spellings; each transformers version reads its own."""
    if config.family == LLAVA_NEXT:
        return _write_llava(config, dtype)
    family = FAMILIES[config.family]
    written = {"architectures": [family.architecture], **_written_text(config.family, config.text)}
    if family.vision:
        if config.vision is None:
            raise ValueError(f"a {config.family} has an image encoder; give the config a vision part to export it")
        written["vision_config"] = _written_vision(config, family)
    return written | {"torch_dtype": dtype} | _written_ids(config, family)


def _written_ids(config: Any, family: Family) -> dict[str, Any]:
    """Ids that we lack are written as null: left out, transformers would put those of the published vocabulary."""
    values = {name: getattr(config, name) for name in family.ids}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _written_text(name: str, text: Any) -> dict[str, Any]:
    family = FAMILIES[name]
    if "head_dim" not in family.text and text.head_width * text.heads != text.width:
        ratio = text.width / text.heads
        raise ValueError(f"head_width={text.head_width}, but a {name} has width / heads = {ratio:g}")
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[text.activation]
    written: dict[str, Any] = {"model_type": name}
    for theirs in family.text:
        ours = TEXT.get(theirs, "qkv_bias")
        written[theirs] = activation if ours == "activation" else getattr(text, ours)
    if name == "gemma":
        written["hidden_activation"] = activation
    if "query_pre_attn_scalar" in written and text.query_scale is None:
        written["query_pre_attn_scalar"] = text.head_width
    written |= {"attention_dropout": 0.0, "use_cache": True, "initializer_range": 0.02}
    return written | _written_windows(family, text) | _written_rope(family, text)


def _write_llava(config: Any, dtype: str) -> dict[str, Any]:
    if config.text_family not in LLAVA_TEXTS:
        raise ValueError(
            f"text_family={config.text_family!r} in a llava_next: expected one of {', '.join(LLAVA_TEXTS)}"
        )
    family, vision = FAMILIES[config.text_family], config.vision
    tower = {theirs: getattr(vision, ours) for theirs, ours in CLIP.items()}
    tower["hidden_act"] = {ours: theirs for theirs, ours in CLIP_ACTIVATIONS.items()}[vision.activation]
    text = _written_text(config.text_family, config.text) | _written_ids(config, family)
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": LLAVA_NEXT,
        "text_config": {"architectures": [family.architecture], **text, "torch_dtype": dtype},
        "vision_config": {"model_type": "clip_vision_model", **tower, "projection_dim": 768, "attention_dropout": 0.0},
        "image_token_index": config.image_token_id,
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in vision.pinpoints],
        "image_seq_length": vision.tile_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "use_image_newline_parameter": True,
        "tie_word_embeddings": config.text.tied,
        "torch_dtype": dtype,
        **_written_ids(config, family),
    }


def _written_windows(family: Family, text: Any) -> dict[str, Any]:
    if family.vision:
        return {"use_sliding_window": False, "sliding_window": text.max_positions, "max_window_layers": text.layers}
    if not family.windows:
        return {}
    by_layer = [text.windows[i % len(text.windows)] for i in range(text.layers)]
    window = max(by_layer)
    written: dict[str, Any] = {"sliding_window": window or None}
    if family.windows == "after":
        first = next((i for i, w in enumerate(by_layer) if w), text.layers)
        written |= {"use_sliding_window": bool(window), "max_window_layers": first}
    if family.windows == "pattern":
        written["sliding_window_pattern"] = len(text.windows)
    if family.windows != "all":
        written["layer_types"] = ["sliding_attention" if w else "full_attention" for w in by_layer]
    if window and [bool(w) for w in by_layer] != _rule(family, written, text.layers):
        raise ValueError(
            f"windows={text.windows}: a {family.architecture} of transformers 4 has no such order of windowed layers"
        )
    return written


def _written_rope(family: Family, text: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if s := text.rope_scaling:
        names = SCALINGS[s.kind]
        said = {theirs: getattr(s, ours) for ours, theirs in names.items()}
        rope = {"rope_type": s.kind} | {k: v for k, v in said.items() if v is not None and (k, v) != ("truncate", True)}
    old = None if rope == {"rope_type": "default"} else rope
    if text.mrope_section is not None:
        section = list(text.mrope_section)
        old = {"type": "mrope", "mrope_section": section} if old is None else old | {"mrope_section": section}
        rope = rope | {"mrope_section": section}
    written: dict[str, Any] = {"rope_theta": text.rope_theta, "rope_scaling": old}
    new = rope | {"rope_theta": text.rope_theta}
    if family.windows == "pattern":
        local = {"rope_type": "default", "rope_theta": text.window_theta or text.rope_theta}
        written["rope_local_base_freq"] = local["rope_theta"]
        return written | {"rope_parameters": {"full_attention": new, "sliding_attention": local}}
    return written | {"rope_parameters": new}


def _written_vision(config: Any, family: Family) -> dict[str, Any]:
    vision = config.vision
    written: dict[str, Any] = {"model_type": config.family}
    assert family.vision is not None
    for theirs, ours in family.vision.items():
        value = getattr(vision, ours)
        written[theirs] = list(value) if isinstance(value, tuple) else value
    if "window_size" in family.vision:
        written |= {"out_hidden_size": config.text.width, "hidden_act": "silu"}
    else:
        ratio = vision.mlp_width / vision.width
        written |= {"hidden_size": config.text.width, "hidden_act": "quick_gelu"}
        written["mlp_ratio"] = int(ratio) if ratio == int(ratio) else ratio
    return written | {"in_chans": vision.channels, "spatial_patch_size": vision.patch_size}
