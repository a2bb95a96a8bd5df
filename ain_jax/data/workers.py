"""Processes that make batches: in order, the same whatever their number, and gone when the parent is.

Each worker is started afresh (no fork: threads and devices of the parent would be copied half alive), reads the
pickled source once (columns on disk travel as the names of their files, and are mapped by the worker itself), and
answers one number at a time over a pipe. Large arrays come back in shared memory. A worker imports no jax and touches
no device.
"""

import contextlib
import multiprocessing
import pickle
import secrets
import shutil
import signal
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging as absl_logging

ALIGN = 64  # bytes
SMALL = 1 << 16  # bytes of arrays that go through the pipe
SHARED = Path("/dev/shm")  # where Linux keeps shared memory: containers often leave 64 MB for it

Arrays = dict[str, np.ndarray]
Layout = dict[str, tuple[str, tuple[int, ...], int]]  # dtype, shape, offset of each array


class Source(Protocol):
    """What workers take numbers to: one dict of arrays each."""

    def __getitem__(self, number: int, /) -> Arrays: ...


def in_order(source: Source, numbers: Iterable[int], workers: int, ahead: int = 1) -> Iterator[Arrays]:
    """`source[n]` for each number, made by so many processes, `ahead` more than one for each of them at a time.

    An exception in a worker is raised here, its traceback beside it as a note. When the iterator is closed the workers
    are killed: they hold nothing that could be lost.
    """
    context = multiprocessing.get_context("spawn")
    mark, waiting = secrets.token_hex(4), deque()  # (number, worker)
    payload, pipes, processes = pickle.dumps(source, 5), [], []
    try:
        for worker in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, mark), name=f"data worker {worker}", daemon=True)
            _start(process)
            theirs.close()  # so that the end of the worker is the end of the pipe
            pipes.append(ours)
            processes.append(process)
        for pipe, process in zip(pipes, processes, strict=True):
            with _told(process):
                pipe.send_bytes(payload)
        del payload
        coming = enumerate(numbers)

        def ask() -> None:
            for turn, number in coming:
                with _told(processes[turn % workers]):
                    pipes[turn % workers].send(number)
                waiting.append((number, turn % workers))
                return

        for _ in range(workers + ahead):
            ask()
        while waiting:
            number, worker = waiting[0]
            with _told(processes[worker]):
                answer = pipes[worker].recv()
            waiting.popleft()
            if isinstance(answer, BaseException):
                raise answer
            arrays = answer if isinstance(answer, dict) else _taken(*answer)
            ask()
            yield arrays
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()
        for number, _ in waiting:
            with contextlib.suppress(FileNotFoundError):
                memory = SharedMemory(_name(mark, number))
                memory.close()
                memory.unlink()


def _start(process: Any) -> None:
    """Start it with interrupts left to the parent: the terminal sends them to every process of the group."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, where signals cannot be set
        process.start()
        return
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def _told(process: Any) -> Iterator[None]:
    """A worker that is gone is told with its status."""
    try:
        yield
    except (EOFError, OSError):
        process.join(5)
        code = process.exitcode
        why = f"killed by signal {-code}; is there enough memory?" if code and code < 0 else f"exit status {code}"
        raise RuntimeError(
            f"{process.name} ended before its batch was made ({why}). Fewer workers take less memory "
            "(Loader.workers; 0 works without). A script of your own that starts workers has to do so under "
            '`if __name__ == "__main__":`'
        ) from None


def _work(pipe: Connection, mark: str) -> None:
    """What a worker does until its pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent stops, saves, and ends us
        signal.signal(number, signal.SIG_IGN)
    absl_logging.set_verbosity(absl_logging.ERROR)  # what libraries remark is remarked by the parent
    with contextlib.suppress(EOFError, OSError):
        try:
            source, fault = pickle.loads(pipe.recv_bytes()), None
        except (EOFError, OSError):
            raise
        except Exception as error:
            source, fault = None, error
        while True:
            number = pipe.recv()
            try:
                if fault is not None or source is None:
                    raise fault or ValueError("no source")
                answer = _given(source[number], _name(mark, number))
            except Exception as error:
                answer = _portable(error)
            pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """The exception as it can be sent, with its traceback as a note."""
    note = "in a data worker:\n" + "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does at pickling
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _name(mark: str, number: int) -> str:
    return f"ain-{mark}-{number:x}"


def _given(arrays: Arrays, name: str) -> Arrays | tuple[str, Layout]:
    """The arrays themselves when small, else the shared memory that they were put into."""
    layout, size = {}, 0
    for key, array in arrays.items():
        layout[key] = (array.dtype.str, array.shape, size)
        size += -(-array.nbytes // ALIGN) * ALIGN
    if size <= SMALL or not _room(size):
        return arrays
    memory = SharedMemory(name, create=True, size=size)
    try:
        for key, view in _views(memory, layout).items():
            view[...] = arrays[key]
            del view
    finally:
        memory.close()
    return name, layout


def _room(size: int) -> bool:
    """Whether so many bytes may be shared; writing beyond what there is would kill the process without a word."""
    return not SHARED.is_dir() or shutil.disk_usage(SHARED).free > 4 * size


def _taken(name: str, layout: Layout) -> Arrays:
    """The arrays, copied out of the shared memory, which is then given back."""
    memory = SharedMemory(name)
    try:
        return {key: view.copy() for key, view in _views(memory, layout).items()}
    finally:
        memory.close()
        memory.unlink()


def _views(memory: SharedMemory, layout: Layout) -> Arrays:
    return {
        key: np.ndarray(shape, dtype, buffer=memory.buf, offset=offset)
        for key, (dtype, shape, offset) in layout.items()
    }
