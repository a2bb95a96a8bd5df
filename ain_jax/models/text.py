"""The decoder: token embeddings in, hidden states and logits out. Llama, Qwen2 and Gemma are settings of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ain_jax.models.config import TextConfig
from ain_jax.models.layers import Einsum, Embedding, GatedMLP, Norm, kept, rotate, run_layers, stacked, text_rotary
from ain_jax.sharding import constrain

# attend(q_BLNH, k_BLKH, v_BLKH, memory of this layer, **rules of this layer) -> (out_BLNH, what this layer hands back);
# the rules are those of `attention`: window, scale, softcap. In training nothing is remembered: both memories are None.
# `generate.py` decodes by handing in another function and its cache.
Attend = Callable[..., tuple[Any, Any]]


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; what it attends to is decided by `attend`."""

    config: TextConfig
    attend: Attend
    window: int
    scale_out: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, rotary, memory):
        c = self.config
        D, N, K, H = c.width, c.heads, c.kv_heads, c.head_width
        query: dict[str, Any] = {"axes": ("embed", "heads", "head"), "bias": c.qkv_bias, "dtype": self.dtype}
        key: dict[str, Any] = query | {"axes": ("embed", "kv_heads", "head")}
        q_BLNH = Einsum("BLD,DNH->BLNH", (D, N, H), name="q_proj", **query)(x_BLD)
        k_BLKH = Einsum("BLD,DKH->BLKH", (D, K, H), name="k_proj", **key)(x_BLD)
        v_BLKH = Einsum("BLD,DKH->BLKH", (D, K, H), name="v_proj", **key)(x_BLD)
        if c.qk_norm:
            norm: dict[str, Any] = {"axis": "head", "plus_one": c.norm_plus_one, "dtype": self.dtype}
            q_BLNH = Norm(H, c.norm_eps, name="q_norm", **norm)(q_BLNH)
            k_BLKH = Norm(H, c.norm_eps, name="k_norm", **norm)(k_BLKH)
        rules = {
            "window": self.window or None,
            "scale": (c.query_scale or H) ** -0.5,
            "softcap": c.attention_softcap,
        }
        queries, keys = ("rows", "positions", "heads", None), ("rows", "positions", "kv_heads", None)
        q_BLNH = kept(rotate(q_BLNH, rotary), "qkv", queries)
        k_BLKH, v_BLKH = kept(rotate(k_BLKH, rotary), "qkv", keys), kept(v_BLKH, "qkv", keys)
        # Every query of the row sees its keys: those lie whole on each device that has some of the positions.
        k_BLKH, v_BLKH = (constrain(x, ("rows", None, "kv_heads", None)) for x in (k_BLKH, v_BLKH))
        out_BLNH, memory = self.attend(q_BLNH, k_BLKH, v_BLKH, memory, **rules)
        out_BLNH = kept(out_BLNH, "attention", queries)
        project = Einsum(
            "BLNH,NHD->BLD",
            (N, H, D),
            ("heads", "head", "embed"),
            c.o_bias,
            self.scale_out,
            self.dtype,
            name="o_proj",
        )
        return kept(project(out_BLNH), "added", ("rows", "positions", None)), memory


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma 2 and 3 norm what is added once more."""

    config: TextConfig
    attend: Attend
    window: int = 0  # positions that a query sees, its own included; 0 is all
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, rotary, memory):
        c = self.config
        scale_out = (2 * c.layers) ** -0.5  # so that the sum over the residual branches starts at the size of one
        norm = partial(Norm, c.width, c.norm_eps, plus_one=c.norm_plus_one, dtype=self.dtype)
        attention = SelfAttention(c, self.attend, self.window, scale_out, self.dtype, name="self_attn")
        added_BLD, memory = attention(norm(name="input_layernorm")(x_BLD), rotary, memory)
        # The published names: in a layer of four norms, "post_attention" is the one behind the attention.
        before_mlp = "pre_feedforward_layernorm" if c.sandwich_norms else "post_attention_layernorm"
        if c.sandwich_norms:
            added_BLD = norm(name="post_attention_layernorm")(added_BLD)
        x_BLD = x_BLD + added_BLD
        mlp = GatedMLP(c.width, c.mlp_width, scale_out, c.activation, c.mlp_bias, dtype=self.dtype, name="mlp")
        added_BLD = kept(mlp(norm(name=before_mlp)(x_BLD)), "added", ("rows", "positions", None))
        if c.sandwich_norms:
            added_BLD = norm(name="post_feedforward_layernorm")(added_BLD)
        return x_BLD + added_BLD, memory


class Decoder(nn.Module):
    """`embed` ids, run the stacked layers and the last norm (`__call__`); the head is in `MultimodalModel`.

    The kinds of layers, windowed and full, repeat in a pattern. `layers` holds the parameters of its whole turns,
    stacked on axis 0 and run as one scan, `last_layers` those of a last turn that is cut short.
    """

    config: TextConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c.vocabulary, c.width, dtype=self.dtype)
        self.norm = Norm(c.width, c.norm_eps, plus_one=c.norm_plus_one, dtype=self.dtype)

    def embed(self, tokens_BL):
        x_BLD = self.embed_tokens(tokens_BL)
        # The factor is rounded to the compute dtype, as Gemma does it: 55.5 for a width of 3072 in bfloat16.
        return x_BLD * jnp.asarray(self.config.width**0.5, self.dtype) if self.config.scale_embedding else x_BLD

    @nn.compact
    def __call__(self, x_BLD, positions_3BL, attend: Attend, memory=None):
        """(hidden_BLD, memory): by stack, `memory` has one entry per layer on axis 0 of its arrays, or is None."""
        c = self.config
        x_BLD = constrain(x_BLD, ("rows", "positions", None))
        positions_3BL = constrain(positions_3BL, (None, "rows", "positions"))
        turn = partial(text_rotary, positions_3BL, c.head_width, section=c.mrope_section)
        full = turn(theta=c.rope_theta, scaling=c.rope_scaling)
        windowed = turn(theta=c.window_theta) if c.window_theta else full
        memories = {}
        for name, windows, count in c.stacks():
            layers = [DecoderLayer(c, attend, window, self.dtype, parent=None) for window in windows]
            rotaries = [windowed if window else full for window in windows]
            plain = DecoderLayer(c, _nothing, dtype=self.dtype, parent=None)  # its parameters are those of any kind
            variables = stacked(self, name, plain, count, x_BLD, full, None)
            kinds = [
                lambda v, x_BLD, m, layer=layer, rotary=rotary: layer.apply(v, x_BLD, rotary, m)
                for layer, rotary in zip(layers, rotaries, strict=True)
            ]
            before = None if memory is None else memory[name]
            x_BLD, memories[name] = run_layers(variables, kinds, x_BLD, before, self.remat)
        return constrain(self.norm(x_BLD), ("rows", "positions", None)), memories


def _nothing(q_BLNH, k_BLKH, v_BLKH, memory, **rules):
    """Attends to nothing: enough to declare parameters."""
    return q_BLNH, memory
