"""LLaVA-NeXT's eyes: CLIP's image encoder over square tiles, and the projector into the decoder's width.

All tiles are of one size, so a row holds a whole number of them and no picture needs segments: tiles do not see each
other. Which feature stands at which placeholder, after padding is cut off and line ends are put in, is decided on the
host (`data/tiles.py`).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ain_jax.models.attention import attention
from ain_jax.models.config import ClipConfig
from ain_jax.models.layers import (
    ACTIVATIONS,
    Einsum,
    Norm,
    Normal,
    PlainMLP,
    declared,
    kept,
    run_layers,
    stacked,
)
from ain_jax.sharding import constrain, gathered

# All layers run on tiles, which are alike: a device has whole ones, and those of a row are shared as its positions are.
TILES = ("tiles", None, None)


class ClipAttention(nn.Module):
    """Full attention inside each tile."""

    config: ClipConfig
    scale_out: float
    dtype: Any = jnp.float32
    attention: str | tuple[str, ...] = "xla"

    @nn.compact
    def __call__(self, x_BPE):
        c = self.config
        E, N, H = c.width, c.heads, c.head_width
        part: dict[str, Any] = {"axes": ("vision_embed", "vision_heads", "head"), "bias": True, "dtype": self.dtype}
        q_BPNH, k_BPNH, v_BPNH = (
            Einsum("BPE,ENH->BPNH", (E, N, H), name=name, **part)(x_BPE) for name in ("q_proj", "k_proj", "v_proj")
        )
        by_head = ("tiles", None, "vision_heads", None)
        q_BPNH, k_BPNH, v_BPNH = (kept(x, "qkv", by_head) for x in (q_BPNH, k_BPNH, v_BPNH))
        rules: dict[str, Any] = {"causal": False, "backend": self.attention, "rows": "tiles"}
        out_BPNH = attention(q_BPNH, k_BPNH, v_BPNH, jnp.ones(x_BPE.shape[:2], jnp.int32), **rules)
        out_BPNH = kept(out_BPNH, "attention", by_head)
        axes = ("vision_heads", "head", "vision_embed")
        project = Einsum("BPNH,NHE->BPE", (N, H, E), axes, True, self.scale_out, self.dtype, name="out_proj")
        return kept(project(out_BPNH), "added", TILES)


class ClipLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ClipConfig
    dtype: Any = jnp.float32
    attention: str | tuple[str, ...] = "xla"

    @nn.compact
    def __call__(self, x_BPE):
        c = self.config
        scale_out = (2 * c.layers) ** -0.5
        attend = ClipAttention(c, scale_out, self.dtype, self.attention, name="self_attn")
        x_BPE = x_BPE + attend(_norm(c, self.dtype, "layer_norm1")(x_BPE))
        mlp = PlainMLP(
            c.width, c.mlp_width, scale_out, c.activation, dtype=self.dtype, places=("tiles", None), name="mlp"
        )
        return x_BPE + kept(mlp(_norm(c, self.dtype, "layer_norm2")(x_BPE)), "added", TILES)


def _norm(c: ClipConfig, dtype: Any, name: str) -> Norm:
    return Norm(c.width, c.norm_eps, "vision_embed", center=True, dtype=dtype, name=name)


class ClipEmbeddings(nn.Module):
    """A learnt class token, then the patches of a tile, each with a learnt position."""

    config: ClipConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, patches_TPK):
        c = self.config
        S = c.tile_patches + 1
        patch_axes = ("patch", "vision_embed")
        embed = Einsum("BPK,KE->BPE", (c.patch_values, c.width), patch_axes, dtype=self.dtype, name="patch_embedding")
        x_TPE = embed(patches_TPK)
        init = declared(Normal(c.width**-0.5), ("vision_embed",))
        one_E: Any = gathered(self.param("class_embedding", init, (c.width,), jnp.float32), ("vision_embed",))
        first_T1E = jnp.broadcast_to(one_E.astype(self.dtype)[None, None], (x_TPE.shape[0], 1, c.width))
        x_TSE = jnp.concatenate([first_T1E, x_TPE], axis=1)
        return x_TSE + Positions(S, c.width, self.dtype, name="position_embedding")()[None]


class Positions(nn.Module):
    """(S, E): a learnt vector for each place of a tile."""

    places: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self):
        init = declared(Normal(0.02), ("position", "vision_embed"))
        table: Any = self.param("weight", init, (self.places, self.width), jnp.float32)
        return gathered(table.astype(self.dtype), ("position", "vision_embed"))


class ClipTower(nn.Module):
    """(B, P, E): what the chosen layer makes of each patch; the class token is left out.

    The layers behind the chosen one are kept for export (`last_layers`, `post_layernorm`) and are not run.
    """

    config: ClipConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str | tuple[str, ...] = "xla"

    @nn.compact
    def __call__(self, patches_BPK):
        c = self.config
        B, P, K = patches_BPK.shape
        if c.patch_values != K:
            raise ValueError(
                f"patches of {K} values, but the tower reads {c.patch_values} = {c.channels} channels x "
                f"{c.patch_size} x {c.patch_size} pixels; use this model's tile settings"
            )
        if P % c.tile_patches:
            raise ValueError(f"{P} patches per row are no whole number of tiles of {c.tile_patches}; use a multiple")
        tiles_TPK = constrain(patches_BPK.reshape(-1, c.tile_patches, K), TILES)
        x_TSE = constrain(ClipEmbeddings(c, self.dtype, name="embeddings")(tiles_TPK), TILES)
        x_TSE = _norm(c, self.dtype, "pre_layrnorm")(x_TSE)  # the published spelling
        encoder = ClipEncoder(c, self.dtype, self.remat, self.attention, name="encoder")
        x_TSE = encoder(x_TSE)
        _norm(c, self.dtype, "post_layernorm")(x_TSE[:, :1])  # declared; nothing reads it
        return constrain(x_TSE[:, 1:].reshape(B, P, c.width), ("rows", "positions", None))


class ClipEncoder(nn.Module):
    """The layers up to the chosen one."""

    config: ClipConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str | tuple[str, ...] = "xla"

    @nn.compact
    def __call__(self, x_TSE):
        layer = ClipLayer(self.config, self.dtype, self.attention, parent=None)
        for name, count, used in self.config.stacks():
            variables = stacked(self, name, layer, count, x_TSE)
            if used:
                kind = lambda v, x_TSE, _: (layer.apply(v, x_TSE), None)
                x_TSE, _ = run_layers(variables, [kind], x_TSE, None, self.remat)
        return x_TSE


class Projector(nn.Module):
    """Two matrices with an exact GELU between them, from the tower's width to the decoder's."""

    in_width: int
    out_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BPE):
        E, D = self.in_width, self.out_width
        x_BPD = Einsum("BPE,EI->BPI", (E, D), ("vision_embed", "vision_mlp"), True, dtype=self.dtype, name="linear_1")(
            x_BPE
        )
        x_BPD = ACTIVATIONS["gelu"](constrain(x_BPD, ("rows", "positions", "vision_mlp")))
        return Einsum("BPI,ID->BPD", (D, D), ("vision_mlp", "embed"), True, dtype=self.dtype, name="linear_2")(x_BPD)


class TileFeatures(nn.Module):
    """(B, P + 1, D): a feature for each patch, and behind them the vector that ends a line of a picture."""

    config: ClipConfig
    out_width: int
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str | tuple[str, ...] = "xla"

    @nn.compact
    def __call__(self, patches_BPK):
        x_BPE = ClipTower(self.config, self.dtype, self.remat, self.attention, name="vision_tower")(patches_BPK)
        project = Projector(self.config.width, self.out_width, self.dtype, name="multi_modal_projector")
        features_BPD = constrain(project(x_BPE), ("rows", None, None))  # what stands at a place may be any of them
        init = declared(Normal(self.out_width**-0.5), ("embed",))  # as LLaVA-NeXT's own code draws it
        line_end_D: Any = gathered(self.param("image_newline", init, (self.out_width,), jnp.float32), ("embed",))
        shape = (features_BPD.shape[0], 1, self.out_width)
        end_B1D = jnp.broadcast_to(line_end_D.astype(self.dtype)[None, None], shape)
        return jnp.concatenate([features_BPD, end_B1D], axis=1)
