"""Runs of several processes: they train together, stop at one step, and go on as another number of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import joined
import numpy as np
import pytest

from ain_jax.launching import processes
from ain_jax.launching.machine import COORDINATOR
from ain_jax.train import metrics

ROOT = Path(__file__).resolve().parents[2]


def together(number: int, command: list[str], cache: Path, seconds: float = 280) -> list[tuple[int, str]]:
    """(exit status, what was printed) of each of so many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        COORDINATOR[0]: f"localhost:{port}",
        COORDINATOR[1]: str(number),
    }
    running = [
        subprocess.Popen(
            [sys.executable, *command], env=environment | {COORDINATOR[2]: str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(number)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, text) for process, text in zip(running, told, strict=True)]


def lines(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not metrics.is_time(k)} for line in metrics.read(folder / "metrics.jsonl")
    ]


def test_four_processes_then_two_then_one(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    run.mkdir()
    whole.mkdir()
    expected = joined.go(whole)
    script = str(Path(joined.__file__))
    # Only one was asked; all know it a step later, or when they save, as they do all the time in the second part.
    for number, at, asked, stops in ((4, 2, 3, 3), (2, 5, 0, 5)):
        for status, text in together(number, [script, str(run), str(at), str(asked)], tmp_path / "cache"):
            assert status == 130 and f"interrupted: saved at step {stops} of 8" in text, text[-3000:]
        assert [line["step"] for line in lines(run)] == list(range(1, stops + 1))
    ended = joined.go(run)
    assert int(ended.step) == joined.STEPS
    np.testing.assert_allclose(ended.params["table"], expected.params["table"], rtol=1e-4, atol=1e-5)
    for found, line in zip(lines(run), lines(whole), strict=True):
        assert found.keys() == line.keys()
        assert found == pytest.approx(line, rel=1e-5, abs=2e-6)  # sums of several devices come in another order
    speeds = [line["tokens_per_second"] for line in metrics.read(run / "metrics.jsonl")]
    assert all(speed > 0 for step, speed in enumerate(speeds, 1) if step not in (1, 4, 6))


def test_a_text_that_rises_stops_all_of_them_at_one_step(tmp_path):
    script = str(Path(joined.__file__))
    for rise, ends in (("0.001", "stopped: step 2: bits per byte of size rose from"), ("9", "ended at 8")):
        told = together(2, [script, str(tmp_path), "0", "-1", rise], tmp_path / "cache")
        assert all(ends in text for _, text in told), told[0][1][-3000:]
        assert [status for status, _ in told] == [int("stopped" in ends)] * 2
    watched = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in watched] == [0, 2, 4, 6, 8] and watched[1]["size"] > watched[0]["size"] * 1.001


def test_every_stage_of_an_experiment_by_two_processes(tmp_path):
    given = ["--exp", str(ROOT / "tests/launch/small.gin"), "--run_dir", str(tmp_path / "run")]
    for status, text in together(2, [str(ROOT / "launch/local.py"), *given], tmp_path / "cache"):
        assert status == 0, text[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert list(summary["stages"]) == ["extend_tokenizer", "pretrain", "prefer", "evaluate", "export"]
    assert summary["machine"]["processes"] == 2 and len(summary["machine"]["devices"]) == 2
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_alone_there_is_nobody_to_tell():
    assert processes.of_first(lambda: {"a": 1}) == {"a": 1} and processes.first(lambda: 3) == 3
    processes.wait_for_all("test")
    with pytest.raises(OSError, match="gone"):
        processes.of_first(lambda: (_ for _ in ()).throw(OSError("gone")))


TOLD = """
import sys
from pathlib import Path
from ain_jax.launching import OtherProcess, machine, processes
import jax
machine.join()
path, first = Path(sys.argv[1]), jax.process_index() == 0
def make():  # the second one finds what the first has written, and writes nothing itself
    if not path.exists():
        assert first
        path.write_text("made")
    return processes.of_first(path.read_text)  # inside, each is by itself
assert processes.first(make) == "made"
assert processes.of_first(lambda: {"by": jax.process_index()}) == {"by": 0}
try:
    processes.of_first(lambda: 1 / 0)
    raise AssertionError("no fault")
except ZeroDivisionError:
    assert first
except OtherProcess as fault:
    assert not first and str(fault) == "division by zero"
try:
    processes.of_first(lambda: (_ for _ in ()).throw(KeyboardInterrupt("asked")))
except KeyboardInterrupt as stop:
    assert str(stop) == "asked"
processes.wait_for_all("end")
import numpy as np
mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.sharding.NamedSharding(mesh, jax.P("a"))
array = jax.make_array_from_callback((4,), spread, lambda where: np.arange(4.0)[where])
assert processes.fetch({"x": array})["x"].tolist() == [0, 1, 2, 3]
assert processes.own_mesh().devices.ravel().tolist() == jax.local_devices()
print("all held")
"""


def test_what_the_first_process_tells(tmp_path):
    for status, text in together(2, ["-c", TOLD, str(tmp_path / "made")], tmp_path / "cache"):
        assert status == 0 and "all held" in text, text[-3000:]
