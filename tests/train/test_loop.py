"""A run that is stopped at any step and goes on ends as if it had never stopped."""

import dataclasses
import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
import worked

from ain_jax.data import loader, pack_plan
from ain_jax.data.packing import Packing
from ain_jax.launching import signals
from ain_jax.train import losses, metrics, optimizer, state
from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.loop import Interrupted, Trainer, train
from ain_jax.train.optimizer import Optimizer
from ain_jax.train.step import make_update

STEPS = 6
PACKING = Packing(row_tokens=24, row_targets=24, window=4)
MARKS = {"pack_plan": "abc", "tokenizer": "def"}


class Run:
    """What `stages.training.fit` puts together, around a model of one table."""

    def __init__(self, folder):
        source = worked.examples([worked.example(i, 5 + i % 9) for i in range(30)])
        plan = pack_plan.plan({"a": source}, None, PACKING, None, 0, folder / "plan.npz")
        self.rows = loader.Rows(plan, [source], PACKING, worked.PICTURE, None)
        assert self.rows.plan.rows >= 2 * STEPS
        settings = Optimizer(0.1, warmup_steps=2)
        params = worked.table(seed=1)
        self.transform = optimizer.make(settings, params, STEPS)
        loss = losses.next_token(worked.Bigram(), 1)
        self.update = make_update(loss, self.transform, optimizer.rate_tree(params, {}))

    def go(self, folder, update=None, marks=MARKS, profile=None, watch=None, **trainer):
        """The state that training in this folder ends with."""
        settings = Trainer(**({"steps": STEPS, "rows": 2, "save_seconds": 1e9} | trainer))
        checkpoints = Checkpoints(folder / "checkpoints", settings.keep, settings.keep_every)
        try:
            return train(
                update=update or self.update,
                state=state.create(worked.table(seed=1), self.transform),
                frozen={},
                batches=lambda start: loader.batches(self.rows, settings.rows, None, start),
                trainer=settings,
                key=jax.random.key(0),
                checkpoints=checkpoints,
                marks=marks,
                groups=self.rows.groups,
                log=lambda start: metrics.Log(folder, "test", settings.steps, start, 0.9),
                profile=profile,
                watch=watch,
            )
        finally:
            checkpoints.close()

    def at(self, step, action):
        """The update, with something that happens once `step` has been dispatched."""

        def update(before, *rest):
            number = int(before.step) + 1
            result = self.update(before, *rest)
            if number == step:
                result = action(result) or result
            return result

        return update


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run.go(folder), numbers(folder)


def numbers(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{k: v for k, v in line.items() if not metrics.is_time(k)} for line in lines]


def assert_as_whole(ended, folder, whole):
    expected, lines = whole
    for a, b in zip(jax.tree.leaves(ended), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert numbers(folder) == lines


def interrupt(number=signal.SIGINT):
    return lambda _: os.kill(os.getpid(), number)


def test_what_is_written_down(whole):
    ended, lines = whole
    assert int(ended.step) == STEPS == len(lines)
    assert lines[0]["loss"] > lines[-1]["loss"] + 0.1
    assert set(lines[0]) == {
        "step",
        "loss",
        "targets",
        "accuracy",
        "gradient_norm",
        "loss/made/ar",
        "accuracy/made/ar",
        "filled",
    }


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_interrupted_at_any_step_it_goes_on_to_the_same_end(run, whole, tmp_path, step):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"saved at step {step} of {STEPS}"):
        run.go(tmp_path, run.at(step, interrupt()))
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(numbers(tmp_path)) == step
    assert_as_whole(run.go(tmp_path), tmp_path, whole)
    assert_as_whole(run.go(tmp_path), tmp_path, whole)  # finished: nothing is done again


def test_interrupted_at_every_step(run, whole, tmp_path):
    for step in range(1, STEPS + 1):
        with pytest.raises(Interrupted, match=f"step {step} "):
            run.go(tmp_path, run.at(step, interrupt((signal.SIGINT, signal.SIGTERM)[step % 2])))
    assert_as_whole(run.go(tmp_path), tmp_path, whole)


def test_asked_to_stop_at_any_moment(run, whole, tmp_path):
    """Also while the stage begins, compiles, saves, or is on its way out."""
    begun = time.monotonic()
    run.go(tmp_path / "timed", save_seconds=0.0)
    took, draws, stops = time.monotonic() - begun, np.random.default_rng(0), 0
    for trial in range(12):
        folder = tmp_path / str(trial)
        asked = threading.Timer(draws.uniform(0.0, took), os.kill, (os.getpid(), signal.SIGTERM))
        try:
            with signals.at_once():
                asked.start()
                try:
                    run.go(folder, save_seconds=0.0)
                finally:
                    asked.cancel()
                    asked.join()
        except KeyboardInterrupt:
            stops += 1
        assert_as_whole(run.go(folder), folder, whole)
    assert stops > 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [2, 5])
def test_killed_between_saves_it_goes_on_from_the_last_one(run, whole, tmp_path, step):
    def kill(_):
        raise Killed

    with pytest.raises(Killed):
        run.go(tmp_path, run.at(step, kill), save_seconds=0.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # written after the checkpoint, and torn
        file.write(f'{{"step": {step}, "loss": 1.0}}\n{{"step": {step + 1}, "lo')
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == step - 1
    checkpoints.close()
    assert_as_whole(run.go(tmp_path), tmp_path, whole)


def test_a_second_signal_stops_at_once(run, tmp_path):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stop:
        run.go(tmp_path, run.at(3, twice))
    assert not isinstance(stop.value, Interrupted)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    checkpoints.close()


def poisoned(run, *steps):
    """The update, whose loss is not a number at these steps: the model's own output is what spoils it."""
    loss = losses.next_token(worked.Bigram(), 1)

    def spoilt(params, frozen, batch, key):
        sums = loss(params, {}, batch, key)
        return dataclasses.replace(sums, loss=sums.loss * frozen["factor"])

    inner = make_update(spoilt, run.transform, optimizer.rate_tree(worked.table(seed=1), {}), skip_bad=True)

    def update(before, frozen, batch, key):
        factor = np.float32(np.nan if int(before.step) + 1 in steps else 1.0)
        return inner(before, {"factor": factor}, batch, key)

    return update


def test_bad_steps_change_nothing_and_are_counted(run, tmp_path):
    seen = {}
    update = poisoned(run, 2, 3, 5)

    def watched(before, *rest):
        number = int(before.step) + 1
        seen[number] = jax.tree.map(np.array, before)
        return update(before, *rest)

    ended = run.go(tmp_path, watched, bad_steps=4)
    same = lambda a, b: all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves((a.params, a.opt_state)), jax.tree.leaves((b.params, b.opt_state)), strict=True)
    )
    assert int(ended.step) == STEPS
    assert same(seen[2], seen[3]) and same(seen[3], seen[4]) and same(seen[5], seen[6])
    assert not same(seen[1], seen[2]) and not same(seen[4], seen[5])
    lines = numbers(tmp_path)
    assert [line["step"] for line in lines if "skipped" in line] == [2, 3, 5]
    assert all(("loss" in line) != ("skipped" in line) for line in lines)


@pytest.mark.parametrize(
    ("bad", "limits", "at"),
    [
        ((4,), {"bad_steps": 0}, 4),
        ((2, 3, 4), {"bad_steps": 2}, 4),
        ((1, 3, 5), {"bad_steps": 4, "bad_steps_in_all": 2}, 5),
    ],
)
def test_too_many_bad_steps_stop_the_run_and_keep_the_batch(run, tmp_path, bad, limits, at):
    with pytest.raises(FloatingPointError, match=rf"step {at}: loss nan, .*lower Optimizer.learning_rate") as stop:
        run.go(tmp_path, poisoned(run, *bad), save_seconds=1e9, **limits)
    path = tmp_path / f"bad_step_{at}.npz"
    assert str(path) in str(stop.value)
    expected = {step: batch for step, (batch, _) in enumerate(loader.batches(run.rows, 2, None), start=1)}[at]
    with np.load(path) as kept:
        np.testing.assert_array_equal(kept["tokens_BL"], np.asarray(expected.tokens_BL))
    assert len(numbers(tmp_path)) == at


def test_bad_steps_of_an_earlier_part_of_the_run_are_counted(run, tmp_path):
    update = poisoned(run, 1, 3, 5)

    def stopped(before, *rest):
        if int(before.step) + 1 == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return update(before, *rest)

    with pytest.raises(Interrupted):
        run.go(tmp_path, stopped, bad_steps=4, bad_steps_in_all=2)
    with pytest.raises(FloatingPointError, match="step 5: .* 3 in all were skipped"):
        run.go(tmp_path, update, bad_steps=4, bad_steps_in_all=2)


def test_a_profile_is_taken_and_changes_nothing(run, whole, tmp_path, capsys):
    assert_as_whole(run.go(tmp_path, profile=tmp_path / "profile"), tmp_path, whole)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000 and f"profile  {tmp_path / 'profile'}" in capsys.readouterr().err
    run.go(tmp_path / "short", profile=tmp_path / "none", steps=3)
    assert not (tmp_path / "none").exists() and "the stage ended before its step 6" in capsys.readouterr().err


def test_permanent_checkpoints_stay(run, whole, tmp_path):
    assert_as_whole(run.go(tmp_path, save_seconds=0.0, keep=1, keep_every=2), tmp_path, whole)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [2, 4, 6]
    checkpoints.close()
    lone = tmp_path / "lone"
    run.go(lone, keep=1, keep_every=4)
    checkpoints = Checkpoints(lone / "checkpoints")
    assert checkpoints.steps() == [4, 6]  # no time has passed: saved for its number alone
    checkpoints.close()


def test_changed_data_and_shortened_runs_are_refused(run, tmp_path):
    run.go(tmp_path, steps=2)
    with pytest.raises(ValueError, match="was written with pack_plan abc, and this run has other"):
        run.go(tmp_path, marks=MARKS | {"pack_plan": "other"})
    with pytest.raises(ValueError, match=r"is at step 2, beyond Trainer.steps = 1"):
        run.go(tmp_path, steps=1)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="rows = 6 cannot be cut into accumulate = 4 equal parts"):
        Trainer(steps=1, rows=6, accumulate=4)
    with pytest.raises(ValueError, match="keep_every = -1, bad_steps = -2: expected 0 or more"):
        Trainer(steps=1, keep_every=-1, bad_steps=-2)
    for wrong in ({"steps": -1}, {"steps": 1, "rows": 0}, {"steps": 1, "keep": 0}):
        with pytest.raises(ValueError, match="expected 1 or more each"):
            Trainer(**wrong)
    assert dataclasses.asdict(Trainer(steps=1))["rows"] == 8
