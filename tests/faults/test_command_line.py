"""What a user can mistype: each stops with one message, the value, what was expected, the nearest right name."""

import json
from pathlib import Path

import pytest

from ain_jax import run

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def ends(arguments: list[str], capsys) -> str:
    """What the command says on its way out; it must refuse, in words and not with a traceback."""
    assert run.main(arguments, experiments=EXPERIMENTS) == 1
    message = capsys.readouterr().err
    assert "ain_jax: " in message and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain/Trainer.stepz=2", "did you mean 'steps'"),
        ("pretrain/Trainr.steps=2", "did you mean 'Trainer'"),
        ("pretran/Trainer.steps=2", "did you mean 'pretrain'"),
        ("pretrain/Trainer.steps='many'", "expected int, found str"),
        ("pretrain/Trainer.steps=2.5", "expected int, found float"),
        ("pretrain/Trainer.steps=True", "expected int, found bool"),
        ("pretrain/Trainer.steps=many", "text is written in quotes"),
        ("pretrain/Trainer.steps=-1", "1 or more, or 0 with epochs"),
        ("pretrain/Trainer.steps=0", "leaves the number to Mixture.by"),
        ("pretrain/Trainer.rows=3", None),
        ("Trainer.steps=2", "changes nothing"),
        ("evaluate/Trainer.steps=2", "does not read Trainer"),
        ("pretrain/Optimizer.schedule='cosin'", "did you mean 'cosine'"),
        ("pretrain/Mixture.weights={'documents/ar': -1.0}", "above 0"),
        ("pretrain/Trainer.steps", "expected [stage/]Class.name=value"),
        ("stepz=2", "nothing refers to the macro 'stepz'"),
    ],
)
def test_overrides(override, expected, capsys):
    arguments = ["--exp", "ain_minute", "--dry_run", "--set", override]
    if expected is None:
        assert run.main(arguments, experiments=EXPERIMENTS) == 0
        assert "pretrain/Trainer.rows = 3" in capsys.readouterr().out
    else:
        assert expected in ends(arguments, capsys)


def test_unknown_experiment_and_stage(capsys):
    assert "did you mean 'ain_minute'" in ends(["--exp", "ain_minut"], capsys)
    assert "no experiment file" in ends(["--exp", "somewhere/else.gin"], capsys)
    assert "did you mean 'instruct'" in ends(["--exp", "ain_minute", "--stage", "instrct"], capsys)


def test_a_stage_before_its_turn(tmp_path, capsys):
    message = ends(["--exp", "ain_minute", "--run_dir", str(tmp_path), "--stage", "instruct"], capsys)
    assert "extend_tokenizer, pretrain" in message


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("extend_tokenizer/Tokenizer.base='sample:tokenizer/mistral.model'", "no such file"),
        ("extend_tokenizer/Tokenizer.learn_from=('documents/xx',)", "documents/xx"),
        ("extend_tokenizer/Tokenizer.measure=('documnts/ar',)", "did you mean 'documents'"),
        ("SampleParams.fonts=('Noto.ttf',)", "NotoNaskhArabic-Regular.ttf"),
    ],
)
def test_missing_files_and_sources(binding, expected, tmp_path, capsys):
    message = ends(["--exp", "ain_minute", "--run_dir", str(tmp_path), "--set", binding], capsys)
    assert expected in message
    assert not list(tmp_path.glob("extend_tokenizer/*"))  # so that the corrected command is not refused


def test_settings_do_not_change_under_a_run(tmp_path, capsys):
    stage = tmp_path / "pretrain"
    stage.mkdir(parents=True)
    (stage / "config.gin").write_text("pretrain/Trainer.steps = 999\n", "utf-8")
    (stage / "result.json").write_text(json.dumps({"numbers": {}, "seconds": 1}), "utf-8")
    message = ends(["--exp", "ain_minute", "--run_dir", str(tmp_path)], capsys)
    assert "pretrain/Trainer.steps = 999" in message and "pretrain/Trainer.steps = 12" in message
    assert (stage / "result.json").exists()
