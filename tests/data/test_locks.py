"""Two processes on one folder: one builds, the other waits and finds it built."""

import json
import os
import subprocess
import sys
import time

from ain_jax.data import locks

BUILD = """
import pathlib, sys, time
from ain_jax.data.builders import merge
from ain_jax.data.builders.files import Sources, build
from ain_jax.data.builders.records import Records

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
run = merge.run

def counted(*arguments):
    (folder / f"built-{name}").touch()
    deadline = time.monotonic() + 60
    while not (folder / "ready-b").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    return run(*arguments)

merge.run = counted
(folder / f"ready-{name}").touch()
while name == "b" and not (folder / "built-a").exists():
    time.sleep(0.01)
made = build("talks", Sources({"talks": str(folder / "talks.jsonl")}, workers=1), folder / "data", progress=False)
print(len(Records(made, "train")))
"""

HOLD = """
import pathlib, sys, time
from ain_jax.data import locks
with locks.building(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def started(code, *arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=pipe, stderr=pipe, text=True)


def test_two_processes_build_a_source_once(tmp_path):
    """The second asks while the first is in the middle of it."""
    rows = ({"id": f"r{i}", "text": f"text {i}"} for i in range(5))
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = [started(BUILD, str(tmp_path), name) for name in "ab"]
    results = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert [out.strip() for out, _ in results] == ["5", "5"]
    assert [(tmp_path / f"built-{name}").exists() for name in "ab"] == [True, False]
    assert results[1][1].count("another process is building") == 1 and "waiting" not in results[0][1]


def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = started(HOLD, str(tmp_path / "a"))
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        waiting = started(HOLD.replace("time.sleep(60)", ""), str(tmp_path / "a"))
        time.sleep(0.5)
        assert waiting.poll() is None
    finally:
        holder.kill()
        holder.communicate()
    out, told = waiting.communicate(timeout=60)
    assert out == "held\n" and waiting.returncode == 0
    # A machine at work may start the second only after the first is gone: then there was nothing to wait for.
    assert told.count("waiting for it") <= 1
    with locks.building(tmp_path / "a"):
        assert (tmp_path / ".a.lock").is_file()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(next(iter(locks.UNKNOWN)), os.strerror(next(iter(locks.UNKNOWN))))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with locks.building(tmp_path / "deep" / "a"):
        assert not (tmp_path / "deep" / "a").exists()
