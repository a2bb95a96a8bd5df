"""The order of stages, what is finished, what may change in between, one process at a time."""

import dataclasses
import fcntl
import json
from pathlib import Path

import pytest

from ain_jax import report, run
from ain_jax.stages import registry


@dataclasses.dataclass(frozen=True)
class Trainer:
    steps: int = 1
    keep: int = 2
    keep_all: bool = False


EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
SETTINGS = {"first": (Trainer,), "second": (Trainer,), "third": (Trainer,)}


@pytest.fixture
def done(monkeypatch, tmp_path):
    """The stages that really ran, in order."""
    ran = []

    def stub(stage):
        ran.append(stage.stage)
        (stage.folder / "work").write_text("begun")
        return {"steps": stage.get(Trainer).steps, "seed": stage.seed("training")}

    monkeypatch.setattr(registry, "SETTINGS", dict(SETTINGS))
    monkeypatch.setattr(registry, "RUN", dict.fromkeys(SETTINGS, stub))
    monkeypatch.setattr(registry, "CHECK", dict.fromkeys(SETTINGS, lambda stage: None))
    monkeypatch.setattr(report, "print_stage", lambda *_: None)
    monkeypatch.setattr(report, "print_table", lambda *_: None)
    monkeypatch.setattr(report, "write", lambda summary, root, resolved: root / "report.html")
    (tmp_path / "test.gin").write_text('Experiment.name = "test"\nExperiment.stages = ("first", "second", "third")\n')
    return ran


@pytest.fixture
def go(done, tmp_path, capsys):
    """The exit status and what was printed."""

    def go(*arguments):
        status = run.main(["--exp", str(tmp_path / "test.gin"), "--run_dir", str(tmp_path / "run"), *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return go


def test_all_stages_run_once_in_their_order(go, done, tmp_path):
    status, out, _ = go()
    assert status == 0 and done == ["first", "second", "third"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["stages"]) == set(SETTINGS) and summary["experiment"] == "test"
    assert "summary.json" in out
    status, _, err = go()
    assert status == 0 and len(done) == 3  # finished stages are not repeated
    assert [line.split()[0] for line in err.splitlines() if "finished before" in line] == ["first", "second", "third"]
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again | {"times": 0} == summary | {"times": 0}


def test_a_dry_run_prints_what_is_in_force_and_writes_nothing(go, done, tmp_path):
    status, out, _ = go("--dry_run", "--set", "second/Trainer.steps=7")
    assert status == 0 and not done and not (tmp_path / "run").exists()
    assert "second/Trainer.steps = 7  # --set 'second/Trainer.steps=7'" in out
    assert "first/Trainer.steps = 1\n" in out


def test_one_stage_at_a_time(go, done, tmp_path):
    status, _, err = go("--stage", "second")
    assert status == 1 and not done
    assert "stage 'second' comes after first, not finished in" in err and "run --stage first first" in err
    assert go("--stage", "first")[0] == 0 and go("--stage", "second")[0] == 0
    assert done == ["first", "second"] and not (tmp_path / "run" / "summary.json").exists()
    status, _, err = go("--stage", "secnd")
    assert status == 1 and "--stage 'secnd': test has no such stage: did you mean 'second'?" in err
    assert go()[0] == 0 and done == ["first", "second", "third"]
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_interrupted_stage_is_run_again_and_those_before_it_are_not(go, done, monkeypatch, tmp_path):
    def interrupted(stage):
        (stage.folder / "work").write_text("half")
        raise KeyboardInterrupt("saved at step 3 of 6")

    with monkeypatch.context() as patched:
        patched.setitem(registry.RUN, "second", interrupted)
        status, _, err = go()
    assert status == 130 and "interrupted (saved at step 3 of 6); the same command goes on from there" in err
    assert not (tmp_path / "run" / "second" / "result.json").exists()
    assert go()[0] == 0 and done == ["first", "second", "third"]


def test_changed_settings_of_a_stage_that_has_begun_are_refused(go, done, tmp_path):
    assert go("--stage", "first")[0] == 0
    before = (tmp_path / "run" / "first" / "result.json").read_bytes()
    status, _, err = go("--set", "Trainer.steps=5")
    assert status == 1 and done == ["first"]
    assert "was begun with\n  first/Trainer.steps = 1\nand this run has\n  first/Trainer.steps = 5" in err
    assert "Give another --run_dir, or delete" in err
    assert (tmp_path / "run" / "first" / "result.json").read_bytes() == before
    assert "steps = 1" in (tmp_path / "run" / "config.gin").read_text()
    assert go("--set", "Experiment.seed=1")[0] == 1  # another seed is another run
    assert go("--set", "Trainer.keep_all=True")[0] == 1  # only begins like a neutral one
    # A stage that has not begun may still change, and so may what leaves every number as it is.
    assert (
        go("--set", "second/Trainer.steps=5", "--set", "Trainer.keep=9", "--set", "Experiment.description='x  # y'")[0]
        == 0
    )
    assert json.loads((tmp_path / "run" / "second" / "result.json").read_text())["numbers"]["steps"] == 5


def test_a_setting_that_came_later_than_the_folder_was_at_its_default(go, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Later:
        share: float = 0.5

    assert go()[0] == 0
    monkeypatch.setitem(registry.SETTINGS, "first", (Trainer, Later))
    assert go()[0] == 0
    status, _, err = go("--set", "first/Later.share=0.4")
    assert status == 1 and "was begun with\n  (nothing)\nand this run has\n  first/Later.share = 0.4" in err


def test_a_change_behind_a_number_sign_is_seen(go, monkeypatch, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Text:
        value: str = "a  # b"

    monkeypatch.setitem(registry.SETTINGS, "first", (Trainer, Text))
    assert go()[0] == 0
    assert go("--set", "first/Text.value='a  # c'")[0] == 1
    assert go()[0] == 0


@pytest.mark.parametrize("fault", [ValueError("a fault"), FloatingPointError("a fault"), OSError("a fault")])
def test_a_fault_is_told_in_one_line_and_leaves_what_was_done(go, done, monkeypatch, tmp_path, fault):
    def faulty(stage):
        (stage.folder / "work").write_text("half")
        raise fault

    monkeypatch.setitem(registry.RUN, "second", faulty)
    status, _, err = go()
    assert status == 1 and err.endswith("ain_jax: a fault\n") and "Traceback" not in err
    assert (tmp_path / "run" / "first" / "result.json").exists()
    assert (tmp_path / "run" / "second" / "work").exists()


def test_a_stage_refused_before_it_did_anything_is_not_held_to_its_settings(go, monkeypatch):
    def refusing(stage):
        raise ValueError("no such file")

    with monkeypatch.context() as patched:
        patched.setitem(registry.RUN, "first", refusing)
        assert go()[0] == 1
    assert go("--set", "Trainer.steps=5")[0] == 0


def test_two_processes_do_not_share_a_folder(go, done, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = go()
        assert status == 1 and not done and "is in use by another process" in err
    assert go()[0] == 0


def test_what_later_stages_refuse_is_told_before_the_first_one_runs(go, done, monkeypatch, tmp_path):
    def refuse(stage):
        raise ValueError(f"{stage.stage} cannot be")

    for name in ("second", "third"):
        monkeypatch.setitem(registry.CHECK, name, refuse)
    for more in ((), ("--dry_run",)):
        status, _, err = go(*more)
        assert status == 1 and "second cannot be" in err and "third cannot be" in err
    assert not done and not (tmp_path / "run").exists()


def test_rates_of_a_later_stage_are_read_before_the_first_one_runs(tmp_path, capsys):
    given = ["--exp", str(EXPERIMENTS / "ain_minute.gin"), "--run_dir", str(tmp_path / "run"), "--set"]
    adapters = ["prefer/Lora.rank=2", "--set", "prefer/Optimizer.matrix_rate=0", "--set"]
    for bindings, told in (
        (['prefer/Optimizer.rates={"visual/mergr": 0.0}'], "prefer/Optimizer.rates names 'visual/mergr'"),
        ([*adapters, 'prefer/Lora.targets=("q_prj",)'], "prefer/Lora: targets names 'q_prj'"),
    ):
        assert run.main([*given, *bindings]) == 1
        assert told in capsys.readouterr().err and not (tmp_path / "run").exists()
