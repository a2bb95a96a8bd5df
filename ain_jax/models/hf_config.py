"""`config.json` of every family to our settings and back, by the lists of `hf_families`."""

import difflib
from collections.abc import Mapping
from typing import Any

from ain_jax.models.hf_families import (
    ACTIVATIONS,
    ALL_TURNED,
    CLIP,
    CLIP_ACTIVATIONS,
    CLIP_DEFAULTS,
    FAMILIES,
    IDS,
    KINDS,
    LLAVA_NEXT,
    LLAVA_ONLY,
    LLAVA_TEXTS,
    MROPE_SECTION,
    NEVER_NULL,
    NO_DROPOUT,
    NO_ROPE,
    NOT_QUANTISED,
    PINPOINTS,
    SILENT,
    SILENT_CLIP,
    SILENT_LLAVA,
    SILENT_VISION,
    TEXT,
    VISION_IDS,
    Family,
)


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
    faults += _faults(flat, {**family.only, **NOT_QUANTISED, **ALL_TURNED}, known | SILENT, "")
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
    unknown -= {name for name, values in ALL_TURNED.items() if rope.get(name) in values}
    if unknown and not rope.keys() & {"type", "rope_type"}:
        faults.append(f"rope settings {', '.join(sorted(unknown))} without rope_type; expected {', '.join(SCALINGS)}")
        return None
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
        # A model that ends before its first full layer has no turn to tell: one longer than the model.
        written["sliding_window_pattern"] = text.layers + 1 if all(by_layer) else len(text.windows)
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
