"""Sums and counts become the numbers that stand in metrics.jsonl, each step once."""

import dataclasses
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worked

from ain_jax.train import measures, metrics, peaks
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
    names = {name for name in lines[0] if not metrics.is_time(name)}
    assert names == {"step", "loss", "filled"} and lines[0]["filled"] == 0.9877
    assert list((tmp_path / "tensorboard").glob("events*"))
    metrics.Log(tmp_path, "pretrain", 5, 0, 1.0).close()  # from the very beginning: nothing is kept
    assert metrics.read(tmp_path / "metrics.jsonl") == []
    assert metrics.read(tmp_path / "none.jsonl") == []


@pytest.fixture
def clock(monkeypatch):
    """`clock(t)`: it is t seconds past the start now, and until it is told otherwise."""
    now = [0.0]
    monkeypatch.setattr(measures, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setitem(measures._compiled, "seconds", 0.0)
    return lambda seconds: now.__setitem__(0, seconds)


def test_speeds_by_hand(tmp_path, clock):
    work = measures.Work({"all": 60.0, "needed": 40.0}, 100.0, "a device of the test")
    log = metrics.Log(tmp_path, "pretrain", 5, 0, 1.0, work)
    for step, (seconds, tokens, targets, patches) in enumerate(((2, 100, 50, 7), (4, 300, 30, 8), (6, 500, 10, 0)), 1):
        clock(seconds)
        log.write(step, {"loss": 1.0, "targets": targets}, tokens, patches)
    log.close()
    lines = metrics.read(tmp_path / "metrics.jsonl")
    # The first step compiles, and is no measure of speed; then 2 s each.
    assert [line["tokens_per_second"] for line in lines] == [0, 150, 200]
    assert [line["targets_per_second"] for line in lines] == [0, 15, 10]
    assert [line["patches_per_second"] for line in lines] == [0, 4, 2]
    assert [(line["step_seconds"], line["seconds"]) for line in lines] == [(0, 2), (2, 4), (2, 6)]
    assert "mfu/all" not in lines[0] and (lines[2]["mfu/all"], lines[2]["mfu/needed"]) == (0.3, 0.2)


def test_peaks_by_kind():
    assert peaks.peak("TPU v5 lite", 8) == (8 * 197e12, peaks.peak("TPU v5 lite", 8)[1])  # type: ignore[index]
    found = {kind: peaks.peak(kind, 1) for kind in ("TPU v5", "TPU v6 lite", "NVIDIA H100 80GB HBM3", "NVIDIA H200")}
    assert [one and one[0] / 1e12 for one in found.values()] == [459, 918, 989.4, 989.4]
    assert peaks.peak("cpu", 4) is None
    assert peaks.peak("cpu", 4, 0.5) == (2e12, "4 x 0.5 TFLOP/s as Trainer.peak_tflops says")


def test_speeds_are_those_of_the_last_steps(tmp_path, clock):
    log = metrics.Log(tmp_path, "pretrain", 100, 0, 1.0)
    for step in range(1, 52):
        clock(step if step <= 30 else 30 + 10 * (step - 30))  # ten times slower
        log.write(step, {"loss": 1.0}, 100)
    log.close()
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert lines[29]["tokens_per_second"] == 100 and lines[-1]["tokens_per_second"] == 10


def test_where_the_time_went_by_hand(clock):
    here = measures.Clock()
    with here.timed("data"):
        clock(4)  # nothing ran meanwhile
    measures._compiled["seconds"] = 3.0
    clock(7)
    assert here.step(1, 1, 1)["goodput"] == 0.0
    with here.timed("data"):
        clock(9)
    with here.timed("device"):
        clock(10.5)  # of the two seconds before, the step filled one and a half
    with here.timed("checkpoint"):
        clock(12)
        measures._compiled["seconds"] = 4.0  # of the second and a half, one is not the disk's
    clock(20)
    found = here.step(1, 1, 1)
    assert {name: found[f"{name}_seconds"] for name in ("data", "compile", "checkpoint")} == {
        "data": 4.5, "compile": 4.0, "checkpoint": 0.5,
    }  # fmt: skip
    assert found["goodput"] == pytest.approx(1 - 9 / 20)


def test_what_jax_compiles_is_counted_once():
    measures._listen()
    before, began = measures._compiled["seconds"], time.monotonic()
    inner = jax.jit(lambda x: jnp.sin(x) * 3)
    jax.jit(lambda x: sum(inner(x + i) for i in range(40)))(np.ones(7))
    spent = measures._compiled["seconds"] - before
    assert 0 < spent <= time.monotonic() - began


def test_skipped_steps_have_no_numbers_and_are_counted(tmp_path):
    log = metrics.Log(tmp_path, "pretrain", 5, 0, 1.0)
    log.write(1, {"loss": 1.0}, 10)
    log.write(2, {"skipped": 1.0}, 10)
    log.close()
    assert log.bad == 1 and "loss" not in metrics.read(tmp_path / "metrics.jsonl")[1]
    again = metrics.Log(tmp_path, "pretrain", 5, 2, 1.0)
    assert again.bad == 1
    again.close()
    earlier = metrics.Log(tmp_path, "pretrain", 5, 1, 1.0)  # goes on before that step
    assert earlier.bad == 0
    earlier.close()


def test_tokens_and_patches_of_a_batch_by_hand():
    source = worked.examples([worked.example(1, 5, [(16, 8)]), worked.example(2, 4)])
    batch = worked.batch([worked.segments(source, 0), worked.segments(source, 1)])
    lengths = [len(segment.tokens_L) for which in (0, 1) for segment in worked.segments(source, which)]
    found = measures.count(batch, 2)
    # A picture of 16 x 8 pixels in patches of 4 x 4.
    assert (int(found.tokens), int(found.patches), int(found.flag)) == (sum(lengths), 8, 2)
    text = dataclasses.replace(batch, patches_BPK=None, patch_positions_BP2=None, patch_segments_BP=None)
    assert int(measures.count(text, 0).patches) == 0


@pytest.mark.parametrize("line", ["", "[]", "{}", '{"step": null}', "3", '{"step": 1'])
def test_a_line_without_a_step_is_left_out(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 1}]
