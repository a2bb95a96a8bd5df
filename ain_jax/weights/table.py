"""Published tensors and our parameters, one row each, read in both directions.

A layout is written "theirs -> ours", each axis a letter of the legend in `models/layers.py`, joined axes in brackets
with the slowest first: "(N H) D -> D N H" splits the rows of a q projection into heads and turns it. Read right to left
it exports.
`{layer}` in a published name runs over the layers, which ours holds stacked on a leading axis.
"""

import functools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ain_jax.models.config import ClipConfig, ModelConfig


@dataclass(frozen=True)
class Row:
    theirs: str  # published name
    ours: str  # path in our tree
    layout: str


@dataclass(frozen=True)
class Place:
    """Where one published tensor lies in our tree."""

    name: str  # published
    path: str  # ours
    layout: str
    layer: int | None = None  # which of the stacked layers; None where ours is not stacked
    layers: int | None = None  # how many are stacked there


def _layer(name: str, layout: str) -> Row:
    return Row(f"model.layers.{{layer}}.{name}", "model/layers/" + name.replace(".", "/"), layout)


def _block(name: str, layout: str) -> Row:
    return Row(f"visual.blocks.{{layer}}.{name}", "visual/blocks/" + name.replace(".", "/"), layout)


# Names as published. `canonical` brings other spellings to these.
TEXT = (
    Row("model.embed_tokens.weight", "model/embed_tokens/weight", "V D -> V D"),
    _layer("input_layernorm.weight", "D -> D"),
    _layer("self_attn.q_proj.weight", "(N H) D -> D N H"),
    _layer("self_attn.k_proj.weight", "(K H) D -> D K H"),
    _layer("self_attn.v_proj.weight", "(K H) D -> D K H"),
    _layer("self_attn.o_proj.weight", "D (N H) -> N H D"),
    _layer("post_attention_layernorm.weight", "D -> D"),
    _layer("mlp.gate_proj.weight", "F D -> D F"),
    _layer("mlp.up_proj.weight", "F D -> D F"),
    _layer("mlp.down_proj.weight", "D F -> F D"),
    Row("model.norm.weight", "model/norm/weight", "D -> D"),
)
QKV_BIASES = (
    _layer("self_attn.q_proj.bias", "(N H) -> N H"),
    _layer("self_attn.k_proj.bias", "(K H) -> K H"),
    _layer("self_attn.v_proj.bias", "(K H) -> K H"),
)
O_BIAS = (_layer("self_attn.o_proj.bias", "D -> D"),)
MLP_BIASES = (
    _layer("mlp.gate_proj.bias", "F -> F"),
    _layer("mlp.up_proj.bias", "F -> F"),
    _layer("mlp.down_proj.bias", "D -> D"),
)
QK_NORMS = (_layer("self_attn.q_norm.weight", "H -> H"), _layer("self_attn.k_norm.weight", "H -> H"))
SANDWICH_NORMS = (
    _layer("pre_feedforward_layernorm.weight", "D -> D"),
    _layer("post_feedforward_layernorm.weight", "D -> D"),
)
HEAD = (Row("lm_head.weight", "lm_head/weight", "V D -> V D"),)
VISION = (
    # The published patch embedding is a convolution over (colour, frame, row, column).
    Row("visual.patch_embed.proj.weight", "visual/patch_embed/proj/weight", "E c t y x -> (c t y x) E"),
    _block("norm1.weight", "E -> E"),
    _block("attn.qkv.weight", "(q n h) E -> E q n h"),
    _block("attn.qkv.bias", "(q n h) -> q n h"),
    _block("attn.proj.weight", "E I -> I E"),
    _block("attn.proj.bias", "E -> E"),
    _block("norm2.weight", "E -> E"),
    Row("visual.merger.ln_q.weight", "visual/merger/ln_q/weight", "E -> E"),
    Row("visual.merger.mlp.0.weight", "visual/merger/mlp/0/weight", "J M -> M J"),
    Row("visual.merger.mlp.0.bias", "visual/merger/mlp/0/bias", "J -> J"),
    Row("visual.merger.mlp.2.weight", "visual/merger/mlp/2/weight", "D J -> J D"),
    Row("visual.merger.mlp.2.bias", "visual/merger/mlp/2/bias", "D -> D"),
)
PLAIN_VISION = (  # Qwen2-VL
    _block("norm1.bias", "E -> E"),
    _block("norm2.bias", "E -> E"),
    _block("mlp.fc1.weight", "W E -> E W"),
    _block("mlp.fc1.bias", "W -> W"),
    _block("mlp.fc2.weight", "E W -> W E"),
    _block("mlp.fc2.bias", "E -> E"),
    Row("visual.merger.ln_q.bias", "visual/merger/ln_q/bias", "E -> E"),
)
GATED_VISION = (  # Qwen2.5-VL
    _block("mlp.gate_proj.weight", "W E -> E W"),
    _block("mlp.gate_proj.bias", "W -> W"),
    _block("mlp.up_proj.weight", "W E -> E W"),
    _block("mlp.up_proj.bias", "W -> W"),
    _block("mlp.down_proj.weight", "E W -> W E"),
    _block("mlp.down_proj.bias", "E -> E"),
)


def _clip(name: str, layout: str) -> Row:
    return Row(
        f"vision_tower.vision_model.{name}",
        "visual/vision_tower/" + name.replace(".{layer}", "").replace(".", "/"),
        layout,
    )


CLIP = (
    _clip("embeddings.class_embedding", "E -> E"),
    _clip("embeddings.patch_embedding.weight", "E c y x -> (c y x) E"),
    _clip("embeddings.position_embedding.weight", "s E -> s E"),
    *(_clip(f"pre_layrnorm.{part}", "E -> E") for part in ("weight", "bias")),
    *(
        _clip(f"encoder.layers.{{layer}}.self_attn.{p}.weight", "(n h) E -> E n h")
        for p in ("q_proj", "k_proj", "v_proj")
    ),
    *(_clip(f"encoder.layers.{{layer}}.self_attn.{p}.bias", "(n h) -> n h") for p in ("q_proj", "k_proj", "v_proj")),
    _clip("encoder.layers.{layer}.self_attn.out_proj.weight", "E (n h) -> n h E"),
    _clip("encoder.layers.{layer}.self_attn.out_proj.bias", "E -> E"),
    *(_clip(f"encoder.layers.{{layer}}.layer_norm{i}.{part}", "E -> E") for i in (1, 2) for part in ("weight", "bias")),
    _clip("encoder.layers.{layer}.mlp.fc1.weight", "W E -> E W"),
    _clip("encoder.layers.{layer}.mlp.fc1.bias", "W -> W"),
    _clip("encoder.layers.{layer}.mlp.fc2.weight", "E W -> W E"),
    _clip("encoder.layers.{layer}.mlp.fc2.bias", "E -> E"),
    *(_clip(f"post_layernorm.{part}", "E -> E") for part in ("weight", "bias")),
    Row("multi_modal_projector.linear_1.weight", "visual/multi_modal_projector/linear_1/weight", "d E -> E d"),
    Row("multi_modal_projector.linear_1.bias", "visual/multi_modal_projector/linear_1/bias", "d -> d"),
    Row("multi_modal_projector.linear_2.weight", "visual/multi_modal_projector/linear_2/weight", "D d -> d D"),
    Row("multi_modal_projector.linear_2.bias", "visual/multi_modal_projector/linear_2/bias", "D -> D"),
    Row("image_newline", "visual/image_newline", "D -> D"),
)


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """The rows that a model of this config has; a tied head has none of its own."""
    text = config.text
    parts = [
        (TEXT, True),
        (QKV_BIASES, text.qkv_bias),
        (O_BIAS, text.o_bias),
        (MLP_BIASES, text.mlp_bias),
        (QK_NORMS, text.qk_norm),
        (SANDWICH_NORMS, text.sandwich_norms),
        (HEAD, not text.tied),
    ]
    if isinstance(config.vision, ClipConfig):
        parts += [(CLIP, True)]
    elif config.vision:
        parts += [(VISION, True), (GATED_VISION if config.vision.gated else PLAIN_VISION, True)]
    return tuple(row for part, wanted in parts if wanted for row in part)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every axis letter of the layouts."""
    text = config.text
    letters = {
        "V": text.vocabulary,
        "D": text.width,
        "F": text.mlp_width,
        "N": text.heads,
        "K": text.kv_heads,
        "H": text.head_width,
    }
    vision = config.vision
    if isinstance(vision, ClipConfig):
        letters |= {"E": vision.width, "W": vision.mlp_width, "n": vision.heads, "h": vision.head_width}
        letters |= {"c": vision.channels, "y": vision.patch_size, "x": vision.patch_size}
        letters |= {"s": vision.tile_patches + 1, "d": text.width}
    elif vision:
        joined = vision.width * vision.merge_size**2
        letters |= {"E": vision.width, "I": vision.width, "W": vision.mlp_width, "J": joined, "M": joined}
        letters |= {"q": 3, "n": vision.heads, "h": vision.head_width}
        letters |= {
            "c": vision.channels,
            "t": vision.temporal_patch_size,
            "y": vision.patch_size,
            "x": vision.patch_size,
        }
    return letters


def published(config: ModelConfig) -> Iterator[Place]:
    """The place of every tensor of the model, in the order of the table."""
    for row in rows(config):
        name = row.theirs
        if isinstance(config.vision, ClipConfig) and name.startswith(("model.", "lm_head.")):
            name = "language_model." + name
        if "{layer}" not in name:
            yield Place(name, row.ours, row.layout)
            continue
        first = 0
        for stack, layers in _stacks(row, config):
            path = row.ours.replace("/layers/", f"/{stack}/", 1)
            for layer in range(layers):
                yield Place(name.format(layer=first + layer), path, row.layout, layer, layers)
            first += layers


def _stacks(row: Row, config: ModelConfig) -> list[tuple[str, int]]:
    """(name, layers) of the stacks that ours holds these layers in."""
    if isinstance(config.vision, ClipConfig) and row.theirs.startswith("vision_tower."):
        return [(name, layers) for name, layers, _ in config.vision.stacks()]
    if row.theirs.startswith("visual."):
        assert config.vision is not None, "rows() gives vision rows to models with an image encoder only"
        return [("blocks", config.vision.layers)]
    return [(name, layers) for name, _, layers in config.text.stacks()]


# Beginnings of names: of transformers 4.52 and later, of the LLaVA-NeXT that it calls -hf, of LLaVA's own code, and of
# a CLIP by itself.
# The first that fits is taken.
SPELLINGS = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.visual.", "visual."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("vision_model.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
)


def canonical(name: str) -> str:
    """A tensor's name in the spelling of the table, whichever of its published spellings it has.

    canonical("model.language_model.norm.weight") and canonical("language_model.model.norm.weight") are both
    "model.norm.weight"
    """
    for other, ours in SPELLINGS:
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name


def rearrange(array: np.ndarray, layout: str, letters: dict[str, int], reverse: bool = False) -> np.ndarray:
    """The array in our layout, or with `reverse` in theirs; a view where that is possible.

    rearrange(ones(6, 4), "(N H) D -> D N H", {"N": 2, "H": 3, "D": 4}) has shape (4, 2, 3)
    """
    source, target = groups(layout)[::-1] if reverse else groups(layout)
    flat_source, flat_target = functools.reduce(operator.iadd, source, []), functools.reduce(operator.iadd, target, [])
    split = array.reshape([letters[letter] for letter in flat_source])
    turned = split.transpose([flat_source.index(letter) for letter in flat_target])
    return turned.reshape(_shape(target, letters))


def their_shape(layout: str, letters: dict[str, int]) -> tuple[int, ...]:
    """Shape of one published tensor."""
    return _shape(groups(layout)[0], letters)


def our_shape(layout: str, letters: dict[str, int]) -> tuple[int, ...]:
    """Shape of the same tensor in ours, one layer of it."""
    return _shape(groups(layout)[1], letters)


def groups(layout: str) -> tuple[list[list[str]], list[list[str]]]:
    """The letters of each axis, theirs and ours: "(N H) D -> D N H" is [[N, H], [D]] and [[D], [N], [H]]."""
    theirs, ours = (
        [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", side)] for side in layout.split("->")
    )
    return theirs, ours


def _shape(axes: list[list[str]], letters: dict[str, int]) -> tuple[int, ...]:
    return tuple(int(np.prod([letters[letter] for letter in group])) for group in axes)
