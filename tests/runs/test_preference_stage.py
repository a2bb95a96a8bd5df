"""Preferences learnt through the stage: every form of data, the reference once for all losses, adapters over a base."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax import run
from ain_jax.data import loader
from ain_jax.experiment import read_bindings, resolve
from ain_jax.models.config import ModelConfig, tiny
from ain_jax.models.multimodal import init_params
from ain_jax.stages import registry
from ain_jax.stages.common import StageRun
from ain_jax.tokenizer.extend import padded_vocab
from ain_jax.train import reference
from ain_jax.train.losses import pair_log_probs
from ain_jax.weights.export import export_folder
from ain_jax.weights.load import load_folder

EXPERIMENT = """
Experiment.name = "preferences"
Experiment.stages = ("prefer", "ipo", "simpo", "kto")
Experiment.kinds = {"ipo": "prefer", "simpo": "prefer", "kto": "prefer"}
Model.folder = "FOLDER/model"
Packing.row_tokens = 192
Optimizer.learning_rate = 0.01
Trainer.steps = 3
Trainer.rows = 2
Sources.files = {"pairs": "FOLDER/pairs.jsonl", "verdicts": "FOLDER/verdicts.jsonl"}
Sources.workers = 1
Mixture.weights = {"pairs": 1.0}
prefer/Trainer.accumulate = 2
prefer/Lora.rank = 2
prefer/Lora.targets = ("q_proj", "down_proj")
ipo/Preference.loss = "ipo"
ipo/Preference.beta = 0.5
ipo/Optimizer.learning_rate = 0.003
simpo/Preference.loss = "simpo"
simpo/Preference.beta = 2.0
simpo/Preference.target_margin = 1.0
kto/Trainer.accumulate = 1
kto/Preference.loss = "kto"
kto/Preference.undesirable_weight = 0.5
kto/Mixture.weights = {"verdicts": 1.0}
"""


@pytest.fixture(scope="module")
def folder(tokenizer, tokenizer_folder, tmp_path_factory):
    """A small Llama as its makers would publish it, pairs, and answers with verdicts (the rows of TRL's kto)."""
    root = tmp_path_factory.mktemp("preferences")
    text = tiny(vocabulary=padded_vocab(len(tokenizer), 64), mrope_section=None, qkv_bias=False).text
    config = ModelConfig(text, family="llama", eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))
    export_folder(init_params(config, jax.random.key(0)), config, tokenizer_folder, None, root / "model")
    talk = lambda ask, say: [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
    pairs = [{"messages": talk(f"كم {n}؟", f"هذه {n}"), "rejected": "لا"} for n in range(8)]
    verdicts = [
        {"prompt": talk(f"كم {n}؟", "")[:1], "completion": talk("", said)[1:], "label": label}
        for n in range(6)
        for said, label in ((f"هذه {n}", True), ("لا", False))
    ]
    for name, lines in (("pairs", pairs), ("verdicts", verdicts)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return root


def go(root, text, *more):
    file = root / "preferences.gin"
    file.write_text(text, encoding="utf-8")
    return run.main(["--exp", str(file), "--run_dir", str(root / "run"), *more])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """(root, how often a reference was computed)."""
    root, asked = tmp_path_factory.mktemp("finished"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "pair_log_probs", lambda *a: asked.append(1) or pair_log_probs(*a))
        assert go(root, EXPERIMENT.replace("FOLDER", str(folder))) == 0
    return root, len(asked)


def lines(root, stage):
    return [json.loads(line) for line in (root / "run" / stage / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_each_loss_begins_where_policy_and_reference_agree(finished):
    first = {stage: lines(finished[0], stage)[0] for stage in ("prefer", "ipo", "simpo", "kto")}
    assert first["prefer"]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["ipo"]["loss"] == pytest.approx(1 / (4 * 0.5**2), abs=1e-4)
    assert 0.25 < first["kto"]["loss"] < 0.5  # half of each weight: 0.5 of the good answers, 0.25 of the bad ones
    for stage in ("prefer", "ipo"):
        for name in ("margin", "drift", "drift_worse", "accuracy"):
            assert first[stage][name] == pytest.approx(0, abs=1e-3), (stage, name)
        assert first[stage]["nll"] > 1
    assert {n for n in first["kto"] if "/" not in n} >= {"accuracy", "margin", "baseline", "drift", "drift_worse"}
    assert {n for n in first["simpo"] if "/" not in n} >= {"accuracy", "margin", "nll", "nll_worse"}
    assert "drift" not in first["simpo"]
    assert "drift_worse/pairs/pair" in first["ipo"] and "drift/verdicts/und" in first["kto"]


def test_each_loss_learns(finished):
    for stage in ("prefer", "ipo", "simpo", "kto"):
        made = lines(finished[0], stage)
        assert len(made) == 3 and made[-1]["margin"] > made[0]["margin"] and made[-1]["loss"] < made[0]["loss"]


def test_the_reference_is_computed_once_for_all_losses_and_not_again_by_a_run_that_goes_on(
    finished, folder, monkeypatch
):
    root, asked = finished
    assert asked == 2  # of the pairs, whatever the loss, rate, or adapters; of the verdicts; simpo asks for none
    assert len(list((root / "run" / "data" / "reference").glob("*.npz"))) == 2
    (root / "run" / "ipo" / "result.json").unlink()
    before = lines(root, "ipo")
    monkeypatch.setattr(reference, "pair_log_probs", lambda *_: pytest.fail("computed again"))
    assert go(root, EXPERIMENT.replace("FOLDER", str(folder))) == 0
    assert lines(root, "ipo") == before


def test_with_adapters_the_reference_is_the_base_alone(finished, folder):
    resolved = resolve(read_bindings(finished[0] / "preferences.gin"), registry.SETTINGS)
    stage = StageRun(resolved, finished[0] / "run", "prefer")
    moved = stage.trained_adapters("prefer")
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(moved)) > 1e-3
    rows, (base, config) = stage.training_rows("pair"), load_folder(folder / "model")
    assert config == stage.config
    score = jax.jit(lambda batch: pair_log_probs(stage.model, base, batch)[0])
    with jax.set_mesh(stage.mesh):
        ((expected_RN2),) = [np.concatenate([score(batch) for batch, _ in loader.batches(rows, 2, None)])]
    kept = [np.load(p)["reference_RN2"] for p in (finished[0] / "run" / "data" / "reference").glob("*.npz")]
    assert any(k.shape == expected_RN2.shape and np.allclose(k, expected_RN2, rtol=1e-5) for k in kept)


@pytest.mark.parametrize(
    ("binding", "told"),
    [
        ("prefer/Preference.target_margin = 1.0", 'loss = "sigmoid" ignores target_margin = 1.0: leave it out'),
        ("kto/Preference.sft = 0.5", 'loss = "kto" ignores sft = 0.5: leave it out'),
        ("kto/Trainer.accumulate = 2", 'its baseline is a mean over the whole batch, which every answer'),
        ('Chat.learn = ("user", "assistant")', "the assistant's last turn alone is compared or judged"),
        ('kto/Mixture.weights = {"pairs": 1.0}', "is a preference pair, and this stage learns from verdicts"),
        ('ipo/Mixture.weights = {"verdicts": 1.0}', "has a verdict on its answer, and this stage compares pairs"),
    ],
)  # fmt: skip
def test_what_a_loss_would_ignore_or_cannot_read_is_refused(folder, tmp_path, capsys, binding, told):
    stages = ("prefer", "ipo", "simpo", "kto")
    stage = next((name for name in stages if binding.startswith(f"{name}/")), "prefer")
    others = ("Experiment.", *(f"{name}/" for name in stages if name != stage), binding.partition(" =")[0])
    wanted = [line for line in EXPERIMENT.splitlines() if not line.startswith(others)]
    wanted += ['Experiment.name = "one"', f'Experiment.stages = ("{stage}",)', binding]
    wanted += [] if stage == "prefer" else [f'Experiment.kinds = {{"{stage}": "prefer"}}']
    assert go(tmp_path, "\n".join(wanted).replace("FOLDER", str(folder))) == 1
    assert told in capsys.readouterr().err
