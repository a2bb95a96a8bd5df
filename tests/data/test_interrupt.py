"""Ctrl-C on a terminal while worker processes lay batches: all of them end, and nobody prints a traceback."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing, sys, threading, time
sys.path.insert(0, {folder!r})
from worker_sources import Large
from ain_jax.data import workers

def tell():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    time.sleep(0.1)  # the parent takes interrupts again
    print("starting", flush=True)

if __name__ == "__main__":
    threading.Thread(target=tell, daemon=True).start()
    try:
        for number, _ in enumerate(workers.in_order(Large(), range(10**9), 2, 2)):
            if number == 5:
                print("running", flush=True)
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        sys.exit(130)
"""


def family(pid: int) -> list[int]:
    """The processes of a session, read from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def read_until(terminal: int, word: bytes, seconds: float) -> bytes:
    """What is printed until the word comes, or the terminal is closed."""
    os.set_blocking(terminal, False)
    printed, deadline = b"", time.monotonic() + seconds
    while word not in printed and time.monotonic() < deadline:
        try:
            part = os.read(terminal, 4096)
        except BlockingIOError:
            time.sleep(0.05)
            continue
        except OSError:  # so Linux tells that nobody holds the other end
            break
        printed += part
    return printed


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are read from /proc")
@pytest.mark.parametrize("when", [b"starting", b"running"])
def test_ctrl_c_on_a_terminal(tmp_path, when):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent)))
    terminal, other = pty.openpty()

    def take() -> None:  # a session of its own, whose terminal sends Ctrl-C to every process in it
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where this suite runs in the background of a shell
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, str(script)]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, preexec_fn=take)
    os.close(other)
    try:
        printed = read_until(terminal, when, 100)
        assert when in printed, printed
        assert len(family(process.pid)) >= 3  # the parent and two workers
        os.write(terminal, b"\x03")
        printed = read_until(terminal, b"stopped", 30)
        assert process.wait(30) == 130
        assert b"stopped" in printed and b"Traceback" not in printed, printed.decode()
        deadline = time.monotonic() + 10
        while family(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not family(process.pid)
    finally:
        for left in family(process.pid):
            os.kill(left, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        os.close(terminal)
