"""Qwen2-VL's image encoder: flattened patches in, one feature of the decoder's width per 2 x 2 patches out."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ain_jax.models.attention import attention
from ain_jax.models.config import VisionConfig
from ain_jax.models.layers import Einsum, Norm, rematerialised, rotate, vision_rotary


class VisionAttention(nn.Module):
    """Full attention inside each image of the row; q, k and v come from one matrix."""

    config: VisionConfig
    scale_out: float
    longest_image: int | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BPE, rotary, patch_segments_BP):
        c = self.config
        shape = (c.width, 3, c.heads, c.head_width)
        axes = ("vision_embed", "qkv", "vision_heads", "head")
        qkv_BPTNH = Einsum("BPE,ETNH->BPTNH", shape, axes, True, dtype=self.dtype, name="qkv")(x_BPE)  # T: q, k, v
        q_BPNH, k_BPNH, v_BPNH = (qkv_BPTNH[:, :, i] for i in range(3))
        q_BPNH, k_BPNH = rotate(q_BPNH, rotary), rotate(k_BPNH, rotary)
        out_BPNH = attention(q_BPNH, k_BPNH, v_BPNH, patch_segments_BP, causal=False, longest=self.longest_image)
        out_BPE = out_BPNH.reshape(x_BPE.shape)
        project = Einsum(
            "BPI,IE->BPE",
            (c.width, c.width),
            ("vision_heads", "vision_embed"),
            True,
            self.scale_out,
            self.dtype,
            name="proj",
        )
        return project(out_BPE)


class VisionMLP(nn.Module):
    """fc2(quick_gelu(fc1(x)))."""

    config: VisionConfig
    scale_out: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BPE):
        E, F = self.config.width, self.config.mlp_width
        wide_BPF = Einsum("BPE,EF->BPF", (E, F), ("vision_embed", "vision_mlp"), True, dtype=self.dtype, name="fc1")(
            x_BPE
        )
        wide_BPF = wide_BPF * jax.nn.sigmoid(wide_BPF * 1.702)
        narrow = Einsum(
            "BPF,FE->BPE", (F, E), ("vision_mlp", "vision_embed"), True, self.scale_out, self.dtype, name="fc2"
        )
        return narrow(wide_BPF)


class VisionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: VisionConfig
    longest_image: int | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BPE, rotary, patch_segments_BP):
        c = self.config
        scale_out = (2 * c.layers) ** -0.5
        norm = {"width": c.width, "eps": c.norm_eps, "axis": "vision_embed", "center": True, "dtype": self.dtype}
        attend = VisionAttention(c, scale_out, self.longest_image, self.dtype, name="attn")
        x_BPE = x_BPE + attend(Norm(name="norm1", **norm)(x_BPE), rotary, patch_segments_BP)
        mlp = VisionMLP(c, scale_out, self.dtype, name="mlp")
        return x_BPE + mlp(Norm(name="norm2", **norm)(x_BPE)), None


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
        x_BPE = Norm(E, c.norm_eps, "vision_embed", center=True, dtype=self.dtype, name="ln_q")(x_BPE)
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
        x_BMJ = jax.nn.gelu(x_BMJ, approximate=False)
        return Einsum("BMI,ID->BMD", (J, D), ("vision_mlp", "embed"), True, dtype=self.dtype, name="2")(x_BMJ)


class VisionTower(nn.Module):
    """features_BMD of the pictures in each row; M = P / merge_size^2, in the order of the patches."""

    config: VisionConfig
    out_width: int
    dtype: Any = jnp.float32
    remat: str = "none"
    longest_image: int | None = None  # patches; a promise that makes attention quicker, see `attention`

    @nn.compact
    def __call__(self, patches_BPK, patch_positions_BP2, patch_segments_BP):
        c = self.config
        _check(patches_BPK.shape, c)
        x_BPE = PatchEmbedding(c, self.dtype, name="patch_embed")(patches_BPK)
        rotary = vision_rotary(patch_positions_BP2, c.head_width)
        blocks = nn.scan(
            rematerialised(VisionBlock, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BPE, _ = blocks(c, self.longest_image, self.dtype, name="blocks")(x_BPE, rotary, patch_segments_BP)
        return Merger(c, self.out_width, self.dtype, name="merger")(x_BPE)


def _check(shape: tuple[int, ...], c: VisionConfig) -> None:
    _B, P, K = shape
    if c.patch_values != K:
        raise ValueError(
            f"patches of {K} values, but the tower reads {c.patch_values} = {c.channels} channels x "
            f"{c.temporal_patch_size} frames x {c.patch_size} x {c.patch_size} pixels; use this model's image settings"
        )
    if P % c.merge_size**2:
        raise ValueError(f"{P} patches per row cannot be merged {c.merge_size} x {c.merge_size}; use a multiple")
