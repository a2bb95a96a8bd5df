"""A run that is stopped at any step and goes on ends as if it had never stopped."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import worked

from ain_jax.data import loader, pack_plan
from ain_jax.data.packing import Packing
from ain_jax.train import losses, metrics, optimizer, state
from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.loop import Interrupted, Trainer, train
from ain_jax.train.optimizer import Optimizer
from ain_jax.train.step import make_update

STEPS = 6
PACKING = Packing(row_tokens=24, row_targets=24, window=4)
MARKS = {"pack_plan": "abc", "tokenizer": "def"}


class Run:
    """What `stages.common.fit` puts together, around a model of one table."""

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

    def go(self, folder, update=None, marks=MARKS, **trainer):
        """The state that training in this folder ends with."""
        settings = Trainer(**({"steps": STEPS, "rows": 2, "save_seconds": 1e9} | trainer))
        checkpoints = Checkpoints(folder / "checkpoints", settings.keep)
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
    return [{k: v for k, v in line.items() if k not in metrics.TIMES} for line in lines]


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


def test_a_state_that_is_not_finite_is_never_saved(run, tmp_path):
    def spoil(result):
        after, sums, norm = result
        return after, sums, norm * np.nan

    with pytest.raises(
        FloatingPointError, match=r"step 4: loss [\d.]+, gradient norm nan; .* Lower Optimizer.learning_rate"
    ):
        run.go(tmp_path, run.at(4, spoil), save_seconds=0.0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == 3
    checkpoints.close()
    assert len(numbers(tmp_path)) == 3


def test_changed_data_and_shortened_runs_are_refused(run, tmp_path):
    run.go(tmp_path, steps=2)
    with pytest.raises(ValueError, match="was written with pack_plan abc, and this run has other"):
        run.go(tmp_path, marks=MARKS | {"pack_plan": "other"})
    with pytest.raises(ValueError, match=r"is at step 2, beyond Trainer.steps = 1"):
        run.go(tmp_path, steps=1)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="rows = 6 cannot be cut into accumulate = 4 equal parts"):
        Trainer(steps=1, rows=6, accumulate=4)
    for wrong in ({"steps": -1}, {"steps": 1, "rows": 0}, {"steps": 1, "keep": 0}):
        with pytest.raises(ValueError, match="expected 1 or more each"):
            Trainer(**wrong)
    assert dataclasses.asdict(Trainer(steps=1))["rows"] == 8
