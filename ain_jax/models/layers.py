"""The parts that layers are made of, and the legend of axis letters for the whole project.

B rows            L positions in a row      S key positions         T gathered positions
D width           N query heads             K key/value heads       G = N / K, query heads that share a key
H head width      F MLP width               V vocabulary rows       h = H / 2, rotary frequencies
P patches in a row, C values of a patch, E image width, M merged image features in a row

Each parameter is declared once, by `Einsum`, `Norm` or `Embedding`, with shape, axis names and initializer. Axis names
are mapped to the mesh in `ain_jax/sharding.py`. Means and the softmax are in float32, whatever the compute dtype.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclass(frozen=True)
class Normal:
    """An initializer: normal values around 0."""

    stddev: float

    def __call__(self, key, shape, dtype):
        return jax.random.normal(key, shape, dtype) * jnp.asarray(self.stddev, dtype)

    def draw(self, generator: np.random.Generator, shape) -> np.ndarray:
        """The same on the host, in float32."""
        return generator.standard_normal(shape, np.float32) * np.float32(self.stddev)


@dataclass(frozen=True)
class Constant:
    """An initializer: one value everywhere."""

    value: float

    def __call__(self, key, shape, dtype):
        return jnp.full(shape, self.value, dtype)

    def draw(self, generator: np.random.Generator, shape) -> np.ndarray:
        """The same on the host, in float32."""
        return np.full(shape, self.value, np.float32)


@flax.struct.dataclass
class Declared(nn.LogicallyPartitioned):
    """A parameter as it was declared: its value with the names of its axes and its initializer."""

    initializer: Normal | Constant = flax.struct.field(pytree_node=False, default=Constant(0.0))


def declared(initializer: Normal | Constant, axes: tuple[str, ...]) -> Callable[..., Any]:
    """What `self.param` calls: the initial value, boxed with axis names and initializer."""
    return lambda key, shape, dtype: Declared(initializer(key, shape, dtype), axes, initializer=initializer)


class Einsum(nn.Module):
    """`x` contracted with one weight as `spec` says, e.g. "BLD,DNH->BLNH", plus a bias over the new axes."""

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias: bool = False
    scale: float = 1.0  # of the initial weights, beside 1 / sqrt(fan in)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        inputs, output = self.spec.split("->")
        letters = inputs.split(",")[1]
        summed = [letter not in output for letter in letters]
        fan_in = math.prod(size for size, gone in zip(self.shape, summed, strict=True) if gone)
        init = declared(Normal(self.scale / math.sqrt(fan_in)), self.axes)
        weight: Any = self.param("weight", init, self.shape, jnp.float32)
        y = jnp.einsum(self.spec, x.astype(self.dtype), weight.astype(self.dtype))
        if self.bias:
            kept = [i for i, gone in enumerate(summed) if not gone]
            assert output.endswith("".join(letters[i] for i in kept)), f"{self.spec}: the bias needs the new axes last"
            init = declared(Constant(0.0), tuple(self.axes[i] for i in kept))
            bias: Any = self.param("bias", init, tuple(self.shape[i] for i in kept), jnp.float32)
            y = y + jnp.expand_dims(bias.astype(self.dtype), tuple(range(y.ndim - bias.ndim)))
        return y


class Norm(nn.Module):
    """`x` divided by its root mean square over the last axis, times a weight; with `center`, LayerNorm with a bias."""

    width: int
    eps: float
    axis: str = "embed"
    center: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        weight: Any = self.param("weight", declared(Constant(1.0), (self.axis,)), (self.width,), jnp.float32)
        leading = tuple(range(x.ndim - 1))
        y = x.astype(jnp.float32)
        if self.center:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y.astype(self.dtype) * jnp.expand_dims(weight.astype(self.dtype), leading)
        if self.center:
            bias: Any = self.param("bias", declared(Constant(0.0), (self.axis,)), (self.width,), jnp.float32)
            y = y + jnp.expand_dims(bias.astype(self.dtype), leading)
        return y


class Embedding(nn.Module):
    """One row per id. The same table, declared once, reads ids (`__call__`) and scores hidden states (`scores`)."""

    vocabulary: int
    width: int
    stddev: float = 0.02
    dtype: Any = jnp.float32

    def setup(self):
        init = declared(Normal(self.stddev), ("vocab", "embed"))
        self.weight: Any = self.param("weight", init, (self.vocabulary, self.width), jnp.float32)

    def __call__(self, tokens_BL):
        # An id outside the table reads NaN instead of a wrong row.
        return jnp.take(self.weight, tokens_BL, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype)

    def scores(self, x):
        return jnp.einsum("...D,VD->...V", x.astype(self.dtype), self.weight.astype(self.dtype))


def frequencies(count: int, theta: float) -> Array:
    """The angles per position of `count` rotary pairs: 1, theta^(-1/count), theta^(-2/count) ..."""
    return 1.0 / (theta ** (jnp.arange(count, dtype=jnp.float32) / count))


def text_rotary(positions_3BL, head_width: int, theta: float, section: tuple[int, ...] | None) -> tuple[Array, Array]:
    """(cos_BLh, sin_BLh): the first `section[0]` pairs turn with time, the next with height, the last with width.

    head width 16, section (2, 3, 3): pair  0 1 2 3 4 5 6 7
                                      axis  t t h h h w w w
    """
    half = head_width // 2
    rates_h = frequencies(half, theta)
    starts = [0, *itertools.accumulate(section or (half,))]
    angles = [
        positions_3BL[axis][:, :, None].astype(jnp.float32) * rates_h[None, None, start:stop]
        for axis, (start, stop) in enumerate(itertools.pairwise(starts))
    ]
    angle_BLh = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle_BLh), jnp.sin(angle_BLh)


def vision_rotary(patch_positions_BP2, head_width: int, theta: float = 10_000.0) -> tuple[Array, Array]:
    """(cos_BPh, sin_BPh): the first half of the pairs turns with the patch's row, the second with its column."""
    rates = frequencies(head_width // 4, theta)[None, None, :]
    rows, columns = (patch_positions_BP2[:, :, axis][:, :, None].astype(jnp.float32) for axis in (0, 1))
    angle_BPh = jnp.concatenate([rows * rates, columns * rates], axis=-1)
    return jnp.cos(angle_BPh), jnp.sin(angle_BPh)


def rotate(x_BLNH, rotary: tuple[Array, Array]):
    """`x` with value i and value i + H/2 of each head turned as a pair by the angle of its position."""
    cos, sin = (table_BLh[:, :, None, :] for table_BLh in rotary)
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLNH.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the MLP of Llama and Qwen2."""

    width: int
    mlp_width: int
    scale_out: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        wide = {"shape": (self.width, self.mlp_width), "axes": ("embed", "mlp"), "dtype": self.dtype}
        gate_BLF = Einsum("BLD,DF->BLF", name="gate_proj", **wide)(x_BLD)
        up_BLF = Einsum("BLD,DF->BLF", name="up_proj", **wide)(x_BLD)
        down = Einsum(
            "BLF,FD->BLD",
            (self.mlp_width, self.width),
            ("mlp", "embed"),
            False,
            self.scale_out,
            self.dtype,
            name="down_proj",
        )
        return down(jax.nn.silu(gate_BLF) * up_BLF)


REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """The layer, whose inner values are computed again in the backward pass as the policy named `remat` says."""
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r}: expected one of {', '.join(REMAT)}")
    return layer if remat == "none" else nn.remat(layer, prevent_cse=False, policy=REMAT[remat])
