"""What is saved comes back bit for bit; what was not finished is no checkpoint; other data is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ain_jax.train import checkpoint, state
from ain_jax.train.checkpoint import Checkpoints, Damaged
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
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), begun(1))
    assert_same(checkpoints.load(1, shapes, MARKS), states[1])
    assert_same(checkpoints.load_params(2, states[0].params), states[2].params)
    assert_same(checkpoint.load_params(folder, states[0].params), states[2].params)
    assert_same(checkpoint.load_params(folder, states[0].params, 1), states[1].params)
    with pytest.raises(ValueError, match="holds no checkpoint of step 3; kept are 1, 2"):
        checkpoint.load_params(folder, states[0].params, 3)
    checkpoints.close()
    assert_same(checkpoint.load_params(folder, states[0].params), states[2].params)
    # ... so that what comes next is the same too
    assert_same(stepped(checkpoints.load(2, begun(1), MARKS)), stepped(states[2]))


@pytest.mark.parametrize(
    ("together", "reads"),
    [(2**26, [3]), (8 + 12 + 256 - 1, [2, 1]), (8 + 12 - 1, [1, 1, 1])],  # the three have 12, 256 and 8 bytes
)
def test_parameters_are_read_together_up_to_some_bytes(saved, monkeypatch, together, reads):
    folder, states = saved
    monkeypatch.setattr(checkpoint, "TOGETHER", together)
    asked, part = [], Checkpoints._part
    monkeypatch.setattr(Checkpoints, "_part", lambda *given: asked.append(len(given[2])) or part(*given))
    checkpoints = Checkpoints(folder)
    assert_same(jax.tree.map(np.asarray, checkpoints.leaves(2, states[0].params)), states[2].params)
    assert asked == reads
    checkpoints.close()


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


def flip(path):
    """Another byte in the middle."""
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 0x10
    path.write_bytes(held)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "garbled": flip,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_never_taken_for_what_was_saved(saved, tmp_path, how, capsys):
    folder, states = saved
    files = sorted(path.relative_to(folder / "2") for path in (folder / "2").rglob("*") if path.is_file())
    fell_back = 0
    for number, name in enumerate(files):
        copy = tmp_path / f"copy{number}" / "checkpoints"
        shutil.copytree(folder, copy)
        DAMAGE[how](copy / "2" / name)
        checkpoints = Checkpoints(copy)
        found = checkpoints.newest(begun(1), MARKS)
        told = capsys.readouterr().err
        assert found is not None
        if int(found.step) == 2:  # of this file nothing is read that matters: the state is what was saved
            assert_same(found, states[2])
        else:
            fell_back += 1
            assert_same(found, states[1])
            assert "damaged" in told and "going on from the checkpoint before it" in told, name
            assert (copy / "damaged-2" / name).exists() == (how != "gone")
            checkpoints.save(stepped(found), MARKS, wait=True)
            assert_same(checkpoints.load(2, begun(1), MARKS), states[2])
        checkpoints.close()
    assert fell_back >= 4


def test_with_no_whole_checkpoint_left_it_says_so(saved):
    folder, _ = saved
    for step in ("1", "2"):
        for path in (folder / step).rglob("d/*"):
            path.write_bytes(b"")
    for _ in range(2):  # and again when it is started again
        checkpoints = Checkpoints(folder)
        with pytest.raises(ValueError, match=r"no checkpoint is left: .*1.* is damaged.* Delete .*stage to begin"):
            checkpoints.newest(begun(1), MARKS)
        checkpoints.close()


def test_a_later_stage_does_not_take_an_earlier_checkpoint_for_the_last(saved):
    folder, states = saved
    for path in (folder / "2").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"2 is damaged .*Delete .*result.json, and the stage goes on from"):
        checkpoint.load_params(folder, states[0].params)


def test_other_marks_are_no_damage(saved):
    folder, _ = saved
    checkpoints = Checkpoints(folder)
    with pytest.raises(ValueError, match="it would go on with other data"):
        checkpoints.newest(begun(), MARKS | {"pack_plan": "new"})
    checkpoints.close()
    assert (folder / "2").is_dir()


def test_a_digest_by_hand_and_on_any_layout():
    values = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32)
    bits = values.view(np.uint32).ravel().astype(object)
    expected = sum((2 * i + 1) * int(b) for i, b in enumerate(bits)) % 2**32
    assert checkpoint.digests({"a": {"b": jnp.asarray(values)}}) == {"a/b": expected}
    other = np.array([[1, 2], [2, 5]])
    for dtype in (jnp.bfloat16, jnp.int32, bool, jnp.uint8):
        array = jnp.asarray(other > 1 if dtype is bool else other, dtype)
        (one,) = checkpoint.digests({"a": array}).values()
        (swapped,) = checkpoint.digests({"a": array[::-1]}).values()
        assert one != swapped, dtype


def test_a_load_that_differs_by_one_bit_is_refused(saved, monkeypatch):
    folder, states = saved
    checkpoints = Checkpoints(folder)
    load = type(checkpoints._checkpointer).load_checkpointables

    def other(self, *rest):
        parts = load(self, *rest)
        parts["params"]["kept"] = jnp.nextafter(parts["params"]["kept"], jnp.inf)
        return parts

    monkeypatch.setattr(type(checkpoints._checkpointer), "load_checkpointables", other)
    with pytest.raises(Damaged, match="params/kept came back with other bits"):
        checkpoints.load(2, states[0], MARKS)
    checkpoints.close()


KILLED = """
import os, signal, sys, time
sys.path[:0] = sys.argv[3:]
from test_checkpoint import MARKS, Checkpoints, begun, stepped
checkpoints = Checkpoints(sys.argv[1], keep=1)
now = stepped(begun(size=1500))
checkpoints.save(now, MARKS, wait=True)
now = stepped(now)
checkpoints.save(now, MARKS)
time.sleep(float(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_the_middle_of_a_save_there_is_always_a_whole_one(tmp_path):
    expected = [begun(size=1500)]
    for _ in range(2):
        expected.append(stepped(expected[-1]))
    here = [str(Path(__file__).parent), *sys.path]
    killed = {
        delay: subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / delay), delay, *here], env=os.environ)
        for delay in ("0", "0.03")
    }
    for delay, process in killed.items():
        assert process.wait(120) == -9
        checkpoints = Checkpoints(tmp_path / delay)
        found = checkpoints.newest(expected[0], MARKS)
        assert found is not None
        assert_same(found, expected[int(found.step)])
        checkpoints.close()
