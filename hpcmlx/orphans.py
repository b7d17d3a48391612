"""No rank outlives what started it: each watches its parent and, where there is one, its launcher.

When mpirun is killed, a rank that computes or sleeps is left running; when the launcher of
`launch=mpirun` is killed, mpirun and all ranks are. `job.py` starts the watch on every rank right
after MPI is up; `launch/mpirun.py` holds the lifeline while it waits for mpirun.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from hpcmlx.errors import ExitCode

#: The file that a launcher keeps locked as long as it lives.
LIFELINE_ENV = "HPCMLX_LIFELINE"
#: Likewise, of a sweep: its launchers watch it.
SWEEP_ENV = "HPCMLX_SWEEP_LIFELINE"
# What mpirun and srun tell a process that they start as a rank.
_STARTED_AS_RANK = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK")


@contextmanager
def lifeline() -> Iterator[str]:
    """A locked temporary file; its path is for `HPCMLX_LIFELINE` in the ranks' environment.

    The lock is not inherited by mpirun and ends with this process, however that ends. Unlike a
    process id it is never somebody else's, and a zombie does not hold it.
    """
    with tempfile.NamedTemporaryFile(prefix="hpcmlx-lifeline-") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.name


def end_rank(reason: str) -> NoReturn:
    """Say why on standard error and end this process with exit code 75, whatever it is doing.

    Nothing is flushed and no lock is taken: the main thread may hold any of them.
    """
    rank = next((os.environ[key] for key in _STARTED_AS_RANK if key in os.environ), "0")
    line = f"hpcmlx: rank {rank} on {socket.gethostname()}: {reason}; start the job again\n"
    with suppress(OSError):  # standard error may be a pipe to mpirun, which is gone
        os.write(2, line.encode())
    os._exit(ExitCode.LOST_PEER)


def watch_parent(on_loss: Callable[[str], object] = end_rank, seconds: float = 1.0) -> None:
    """Call `on_loss` from a daemon thread once what started this rank has gone.

    A process that was not started as a rank is not watched: it may outlive its shell.
    Linux's parent-death signal is not used: it comes when the *thread* that started the rank ends,
    and PRRTE starts the ranks of a host from threads that it then ends, where there are 32 or more.

    Args:
        on_loss: gets what has gone, as text.
        seconds: from one look to the next; a look is two system calls.
    """
    if not any(key in os.environ for key in _STARTED_AS_RANK):
        return
    parent = os.getppid()
    path = os.environ.get(LIFELINE_ENV)
    held = _open_lifeline(path)

    def watch() -> None:
        while True:
            if os.getppid() != parent:
                on_loss(f"its parent (mpirun's process {parent}) is gone")
                return
            if held is not None and _is_free(held):
                _remove(path)
                on_loss("the launcher that started mpirun is gone")
                return
            time.sleep(seconds)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def watch_sweep(seconds: float = 1.0) -> None:
    """End this launcher, as a user would, once the sweep that has started it is gone.

    A process that no sweep has started is not watched.
    """
    path = os.environ.get(SWEEP_ENV)
    held = _open_lifeline(path)
    if held is None:
        return

    def watch() -> None:
        while not _is_free(held):
            time.sleep(seconds)
        _remove(path)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-sweep", daemon=True).start()


def _open_lifeline(path: str | None) -> int | None:
    """A descriptor of the launcher's file; None without a launcher, or where it is on another
    host, whose ranks watch it."""
    if path is None:
        return None
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None


def _remove(path: str | None) -> None:
    """Delete the file, which who held it can no longer do."""
    if path is not None:
        with suppress(OSError):  # another rank may have been quicker
            os.unlink(path)


def _is_free(descriptor: int) -> bool:
    """Whether nobody holds the lock any more. Shared, so that ranks do not see each other's."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
