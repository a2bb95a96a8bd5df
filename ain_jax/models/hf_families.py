"""The published families as data: attribute names, what they mean, what is assumed where they are absent.

A family lists each published attribute with the value that the published code assumes where it is absent; an attribute
that neither a list nor SILENT holds is refused by name, since an ignored one is a model that is slightly wrong.
`hf_config` reads and writes by these lists.
"""

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
    **dict.fromkeys(["attention_factor", "tokens_per_second", "mscale", "mscale_all_dim"], NUMBER),
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
ALL_TURNED = {"partial_rotary_factor": (1.0, None)}  # rotary positions turn the whole width of a head
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
