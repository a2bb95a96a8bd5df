"""Sums and counts become the numbers that stand in metrics.jsonl, each step once."""

import json
import types

import numpy as np
import pytest

from ain_jax.train import metrics
from ain_jax.train.losses import Sums

GROUPS = ("read/ar", "read/en", "name/en")


def test_numbers_by_hand():
    parts = {
        "loss": (np.array([6.0, 2.0, 0.0]), np.array([3.0, 1.0, 0.0])),
        "accuracy": (np.array([3.0, 0.0, 0.0]), np.array([3.0, 1.0, 0.0])),
    }
    found = metrics.numbers(Sums(np.float32(10), np.float32(4), parts), GROUPS)
    assert found == {
        "loss": 2.0,  # the plain one that `parts` gives; what the gradient was taken of may be smoothed
        "targets": 4.0,
        "loss/read/ar": 2.0,
        "loss/read/en": 2.0,
        "accuracy": 0.75,
        "accuracy/read/ar": 1.0,
        "accuracy/read/en": 0.0,
    }
    assert metrics.numbers(Sums(np.float32(10), np.float32(4), {}), GROUPS) == {"loss": 2.5, "targets": 4.0}


def test_a_log_goes_on_behind_its_last_step(tmp_path):
    first = metrics.Log(tmp_path, "pretrain", 5, 0, 0.98765)
    for step in (1, 2, 3):
        first.write(step, {"loss": 1 / step}, 100)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a write
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    second = metrics.Log(tmp_path, "pretrain", 5, 2, 0.98765)
    second.write(3, {"loss": 9.0}, 100)
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert set(lines[0]) == {"step", "loss", "filled", *metrics.TIMES} and lines[0]["filled"] == 0.9877
    assert list((tmp_path / "tensorboard").glob("events*"))
    metrics.Log(tmp_path, "pretrain", 5, 0, 1.0).close()  # from the very beginning: nothing is kept
    assert metrics.read(tmp_path / "metrics.jsonl") == []
    assert metrics.read(tmp_path / "none.jsonl") == []


def test_tokens_per_second_leaves_out_the_step_that_compiles(tmp_path, monkeypatch):
    now = iter([10.0, 12.0, 14.0, 16.0])
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    log = metrics.Log(tmp_path, "pretrain", 5, 0, 1.0)
    log.write(1, {"loss": 1.0}, 100)
    log.write(2, {"loss": 1.0}, 300)
    log.write(3, {"loss": 1.0}, 500)
    log.close()
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [(line["tokens_per_second"], line["seconds"]) for line in lines] == [(0, 2.0), (150, 4.0), (200, 6.0)]


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"step": null}', "3", '{"step": 1'])
def test_a_line_without_a_step_is_left_out(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 1}]
