"""Tiny experiments for any mesh: ten updates on one batch, and by how much they differ from those of one device."""

import dataclasses
import re
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import worked

from ain_jax import sharding
from ain_jax.data.batch import Batch
from ain_jax.models import lora, multimodal
from ain_jax.models.config import ClipConfig, ModelConfig, tiny
from ain_jax.train import losses, optimizer, rows, state, step
from ain_jax.train.preferences import Preference, preference

STEPS = 10
ROWS = 8
LORA = lora.Lora(rank=4, alpha=16.0, targets=(lora.ALL_LINEAR, "embed_tokens", "lm_head"))
DORA = dataclasses.replace(LORA, dora=True)
# Eight query heads, that eight devices can share, of two key heads, that they cannot.
# Five layers: no other axis has such a size, and what holds all layers is told by its shape.
QWEN = tiny(tied=False, layers=5, heads=8, kv_heads=2, head_width=8, mrope_section=(2, 1, 1))
PAIRS = [[0], [1], [2], [3], [4], [5], [6], [7]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch, and how it learns."""

    config: ModelConfig
    batch: Any
    settings: optimizer.Optimizer
    preference: Preference | None = None
    adapters: lora.Lora | None = None
    remat: str = "none"
    accumulate: int = 1
    param_dtype: Any = jnp.float32
    new_rows: tuple[int, int] | None = None  # Optimizer.rows = "new": the first, and how many
    dtype: Any = jnp.float32

    def trained(self, mesh: jax.sharding.Mesh) -> tuple[Any, Any, losses.Loss]:
        """What learns and what stays, laid over the mesh, and the loss of the two."""
        names = multimodal.axis_names(self.config)
        layout = sharding.layout(names, multimodal.abstract_params(self.config, self.param_dtype), mesh)
        params = multimodal.init_params(self.config, jax.random.key(0), layout)
        model = multimodal.MultimodalModel(self.config, self.dtype, self.remat)
        loss = preference(model, 2, self.preference) if self.preference else losses.next_token(model, 2)
        if self.new_rows:
            first, count = self.new_rows
            taken = rows.take(params, first, count)
            places = sharding.layout(jax.tree.map(lambda _: ("vocab", "embed"), taken), taken, mesh)
            aim = lambda learnt, base, *rest: loss(rows.put(base, learnt, first), {}, *rest)
            return sharding.placed(taken, places), params, aim
        if (adapters := self.adapters) is None:
            return params, {}, loss
        drawn = lora.init(adapters, self.config, jax.random.key(1), params)
        places = sharding.shardings(lora.axis_names(drawn, names), drawn, mesh)
        aim = lambda halves, base, *rest: loss(base, {"lora": lora.scaled(halves, adapters)}, *rest)
        return jax.tree.map(jax.device_put, drawn, places), params, aim

    def made(self, mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, Any, Any, Any]]:
        """The update, and what it is called with first."""
        trained, frozen, loss = self.trained(mesh)
        transform = optimizer.make(self.settings, trained, STEPS)
        rates = optimizer.rate_tree(trained, self.settings.rates)
        begun = state.create(trained, transform)
        update = step.make_update(loss, transform, rates, self.accumulate, state.layout(trained, transform))
        batch = jax.device_put(self.batch, sharding.rows(mesh))
        return update, (begun, frozen, batch, jax.random.key(2))

    def run(self, mesh: jax.sharding.Mesh, steps: int = STEPS) -> "Result":
        with jax.set_mesh(mesh):
            update, (now, frozen, batch, key) = self.made(mesh)
            before = jax.tree.map(lambda x: np.asarray(x, np.float32), now.params)
            where = jax.tree.map(lambda x: x.sharding, (now.params, now.opt_state))
            compiled: Any = update.lower(now, frozen, batch, key).compile()  # refuses a state that has moved
            one_turn = self.config.text.layers < 2 * len(self.config.text.windows)  # then all layers come at once
            stacks = [] if one_turn else _stacks(frozen or now.params, mesh)
            gathered = [s for s in _gathered(compiled.as_text()) if s in stacks]
            values = []
            for _ in range(steps):
                now, sums, _ = compiled(now, frozen, batch, key)
                values.append(float(sums.loss / sums.count))
            alike = lambda x, w: x.sharding.is_equivalent_to(w, x.ndim)
            stayed = jax.tree.map(alike, (now.params, now.opt_state), where)
            assert jax.tree.all(stayed), "the state moved to other devices"
            moved = jax.tree.map(lambda new, old: np.asarray(new, np.float32) - old, now.params, before)
        named = {optimizer.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(moved)}
        return Result(values, named, gathered)


def _stacks(params: Any, mesh: jax.sharding.Mesh) -> list[list[int]]:
    """The shapes, sorted, of all layers of each matrix as a device uses it: whole, or one axis cut by `tensor`."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(params["model"]["layers"]) if leaf.ndim > 2]
    cut = lambda shape, i: [*shape[:i], shape[i] // mesh.shape["tensor"], *shape[i + 1 :]]
    return [sorted(cut(shape, i)) for shape in shapes for i in range(len(shape))]


def _gathered(text: str) -> list[list[int]]:
    """The shapes, sorted, of what a compiled program gathers from other devices."""
    lines = [line.split(" all-gather")[0] for line in text.splitlines() if re.search(r" all-gather(-start)?\(", line)]
    return [sorted(map(int, dims.split(","))) for line in lines for dims in re.findall(r"\w+\[([\d,]+)\]", line)]


@dataclasses.dataclass(frozen=True)
class Result:
    losses: list[float]
    moved: dict[str, np.ndarray]  # by parameter, the update of all steps
    gathered: list[list[int]]  # shapes of whole stacks of layers that were gathered at once

    def apart(self, other: "Result") -> dict[str, Any]:
        """How far this is from what one device came to, relative: of losses, of the update, of the worst parameter."""
        size = lambda moved: np.sqrt(sum(float((u.astype(np.float64) ** 2).sum()) for u in moved.values()))
        total, count = size(other.moved), sum(u.size for u in other.moved.values())
        differ = {name: self.moved[name] - other.moved[name] for name in other.moved}
        typical = {name: total * (u.size / count) ** 0.5 for name, u in other.moved.items()}  # of so many numbers
        own = {name: size({name: u}) for name, u in other.moved.items()}
        # A bias of keys without rotary positions has no gradient, only rounding: it is measured by what others move.
        by = {name: own[name] if own[name] > 1e-2 * typical[name] else typical[name] for name in own}
        each = {name: size({name: d}) / by[name] for name, d in differ.items()}
        worst = max(each, key=lambda name: each[name])
        return {
            "losses": max(abs(a - b) / abs(b) for a, b in zip(self.losses, other.losses, strict=True)),
            "whole": size(differ) / total,
            "parameter": each[worst],
            "name": worst,
            "gathered": self.gathered,
        }


def _packed(length: int = 40) -> dict[str, np.ndarray]:
    """Rows of three texts each and some padding, as `Batch` has them, random ids; of a length that no width has."""
    rng = np.random.default_rng(0)
    lengths = [length // 2 - 3, length // 4, length // 4]
    segments_L = np.repeat([1, 2, 3, 0], [*lengths, length - sum(lengths)]).astype(np.int32)
    positions_L = np.concatenate([np.arange(n) for n in [*lengths, length - sum(lengths)]]).astype(np.int32)
    own = np.flatnonzero((segments_L[1:] == segments_L[:-1]) & (segments_L[1:] > 0))
    predict_C = own[::2][: length // 4]
    tokens_BL = rng.integers(2, 80, (ROWS, length)).astype(np.int32) * (segments_L > 0)
    repeat = lambda x: np.tile(x, (ROWS, *[1] * np.ndim(x))).astype(np.int32)
    return {
        "tokens_BL": tokens_BL.astype(np.int32),
        "segments_BL": repeat(segments_L),
        "positions_B3L": repeat(np.stack([positions_L] * 3)),
        "predict_at_BC": repeat(predict_C),
        "targets_BC": tokens_BL[:, predict_C + 1].astype(np.int32),
        "target_segments_BC": repeat(segments_L[predict_C]),
        "target_groups_BC": repeat(np.arange(len(predict_C)) % 2),
    }


def _tiled(config: ModelConfig, tiles: int = 8) -> Batch:
    """The same rows, every third token one of the features of eight tiles, or the end of a line."""
    assert isinstance(config.vision, ClipConfig)
    arrays, rng, P = _packed(), np.random.default_rng(1), tiles * config.vision.tile_patches
    shape = arrays["tokens_BL"].shape
    index_BL = np.where(np.arange(shape[1]) % 3 == 0, rng.integers(0, P + 1, shape), -1).astype(np.int32)
    patches_BPK = rng.normal(size=(ROWS, P, config.vision.patch_values)).astype(np.float32)
    places = np.zeros((ROWS, P, 2), np.int32), np.ones((ROWS, P), np.int32)
    return Batch(
        **arrays,
        feature_index_BL=index_BL,
        patches_BPK=patches_BPK,
        patch_positions_BP2=places[0],
        patch_segments_BP=places[1],
    )


def _pictures(pairs: bool = False) -> Any:
    """Worked rows with a picture each, of sizes that differ."""
    made = [
        worked.example(i, 6 + i % 3, [(16, 8 + 8 * (i % 2))], pair=pairs, group=("ar", "en")[i % 2])
        for i in range(ROWS)
    ]
    source = worked.examples(made)
    if pairs:
        return worked.pair_batch(source, PAIRS, 1)
    return worked.batch([[*worked.segments(source, i)] for i in range(ROWS)])


def _judged() -> Any:
    """The same, a verdict on each. The reference is near the policy, and elsewhere the less so the later the row: the
    baseline is above 0, and that of a device's own rows would be another."""
    own, elsewhere = (-7, -30, -29, -31, -15, -33, -12, -20), (-27, -27, -33, -18, -6, -21, -19, -21)
    reference_B2 = np.array([(near, far + 1 - row) for row, (near, far) in enumerate(zip(own, elsewhere, strict=True))])
    reference_BN2 = reference_B2[:, None].astype(np.float32)
    good_BN = np.arange(ROWS, dtype=np.int32)[:, None] % 2
    return dataclasses.replace(_pictures(pairs=True), reference_BN2=reference_BN2, desirable_BN=good_BN)


def cases() -> dict[str, Case]:
    """By name: pictures, tiles, windows, pairs, adapters, new rows, Muon; with accumulation, bfloat16 and remat."""
    gemma = families.text("gemma3_text", windows=(8, 0), window_theta=50.0, layers=3, heads=8, kv_heads=2)
    tiles = families.llava("qwen2")
    tiles = dataclasses.replace(tiles, text=dataclasses.replace(tiles.text, layers=5))
    # Ten steps of these come to half the loss or less.
    adam, faster, slower = (
        optimizer.Optimizer(rate, weight_decay=0.1, eps=1e-6, schedule="flat") for rate in (7e-4, 1.5e-2, 1.5e-3)
    )
    pictures = Case(QWEN, _pictures(), adam)
    return {
        "pictures": pictures,
        "tiles": Case(tiles, _tiled(tiles), adam),
        "windows": Case(gemma, Batch(**_packed()), faster),
        "pairs": Case(QWEN, _pictures(pairs=True), adam, Preference(beta=0.5, sft=1.0)),
        "judged and adapters": Case(QWEN, _judged(), slower, Preference("kto", beta=0.5), adapters=DORA),
        "adapters": Case(QWEN, _pictures(), slower, adapters=LORA),
        "new rows": dataclasses.replace(
            pictures, settings=dataclasses.replace(faster, learning_rate=6e-2), new_rows=(8, 72)
        ),
        "muon": dataclasses.replace(
            pictures,
            settings=dataclasses.replace(adam, matrix_rate=1e-2, rates={"visual": 0.5, "model/embed_tokens": 0.0}),
        ),
    }
