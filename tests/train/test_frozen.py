"""What is frozen does not move by a bit in several updates, and what learns has all moved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worked

from ain_jax.models import lora
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import MultimodalModel, init_params
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


def trained(loss, params, frozen, settings):
    """(before, after, frozen before, frozen after) of some updates, as bytes by path."""
    rates = optimizer.rate_tree(params, settings.rates)
    transform = optimizer.make(settings, params, STEPS)
    update = make_update(loss, transform, rates)
    before, stays = leaves(params), leaves(frozen)
    now = state.create(jax.tree.map(jnp.array, params), transform)
    for _ in range(STEPS):
        now, _, norm = update(now, frozen, BATCH, jax.random.key(0))
        assert np.isfinite(norm) and norm > 0
    return before, leaves(now.params), stays, leaves(frozen)


@pytest.mark.parametrize("case", CASES)
def test_frozen_parameters_keep_their_bytes_and_the_others_do_not(case):
    settings, rates, dtype = CASES[case]
    settings = dataclasses.replace(settings, rates=rates)
    params = jax.tree.map(lambda x: x.astype(dtype), init_params(worked.CONFIG, jax.random.key(0)))
    loss = losses.next_token(MultimodalModel(worked.CONFIG), 2)
    before, after, *_ = trained(loss, params, {}, settings)
    frozen = set(filter(FROZEN[case], before))
    assert 0 < len(frozen) < len(before)
    assert {name for name in before if before[name] == after[name]} == frozen


def test_under_adapters_the_base_keeps_its_bytes():
    settings = Lora(rank=2, targets=("q_proj", "down_proj", "attn/qkv", "merger/mlp/0", "lm_head"), dora=True)
    base = jax.tree.map(lambda x: x.astype("bfloat16"), init_params(worked.CONFIG, jax.random.key(0)))
    loss = losses.next_token(MultimodalModel(worked.CONFIG), 2)
    aim = lambda pairs, base, *rest: loss(base, {"lora": lora.scaled(pairs, settings)}, *rest)
    pairs = lora.init(settings, worked.CONFIG, jax.random.key(1), base)
    rates = {"visual": 0.0, "q_proj/a": 0.0}  # of adapters, too, some may stay
    before, after, base_before, base_after = trained(aim, pairs, base, dataclasses.replace(ADAM, rates=rates))
    assert base_before == base_after
    stays = {name for name in before if name.startswith("visual/") or name.endswith("q_proj/a")}
    assert {name for name in before if before[name] == after[name]} == stays and len(stays) == 7


def test_beside_new_rows_all_others_keep_their_bytes():
    params = init_params(worked.CONFIG, jax.random.key(0))
    first, count = 60, 100
    loss = losses.next_token(MultimodalModel(worked.CONFIG), 2)
    aim = lambda taken, base, *rest: loss(rows.put(base, taken, first), {}, *rest)
    taken = rows.take(params, first, count)
    before, after, base_before, base_after = trained(aim, taken, params, ADAM)
    assert base_before == base_after and not any(before[name] == after[name] for name in before)
    assert set(before) == {"model/embed_tokens/weight", "lm_head/weight"}
