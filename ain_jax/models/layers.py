"""The parts that layers are made of, and the legend of axis letters for the whole project.

B rows            L positions in a row      S key positions         T gathered positions
D width           N query heads             K key/value heads       G = N / K, query heads that share a key
H head width      F MLP width               V vocabulary rows       h = H / 2, rotary frequencies
P patches in a row, K values of a patch (where no key head is near), E image width, M merged image features in a row

Each parameter is declared once, by `Einsum`, `Norm` or `Embedding`, with shape, axis names and initializer. Axis names
are mapped to the mesh in `ain_jax/sharding.py`. Means and the softmax are in float32, whatever the compute dtype.
"""

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ain_jax.models.config import RopeScaling
from ain_jax.sharding import constrain, gathered, parameters_are_cut

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


def low_rank(spec: str, x, a, b):
    """What a pair of adapters adds to `einsum(spec, x, weight)`: (x·a)·b, the weight a·b never made.

    "BLNH,NHD->BLD" becomes "BLNH,NHr->BLr" and "BLr,rD->BLD".
    """
    (given, letters), output = spec.split("->")[0].split(","), spec.split("->")[1]
    summed = "".join(letter for letter in letters if letter not in output)
    new = "".join(letter for letter in letters if letter in output)
    middle = "".join(letter for letter in given if letter not in summed) + "r"
    return jnp.einsum(f"{middle},r{new}->{output}", jnp.einsum(f"{given},{summed}r->{middle}", x, a), b)


TINY = float(np.finfo(np.float32).tiny)  # the square of a column of zeros, as a padded row of a head is


def norms(weight, a, b, inputs: int):
    """The length of each column of `weight + a·b`, over its first `inputs` axes, in float32; the sum is never made.

    |w + Ab|^2 = |w|^2 + 2 b·(A^T w) + b·(A^T A) b of a column w, where b is the same column of `b`.
    """
    weight, a, b = (x.astype(jnp.float32) for x in (weight, a, b))
    axes = tuple(range(inputs))
    # An accelerator's default precision would round both to bfloat16 first.
    over = partial(jnp.tensordot, axes=(axes, axes), precision="highest")
    turned = jnp.tensordot(over(a, a), b, 1, precision="highest")
    square = jnp.sum(jnp.square(weight), axes) + jnp.sum(b * (2 * over(a, weight) + turned), axis=0)
    return jnp.sqrt(jnp.maximum(square, TINY))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x, weight, axes: int):
    """`x` and `weight` contracted over the last and the first `axes` axes, as `jnp.tensordot` does it.

    Its gradients differ from those that JAX derives in one thing: where a product needs an operand turned over, that is
    the narrower one. What computes the wide one is then not computed a second time, turned over, as XLA for CPUs does.
    """
    return jnp.tensordot(x, weight, axes)


def _product_and_kept(x, weight, axes: int):
    # What is frozen gets no gradient, so that the other operand need not be kept.
    kept = x.value if weight.perturbed else None, weight.value if x.perturbed else None
    return jnp.tensordot(x.value, weight.value, axes), kept


def _product_gradients(axes: int, kept, by_y):
    x, weight = kept
    if isinstance(by_y, jax.custom_derivatives.SymbolicZero):
        return None, None
    by_x = by_weight = None
    if weight is not None:
        new = weight.ndim - axes
        last, rest = tuple(range(by_y.ndim - new, by_y.ndim)), tuple(range(axes, weight.ndim))
        by_x = jax.lax.dot_general(by_y, weight, ((last, rest), ((), ())))
    if x is not None:
        over = tuple(range(x.ndim - axes))
        if x.size <= by_y.size:
            by_weight = jax.lax.dot_general(x, by_y, ((over, over), ((), ())))
        else:
            by_weight = jax.lax.dot_general(by_y, x, ((over, over), ((), ())))
            new = by_weight.ndim - axes
            by_weight = jnp.transpose(by_weight, (*range(new, by_weight.ndim), *range(new)))
    return by_x, by_weight


product.defvjp(_product_and_kept, _product_gradients, symbolic_zeros=True)


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
        given, letters = inputs.split(",")
        summed = [letter not in output for letter in letters]
        axes = sum(summed)
        # Then no operand is turned over: einsum sums "NH" as "HN", and copies the weight for it.
        assert all(summed[:axes]) and given.endswith(letters[:axes]), f"{self.spec}: sum the last axes of x, in order"
        fan_in = math.prod(size for size, gone in zip(self.shape, summed, strict=True) if gone)
        init = declared(Normal(self.scale / math.sqrt(fan_in)), self.axes)
        weight: Any = self.param("weight", init, self.shape, jnp.float32)
        y: Any = product(x.astype(self.dtype), gathered(weight.astype(self.dtype), self.axes), axes)
        if self.has_variable("lora", "a"):
            a, b = _pair(self)
            a, b = gathered(a, (*self.axes[:axes], "rank")), gathered(b, ("rank", *self.axes[axes:]))
            y = y + low_rank(self.spec, x.astype(self.dtype), a, b)
            if self.has_variable("lora", "magnitude"):
                share = _share(self, weight, axes)
                y = (y.astype(jnp.float32) * jnp.expand_dims(share, tuple(range(y.ndim - share.ndim)))).astype(y.dtype)
        if self.bias:
            kept = [i for i, gone in enumerate(summed) if not gone]
            assert output.endswith("".join(letters[i] for i in kept)), f"{self.spec}: the bias needs the new axes last"
            new = tuple(self.axes[i] for i in kept)
            bias: Any = self.param(
                "bias", declared(Constant(0.0), new), tuple(self.shape[i] for i in kept), jnp.float32
            )
            bias = gathered(bias.astype(self.dtype), new)
            y = y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))
        return y


class Norm(nn.Module):
    """`x` divided by its root mean square over the last axis, times a weight; with `center`, LayerNorm with a bias.

    With `plus_one` the weight is stored as its difference from 1 and multiplied in float32, as Gemma does it. LayerNorm
    is rounded to the compute dtype once, at its end, as torch does it; the other norm is before its weight, as Llama's.
    """

    width: int
    eps: float
    axis: str = "embed"
    center: bool = False
    plus_one: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        init = declared(Constant(0.0 if self.plus_one else 1.0), (self.axis,))
        weight: Any = gathered(self.param("weight", init, (self.width,), jnp.float32), (self.axis,))
        leading = tuple(range(x.ndim - 1))
        y = x.astype(jnp.float32)
        if self.center:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.plus_one:
            return (y * (1.0 + jnp.expand_dims(weight.astype(jnp.float32), leading))).astype(self.dtype)
        if self.center:
            bias: Any = self.param("bias", declared(Constant(0.0), (self.axis,)), (self.width,), jnp.float32)
            bias = gathered(bias, (self.axis,))
            weight_E, bias_E = (jnp.expand_dims(x.astype(jnp.float32), leading) for x in (weight, bias))
            return (y * weight_E + bias_E).astype(self.dtype)
        return y.astype(self.dtype) * jnp.expand_dims(weight.astype(self.dtype), leading)


class Embedding(nn.Module):
    """One row per id. The same table, declared once, reads ids (`__call__`) and scores hidden states (`scores`)."""

    vocabulary: int
    width: int
    stddev: float = 0.02
    dtype: Any = jnp.float32
    head: bool = False  # it only scores, and its adapters are those of a linear map from D to V

    def setup(self):
        init = declared(Normal(self.stddev), ("vocab", "embed"))
        self.weight: Any = self.param("weight", init, (self.vocabulary, self.width), jnp.float32)

    def __call__(self, tokens_BL):
        # An id outside the table reads NaN instead of a wrong row.
        # Each device reads its part of the width for the rows of all that share the table, and hands them round: the
        # table is never gathered, which is far larger than what is read.
        tokens_BL = constrain(tokens_BL, ("readers", None))
        read = partial(jnp.take, indices=tokens_BL, axis=0, mode="fill", fill_value=jnp.nan)
        x_BLD = read(self.weight).astype(self.dtype)
        if self.has_variable("lora", "a"):
            a_Vr, b_rD = _pair(self)
            x_BLD = x_BLD + jnp.einsum("BLr,rD->BLD", read(a_Vr), b_rD)
            if self.has_variable("lora", "magnitude"):
                share_D = _share(self, self.weight, 1)
                x_BLD = (x_BLD.astype(jnp.float32) * share_D[None, None]).astype(self.dtype)
        for axes in (("readers", None, "embed"), ("readers", "positions", "read"), ("rows", "positions", None)):
            x_BLD = constrain(x_BLD, axes)
        return x_BLD

    def factors(self, x) -> list[tuple[Any, Any]]:
        """Pairs (y, w_V.) whose products y @ w.T sum to the scores: the table, and adapters where there are any."""
        x = x.astype(self.dtype)
        pairs = [(x, self.weight)]
        if self.has_variable("lora", "a"):
            a, b = _pair(self)
            first, second_Vr = (a, b.T) if self.head else (b.T, a)
            pairs.append((jnp.einsum("...D,Dr->...r", x, gathered(first, ("embed", "rank"))), second_Vr))
        if self.head and self.has_variable("lora", "magnitude"):
            share_V = _share(self, self.weight.T, 1)
            pairs = [(y, (w.astype(jnp.float32) * share_V[:, None]).astype(self.dtype)) for y, w in pairs]
        return pairs

    def scores(self, x):
        """Sums are in float32, whatever the compute dtype."""
        product = partial(jnp.einsum, "...D,VD->...V", preferred_element_type=jnp.float32)
        whole = lambda w, axis: gathered(w.astype(self.dtype), ("vocab", axis))
        factors = zip(self.factors(x), ("embed", "rank"), strict=False)
        scores = reduce(operator.add, [product(y, whole(w, axis)) for (y, w), axis in factors])
        return constrain(scores, ("rows", "positions", "vocab")) if x.ndim == 3 else scores


def _pair(module: nn.Module) -> list[Any]:
    """The module's adapters a and b, of the collection that `lora.scaled` makes."""
    return [module.get_variable("lora", half).astype(module.dtype) for half in ("a", "b")]


def _share(module: nn.Module, weight: Any, inputs: int) -> Any:
    """What DoRA multiplies each output of a module by: its magnitude over the length of its column.

    No gradient goes through the length (arXiv 2402.09353, section 4.3).
    """
    a, b, magnitude = (module.get_variable("lora", name) for name in ("a", "b", "magnitude"))
    return magnitude / jax.lax.stop_gradient(norms(weight, a, b, inputs))


def frequencies(count: int, theta: Any) -> Array:
    """The angles per position of `count` rotary pairs: 1, theta^(-1/count), theta^(-2/count) ..."""
    return 1.0 / (theta ** (jnp.arange(count, dtype=jnp.float32) / count))


def scaled_frequencies(count: int, theta: float, scaling: RopeScaling | None, length: Any) -> tuple[Array, float]:
    """(rates_h, factor): angles per position, stretched for long texts, and what cosine and sine are multiplied by.

    `length` is the number of positions in use, which "dynamic" alone asks for. The kinds are those of transformers'
    modeling_rope_utils: linear (positions divided), dynamic (NTK: a base that grows with the length), llama3 (slow
    pairs divided, fast ones kept, a ramp between) and yarn (arXiv 2309.00071, the same by turns, and warmer scores).
    """
    if scaling is None:
        return frequencies(count, theta), 1.0
    s = scaling
    if s.kind == "dynamic":
        grown = jnp.maximum(length, s.original_positions).astype(jnp.float32) / s.original_positions
        return frequencies(count, theta * (s.factor * grown - (s.factor - 1)) ** (count / (count - 1))), 1.0
    rates_h = frequencies(count, theta)
    if s.kind == "linear":
        return rates_h / s.factor, 1.0
    if s.kind == "llama3":
        turns_h = s.original_positions * rates_h / (2 * math.pi)
        kept_h = jnp.clip((turns_h - s.low) / (s.high - s.low), 0.0, 1.0)
        return rates_h * (kept_h + (1 - kept_h) / s.factor), 1.0

    def pair_with(turns: float) -> float:
        """The pair, counted from 0 and in fractions, that turns so often within the original length."""
        return count * math.log(s.original_positions / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_with(s.high), pair_with(s.low)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * count - 1)
    ramp_h = (jnp.arange(count, dtype=jnp.float32) - low) / max(high - low, 0.001)
    kept_h = 1 - jnp.clip(ramp_h, 0.0, 1.0)
    return rates_h * (kept_h + (1 - kept_h) / s.factor), s.cosine_factor()


def text_rotary(
    positions_3BL, head_width: int, theta: float, section: tuple[int, ...] | None, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """(cos_BLh, sin_BLh): the first `section[0]` pairs turn with time, the next with height, the last with width.

    head width 16, section (2, 3, 3): pair  0 1 2 3 4 5 6 7
                                      axis  t t h h h w w w
    """
    half = head_width // 2
    rates_h, factor = scaled_frequencies(half, theta, scaling, positions_3BL.max() + 1)
    starts = [0, *itertools.accumulate(section or (half,))]
    angles = [
        positions_3BL[axis][:, :, None].astype(jnp.float32) * rates_h[None, None, start:stop]
        for axis, (start, stop) in enumerate(itertools.pairwise(starts))
    ]
    angle_BLh = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle_BLh) * factor, jnp.sin(angle_BLh) * factor


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


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(x * 1.702),
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), the MLP of Llama, Qwen2 and Gemma."""

    width: int
    mlp_width: int
    scale_out: float
    activation: str = "silu"
    bias: bool = False
    axes: tuple[str, str] = ("embed", "mlp")
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        first: dict[str, Any] = {"shape": (self.width, self.mlp_width), "axes": self.axes}
        rest: dict[str, Any] = {"bias": self.bias, "dtype": self.dtype}
        gate_BLF = Einsum("BLD,DF->BLF", name="gate_proj", **first, **rest)(x_BLD)
        up_BLF = Einsum("BLD,DF->BLF", name="up_proj", **first, **rest)(x_BLD)
        narrow = {"shape": (self.mlp_width, self.width), "axes": self.axes[::-1], "scale": self.scale_out}
        down = Einsum("BLF,FD->BLD", name="down_proj", **narrow, **rest)
        gate_BLF, up_BLF = (kept(x, "mlp", ("rows", "positions", self.axes[1])) for x in (gate_BLF, up_BLF))
        return down(ACTIVATIONS[self.activation](gate_BLF) * up_BLF)


class PlainMLP(nn.Module):
    """fc2(act(fc1(x))), with biases: the MLP of image encoders."""

    width: int
    mlp_width: int
    scale_out: float
    activation: str
    axes: tuple[str, str] = ("vision_embed", "vision_mlp")
    dtype: Any = jnp.float32
    places: tuple[str, str | None] = ("rows", "positions")  # the first axes of x

    @nn.compact
    def __call__(self, x_BPE):
        E, F = self.width, self.mlp_width
        wide_BPF = Einsum("BPE,EF->BPF", (E, F), self.axes, True, dtype=self.dtype, name="fc1")(x_BPE)
        narrow = Einsum("BPF,FE->BPE", (F, E), self.axes[::-1], True, self.scale_out, self.dtype, name="fc2")
        wide_BPF = kept(wide_BPF, "mlp", (*self.places, self.axes[1]))
        return narrow(ACTIVATIONS[self.activation](wide_BPF))


def kept(x, name: str, axes: Sequence[str | None]):
    """`x` laid over the mesh by its axes (`sharding.constrain`), under a name that the policies of REMAT know it by."""
    return checkpoint_name(constrain(x, axes), name)


HOST = "pinned_host"
_POLICIES = jax.checkpoint_policies
_OFFLOAD = partial(_POLICIES.save_and_offload_only_these_names, offload_src="device", offload_dst=HOST)
# What of a layer is kept for the backward pass; the rest is computed again there. In growing memory: `full` keeps the
# layer's input alone, and so does `offload`, in the host's memory; `attention` also what attention gave; `minimal` all
# that is of the width of heads or model, that is all matrix products but the wide ones of the MLP, and
# `offload_minimal` the same in the host's memory; `dots` every matrix product with a parameter; `none` everything.
REMAT = {
    "none": None,
    "full": _POLICIES.nothing_saveable,
    "offload": _OFFLOAD(names_which_can_be_saved=[], names_which_can_be_offloaded=["layer"]),
    "attention": _POLICIES.save_only_these_names("attention"),
    "minimal": _POLICIES.save_only_these_names("qkv", "attention", "added"),
    "offload_minimal": _OFFLOAD(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer", "qkv", "attention", "added"]
    ),
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
}


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything but parameters gathered from other devices: kept, they would be whole on every device."""
    return primitive.name != "sharding_constraint"


def check_remat(remat: str) -> None:
    """ValueError where there is no such policy, or the devices of this process cannot keep in the host's memory."""
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r}: expected one of {', '.join(REMAT)}")
    device: Any = jax.local_devices()[0]
    mesh = jax.sharding.get_abstract_mesh()
    described = not mesh.empty and getattr(mesh.abstract_device, "platform", device.platform) != device.platform
    memories = [memory.kind for memory in device.addressable_memories()]
    if remat.startswith("offload") and not described and HOST not in memories:
        raise ValueError(
            f"remat={remat!r} keeps activations in the host's memory ({HOST}), and devices of platform "
            f"{device.platform} have {', '.join(memories)} alone: take "
            f"{', '.join(name for name in REMAT if not name.startswith('offload'))}"
        )


def stacked(module: nn.Module, name: str, layer: nn.Module, count: int, *inputs: Any) -> Any:
    """The variables of `count` layers like `layer`, the layers on axis 0 of each array: {"params": ...}.

    Declared where they are new. `layer` has no parent; `inputs` are what it is called with. Where the model is applied
    with adapters (`models/lora.py`), theirs stand beside under "lora". Layers that are `apart` are given as they are.
    """
    given = module.get_variable("params", name)
    if isinstance(given, tuple):
        return {"params": given}

    def declare(key):
        boxes = jax.vmap(lambda k: layer.init(k, *inputs)["params"])(jax.random.split(key, count))
        is_box = lambda x: isinstance(x, Declared)
        return jax.tree.map(lambda box: box.replace(names=("layers", *box.names)), boxes, is_leaf=is_box)

    variables: dict[str, Any] = {"params": module.param(name, declare)}
    if module.has_variable("lora", name):
        variables["lora"] = module.get_variable("lora", name)
    return variables


def apart(stack: Any) -> Any:
    """The parameters of each layer of a stack, in a tuple, or the stack itself where that would take memory.

    On a CPU the layers share the memory of the stack. XLA for CPUs copies a layer out of its stack to read it, which is
    much where little is done with it: a third of the time of decoding a token.
    """
    leaves = jax.tree.leaves(stack)
    if any(len(leaf.devices()) > 1 or next(iter(leaf.devices())).platform != "cpu" for leaf in leaves):
        return stack
    seen = jax.tree.map(np.asarray, stack)
    of_layer = lambda i: jax.tree.map(lambda array: jax.device_put(array[i], may_alias=True), seen)
    return tuple(map(of_layer, range(len(leaves[0]))))


def run_layers(variables: Any, kinds: Sequence[Any], x: Any, memory: Any, remat: str) -> tuple[Any, Any]:
    """(x, memory) behind all layers of a stack (see `stacked`), the functions `kinds` taking turns.

    A kind is called as `kind(variables of one layer, x, memory of one layer)` and gives x and memory back. One turn of
    the kinds is the body of a scan, so compile time grows with the turn, not with the layers. Layers that are `apart`
    run one by one, and their memories are a tuple.
    """
    check_remat(remat)
    # Under a name, so that the layer's input can be kept elsewhere than where the scan has it.
    kinds = [lambda v, x, m, kind=kind: kind(v, checkpoint_name(x, "layer"), m) for kind in kinds]
    policy = REMAT[remat]
    if policy is None and parameters_are_cut():
        policy = _all_but_gathered
    if policy is not None:
        kinds = [jax.checkpoint(kind, prevent_cse=False, policy=policy) for kind in kinds]
    size = len(kinds)
    if isinstance(variables["params"], tuple):
        memories = []
        for i, params in enumerate(variables["params"]):
            x, layer_memory = kinds[i % size]({"params": params}, x, None if memory is None else memory[i])
            memories.append(layer_memory)
        return x, tuple(memories)
    in_turns = (variables, memory)
    if size > 1:  # with an axis of size 1, XLA for CPUs copies the whole stack, when decoding for every token
        in_turns = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), in_turns)

    def turn(x, one_turn):
        memories = []
        for i, kind in enumerate(kinds):
            of_layer, layer_memory = jax.tree.map(lambda leaf, i=i: leaf[i] if size > 1 else leaf, one_turn)
            x, layer_memory = kind(of_layer, x, layer_memory)
            memories.append(layer_memory)
        if size == 1:
            return x, memories[0]
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *memories)

    x, memory = jax.lax.scan(turn, x, in_turns)
    return x, memory if size == 1 else jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), memory)
