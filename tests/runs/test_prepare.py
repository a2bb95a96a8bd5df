"""--prepare does all that asks for no accelerator: what comes after it neither tokenises nor plans anything again."""

import itertools
import json
from pathlib import Path

import pytest

from ain_jax import run
from ain_jax.data import examples, planning
from ain_jax.experiment import parse_override, read_bindings, resolve
from ain_jax.stages import extend_tokenizer, prefer, registry, training

SMALL = Path(__file__).parents[1] / "launch/small.gin"
OVERRIDES = ('Watch.texts = ("documents/ar",)', "Watch.rows = 2")
STAGES = ("pretrain", "prefer")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    given = ["--exp", str(SMALL), "--run_dir", str(root), "--prepare"]
    given += [word for override in OVERRIDES for word in ("--set", override)]
    assert run.main(given) == 0
    return root


def test_it_ends_before_any_stage_learns(prepared):
    assert json.loads((prepared / "extend_tokenizer/result.json").read_text())["numbers"]["new_pieces"] == 40
    for stage in STAGES:
        assert {path.name for path in (prepared / stage).iterdir()} >= {"pack_plan", "watch_documents%2Far"}
        assert not (prepared / stage / "checkpoints").exists() and not (prepared / stage / "result.json").exists()


def test_what_comes_after_it_finds_everything_made(prepared, monkeypatch):
    def again(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(examples, "_write", again)
    monkeypatch.setattr(planning, "write", again)
    resolved = resolve(read_bindings(SMALL), registry.SETTINGS, [parse_override(told) for told in OVERRIDES])
    for stage in STAGES:
        found = registry.StageRun(resolved, prepared, stage)
        rows, watched = {"pretrain": (8, 2), "prefer": (4, 4)}[stage]  # with pictures, whole batches are watched
        assert training.prepare(found, prefer.answers(found)) == {"training": rows, "documents/ar": watched}


def test_of_a_source_so_many_training_records_are_taken_evenly(prepared, tmp_path):
    rows = [{"id": str(n), "text": f"نص رقم {n} " + "و" * n, "language": ("ar", "arz")[n % 2]} for n in range(200)]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    overrides = [f'Sources.files = {{"own": "{tmp_path}/own.jsonl"}}', 'Sources.held_out = {"own": 0.2}']
    found = {}
    for most in (7, 1000):
        told = [parse_override(one) for one in (*overrides, f'Sources.most = {{"own": {most}}}')]
        stage = registry.StageRun(resolve(read_bindings(SMALL), registry.SETTINGS, told), prepared, "pretrain")
        found[most] = {
            "whole": [int(stage.examples("own").records[n].id) for n in range(len(stage.examples("own").records))],
            "part": [r.language for r in stage.examples("own/arz").records],
            "held": len(stage.examples("own", "test")),
            "learnt from": len(extend_tokenizer._texts(stage, "own", "train")),
            "part learnt from": len(extend_tokenizer._texts(stage, "own/arz", "train")),
        }
    few, whole = found[7], found[1000]
    places = [whole["whole"].index(n) for n in few["whole"]]
    steps = {after - before for before, after in itertools.pairwise(places)}
    assert (
        len(places) == 7 and places[0] == 0 and places[-1] == len(whole["whole"]) - 1 and max(steps) <= min(steps) + 1
    )
    assert few["part"] == ["arz"] * 7 and few["learnt from"] == few["part learnt from"] == 7
    assert few["held"] == whole["held"] > 20 and whole["learnt from"] == len(whole["whole"])


def test_the_text_of_a_source_counts_so_many_times(tmp_path, monkeypatch):
    for name, count in (("own", 3), ("rest", 5)):
        rows = [{"id": f"{name}/{n}", "text": f"{name} {n}", "language": "ar"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    told = [
        f'Sources.files = {{"own": "{tmp_path}/own.jsonl", "rest": "{tmp_path}/rest.jsonl"}}',
        'extend_tokenizer/Tokenizer.learn_from = ("own", "rest")',
        'extend_tokenizer/Tokenizer.times = {"own": 4}',
        'extend_tokenizer/Tokenizer.measure = ("documents/en",)',
    ]
    learnt = []

    def stop(_, texts, **__):
        learnt.extend(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr(extend_tokenizer.extend, "extend", stop)
    resolved = resolve(read_bindings(SMALL), registry.SETTINGS, [parse_override(one) for one in told])
    with pytest.raises(KeyboardInterrupt):
        extend_tokenizer.run(registry.StageRun(resolved, tmp_path / "run", "extend_tokenizer"))
    assert learnt == [f"own {n}" for n in range(3)] * 4 + [f"rest {n}" for n in range(5)]
    with pytest.raises(ValueError, match=r"times names 'ow': .*did you mean 'own'"):
        extend_tokenizer.Tokenizer(learn_from=("own",), times={"ow": 2})
    with pytest.raises(ValueError, match=r"times\['own'\] = 0: expected a whole number, 1 or more"):
        extend_tokenizer.Tokenizer(learn_from=("own",), times={"own": 0})
