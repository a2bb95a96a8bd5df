"""Schedule, parameter groups and what stays frozen -> one optax transformation."""

import dataclasses
import fnmatch
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import optax
from optax import contrib

from ain_jax.experiment import nearest


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled weight decay (arXiv 1711.05101) on matrices alone.

    `rates` multiplies the learning rate of the modules that a key names; 0 freezes them:

        {"visual": 0.1, "visual/merger": 1.0, "model/embed_tokens": 0.0, "*norm*": 0.0, "q_proj": 2.0, "bias": 0.0}

    A key is a name or names that follow one another in a path (see `rate_tree`), `*` standing for any letters of one.
    """

    learning_rate: float
    # Muon (K. Jordan et al., 2024) for the matrices inside the layers, at this rate; the embedding, the head, the patch
    # embedding, biases and norms stay with AdamW at `learning_rate`. 0 leaves all to AdamW. In a few hundred steps from
    # random weights it gets markedly further.
    matrix_rate: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "flat"] = "cosine"
    final_share: float = 0.1  # of the peak rate, reached at the last step
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    # Where a gradient is far below eps, Adam's step shrinks with it. Rows of a large vocabulary that a small corpus
    # never shows get tiny gradients, all in one direction; with optax's 1e-8 they are scaled up to full steps, and
    # the tokens become impossible instead of unlikely.
    eps: float = 1e-8
    clip: float = 1.0  # global norm of the gradient; 0 does not clip
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # "new": the rows of an extension's new pieces learn, in the embedding and in a head of its own, and nothing else;
    # Adam's moments are kept for them alone.
    rows: Literal["all", "new"] = "all"

    def __post_init__(self):
        if not self.learning_rate > 0 or self.matrix_rate < 0:
            raise ValueError(
                f"learning_rate = {self.learning_rate}, matrix_rate = {self.matrix_rate}: "
                "expected above 0, and 0 or more"
            )
        if self.warmup_steps < 0 or not 0 <= self.final_share <= 1:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps}, final_share = {self.final_share}: "
                "expected 0 or more steps and a share between 0 and 1"
            )
        below = {k: v for k, v in self.rates.items() if v < 0}
        if below:
            raise ValueError(f"rates = {below}: expected multiples of 0 or more")


def schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """The learning rate of each step: a linear warm-up, then a decay to `final_share` of the peak at the last."""
    peak, after = settings.learning_rate, max(1, steps - 1 - settings.warmup_steps)
    if settings.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, after, settings.final_share)
    elif settings.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * settings.final_share, after)
    else:
        decay = optax.constant_schedule(peak)
    if not settings.warmup_steps:
        return decay
    # The first step already learns: step s of w warm-up steps runs at (s + 1) / w of the peak.
    warmup = optax.linear_schedule(peak / settings.warmup_steps, peak, max(1, settings.warmup_steps - 1))
    return optax.join_schedules([warmup, decay], [settings.warmup_steps])


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as text, "model/layers/self_attn/q_proj/kernel"."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)


def rate_tree(params: Any, rates: Mapping[str, float]) -> Any:
    """The multiple of the learning rate of each parameter, as a tree of floats shaped like `params`.

    A key names what lies under it wherever its names follow one another in a path. Of several keys the one that ends
    deeper in the path decides, then the one of more names, then the one with more letters beside its `*`:

        visual/blocks/attn/proj/weight    "visual" 0.1 and "attn/proj" 1.0 give 1.0; "visual" and "visual/b*" the latter

    ValueError: a key that names nothing, two that decide alike and differ, or everything frozen.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for key in rates:
        if not any(_depth(name, key) for name in names):
            known = {"/".join(n.split("/")[:i]) for n in names for i in range(1, n.count("/") + 2)}
            known |= {part for name in names for part in name.split("/")}
            raise ValueError(
                f"Optimizer.rates names {key!r}, which no parameter lies under: {nearest(key, sorted(known))}"
            )

    def rate(path, _):
        name = path_name(path)
        ranks = {key: (_depth(name, key), key.strip("/").count("/"), len(key.replace("*", ""))) for key in rates}
        best = [key for key, rank in ranks.items() if rank[0] and rank == max(ranks.values())]
        if len({rates[key] for key in best}) > 1:
            raise ValueError(
                f"Optimizer.rates names {name} by {' and '.join(map(repr, best))} alike, with "
                f"{' and '.join(str(rates[key]) for key in best)}: name it more closely"
            )
        return rates[best[0]] if best else 1.0

    tree = jax.tree_util.tree_map_with_path(rate, params)
    if rates and not any(jax.tree.leaves(tree)):
        raise ValueError(f"Optimizer.rates = {dict(rates)} freezes all that is there: leave something to learn")
    return tree


def _depth(name: str, key: str) -> int:
    """Up to which of its names a key reaches into a path, counted from 1; 0 where it does not name it.

    "self_attn/q_proj" in "model/layers/self_attn/q_proj/weight" reaches 4.
    """
    parts, wanted = name.split("/"), key.strip("/").split("/")
    for end in range(len(parts), len(wanted) - 1, -1):
        if all(map(fnmatch.fnmatchcase, parts[end - len(wanted) : end], wanted)):
            return end
    return 0


def matrices(params: Any) -> Any:
    """True for each matrix. A bias is none, nor is the scale of a norm, which stacked over the layers has two axes, nor
    the magnitudes of DoRA.
    """

    def is_matrix(path, leaf):
        parts = path_name(path).split("/")
        return parts[-1] not in ("bias", "magnitude") and leaf.ndim - _stacked(parts) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


OUTSIDE_LAYERS = ("embed_tokens", "lm_head", "patch_embed", "embeddings")
STACKS = ("layers", "last_layers", "blocks")


def _stacked(parts: Sequence[str]) -> int:
    """1 where the first axis of a parameter counts the layers."""
    return int(any(name in parts for name in STACKS))


def muon_axes(params: Any) -> Any:
    """The input and output axes of each matrix that Muon updates, None for the other parameters."""

    def axes(path, leaf, is_matrix):
        parts = path_name(path).split("/")
        if not is_matrix or parts[-1] != "weight" or any(name in parts for name in OUTSIDE_LAYERS):
            return None
        first = _stacked(parts)  # behind the axis that stacks the layers
        inputs = 2 if {"o_proj", "out_proj"}.intersection(parts) else 1  # heads and their width are joined there
        return contrib.MuonDimensionNumbers(
            reduction_axis=tuple(range(first, first + inputs)), output_axis=tuple(range(first + inputs, leaf.ndim))
        )

    return jax.tree_util.tree_map_with_path(axes, params, matrices(params))


def make(settings: Optimizer, params: Any, steps: int) -> optax.GradientTransformation:
    """The transformation for these parameters; frozen ones keep no optimiser state."""
    rates = rate_tree(params, settings.rates)

    def group(multiple: float, muon: bool) -> optax.GradientTransformation:
        if multiple == 0:
            return optax.set_to_zero()
        rate = schedule(settings, steps)
        if muon:
            share = multiple * settings.matrix_rate / settings.learning_rate
            return contrib.muon(
                lambda step: share * rate(step),
                weight_decay=settings.weight_decay,
                muon_weight_dimension_numbers=muon_axes,
            )
        return optax.adamw(
            lambda step: multiple * rate(step),
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=matrices,
            nesterov=bool(settings.matrix_rate),  # as Muon does, beside which it then works
        )

    kinds = jax.tree.map(lambda rate, axes: (rate, bool(settings.matrix_rate and axes)), rates, muon_axes(params))
    is_kind = lambda x: isinstance(x, tuple)
    groups: dict[Hashable, Any] = {
        str(kind): group(*kind) for kind in sorted(set(jax.tree.leaves(kinds, is_leaf=is_kind)))
    }
    labels = jax.tree.map(str, kinds, is_leaf=is_kind)
    update = optax.multi_transform(groups, labels) if len(groups) > 1 else next(iter(groups.values()))
    clip = optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity()
    return optax.chain(clip, update)


def freeze(params: Any, rates: Any) -> Any:
    """`params` with the gradient stopped where the rate is 0, so that it is not computed in vain."""
    return jax.tree.map(lambda p, r: jax.lax.stop_gradient(p) if r == 0 else p, params, rates)
