"""The whole experiment at its smallest: it runs, repeats itself, and survives being stopped anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Inside every stage, during a save, between stages; some more than once in one stage.
POINTS = (
    "KILL@data",
    "KILL@tokenizer",
    "KILL@tokenise",
    "INT@step:pretrain:3",
    "KILL@step:pretrain:9",
    "KILL@saving:pretrain",
    "KILL@between:pretrain",
    "TERM@step:instruct:5",
    "KILL@reference:prefer",
    "INT@step:prefer:2",
    "KILL@model:evaluate:instruct",
    "KILL@weights",
    "KILL@result:export",
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(point, folder)`: (how it ended, what it said) of a run in that folder, stopped at that point."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "",
    }
    log = tmp_path_factory.mktemp("log") / "stderr"
    command = [sys.executable, str(Path(__file__).with_name("stopped.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as server:
        assert server.stdin is not None and server.stdout is not None

        def run(point: str, folder: Path) -> tuple[int, str]:
            arguments = ["--exp", "ain_minute", "--run_dir", str(folder), "--set", "Trainer.save_seconds=0.5"]
            print(json.dumps([str(log), point, *arguments]), file=server.stdin, flush=True)
            ended = server.stdout.readline()
            assert ended, f"the server of runs is gone: {log.read_text('utf-8', 'replace')[-3000:]}"
            return int(ended), log.read_text("utf-8", "replace")

        yield run
        server.stdin.close()


def numbers(folder: Path) -> dict:
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    return {k: v for k, v in summary.items() if k != "times"}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    status, said = start("", folder)
    assert status == 0, said[-3000:]
    return folder


def test_writes_what_it_promises(whole):
    assert (whole / "config.gin").read_text("utf-8").count("pretrain/Trainer.steps = 12") == 1
    for stage in ("pretrain", "instruct", "prefer"):
        lines = [json.loads(line) for line in (whole / stage / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert list((whole / stage / "tensorboard").glob("events*"))
    assert (whole / "report.html").stat().st_size > 10_000
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= {
        p.name for p in (whole / "export").iterdir()
    }
    assert numbers(whole)["stages"]["extend_tokenizer"]["fertility"]["ar"]["after"]["tokens_per_word"] < 3.5


def test_any_checkpoint_is_exported_at_any_time(whole, tmp_path):
    def export(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ain_jax.stages.export", "--run", str(whole), *arguments]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    done = export("--out", str(tmp_path / "last"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    last = tmp_path / "last" / "model.safetensors"
    assert last.read_bytes() == (whole / "export" / "model.safetensors").read_bytes()
    step = max(int(path.name) for path in (whole / "instruct" / "checkpoints").iterdir() if path.name.isdigit())
    done = export("--stage", "instruct", "--step", str(step), "--out", str(tmp_path / "earlier"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "earlier" / "model.safetensors").read_bytes() != last.read_bytes()
    assert f"at step {step} of the stage instruct" in (tmp_path / "earlier" / "README.md").read_text("utf-8")
    refused = export("--step", "999999")
    assert refused.returncode == 1 and "holds no checkpoint of step 999999; kept are" in refused.stderr


def test_stopped_at_every_point_it_ends_with_the_same_numbers(whole, start, tmp_path):
    for point in POINTS:
        status, said = start(point, tmp_path)
        assert f"stopping at {point}" in said, f"{point} was never reached:\n{said[-3000:]}"
        expected = {"KILL": (-9,), "INT": (130, -2), "TERM": (130, -15)}[point.partition("@")[0]]
        assert status in expected, f"{point}: {status}\n{said[-3000:]}"
        assert not (tmp_path / "summary.json").exists()
    status, said = start("", tmp_path)
    assert status == 0, said[-3000:]
    assert "pretrain         finished before" in said
    assert numbers(tmp_path) == numbers(whole)
    for stage in ("pretrain", "instruct", "prefer"):
        lines = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
