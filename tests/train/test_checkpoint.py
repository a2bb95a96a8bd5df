"""What is saved comes back bit for bit; what was not finished is no checkpoint; other data is refused."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ain_jax.train import checkpoint, state
from ain_jax.train.checkpoint import Checkpoints
from ain_jax.train.state import TrainState

MARKS = {"pack_plan": "abc", "tokenizer": "def"}
OPTIMIZER = optax.multi_transform(
    {"on": optax.adamw(0.1), "off": optax.set_to_zero()}, {"kept": "off", "layers": {"weight": "on", "half": "on"}}
)


def begun(seed=0, size=8):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"kept": draw(3), "layers": {"weight": draw(size, size), "half": draw(4).astype(jnp.bfloat16)}}
    return state.create(params, OPTIMIZER)


@jax.jit
def stepped(before: TrainState) -> TrainState:
    gradients = jax.tree.map(lambda p: jnp.sin(p) + jnp.asarray(0.1, p.dtype), before.params)
    updates, opt_state = OPTIMIZER.update(gradients, before.opt_state, before.params)
    return TrainState(before.step + 1, optax.apply_updates(before.params, updates), opt_state)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 1 and 2, and the states at these steps."""
    checkpoints = Checkpoints(tmp_path / "stage" / "checkpoints")
    states = [begun()]
    for _ in range(2):
        states.append(stepped(states[-1]))
        checkpoints.save(states[-1], MARKS)
    checkpoints.close()
    return tmp_path / "stage" / "checkpoints", states


def test_save_and_load_are_the_identity(saved):
    folder, states = saved
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() == 2
    assert_same(checkpoints.load(2, begun(1), MARKS), states[2])
    assert_same(checkpoints.load(1, jax.eval_shape(lambda: begun(1)), MARKS), states[1])
    assert_same(checkpoints.load_params(2, states[0].params), states[2].params)
    assert_same(checkpoint.load_params(folder, states[0].params), states[2].params)
    assert_same(checkpoint.load_params(folder, states[0].params, 1), states[1].params)
    with pytest.raises(ValueError, match="holds no checkpoint of step 3; kept are 1, 2"):
        checkpoint.load_params(folder, states[0].params, 3)
    checkpoints.close()
    assert_same(checkpoint.load_params(folder, states[0].params), states[2].params)
    # ... so that what comes next is the same too
    assert_same(stepped(checkpoints.load(2, begun(1), MARKS)), stepped(states[2]))


@pytest.mark.parametrize("name", MARKS)
def test_other_data_or_another_tokenizer_is_refused(saved, name):
    folder, _ = saved
    checkpoints = Checkpoints(folder)
    changed = MARKS | {name: "new"}
    with pytest.raises(
        ValueError, match=f"2 was written with {name} {MARKS[name]}, and this run has new: it would go on"
    ):
        checkpoints.load(2, begun(), changed)
    checkpoints.close()


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    now = begun()
    for _ in range(4):
        now = stepped(now)
        checkpoints.save(now, MARKS, wait=True)
        checkpoints.save(now, MARKS)  # the same step again is no second save
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["3", "4"]


def test_an_interrupted_save_is_not_mistaken_for_a_checkpoint(saved):
    folder, states = saved
    left_over = folder / "3.orbax-checkpoint-tmp"  # how orbax names a folder that it is still writing
    shutil.copytree(folder / "2", left_over)
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() == 2
    assert_same(checkpoints.load(2, begun(), MARKS), states[2])
    now = stepped(states[2])
    checkpoints.save(now, MARKS, wait=True)
    assert checkpoints.latest() == 3
    checkpoints.close()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    step = jax.jit(stepped, donate_argnums=0)  # the buffers that are being saved are given away
    now = stepped(begun(size=1500))
    expected = jax.tree.map(np.array, now)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(now, MARKS)
    for _ in range(5):
        now = step(now)
    jax.block_until_ready(now)
    checkpoints.wait()
    assert_same(checkpoints.load(1, now, MARKS), expected)
    checkpoints.close()


def test_a_folder_without_a_checkpoint_is_told_and_not_made(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint; run the stage that writes it first"):
        checkpoint.load_params(tmp_path / "pretrain" / "checkpoints", begun().params)
    assert not list(tmp_path.iterdir())
