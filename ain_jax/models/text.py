"""The decoder: token embeddings in, hidden states and logits out. Llama, Qwen2 and Gemma are settings of it."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ain_jax.models.config import TextConfig
from ain_jax.models.layers import Einsum, Embedding, GatedMLP, Norm, rematerialised, rotate, text_rotary

# (q_BLNH, k_BLKH, v_BLKH, memory of this layer) -> (out_BLNH, what this layer hands back). In training nothing is
# remembered: both memories are None. `generate.py` decodes by handing in another function and its cache.
Attend = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; what it attends to is decided by `attend`."""

    config: TextConfig
    attend: Attend
    scale_out: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, rotary, memory):
        c = self.config
        D, N, K, H = c.width, c.heads, c.kv_heads, c.head_width
        query: dict[str, Any] = {"axes": ("embed", "heads", "head"), "bias": c.qkv_bias, "dtype": self.dtype}
        key: dict[str, Any] = query | {"axes": ("embed", "kv_heads", "head")}
        q_BLNH = rotate(Einsum("BLD,DNH->BLNH", (D, N, H), name="q_proj", **query)(x_BLD), rotary)
        k_BLKH = rotate(Einsum("BLD,DKH->BLKH", (D, K, H), name="k_proj", **key)(x_BLD), rotary)
        v_BLKH = Einsum("BLD,DKH->BLKH", (D, K, H), name="v_proj", **key)(x_BLD)
        out_BLNH, memory = self.attend(q_BLNH, k_BLKH, v_BLKH, memory)
        project = Einsum(
            "BLNH,NHD->BLD",
            (N, H, D),
            ("heads", "head", "embed"),
            scale=self.scale_out,
            dtype=self.dtype,
            name="o_proj",
        )
        return project(out_BLNH), memory


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: TextConfig
    attend: Attend
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, rotary, memory):
        c = self.config
        scale_out = (2 * c.layers) ** -0.5  # so that the sum over the residual branches starts at the size of one
        norm = {"width": c.width, "eps": c.norm_eps, "dtype": self.dtype}
        attention = SelfAttention(c, self.attend, scale_out, self.dtype, name="self_attn")
        added_BLD, memory = attention(Norm(name="input_layernorm", **norm)(x_BLD), rotary, memory)
        x_BLD = x_BLD + added_BLD
        mlp = GatedMLP(c.width, c.mlp_width, scale_out, self.dtype, name="mlp")
        return x_BLD + mlp(Norm(name="post_attention_layernorm", **norm)(x_BLD)), memory


class Decoder(nn.Module):
    """`embed` ids, run the stacked layers and the last norm (`__call__`); the head is in `MultimodalModel`.

    The layers are one scan over parameters stacked on axis 0, so compile time does not grow with their number.
    """

    config: TextConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c.vocabulary, c.width, dtype=self.dtype)
        self.norm = Norm(c.width, c.norm_eps, dtype=self.dtype)

    def embed(self, tokens_BL):
        return self.embed_tokens(tokens_BL)

    @nn.compact
    def __call__(self, x_BLD, positions_3BL, attend: Attend, memory=None):
        """(hidden_BLD, memory): `memory` has one entry per layer on axis 0 of its arrays, or is None."""
        c = self.config
        rotary = text_rotary(positions_3BL, c.head_width, c.rope_theta, c.mrope_section)
        layers = nn.scan(
            rematerialised(DecoderLayer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            out_axes=0,
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BLD, memory = layers(c, attend, self.dtype, name="layers")(x_BLD, rotary, memory)
        return self.norm(x_BLD), memory
