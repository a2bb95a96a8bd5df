"""Low-rank updates (LoRA, arXiv 2106.09685) as a second tree beside the parameters.

Under the path of an adapted module lies a pair {"a", "b"}; `scale * a·b` is added to its weight:

    model/layers/self_attn/q_proj   weight  layers D N H    a  layers D r      b  layers r N H
    model/layers/self_attn/o_proj   weight  layers N H D    a  layers N H r    b  layers r D
    model/embed_tokens              weight  V D             a  V r             b  r D
    lm_head                         weight  V D             a  D r             b  r V

So `a` has the summed axes and `b` the new ones; the head, published as a linear map from D to V, is one too. Which axes
are summed is read off the weight table, whose layouts put the outputs of a published matrix first.

The scale is folded into nothing: `scaled` gives the Linen collection that the modules add, `merge` the whole weights.

With `dora` (arXiv 2402.09353) a third array stands beside: "magnitude", one number for each output, which the length of
its column of `weight + scale * a·b` is brought to. It begins as the length of the weight's own column:

    model/layers/self_attn/q_proj   magnitude  layers N H     over D
    model/embed_tokens              magnitude  D              over V
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ain_jax.experiment import nearest
from ain_jax.models.config import ModelConfig
from ain_jax.models.layers import TINY, norms
from ain_jax.weights.table import groups, published, sizes

ALL_LINEAR = "all-linear"
EMBEDDING, HEAD = "embed_tokens", "lm_head"


@dataclass(frozen=True)
class Lora:
    """Which modules get a low-rank update, and of what size.

    A target is the end of a module's path ("q_proj", "mlp/up_proj"), the whole of it ("model/embed_tokens"), or
    "all-linear": every matrix of decoder and image encoder but the embedding and the head. `rank_pattern` and
    `alpha_pattern` are keyed alike, the longest matching key deciding.
    """

    rank: int = 0  # 0 adapts nothing
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False  # the lengths of columns learn by themselves, beside their directions

    def __post_init__(self):
        if self.rank < 0 or not self.alpha > 0:
            raise ValueError(f"rank = {self.rank}, alpha = {self.alpha}: expected 0 or more, and above 0")
        ignored = [f.name for f in fields(self) if f.name != "rank" and getattr(self, f.name) != _default(f)]
        if self.rank == 0 and ignored:
            told = " and ".join(f"{name} = {getattr(self, name)}" for name in ignored)
            raise ValueError(f"{told}, but rank = 0 adapts nothing: set rank, or leave it out")
        if not self.targets:
            raise ValueError(f"targets = (): expected names of modules, or {ALL_LINEAR!r}")
        below = {k: v for pattern in (self.rank_pattern, self.alpha_pattern) for k, v in pattern.items() if not v > 0}
        if below:
            raise ValueError(f"rank_pattern, alpha_pattern = {below}: expected ranks and alphas above 0")

    def rank_of(self, path: str) -> int:
        """The rank of the module at this path."""
        return _longest(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Its alpha."""
        return _longest(self.alpha_pattern, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """What its a·b is multiplied by."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Site:
    """A weight that can be adapted: its summed and its new axes, and how many layers are stacked."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: int | None
    is_table: bool  # read by id: the rows are the inputs

    def shapes(self, rank: int, letters: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a and b."""
        stack = () if self.layers is None else (self.layers,)
        inputs, outputs = (tuple(letters[letter] for letter in side) for side in (self.inputs, self.outputs))
        return (*stack, *inputs, rank), (*stack, rank, *outputs)

    def magnitude(self, letters: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the magnitudes."""
        return (*(() if self.layers is None else (self.layers,)), *(letters[letter] for letter in self.outputs))


def sites(config: ModelConfig) -> dict[str, Site]:
    """Every weight of the model that can be adapted, by the path of its module.

    That is: each matrix of the table. Norms and biases are none, nor is the convolution over patches.
    """
    found = {}
    for place in published(config):
        *folders, module, leaf = place.path.split("/")
        theirs, ours = groups(place.layout)
        is_table = module == EMBEDDING
        # Positions, too, are read by id, and there is nothing to learn of low rank about them.
        if leaf != "weight" or len(theirs) != 2 or (not is_table and "embed" in module):
            continue
        inputs, outputs = map(tuple, theirs if is_table else theirs[::-1])
        expected = (*outputs, *inputs) if module == HEAD else (*inputs, *outputs)
        assert [[axis] for axis in expected] == ours, f"{place.path}: a·b has axes {expected}, the weight {ours}"
        found["/".join([*folders, module])] = Site(inputs, outputs, place.layers, is_table)
    return found


def targeted(settings: Lora, config: ModelConfig) -> dict[str, Site]:
    """The sites that the settings name; a target or a pattern that names none is refused."""
    known = sites(config) if settings.rank else {}
    linear = [path for path in known if path.split("/")[-1] not in (EMBEDDING, HEAD)]
    by_target = {t: linear if t == ALL_LINEAR else [p for p in known if _names(t, p)] for t in settings.targets}
    chosen = {path for paths in by_target.values() for path in paths}
    ends = lambda paths: sorted({path.split("/")[-1] for path in paths} | set(paths))
    unmatched = [target for target, paths in by_target.items() if not paths]
    faults = [
        f"targets names {target!r}, which no matrix ends in: {nearest(target, ends(known))}" for target in unmatched
    ]
    for name in ("rank_pattern", "alpha_pattern"):
        keys = [key for key in getattr(settings, name) if not any(_names(key, path) for path in chosen)]
        faults += [f"{name} names {key!r}, which no target ends in: {nearest(key, ends(chosen))}" for key in keys]
    tied_table = settings.dora and config.text.tied and [path for path in chosen if known[path].is_table]
    if tied_table:
        faults.append(
            f"dora adapts {tied_table[0]}, to which this model's head is tied: the columns of the two are not the same "
            "ones, and PEFT gives each a magnitude of its own; take it out of targets, or set dora = False"
        )
    if known and faults:
        raise ValueError("Lora: " + "; ".join(faults))
    return {path: site for path, site in known.items() if path in chosen}


def init(settings: Lora, config: ModelConfig, key, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fresh pairs, float32, as one nested dict; the adapted model is at first the base itself, since a·b is 0.

    `params`, the base, are what magnitudes are measured on.

    As PEFT draws them: `a` uniform up to 1 / sqrt(fan in) and `b` 0. In an embedding the other way round, `a` 0 and `b`
    standard normal, so that ids that are never seen keep their rows. Each is drawn on the host from the key and its own
    path, so a target more or less leaves the others as they are.
    """
    letters = sizes(config)
    seed = np.asarray(jax.random.key_data(key)).tolist()
    flat = {}
    for path, site in targeted(settings, config).items():
        shape_a, shape_b = site.shapes(settings.rank_of(path), letters)
        generator = np.random.default_rng([*seed, zlib.crc32(path.encode())])
        a, b = np.zeros(shape_a, np.float32), np.zeros(shape_b, np.float32)
        if site.is_table:
            b = generator.standard_normal(shape_b, np.float32)
        else:
            bound = math.prod(letters[letter] for letter in site.inputs) ** -0.5
            a = generator.uniform(-bound, bound, shape_a).astype(np.float32)
        flat |= {f"{path}/a": jnp.asarray(a), f"{path}/b": jnp.asarray(b)}
        if settings.dora:
            assert params is not None, "magnitudes are those of the base's weights"
            weight = flatten_dict(dict(params), sep="/")[f"{path}/weight"]
            flat[f"{path}/magnitude"] = _lengths(weight, a, b, _is_head(path))
    return unflatten_dict(flat, sep="/")


def abstract(settings: Lora, config: ModelConfig) -> dict[str, Any]:
    """The shapes and dtypes of `init`, as the same tree of `jax.ShapeDtypeStruct`."""
    letters, flat = sizes(config), {}
    for path, site in targeted(settings, config).items():
        for half, shape in zip("ab", site.shapes(settings.rank_of(path), letters), strict=True):
            flat[f"{path}/{half}"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        if settings.dora:
            flat[f"{path}/magnitude"] = jax.ShapeDtypeStruct(site.magnitude(letters), jnp.float32)
    return unflatten_dict(flat, sep="/")


def pairs(adapters: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(path of the module, a, b) of every pair; a node that is no pair is refused."""
    halves: dict[str, dict[str, Any]] = {}
    for name, array in flatten_dict(dict(adapters), sep="/").items():
        path, _, half = str(name).rpartition("/")
        halves.setdefault(path, {})[half] = array
    own = lambda held: held.keys() - {"magnitude"} == {"a", "b"}
    wrong = [f"{path or 'the root'} holds {', '.join(held)}" for path, held in halves.items() if not own(held)]
    if wrong:
        raise ValueError(f"this is no tree of adapters: {'; '.join(wrong)}; expected a and b under each module's path")
    for path, pair in halves.items():
        yield path, pair["a"], pair["b"]


def magnitudes(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """By path of the module, the magnitudes of DoRA."""
    flat = {str(name): array for name, array in flatten_dict(dict(adapters), sep="/").items()}
    return {name.removesuffix("/magnitude"): m for name, m in flat.items() if name.endswith("/magnitude")}


def scaled(adapters: Mapping[str, Any], settings: Lora) -> dict[str, Any]:
    """The collection "lora" that the modules read: the same tree with each `b` times its scale, in float32.

    model.apply({"params": params, "lora": scaled(adapters, settings)}, ...)
    """
    flat, faults = (
        {f"{path}/magnitude": m for path, m in magnitudes(adapters).items()},
        _magnitude_faults(adapters, settings),
    )
    for path, a, b in pairs(adapters):
        if a.shape[-1] != settings.rank_of(path):
            faults.append(_rank_fault(path, a, settings))
        flat |= {f"{path}/a": a, f"{path}/b": jnp.asarray(b).astype(jnp.float32) * settings.scale_of(path)}
    _stop(faults)
    return unflatten_dict(flat, sep="/")


def merge(params: Mapping[str, Any], adapters: Mapping[str, Any], settings: Lora) -> dict[str, Any]:
    """The parameters with `scale * a·b` added to the adapted weights: summed in float32, kept in the weight's dtype.

    With magnitudes each column of the sum is then brought to its own.

    The head of a tied model is its embedding and changes with it, as it does in the forward.
    """
    flat: dict[str, Any] = dict(flatten_dict(dict(params), sep="/"))
    faults, lengths = _magnitude_faults(adapters, settings), magnitudes(adapters)
    for path, a, b in pairs(adapters):
        weight = flat.get(f"{path}/weight")
        if weight is None:
            known = [name.removesuffix("/weight") for name in flat if name.endswith("/weight")]
            faults.append(f"{path} is no weight of this model: {nearest(path, known)}")
        elif a.shape[-1] != settings.rank_of(path):
            faults.append(_rank_fault(path, a, settings))
        elif (made := _product_shape(path, a.shape, b.shape, weight.ndim)) != weight.shape:
            faults.append(
                f"{path}: a {a.shape} and b {b.shape} make {made or 'no weight'}, expected {tuple(weight.shape)}"
            )
    _stop(faults)
    for path, a, b in pairs(adapters):
        weight, scale = flat[f"{path}/weight"], settings.scale_of(path)
        flat[f"{path}/weight"] = _added(weight, a, b, lengths.get(path), scale, _is_head(path))
    return unflatten_dict(flat, sep="/")


@partial(jax.jit, static_argnames="is_head")
def _added(weight, a, b, magnitude, scale: float, is_head: bool):
    stack, rank = weight.shape[: _stacked(a.shape, b.shape, weight.ndim)], a.shape[-1]
    a = a.astype(jnp.float32).reshape(*stack, -1, rank)
    b = b.astype(jnp.float32).reshape(*stack, rank, -1)
    # An accelerator's default precision would round both to bfloat16 first.
    product = scale * jnp.matmul(a, b, precision="highest")
    product = (product.mT if is_head else product).reshape(weight.shape)
    total = weight.astype(jnp.float32) + product
    if magnitude is not None:
        outputs = magnitude.ndim - len(stack)
        first, last = (len(stack) + outputs, weight.ndim) if is_head else (len(stack), weight.ndim - outputs)
        square = jnp.sum(jnp.square(total), axis=tuple(range(first, last)), keepdims=True)
        length = jnp.sqrt(jnp.maximum(square, TINY))
        total = total * (jnp.expand_dims(magnitude, tuple(range(first, last))) / length)
    return total.astype(weight.dtype)


def _lengths(weight, a, b, is_head: bool) -> jax.Array:
    """The lengths of a weight's columns beside a pair, of a stack layer by layer."""
    stacked = _stacked(a.shape, b.shape, weight.ndim)
    one = lambda w, a, b: norms(w.T if is_head else w, a, b, a.ndim - 1)
    each = (lambda *of_all: jax.lax.map(lambda of_layer: one(*of_layer), of_all)) if stacked else one
    return jax.jit(each)(weight, a, b)


def _default(setting: Field) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def axis_names(adapters: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the axes of every `a` and `b`, from those of the weights; the rank's own, "rank", stays whole."""
    names: dict[str, Any] = dict(flatten_dict(dict(params), sep="/"))
    flat = {}
    for path, a, b in pairs(adapters):
        axes = names[f"{path}/weight"]
        stacked = _stacked(a.shape, b.shape, len(axes))
        stack, axes = axes[:stacked], axes[stacked:]
        outputs = b.ndim - stacked - 1
        inputs, new = (axes[outputs:], axes[:outputs]) if _is_head(path) else (axes[:-outputs], axes[-outputs:])
        flat |= {f"{path}/a": (*stack, *inputs, "rank"), f"{path}/b": (*stack, "rank", *new)}
        if path in magnitudes(adapters):
            flat[f"{path}/magnitude"] = (*stack, *new)
    return unflatten_dict(flat, sep="/")


def count(adapters: Mapping[str, Any]) -> int:
    """How many numbers the pairs hold, magnitudes among them."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapters))


def _names(end: str, path: str) -> bool:
    return path == end or path.endswith("/" + end)


def _longest(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    matching = [key for key in pattern if _names(key, path)]
    return pattern[max(matching, key=len)] if matching else default


def _is_head(path: str) -> bool:
    return path.split("/")[-1] == HEAD


def _stacked(a: tuple[int, ...], b: tuple[int, ...], ndim: int) -> int:
    """1 where the axis of the layers stands before the axes of both a and b, 0 where there is none."""
    return len(a) + len(b) - 2 - ndim


def _product_shape(path: str, a: tuple[int, ...], b: tuple[int, ...], ndim: int) -> tuple[int, ...] | None:
    stacked = _stacked(a, b, ndim)
    if stacked not in (0, 1) or b[stacked] != a[-1] or a[:stacked] != b[:stacked]:
        return None
    inputs, outputs = a[stacked:-1], b[stacked + 1 :]
    return (*a[:stacked], *((*outputs, *inputs) if _is_head(path) else (*inputs, *outputs)))


def _rank_fault(path: str, a: Any, settings: Lora) -> str:
    return f"{path}: a {tuple(a.shape)} has rank {a.shape[-1]}, the settings say {settings.rank_of(path)}"


def _magnitude_faults(adapters: Mapping[str, Any], settings: Lora) -> list[str]:
    found, faults = magnitudes(adapters), []
    for path, a, b in pairs(adapters):
        if (path in found) != settings.dora:
            faults.append(
                f"{path} has {'a' if path in found else 'no'} magnitude, the settings say dora = {settings.dora}"
            )
        elif settings.dora and found[path].size * a.shape[-1] != b.size:
            faults.append(
                f"{path}: magnitude {tuple(found[path].shape)}, expected one number for each output of b {b.shape}"
            )
    return faults


def _stop(faults: list[str]) -> None:
    if faults:
        raise ValueError(f"adapters, {len(faults)} faults:\n  " + "\n  ".join(faults))
