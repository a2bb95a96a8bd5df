"""Held-out texts are measured before, during and after; a run that forgets them is saved and stops."""

import json
import os
import signal

import numpy as np
import pytest
import worked
from test_loop import STEPS, Run, assert_as_whole, numbers

from ain_jax.launching import Interrupted
from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.watch import Risen, Watch, Watcher

TEXTS = ("documents/ar", "documents/en")
START = np.asarray(worked.table(seed=1)["table"], np.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The same run, unwatched."""
    folder = tmp_path_factory.mktemp("whole")
    return run.go(folder), numbers(folder)


class Sizes:
    """In place of texts: numbers that follow from the weights alone, one falling and one rising with each step."""

    def __init__(self):
        self.calls = 0

    def __call__(self, trained, frozen):
        self.calls += 1
        moved = float(np.abs(np.asarray(trained["table"], np.float64) - START).mean())
        return {"documents/ar": 3.0 - moved, "documents/en": 1.0 + moved}


def watcher(folder, measure=None, **settings):
    return Watcher(Watch(TEXTS, **settings), folder, measure or Sizes())


def lines(folder):
    return [json.loads(line) for line in (folder / "watch.jsonl").read_text("utf-8").splitlines()]


def test_before_in_between_and_after(run, whole, tmp_path, capsys):
    measure = Sizes()
    ended = run.go(tmp_path, watch=watcher(tmp_path, measure, every=4))
    assert_as_whole(ended, tmp_path, whole)  # it changes nothing
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [0, 4, 6] and measure.calls == 3
    assert written[0] == {"step": 0, "documents/ar": 3.0, "documents/en": 1.0}
    assert 1.0 < written[1]["documents/en"] < written[2]["documents/en"]
    moved = np.abs(np.asarray(ended.params["table"], np.float64) - START).mean()
    assert written[2]["documents/en"] == pytest.approx(1 + moved, abs=1e-6)
    told = capsys.readouterr().err
    assert "step 0: bits per byte of documents/ar 3.0000, documents/en 1.0000" in told
    assert f"step 6: bits per byte of documents/ar {3 - moved:.4f} ({-moved / 3:+.1%})" in told
    events = [path for path in (tmp_path / "tensorboard").iterdir() if b"watch/documents/en" in path.read_bytes()]
    assert events
    assert run.go(tmp_path, watch=watcher(tmp_path, measure, every=4)) is not None and measure.calls == 3  # finished


def test_only_before_and_after(run, tmp_path):
    run.go(tmp_path, watch=watcher(tmp_path))
    assert [line["step"] for line in lines(tmp_path)] == [0, STEPS]


@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_an_interrupted_run_compares_with_the_same_first_values(run, whole, tmp_path, step):
    expected = tmp_path / "expected"
    run.go(expected, watch=watcher(expected, every=2))
    update = run.at(step, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        run.go(tmp_path, update, watch=watcher(tmp_path, every=2))
    with (tmp_path / "watch.jsonl").open("a") as file:  # of steps that the checkpoint does not hold, and torn
        file.write(f'{{"step": {STEPS + 1}, "documents/en": 9.0}}\n{{"step": 8, "docu')
    assert_as_whole(run.go(tmp_path, watch=watcher(tmp_path, every=2)), tmp_path, whole)
    assert lines(tmp_path) == lines(expected)


def test_a_run_that_forgets_is_saved_and_stops(run, whole, tmp_path):
    plain = tmp_path / "plain"
    run.go(plain, watch=watcher(plain, every=1))
    at = {line["step"]: line["documents/en"] for line in lines(plain)}
    share = (at[3] + at[2]) / 2 - 1  # what step 3 is the first above

    def go(share):
        return run.go(tmp_path, watch=watcher(tmp_path, every=1, stop_rise={"documents/en": share}))

    with pytest.raises(Risen) as stop:
        go(share)
    assert f"step 3: bits per byte of documents/en rose from 1 before the first step to {at[3]:g} " in str(stop.value)
    assert f"where Watch.stop_rise allows {share:+.2%}. The state of this step is saved" in str(stop.value)
    assert "raise Watch.stop_rise" in str(stop.value) and "Mixture.weights" in str(stop.value)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == 3 == len(numbers(tmp_path))
    checkpoints.close()
    # The same command says the same and trains no further; with a larger share it goes on to the very same end.
    with pytest.raises(Risen, match="step 3: bits per byte of documents/en rose"):
        go(share)
    assert len(numbers(tmp_path)) == 3
    assert_as_whole(go(9.0), tmp_path, whole)
    assert lines(tmp_path) == lines(plain)


def test_a_stop_at_the_last_step_is_no_end(run, tmp_path):
    for _ in range(2):
        with pytest.raises(Risen, match=f"step {STEPS}: "):
            run.go(tmp_path, watch=watcher(tmp_path, stop_rise={"documents/en": 1e-4}))


def test_a_value_that_is_no_number_stops(run, tmp_path):
    values = iter([{"documents/en": 1.0}, {"documents/en": float("nan")}])
    watch = Watcher(Watch(TEXTS[1:], stop_rise={"documents/en": 9.0}), tmp_path, lambda *_: next(values))
    with pytest.raises(Risen, match=r"to nan \(\+nan%\)"):
        run.go(tmp_path, watch=watch)


def test_without_the_first_values_nothing_is_compared(run, tmp_path):
    run.go(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"does not say what was measured before the first step, .* is at step 2"):
        run.go(tmp_path, watch=watcher(tmp_path))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"every": -1}, "every = -1, rows = 64, row_tokens = 0: expected 0 or more each"),
        ({"texts": ("a", "b", "a")}, "texts names a more than once"),
        ({"every": 5, "rows": 8, "row_tokens": 9}, "every = 5 and rows = 8 and row_tokens = 9, and nothing is watched"),
        ({"texts": ("documents/en",), "stop_rise": {"documents/em": 0.1}}, "'documents/em', which texts does not: did"),
        ({"texts": ("a",), "stop_rise": {"a": 0.0}}, "stop_rise = {'a': 0.0}: expected a share above 0; leave it out"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError) as error:
        Watch(**settings)
    assert told in str(error.value)


def test_the_time_of_it_is_told_apart(run, tmp_path):
    run.go(tmp_path, watch=watcher(tmp_path, every=2))
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert written[-1]["watch_seconds"] > 0
