"""The image encoders of Qwen2-VL and Qwen2.5-VL: flattened patches in, one feature of the decoder's width per 2 x 2
patches out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ain_jax.models.attention import attention
from ain_jax.models.config import VisionConfig
from ain_jax.models.layers import (
    Einsum,
    GatedMLP,
    Norm,
    PlainMLP,
    kept,
    rotate,
    run_layers,
    stacked,
    vision_rotary,
)
from ain_jax.sharding import constrain


class VisionAttention(nn.Module):
    """Full attention inside each segment of the row, an image or a window; q, k and v come from one matrix."""

    config: VisionConfig
    scale_out: float
    longest: int | None
    dtype: Any = jnp.float32
    attention: str | tuple[str, ...] = "xla"

    @nn.compact
    def __call__(self, x_BPE, rotary, segments_BP):
        c = self.config
        shape = (c.width, 3, c.heads, c.head_width)
        axes = ("vision_embed", "qkv", "vision_heads", "head")
        qkv_BPTNH = Einsum("BPE,ETNH->BPTNH", shape, axes, True, dtype=self.dtype, name="qkv")(x_BPE)  # T: q, k, v
        q_BPNH, k_BPNH, v_BPNH = (qkv_BPTNH[:, :, i] for i in range(3))
        by_head = ("rows", "positions", "vision_heads", None)
        q_BPNH, k_BPNH, v_BPNH = (
            kept(x, "qkv", by_head) for x in (rotate(q_BPNH, rotary), rotate(k_BPNH, rotary), v_BPNH)
        )
        k_BPNH, v_BPNH = (constrain(x, ("rows", None, "vision_heads", None)) for x in (k_BPNH, v_BPNH))
        rules: dict[str, Any] = {"causal": False, "longest": self.longest, "backend": self.attention}
        out_BPNH = attention(q_BPNH, k_BPNH, v_BPNH, segments_BP, **rules)
        out_BPE = kept(out_BPNH, "attention", by_head).reshape(x_BPE.shape)
        project = Einsum(
            "BPI,IE->BPE",
            (c.width, c.width),
            ("vision_heads", "vision_embed"),
            True,
            self.scale_out,
            self.dtype,
            name="proj",
        )
        return kept(project(out_BPE), "added", ("rows", "positions", None))


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: VisionConfig
    longest: int | None = None  # patches of a segment
    dtype: Any = jnp.float32
    attention: str | tuple[str, ...] = "xla"

    @nn.compact
    def __call__(self, x_BPE, rotary, segments_BP):
        c = self.config
        scale_out = (2 * c.layers) ** -0.5
        attend = VisionAttention(c, scale_out, self.longest, self.dtype, self.attention, name="attn")
        x_BPE = x_BPE + attend(_norm(c, self.dtype, "norm1")(x_BPE), rotary, segments_BP)
        if c.gated:
            axes = ("vision_embed", "vision_mlp")
            mlp = GatedMLP(c.width, c.mlp_width, scale_out, "silu", True, axes, self.dtype, name="mlp")
        else:
            mlp = PlainMLP(c.width, c.mlp_width, scale_out, "quick_gelu", dtype=self.dtype, name="mlp")
        return x_BPE + kept(mlp(_norm(c, self.dtype, "norm2")(x_BPE)), "added", ("rows", "positions", None))


def _norm(c: VisionConfig, dtype: Any, name: str) -> Norm:
    return Norm(c.width, c.norm_eps, "vision_embed", center=not c.gated, dtype=dtype, name=name)


class PatchEmbedding(nn.Module):
    """Published as a 3-D convolution whose stride is its size: on flattened patches it is one matrix."""

    config: VisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, patches_BPK):
        shape, axes = (self.config.patch_values, self.config.width), ("patch", "vision_embed")
        return Einsum("BPK,KE->BPE", shape, axes, dtype=self.dtype, name="proj")(patches_BPK)


class Merger(nn.Module):
    """features_BMD: each 2 x 2 block of patches, which lie side by side in the row, normed, joined and projected."""

    config: VisionConfig
    out_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BPE):
        c, (B, P, E) = self.config, x_BPE.shape
        joined = c.merge_size**2
        x_BPE = _norm(c, self.dtype, "ln_q")(x_BPE)
        return MergerMLP(joined * E, self.out_width, self.dtype, name="mlp")(x_BPE.reshape(B, P // joined, joined * E))


class MergerMLP(nn.Module):
    """Two matrices with an exact GELU between them; their names are the published ones."""

    in_width: int
    out_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BMJ):
        J, D = self.in_width, self.out_width
        x_BMJ = Einsum("BMJ,JI->BMI", (J, J), ("vision_merged", "vision_mlp"), True, dtype=self.dtype, name="0")(x_BMJ)
        x_BMJ = jax.nn.gelu(constrain(x_BMJ, ("rows", "positions", "vision_mlp")), approximate=False)
        return Einsum("BMI,ID->BMD", (J, D), ("vision_mlp", "embed"), True, dtype=self.dtype, name="2")(x_BMJ)


class VisionTower(nn.Module):
    """features_BMD of the pictures in each row; M = P / merge_size^2, in the order of the patches."""

    config: VisionConfig
    out_width: int
    dtype: Any = jnp.float32
    remat: str = "none"
    longest_image: int | None = None  # patches; a promise that makes attention quicker, see `attention`
    attention: str | tuple[str, ...] = "xla"

    @nn.compact
    def __call__(self, patches_BPK, patch_positions_BP2, patch_segments_BP):
        c = self.config
        _check(patches_BPK.shape, c)
        cut, whole = ("rows", "positions", None), ("rows", None, None)
        patches_BPK = constrain(patches_BPK, whole if c.window else cut)
        x_BPE = constrain(PatchEmbedding(c, self.dtype, name="patch_embed")(patches_BPK), whole if c.window else cut)
        segments = {False: patch_segments_BP}
        positions_BP2, order_BP = patch_positions_BP2, None
        if c.window:  # each window's patches side by side, so that attention needs its neighbourhood alone
            windows_BP = window_segments(patch_positions_BP2, patch_segments_BP, c)
            order_BP = jnp.argsort(windows_BP, axis=1, stable=True)
            pick = lambda x: jnp.take_along_axis(x, order_BP.reshape(*order_BP.shape, *(1,) * (x.ndim - 2)), axis=1)
            x_BPE, positions_BP2 = pick(x_BPE), pick(patch_positions_BP2)
            segments = {False: pick(patch_segments_BP), True: pick(windows_BP)}
        x_BPE, positions_BP2 = constrain(x_BPE, cut), constrain(positions_BP2, cut)
        rotary = vision_rotary(positions_BP2, c.head_width)
        longest = {False: self.longest_image, True: window_side(c) ** 2}
        of_kind = lambda windowed: VisionBlock(c, longest[windowed], self.dtype, self.attention, parent=None)
        blocks = [of_kind(windowed) for windowed in c.windowed]
        variables = stacked(self, "blocks", blocks[0], c.layers, x_BPE, rotary, segments[c.windowed[0]])
        kinds = [
            lambda v, x_BPE, _, block=block, windowed=windowed: (
                block.apply(v, x_BPE, rotary, segments[windowed]),
                None,
            )
            for block, windowed in zip(blocks, c.windowed, strict=True)
        ]
        x_BPE, _ = run_layers(variables, kinds, x_BPE, None, self.remat)
        features_BMD = Merger(c, self.out_width, self.dtype, name="merger")(x_BPE)
        if order_BP is not None:  # a merged block moved as one: its place is that of its first patch
            back_BM = jnp.argsort(order_BP[:, :: c.merge_size**2], axis=1)
            features_BMD = jnp.take_along_axis(constrain(features_BMD, whole), back_BM[:, :, None], axis=1)
        return features_BMD


def window_side(c: VisionConfig) -> int:
    """Patches on a side of a window, whole merged blocks: 112 pixels are 8 patches of 14."""
    return c.window // c.merge_size // c.patch_size * c.merge_size


def window_segments(patch_positions_BP2, patch_segments_BP, c: VisionConfig):
    """(B, P): a number for each window of each picture, ascending as windows are read; 0 for padding."""
    place_BP2 = patch_positions_BP2 // window_side(c)
    number_BP = (patch_segments_BP << 20) + (place_BP2[:, :, 0] << 10) + place_BP2[:, :, 1]
    return jnp.where(patch_segments_BP > 0, number_BP, 0)


def _check(shape: tuple[int, ...], c: VisionConfig) -> None:
    _B, P, K = shape
    if c.patch_values != K:
        raise ValueError(
            f"patches of {K} values, but the tower reads {c.patch_values} = {c.channels} channels x "
            f"{c.temporal_patch_size} frames x {c.patch_size} x {c.patch_size} pixels; use this model's image settings"
        )
    if P % c.merge_size**2:
        raise ValueError(f"{P} patches per row cannot be merged {c.merge_size} x {c.merge_size}; use a multiple")
