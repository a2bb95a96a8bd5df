"""What is frozen does not move by a bit in several updates, and what learns has all moved."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worked
from flax.traverse_util import flatten_dict

from ain_jax.models import lora
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import MultimodalModel, init_params
from ain_jax.stages import training
from ain_jax.train import losses, optimizer, rows, state
from ain_jax.train.optimizer import Optimizer, path_name
from ain_jax.train.step import make_update

STEPS = 3
SOURCE = worked.examples([worked.example(i, 8, [(16, 8)], group=("ar", "en")[i % 2]) for i in range(4)])
BATCH = worked.batch([worked.segments(SOURCE, i) for i in range(4)])
ADAM = Optimizer(0.05, weight_decay=0.5, schedule="flat")
MUON = dataclasses.replace(ADAM, matrix_rate=0.05)

# By name: the optimiser, what it freezes, the dtype of the parameters, and what we say of that without patterns.
CASES = {
    "modules": (ADAM, {"visual": 0.0, "visual/merger": 1.0, "model/embed_tokens": 0.0}, "float32"),
    "patterns": (MUON, {"q_proj": 0.0, "*norm*": 0.0, "visual/*/mlp": 0.0, "model/norm": 0.5}, "bfloat16"),
}
FROZEN = {
    "modules": lambda name: name.startswith(("visual/blocks/", "visual/patch_embed/", "model/embed_tokens/")),
    "patterns": lambda name: (
        ("q_proj" in name or "norm" in name or (name.startswith("visual/") and "/mlp/" in name))
        and not name.startswith("model/norm")
    ),
}


def leaves(tree):
    return {path_name(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def stage(settings, **others):
    """A stage with these settings, as far as what it trains is asked for."""
    given = {type(value): value for value in (settings, others.pop("adapted", Lora()))}
    return SimpleNamespace(get=given.__getitem__, **others)


def trained(loss, params, frozen, settings):
    """The parameters behind some updates."""
    rates = optimizer.rate_tree(params, settings.rates)
    transform = optimizer.make(settings, params, STEPS)
    update = make_update(loss, transform, rates)
    now = state.create(jax.tree.map(jnp.array, params), transform)
    for _ in range(STEPS):
        now, _, norm = update(now, frozen, BATCH, jax.random.key(0))
        assert np.isfinite(norm) and norm > 0
    return now.params


@pytest.mark.parametrize("case", CASES)
def test_frozen_parameters_keep_their_bytes_and_the_others_do_not(case):
    settings, rates, dtype = CASES[case]
    settings = dataclasses.replace(settings, rates=rates)
    params = jax.tree.map(lambda x: x.astype(dtype), init_params(worked.CONFIG, jax.random.key(0)))
    loss = losses.next_token(MultimodalModel(worked.CONFIG), 2)
    before, after = leaves(params), leaves(trained(loss, params, {}, settings))
    frozen = set(filter(FROZEN[case], before))
    assert 0 < len(frozen) < len(before)
    assert {name for name in before if before[name] == after[name]} == frozen


def test_under_adapters_the_base_keeps_its_bytes():
    adapted = Lora(rank=2, targets=("q_proj", "down_proj", "attn/qkv", "merger/mlp/0", "lm_head"), dora=True)
    base = jax.tree.map(lambda x: x.astype("bfloat16"), init_params(worked.CONFIG, jax.random.key(0)))
    settings = dataclasses.replace(ADAM, rates={"visual": 0.0, "q_proj/a": 0.0})  # of adapters, too, some may stay
    aim = training.aimed(stage(settings, adapted=adapted), losses.next_token(MultimodalModel(worked.CONFIG), 2))
    pairs = lora.init(adapted, worked.CONFIG, jax.random.key(1), base)
    learnt = trained(aim, pairs, base, settings)
    before, after = leaves(pairs), leaves(learnt)
    stays = {name for name in before if name.startswith("visual/") or name.endswith("q_proj/a")}
    assert {name for name in before if before[name] == after[name]} == stays and len(stays) == 7
    # Joined, the modules without adapters are those of the base.
    whole, merged = leaves(base), leaves(lora.merge(base, learnt, adapted))
    assert {name for name in whole if whole[name] != merged[name]} >= {
        f"{name.rpartition('/')[0]}/weight" for name in before if name.endswith("/b") and not name.startswith("visual/")
    }
    beside = {f"{name.rpartition('/')[0]}/weight" for name in before}
    assert all(whole[name] == merged[name] for name in whole if name not in beside)


def test_beside_new_rows_all_others_keep_their_bytes():
    params = init_params(worked.CONFIG, jax.random.key(0))
    first, count = 60, 100
    settings = dataclasses.replace(ADAM, rows="new")
    aim = training.aimed(stage(settings, new_rows=(first, count)), losses.next_token(MultimodalModel(worked.CONFIG), 2))
    learnt = trained(aim, rows.take(params, first, count), params, settings)
    whole = rows.put(params, learnt, first)
    before, after = leaves(params), leaves(whole)
    tables = {"model/embed_tokens/weight", "lm_head/weight"}
    assert {name for name in before if before[name] != after[name]} == tables
    for name in tables:
        was_VD, now_VD = (np.asarray(flatten_dict(tree, sep="/")[name]) for tree in (params, whole))
        moved_V = (was_VD != now_VD).any(axis=1)
        assert moved_V[first : first + count].all() and moved_V.sum() == count
