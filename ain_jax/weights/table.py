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

from ain_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Row:
    theirs: str  # published name
    ours: str  # path in our tree
    layout: str


# Names as published for Qwen2-VL. `canonical` brings the newer spelling to this one.
TEXT = (
    Row("model.embed_tokens.weight", "model/embed_tokens/weight", "V D -> V D"),
    Row("model.layers.{layer}.input_layernorm.weight", "model/layers/input_layernorm/weight", "D -> D"),
    Row("model.layers.{layer}.self_attn.q_proj.weight", "model/layers/self_attn/q_proj/weight", "(N H) D -> D N H"),
    Row("model.layers.{layer}.self_attn.k_proj.weight", "model/layers/self_attn/k_proj/weight", "(K H) D -> D K H"),
    Row("model.layers.{layer}.self_attn.v_proj.weight", "model/layers/self_attn/v_proj/weight", "(K H) D -> D K H"),
    Row("model.layers.{layer}.self_attn.o_proj.weight", "model/layers/self_attn/o_proj/weight", "D (N H) -> N H D"),
    Row(
        "model.layers.{layer}.post_attention_layernorm.weight", "model/layers/post_attention_layernorm/weight", "D -> D"
    ),
    Row("model.layers.{layer}.mlp.gate_proj.weight", "model/layers/mlp/gate_proj/weight", "F D -> D F"),
    Row("model.layers.{layer}.mlp.up_proj.weight", "model/layers/mlp/up_proj/weight", "F D -> D F"),
    Row("model.layers.{layer}.mlp.down_proj.weight", "model/layers/mlp/down_proj/weight", "D F -> F D"),
    Row("model.norm.weight", "model/norm/weight", "D -> D"),
)
BIASES = (
    Row("model.layers.{layer}.self_attn.q_proj.bias", "model/layers/self_attn/q_proj/bias", "(N H) -> N H"),
    Row("model.layers.{layer}.self_attn.k_proj.bias", "model/layers/self_attn/k_proj/bias", "(K H) -> K H"),
    Row("model.layers.{layer}.self_attn.v_proj.bias", "model/layers/self_attn/v_proj/bias", "(K H) -> K H"),
)
HEAD = (Row("lm_head.weight", "lm_head/weight", "V D -> V D"),)
VISION = (
    # The published patch embedding is a convolution over (colour, frame, row, column).
    Row("visual.patch_embed.proj.weight", "visual/patch_embed/proj/weight", "E c t y x -> (c t y x) E"),
    Row("visual.blocks.{layer}.norm1.weight", "visual/blocks/norm1/weight", "E -> E"),
    Row("visual.blocks.{layer}.norm1.bias", "visual/blocks/norm1/bias", "E -> E"),
    Row("visual.blocks.{layer}.attn.qkv.weight", "visual/blocks/attn/qkv/weight", "(q n h) E -> E q n h"),
    Row("visual.blocks.{layer}.attn.qkv.bias", "visual/blocks/attn/qkv/bias", "(q n h) -> q n h"),
    Row("visual.blocks.{layer}.attn.proj.weight", "visual/blocks/attn/proj/weight", "E I -> I E"),
    Row("visual.blocks.{layer}.attn.proj.bias", "visual/blocks/attn/proj/bias", "E -> E"),
    Row("visual.blocks.{layer}.norm2.weight", "visual/blocks/norm2/weight", "E -> E"),
    Row("visual.blocks.{layer}.norm2.bias", "visual/blocks/norm2/bias", "E -> E"),
    Row("visual.blocks.{layer}.mlp.fc1.weight", "visual/blocks/mlp/fc1/weight", "W E -> E W"),
    Row("visual.blocks.{layer}.mlp.fc1.bias", "visual/blocks/mlp/fc1/bias", "W -> W"),
    Row("visual.blocks.{layer}.mlp.fc2.weight", "visual/blocks/mlp/fc2/weight", "E W -> W E"),
    Row("visual.blocks.{layer}.mlp.fc2.bias", "visual/blocks/mlp/fc2/bias", "E -> E"),
    Row("visual.merger.ln_q.weight", "visual/merger/ln_q/weight", "E -> E"),
    Row("visual.merger.ln_q.bias", "visual/merger/ln_q/bias", "E -> E"),
    Row("visual.merger.mlp.0.weight", "visual/merger/mlp/0/weight", "J M -> M J"),
    Row("visual.merger.mlp.0.bias", "visual/merger/mlp/0/bias", "J -> J"),
    Row("visual.merger.mlp.2.weight", "visual/merger/mlp/2/weight", "D J -> J D"),
    Row("visual.merger.mlp.2.bias", "visual/merger/mlp/2/bias", "D -> D"),
)


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """The rows that a model of this config has; a tied head has none of its own."""
    text = config.text
    return TEXT + (BIASES if text.qkv_bias else ()) + (() if text.tied else HEAD) + (VISION if config.vision else ())


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
    if vision := config.vision:
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


def layer_count(row: Row, config: ModelConfig) -> int | None:
    """How many published tensors are stacked in ours; None where ours is not stacked."""
    if "{layer}" not in row.theirs:
        return None
    if row.theirs.startswith("visual."):
        assert config.vision is not None, "rows() gives vision rows to models with an image encoder only"
        return config.vision.layers
    return config.text.layers


def published(config: ModelConfig) -> Iterator[tuple[str, Row, int | None]]:
    """(published name, row, layer) of every tensor of the model, in the order of the table."""
    for row in rows(config):
        count = layer_count(row, config)
        if count is None:
            yield row.theirs, row, None
        else:
            yield from ((row.theirs.format(layer=layer), row, layer) for layer in range(count))


def canonical(name: str) -> str:
    """A tensor's name in the published spelling; transformers 4.52 and later also write the towers under `model.`."""
    for newer, older in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(newer):
            return older + name.removeprefix(newer)
    return name


def rearrange(array: np.ndarray, layout: str, letters: dict[str, int], reverse: bool = False) -> np.ndarray:
    """The array in our layout, or with `reverse` in theirs; a view where that is possible.

    rearrange(ones(6, 4), "(N H) D -> D N H", {"N": 2, "H": 3, "D": 4}) has shape (4, 2, 3)
    """
    source, target = (_axes(side) for side in (layout.split("->")[::-1] if reverse else layout.split("->")))
    flat_source, flat_target = functools.reduce(operator.iadd, source, []), functools.reduce(operator.iadd, target, [])
    split = array.reshape([letters[letter] for letter in flat_source])
    turned = split.transpose([flat_source.index(letter) for letter in flat_target])
    return turned.reshape(_shape(target, letters))


def their_shape(row: Row, letters: dict[str, int]) -> tuple[int, ...]:
    """Shape of one published tensor."""
    return _shape(_axes(row.layout.split("->")[0]), letters)


def _axes(side: str) -> list[list[str]]:
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", side)]


def _shape(axes: list[list[str]], letters: dict[str, int]) -> tuple[int, ...]:
    return tuple(int(np.prod([letters[letter] for letter in group])) for group in axes)
