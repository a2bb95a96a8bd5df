"""A published folder whose tokenizer is extended: new rows made, then trained alone, in parts, then all; exported."""

import json
import shutil

import extended
import jax
import numpy as np
import optax
import pytest
import tokenizers

from ain_jax import run
from ain_jax.experiment import read_bindings, resolve
from ain_jax.models.config import ModelConfig, tiny
from ain_jax.models.multimodal import init_params
from ain_jax.stages import registry, training
from ain_jax.tokenizer import schedule
from ain_jax.tokenizer.folder import read_extension
from ain_jax.tokenizer.schedule import Vocabulary
from ain_jax.train import checkpoint, loop, metrics
from ain_jax.train.state import TrainState
from ain_jax.weights.embeddings import load_rows
from ain_jax.weights.export import export_folder
from ain_jax.weights.load import load_folder

PIECES, STEPS = 24, 6
EXPERIMENT = """
Experiment.name = "extended"
Experiment.stages = ("extend_tokenizer", "new_rows", "growing", "pretrain", "export")
Experiment.kinds = {{"new_rows": "pretrain", "growing": "pretrain"}}
Model.folder = "{folder}"
Model.vocabulary_multiple = 8
Packing.row_tokens = 32
Tokenizer.pieces = {pieces}
Sources.files = {{"ar": "{data}/ar.jsonl", "en": "{data}/en.jsonl"}}
Sources.held_out = {{"ar": 0.4, "en": 0.4}}
Sources.workers = 1
Tokenizer.learn_from = ("ar",)
Tokenizer.keep = ("en",)
Tokenizer.measure = ("ar", "en")
Mixture.weights = {{"ar": 0.5, "en": 0.5}}
Optimizer.learning_rate = 0.01
Trainer.steps = {steps}
Trainer.rows = 2
new_rows/Start.stage = ""
new_rows/Optimizer.rows = "new"
growing/Start.stage = "new_rows"
growing/Vocabulary.parts = 3
pretrain/Start.stage = "growing"
export/Export.stage = "pretrain"
"""
WEIGHT = ("model", "embed_tokens", "weight")


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A Llama with the byte-level base of `extended`, as its maker publishes it; five rows are spare."""
    root = tmp_path_factory.mktemp(request.param)
    base = extended.byte_level(root / "tokenizer")
    ids = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab_size()
    text = tiny(vocabulary=ids + 5, mrope_section=None, qkv_bias=False, tied=request.param == "tied").text
    config = ModelConfig(text, family="llama", eos_token_id=256)
    export_folder(init_params(config, jax.random.key(0)), config, base, None, root / "model")
    for name, texts in (("ar", extended.ARABIC), ("en", extended.ENGLISH)):
        lines = [json.dumps({"text": text, "language": name}) + "\n" for text in texts * 4]
        (root / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


def go(root, folder, *more):
    file = root / "extended.gin"
    file.write_text(EXPERIMENT.format(folder=folder / "model", data=folder, pieces=PIECES, steps=STEPS), "utf-8")
    return run.main(["--exp", str(file), "--run_dir", str(root / "run"), *more])


def tables(params):
    return [np.asarray(params["model"]["embed_tokens"]["weight"])] + (
        [np.asarray(params["lm_head"]["weight"])] if "lm_head" in params else []
    )


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    assert go(root, folder) == 0
    return root / "run"


def test_new_rows_learn_alone_and_the_optimiser_keeps_state_for_them_alone(folder, done):
    before, _ = load_folder(folder / "model")
    extension = read_extension(done / "extend_tokenizer" / "tokenizer")
    made = load_rows(done / "extend_tokenizer" / "new_rows.npz")
    count = extension.size - extension.base_size
    with checkpoint.opened(done / "new_rows" / "checkpoints") as (checkpoints, step):
        assert step == STEPS
        saved = checkpoints._checkpointer.load_checkpointables(step)
    shapes = {np.shape(leaf) for part in ("params", "opt_state") for leaf in jax.tree.leaves(saved[part])} - {()}
    assert shapes == {(count, before["model"]["embed_tokens"]["weight"].shape[1])}
    for table_VD, rows_ND in zip(tables(before), tables(made), strict=True):
        spelt = [table_VD[list(ids)].mean(axis=0) for ids in extension.replaces]
        np.testing.assert_allclose(rows_ND[-len(spelt) :], spelt, atol=1e-6)


def test_old_rows_stay_while_new_ones_learn_and_move_afterwards(folder, done):
    resolved = resolve(read_bindings(done / "config.gin"), registry.SETTINGS)
    stage = registry.StageRun(resolved, done, "pretrain")
    before, _ = load_folder(folder / "model")
    first, count = stage.new_rows
    alone, grown, last = (stage.trained_params(name) for name in ("new_rows", "growing", "pretrain"))
    made = load_rows(done / "extend_tokenizer" / "new_rows.npz")
    for old, made_ND, one, two, three in zip(*map(tables, (before, made, alone, grown, last)), strict=True):
        assert len(one) == -(-(first + count) // 8) * 8 > len(old)
        np.testing.assert_array_equal(one[:first], old[:first])
        moved_N = (one[first : first + count] != made_ND).any(axis=1)
        assert moved_N.mean() > 0.5  # an input row whose piece the text does not hold stays
        assert np.abs(two[:first] - old[:first]).max() > 0 and np.abs(three - two).max() > 0
    np.testing.assert_array_equal(alone["model"]["norm"]["weight"], before["model"]["norm"]["weight"])


def test_where_pieces_come_into_use_their_rows_are_made_of_what_spelt_them(done):
    stage = registry.StageRun(resolve(read_bindings(done / "config.gin"), registry.SETTINGS), done, "growing")
    params = stage.trained_params("new_rows")
    begun = TrainState(2, params, jax.tree.map(jax.numpy.ones_like, optax.adam(0.1).init(params)))
    extension, sizes = stage.extension, stage.get(Vocabulary).sizes(PIECES)
    found = training.changes(stage, params)
    assert sizes == [3, 8, 24] and sorted(found) == [3, 5]
    for step, used, now in ((3, 3, 8), (5, 8, 24)):
        after = found[step](begun)
        begin = extension.first_piece + used
        spelt = schedule.spelt_before(extension, used, now)
        for old, new, moments in zip(*map(tables, (params, after.params, after.opt_state[0].mu)), strict=True):
            expected = np.stack([old[ids].mean(axis=0) for ids in spelt])
            np.testing.assert_allclose(new[begin : begin + now - used], expected, atol=1e-6)
            untouched = np.delete(np.arange(len(old)), np.arange(begin, begin + now - used))
            np.testing.assert_array_equal(new[untouched], old[untouched])
            assert moments[untouched].all() and not moments[begin : begin + now - used].any()


def test_the_export_is_the_extended_model_and_its_tokenizer(folder, done):
    _, config = load_folder(done / "export")
    extension = read_extension(done / "extend_tokenizer" / "tokenizer")
    assert config.text.vocabulary == -(-extension.size // 8) * 8
    exported = tokenizers.Tokenizer.from_file(str(done / "export" / "tokenizer.json"))
    assert exported.token_to_id(extension.pieces[-1]) == extension.size - 1
    numbers = json.loads((done / "summary.json").read_text("utf-8"))["stages"]
    losses = numbers["extend_tokenizer"]["rows"]
    assert set(losses["base"]) == {"ar", "en"}
    assert numbers["new_rows"]["last"]["bits_per_byte"] > 0


def test_a_growing_vocabulary_is_the_same_after_an_interruption(folder, done, tmp_path):
    """Stopped at each border of its parts and in the middle of one."""
    root = tmp_path / "again"
    shutil.copytree(done.parent, root)
    whole = (root / "run" / "growing" / "metrics.jsonl").read_text("utf-8")
    for name in ("growing", "pretrain", "export"):
        shutil.rmtree(root / "run" / name)
    (root / "run" / "summary.json").unlink()
    for stop in (1, 2, 3, 4):
        real = loop.Checkpoints.save

        def save(self, state, marks, wait=False, real=real):
            real(self, state, marks, wait=True)
            raise KeyboardInterrupt

        loop.Checkpoints.save = save
        try:
            assert go(root, folder, "--stage", "growing", "--set", "growing/Trainer.save_seconds=0.0") == 130, stop
        finally:
            loop.Checkpoints.save = real
    assert go(root, folder, "--stage", "growing", "--set", "growing/Trainer.save_seconds=0.0") == 0
    strip = lambda text: [
        {k: v for k, v in json.loads(line).items() if not metrics.is_time(k)} for line in text.splitlines()
    ]
    assert strip((root / "run" / "growing" / "metrics.jsonl").read_text("utf-8")) == strip(whole)
