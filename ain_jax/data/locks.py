"""One process at a time builds what lies at a place; the others wait, and then find it there."""

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

# What file systems answer that know no locks. Builds are renamed into their place: the worst is work done twice.
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def building(path: Path) -> Iterator[None]:
    """Held by one process (and one thread of it) at a time, that builds `path`; also over hosts where the store can.

    The lock lies beside, in `.NAME.lock`, and is the system's: it ends with its process, however that ends. The file
    stays, since to remove one that another has just opened would let two in. Who waits is told so, once. Look again
    inside whether `path` has been built.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        _lock(file, path)
        yield  # closing the file gives the lock back


def _lock(file, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another process is building {path}: waiting for it", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
