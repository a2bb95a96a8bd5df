"""A checkpoint moved to another tokenizer and back; what carries a tokenizer's fingerprint is refused under another."""

import dataclasses
import hashlib
import json

import extended
import jax
import numpy as np
import optax
import pytest
import tokenizers
from flax.traverse_util import flatten_dict

from ain_jax.data import examples, pack_plan
from ain_jax.data.formats import Record
from ain_jax.data.packing import Packing
from ain_jax.models import lora
from ain_jax.models.lora import Lora
from ain_jax.tokenizer import remap
from ain_jax.tokenizer.chat import load_tokenizer
from ain_jax.tokenizer.folder import read_extension
from ain_jax.train import optimizer, state
from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.optimizer import Optimizer
from ain_jax.weights.adapters import load_adapters, save_adapters
from ain_jax.weights.embeddings import Embeddings, make_rows, replaced
from ain_jax.weights.export import export_folder


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return extended.vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A vocabulary of the same kind that learnt other words: some ids are those of other pieces."""
    texts = ("a new world and an old one", "the new cat", "brave new world, the world")
    return extended.byte_level(tmp_path_factory.mktemp("other") / "tokenizer", texts, 40)


def backend(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_moves_by_hand(vocabulary):
    plan = remap.moves(vocabulary.old, vocabulary.new)
    first, extension = vocabulary.first, vocabulary.extension
    assert plan.same_W[:first].tolist() == list(range(first)) and (plan.same_W[first:] == -1).all()
    assert plan.kept == plan.old_ids == first
    assert plan.spelt[: first + 1] == ((),) * (first + 1)  # old ones, and the new special token
    assert plan.spelt[extension.first_piece :] == extension.replaces
    back = remap.moves(vocabulary.new, vocabulary.old)
    assert back.same_W.tolist() == list(range(first)) and back.old_ids == extension.size


def test_rows_by_hand():
    plan = remap.Moves(np.array([2, -1, -1, 0]), ((), (0, 1, 1), (), ()), 3)
    table = np.array([[1, 0], [4, 3], [7, 9], [50, 50]], np.float32)  # the last is padding
    assert remap.moved(table, plan, 5).tolist() == [[7, 9], [3, 2], [4, 4], [1, 0], [4, 4]]
    assert remap.moved(table, plan, 5, fresh=0.0).tolist() == [[7, 9], [0, 0], [0, 0], [1, 0], [0, 0]]
    assert np.array_equal(remap.moved(table.T, plan, 5, axis=1), remap.moved(table, plan, 5).T)
    with pytest.raises(ValueError, match="a table of 2 rows, and the old tokenizer has 3 ids"):
        remap.moved(table[:2], plan, 5)
    with pytest.raises(ValueError, match="rows = 3, and the new tokenizer has 4 ids"):
        remap.moved(table, plan, 3)


def test_rows_equal_those_of_the_mean(vocabulary):
    params, config = extended.model(vocabulary.first, tied=False)
    plan = remap.moves(vocabulary.old, vocabulary.new)
    there = remap.remap_params(params, plan, 400)
    made = make_rows(params, config, vocabulary.first, replaced(vocabulary.extension), Embeddings())
    begin = vocabulary.extension.first_piece
    for path, rows in flatten_dict(made).items():
        np.testing.assert_allclose(flatten_dict(there)[path][begin : vocabulary.extension.size], rows[1:], atol=1e-6)


@pytest.mark.parametrize("to", ["extended", "other", "sentencepiece"])
def test_there_and_back_is_the_identity_on_what_both_have(vocabulary, other, tokenizer_folder, to):
    target = {"extended": vocabulary.new, "other": backend(other), "sentencepiece": backend(tokenizer_folder)}[to]
    table = np.random.default_rng(0).normal(size=(384, 3)).astype(np.float32)
    there, back = remap.moves(vocabulary.old, target), remap.moves(target, vocabulary.old)
    rows = target.get_vocab_size() + 5
    again = remap.moved(remap.moved(table, there, rows), back, 384)
    shared = back.same_W >= 0
    assert shared.sum() > 150
    assert again[: len(shared)][shared].tobytes() == table[: len(shared)][shared].tobytes()
    assert np.isfinite(again).all()
    # All that the old one spells, the new one can spell: none is left to the mean but special tokens.
    found = [vocabulary.old.id_to_token(i) for i in np.flatnonzero(~shared) if not back.spelt[i]]
    assert set(found) <= {"<|end|>", "<|pad|>"}


def trained(params, settings=None, steps=3):
    transform = optimizer.make(settings or Optimizer(learning_rate=0.01, rates={"model/norm": 0.0}), params, 10)
    now = state.create(params, transform)

    @jax.jit
    def update(now):
        gradients = jax.tree.map(lambda p: p * p + 0.01, now.params)
        updates, opt_state = transform.update(gradients, now.opt_state, now.params)
        return state.TrainState(now.step + 1, optax.apply_updates(now.params, updates), opt_state)

    for _ in range(steps):
        now = update(now)
    return now, transform


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def fingerprint(folder):
    return examples.tokenizer_fingerprint(load_tokenizer(folder))


@pytest.fixture
def saved(vocabulary, tmp_path):
    params, config = extended.model(vocabulary.first + 7, tied=False)
    now, _ = trained(params)
    checkpoints = Checkpoints(tmp_path / "stage" / "checkpoints")
    checkpoints.save(now, {"tokenizer": fingerprint(vocabulary.base_folder), "pack_plan": "abc"}, wait=True)
    checkpoints.close()
    return tmp_path / "stage" / "checkpoints", now, config


def opened(folder, like, marks):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.load(checkpoints.latest(), like, marks)
    finally:
        checkpoints.close()


def test_a_checkpoint_there_and_back(vocabulary, saved, tmp_path):
    folder, now, _ = saved
    before = digest(folder)
    base, larger = vocabulary.base_folder, vocabulary.extension.folder
    step, plan = remap.remap_checkpoint(folder, base, larger, tmp_path / "there", rows=400)
    assert digest(folder) == before
    assert (step, plan.kept) == (3, vocabulary.first)

    wide, _ = extended.model(400, tied=False)
    like, _ = trained(wide, steps=0)
    there = opened(tmp_path / "there", like, {"tokenizer": fingerprint(larger), "pack_plan": "abc"})
    assert int(there.step) == 3
    assert jax.tree.structure(there) == jax.tree.structure(like)  # the optimiser takes it as its own
    V, first, size = vocabulary.first + 7, vocabulary.first, vocabulary.extension.size
    for (path, leaf), (_, old) in zip(
        jax.tree_util.tree_leaves_with_path(there), jax.tree_util.tree_leaves_with_path(now), strict=True
    ):
        name = optimizer.path_name(path)
        leaf, old = np.asarray(leaf), np.asarray(old)
        if "embed_tokens" not in name and "lm_head" not in name:
            assert leaf.tobytes() == old.tobytes(), name
            continue
        assert old.shape[0] == V and leaf.shape[0] == 400
        assert leaf[:first].tobytes() == old[:first].tobytes()
        if name.startswith("opt_state"):
            assert not leaf[first:].any() and old[:first].any()
        else:
            ids = vocabulary.extension.replaces[-1]
            np.testing.assert_allclose(leaf[size - 1], old[list(ids)].mean(axis=0), atol=1e-6)
            np.testing.assert_allclose(
                leaf[size:], np.broadcast_to(old[:first].mean(axis=0), (400 - size, 32)), atol=1e-6
            )

    remap.remap_checkpoint(tmp_path / "there", larger, base, tmp_path / "back", rows=V)
    back = opened(tmp_path / "back", now, {"tokenizer": fingerprint(base), "pack_plan": "abc"})
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(now), strict=True):
        one, two = np.asarray(one), np.asarray(two)
        assert one.tobytes() == two.tobytes() or one[:first].tobytes() == two[:first].tobytes()


def test_a_remapped_state_trains_on(vocabulary, saved, tmp_path):
    folder, _, _ = saved
    remap.remap_checkpoint(folder, vocabulary.base_folder, vocabulary.extension.folder, tmp_path / "there", rows=400)
    like, transform = trained(extended.model(400, tied=False)[0], steps=0)
    there = opened(tmp_path / "there", like, {"tokenizer": fingerprint(vocabulary.extension.folder)})
    updates, _ = transform.update(jax.tree.map(lambda p: p + 0.1, there.params), there.opt_state, there.params)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(updates))


def test_low_rank_pairs_of_a_table_move_with_its_rows(vocabulary):
    params, config = extended.model(vocabulary.first, tied=False)
    settings = Lora(rank=2, targets=("embed_tokens", "lm_head", "q_proj"))
    drawn = lora.init(settings, config, jax.random.key(1))
    drawn = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), drawn)
    plan = remap.moves(vocabulary.old, vocabulary.new)
    both = [remap.remap_params(tree, plan, 400) for tree in (params, drawn)]
    of_merged = remap.remap_params(lora.merge(params, drawn, settings), plan, 400)
    merged = flatten_dict(lora.merge(*both, settings), sep="/")
    for path, leaf in flatten_dict(of_merged, sep="/").items():
        np.testing.assert_allclose(leaf, merged[path], atol=1e-5)


def test_what_does_not_fit_is_refused_and_nothing_is_written(vocabulary, other, saved, tmp_path):
    folder, _, _ = saved
    base, larger = vocabulary.base_folder, vocabulary.extension.folder
    with pytest.raises(
        ValueError, match="was made under tokenizer .*: give the tokenizer that it was made under as --from"
    ):
        remap.remap_checkpoint(folder, other, larger, tmp_path / "out")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        remap.remap_checkpoint(tmp_path / "nothing", base, larger, tmp_path / "out")
    with pytest.raises(ValueError, match="rows = 300, and the new tokenizer has"):
        remap.remap_checkpoint(folder, base, larger, tmp_path / "out", rows=300)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        remap.remap_checkpoint(folder, base, larger, tmp_path / "full")


def test_the_command(vocabulary, saved, tmp_path, capsys):
    folder, _, _ = saved
    base, larger = vocabulary.base_folder, vocabulary.extension.folder
    where = ["--checkpoint", str(folder), "--from", str(base), "--to", str(larger)]
    plan = dataclasses.replace(PLAN, fingerprint="the plan to come")
    pack_plan.save(plan, tmp_path / "pack_plan")
    out = ["--out", str(tmp_path / "out"), "--pack_plan", str(tmp_path / "pack_plan")]
    assert remap.main([*where, *out]) == 0
    assert f"{vocabulary.first} rows carried over, {extended.PIECES} made of others" in capsys.readouterr().out
    rows = -(-vocabulary.extension.size // 64) * 64
    like, _ = trained(extended.model(rows, tied=False)[0], steps=0)
    opened(tmp_path / "out", like, {"tokenizer": fingerprint(larger), "pack_plan": "the plan to come"})
    assert remap.main([*where, *out]) == 1
    assert "is not empty" in capsys.readouterr().err


PLAN = pack_plan.PackPlan(np.zeros((1, 2), np.int32), np.array([0, 1]), 1.0, 0.0, 1.0, 1, "")
TEXTS = [Record(str(i), "made", "ar", "prose", text=text) for i, text in enumerate(extended.ARABIC)]


def test_what_was_made_under_one_tokenizer_is_not_taken_under_another(vocabulary, saved, tmp_path):
    base, larger = (load_tokenizer(f) for f in (vocabulary.base_folder, vocabulary.extension.folder))
    cached = [examples.tokenise(TEXTS, "texts", t, None, 64, "mark", tmp_path / "cache") for t in (base, larger, base)]
    assert cached[0].fingerprint == cached[2].fingerprint != cached[1].fingerprint
    assert cached[0].tokens_T.max() < vocabulary.first <= cached[1].tokens_T.max()
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2

    packing, path = Packing(row_tokens=64, row_patches=0), tmp_path / "plan.npz"
    plans = [pack_plan.plan({"texts": one}, None, packing, None, 0, path) for one in cached[:2]]
    assert plans[0].fingerprint != plans[1].fingerprint == pack_plan.load(path).fingerprint

    folder, now, config = saved
    with pytest.raises(ValueError, match="was written with tokenizer"):
        opened(folder, now, {"tokenizer": examples.tokenizer_fingerprint(larger)})

    settings = Lora(rank=2, targets=("q_proj",))
    marks = [examples.tokenizer_fingerprint(t) for t in (base, larger)]
    drawn = lora.init(settings, config, jax.random.key(1))
    adapters = save_adapters(drawn, settings, config, tmp_path / "adapters", tokenizer=marks[0])
    load_adapters(adapters, config, tokenizer=marks[0])
    with pytest.raises(ValueError, match=f"tokenizer='{marks[0]}', expected '{marks[1]}'"):
        load_adapters(adapters, config, tokenizer=marks[1])
    assert json.loads((adapters / "adapter_base.json").read_text())["vocabulary_rows"] == config.text.vocabulary


def test_an_export_carries_the_extension_and_its_fingerprint(vocabulary, tmp_path):
    params, config = extended.model(384)
    out = export_folder(params, config, vocabulary.extension.folder, None, tmp_path / "export")
    assert read_extension(out).fingerprint == vocabulary.extension.fingerprint
    assert fingerprint(out) == fingerprint(vocabulary.extension.folder) != fingerprint(vocabulary.base_folder)
    text = (out / "tokenizer.json").read_text(encoding="utf-8")
    (out / "tokenizer.json").write_text(text.replace(vocabulary.extension.pieces[-1], "x"), encoding="utf-8")
    with pytest.raises(ValueError, match="has fingerprint"):
        read_extension(out)
