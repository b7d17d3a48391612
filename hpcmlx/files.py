"""Files that are whole or not there, logs that only grow, and run directories of one launch.

Everything a job keeps is written here: to a temporary name, flushed to the disk, renamed. libhdf5
crashes the interpreter when a write of its own fails, so it writes through Python, which takes
note of the failure and tells it nothing.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import h5py

from hpcmlx.errors import ConfigError, OutputError, StorageError

#: Written by `claim`, so that a second launch on the same directory is refused.
CLAIM = "claim.json"
CLAIM_ENV = "HPCMLX_CLAIM"
#: Locked while a launch works in the directory; says who it is.
LOCK = "lock"
#: What a resumed run is compared with; a run directory that has one may be entered again.
MANIFEST = "manifest.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_WRITE = 1 << 30  # macOS refuses a single write of 2 GiB or more

Data = bytes | bytearray | memoryview | str


def write_atomic(path: str | Path, data: Data) -> None:
    """Write `path` so that at every instant it is absent, the old file or the whole new one.

    Args:
        path: the file; its directory exists.
        data: the content; text is written as UTF-8.

    Raises:
        OutputError: the file cannot be created (read-only, no permission, no directory).
        StorageError: writing failed half-way (disk full, I/O error); no temporary file stays.
    """
    with atomic_writer(path) as write:
        write(data)


@contextmanager
def atomic_writer(path: str | Path) -> Iterator[Callable[[Data], None]]:
    """The same for what does not fit into memory: the block gets a function that writes the next
    piece, and `path` appears when the block ends without an exception."""
    path = Path(path)
    with _replacing(path) as fd:
        done = 0

        def write(data: Data) -> None:
            nonlocal done
            view = memoryview(data.encode() if isinstance(data, str) else data).cast("B")
            done += view.nbytes
            with _reported(path, done):
                _write_all(fd, view)

        yield write


def write_hdf5(path: str | Path, fill: Callable[[h5py.File], None]) -> None:
    """Let `fill` write an HDF5 file that appears under its name when it is whole.

    Datasets should be created with `fletcher32=True`: with `libver="latest"`, which is set here,
    flipped bits are then found when they are read.

    Raises:
        OutputError, StorageError: as `write_atomic`.
    """
    path = Path(path)
    with _replacing(path) as fd:
        sink = _Sink(fd)
        try:
            with h5py.File(sink, "w", libver="latest") as file:
                fill(file)
        finally:  # what libhdf5 says of a file that was not written does not matter
            if sink.error is not None:
                with _reported(path, sink.size):
                    raise sink.error


class _Sink(io.RawIOBase):
    """A file for h5py whose writes never fail: the first error is kept, and all that comes after
    it dropped.

    Attributes:
        error: why the file is not whole.
        size: bytes it would have.
    """

    def __init__(self, fd: int):
        self.error: OSError | None = None
        self.size = 0
        self._fd, self._position = fd, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = os.preadv(self._fd, [buffer], self._position)
        self._position += count
        return count

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                _write_all(self._fd, view, self._position)
            except OSError as error:
                self.error = error
        self._position += view.nbytes
        self.size = max(self.size, self._position)
        return view.nbytes

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self._fd, self.size)
            except OSError as error:
                self.error = error
        return self.size


class DurableLog:
    """A new file that only grows; what `append` was given is on the disk when it returns.

    Attributes:
        path: the file.
        size: its length in bytes.
    """

    def __init__(self, path: Path):
        """
        Raises:
            OutputError: it cannot be created or is there already.
            StorageError: the disk is full or failing.
        """
        self.path, self.size = path, 0
        self._failure: StorageError | None = None
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _failure(error, path, 0, creating=True) from error
        with _reported(path, 0):
            _flush_directory(path.parent)

    def append(self, data: bytes) -> None:
        """Write `data` in one piece and flush it.

        Raises:
            StorageError: it may not be on the disk. It is cut off again as far as that goes, and
                the log takes nothing more: after a failed flush the system has forgotten which
                pages it still owes to the disk, so another try would succeed without reason.
        """
        if self._failure is not None:
            raise self._failure
        try:
            with _reported(self.path, len(data)):
                _write_all(self._fd, memoryview(data))
                flush(self._fd)
        except StorageError as error:
            self._failure = error
            with suppress(OSError):
                os.ftruncate(self._fd, self.size)
            os.close(self._fd)
            raise
        self.size += len(data)

    def remove(self) -> None:
        """Close it and delete it.

        Raises:
            StorageError: that fails, or an `append` has failed.
        """
        if self._failure is not None:
            raise self._failure
        with _reported(self.path, 0):
            os.close(self._fd)
            self.path.unlink()


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """The descriptor of a temporary file that takes the place of `path` when the block ends
    without an exception."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failure(error, path, 0, creating=True) from error
    try:
        try:
            yield fd
            size = os.fstat(fd).st_size
            with _reported(path, size):
                flush(fd)
        finally:
            os.close(fd)
        with _reported(path, size):
            os.rename(temporary, path)
            _flush_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunDir:
    """A run directory and this launch's right to it.

    Attributes:
        path: absolute.
        token: tells this launch from others; a launcher hands it to its ranks as `HPCMLX_CLAIM`.
        resumed: an earlier launch has begun the run that is in it.
    """

    path: Path
    token: str
    resumed: bool


def open_run_dir(
    path: str | Path | None,
    job: str,
    layout: str,
    *,
    resumable: bool = False,
    resume: bool = False,
    root: str | Path = "runs",
) -> RunDir:
    """The directory of this launch: made if need be, private (mode 700), claimed by this process.

    A directory that a launch has claimed is entered again: `lock_run_dir`, to be called next, keeps
    other launches out, and `manifest.check` those that want something else.

    Args:
        path: the directory to use, new or empty; None for a new one under `root`.
        job: the job's name, for the name of a new directory.
        layout: the layout, as in `dp1_pp2_tp2`, likewise.
        resumable: whether this job goes on with what an earlier launch of it has left.
        resume: go on, or else refuse.
        root: where new directories go.

    Raises:
        OutputError: it has something else in it, belongs to another launch, or cannot be made.
        ConfigError: `resume`, and there is no run to go on with.
    """
    begun = path is not None and resumable and (Path(path) / CLAIM).is_file()
    if begun and not _is_fresh(Path(str(path))):
        token = os.environ.get(CLAIM_ENV) or secrets.token_hex(16)
        return RunDir(make_run_dir(str(path)), token, True)
    if resume:
        raise ConfigError(f"resume={path}: no {CLAIM} there, so no run to go on with")
    run_dir = reserve_run_dir(job, layout, root) if path is None else make_run_dir(path)
    return RunDir(run_dir, claim(run_dir), False)


def make_run_dir(path: str | Path) -> Path:
    """Make the directory `path` unless it is there; the absolute path. Raises OutputError."""
    run_dir = Path(path).absolute()
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _failure(error, run_dir, 0, creating=True) from error
    return run_dir


def reserve_run_dir(job: str, layout: str, root: str | Path = "runs") -> Path:
    """Make a new empty directory under `root`, named after the time, the job and the layout.

    Two launches never get the same one, whatever the clock says. Raises OutputError.
    """
    root = Path(root).absolute()
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{job}-{layout}"
    number = 1
    while True:
        run_dir = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            run_dir.mkdir(mode=0o700)
            return run_dir
        except FileExistsError as error:
            if root.exists() and not root.is_dir():
                raise _failure(error, root, 0, creating=True) from error
            number += 1
        except OSError as error:
            raise _failure(error, run_dir, 0, creating=True) from error


def claim(run_dir: str | Path) -> str:
    """Mark an empty directory as this launch's own.

    A launcher claims it, puts the token it gets into the environment as `HPCMLX_CLAIM` and starts
    the ranks, which may then claim the same directory once more.

    Returns:
        The token.

    Raises:
        OutputError: there is something in it, or another launch was faster.
    """
    run_dir = Path(run_dir)
    given = os.environ.get(CLAIM_ENV)
    token = given or secrets.token_hex(16)
    owner = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
    hint = "give another run_dir, or none for a new one"
    try:
        if given and _is_fresh(run_dir):
            return given
        if os.listdir(run_dir):
            raise OutputError(f"run directory {run_dir} is not empty; {hint}")
        fd = os.open(run_dir / CLAIM, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(owner, file)
    except FileExistsError as error:
        raise OutputError(f"run directory {run_dir} belongs to another launch; {hint}") from error
    except OSError as error:
        raise _failure(error, run_dir, 0, creating=True) from error
    return token


def _is_fresh(run_dir: Path) -> bool:
    """Whether our launcher has claimed the directory and nobody has begun anything in it."""
    given = os.environ.get(CLAIM_ENV)
    try:
        return os.listdir(run_dir) == [CLAIM] and _token(run_dir) == given
    except (ValueError, KeyError, TypeError):  # somebody else is writing the claim
        return False


def _token(run_dir: Path) -> str:
    return str(json.loads((run_dir / CLAIM).read_text())["token"])


def lock_run_dir(run_dir: str | Path) -> int:
    """Keep every other launch out of a run directory until this process ends, however it ends.

    Returns:
        The descriptor that holds the lock; the kernel lets go of it with the process.

    Raises:
        OutputError: another process works in the directory, or its file system has no locks.
    """
    run_dir = Path(run_dir)
    path = run_dir / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failure(error, path, 0, creating=True) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        with _reported(path, 0):
            os.ftruncate(fd, 0)
            _write_all(fd, memoryview(json.dumps(holder).encode()), 0)
    except BlockingIOError as error:
        who = _holder(os.pread(fd, 4096, 0))
        os.close(fd)
        raise OutputError(
            f"run directory {run_dir} is in use by {who}; wait for its end or give another run_dir"
        ) from error
    except OSError as error:
        os.close(fd)
        raise OutputError(
            f"cannot lock {path}: {error.strerror}; set run_dir to a file system with file locks"
        ) from error
    return fd


def free_bytes(path: str | Path) -> int:
    """Bytes this user may still write where `path` is or would be made. Raises OutputError."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        found = os.statvfs(place)
    except OSError as error:
        raise _failure(error, place, 0, creating=True) from error
    return found.f_bavail * found.f_frsize


def check_room(run_dir: str | Path, num_bytes: int, what: str) -> None:
    """
    Args:
        num_bytes: that will be written.
        what: they are, for the message ("the results of 500 rows").

    Raises:
        OutputError: there is less room than that.
    """
    if (free := free_bytes(run_dir)) < num_bytes:
        raise OutputError(
            f"not enough room in {run_dir}: {what} may need {_size(num_bytes)}, "
            f"{_size(free)} are free; free some space or set run_dir to another file system"
        )


def flush(fd: int) -> None:
    """Get the file to the disk; macOS's fsync stops at the drive's cache."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def _flush_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, view: memoryview, position: int | None = None) -> None:
    """Write all of `view`, at `position` or where the descriptor stands."""
    while view:
        piece = view[:_MAX_WRITE]
        if position is None:
            done = os.write(fd, piece)
        else:
            done = os.pwrite(fd, piece, position)
            position += done
        view = view[done:]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _holder(text: bytes) -> str:
    """Who holds a lock, from what it has written into the file."""
    try:
        found = json.loads(text)
        return f"pid {found['pid']} on host {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):  # it has just got the lock
        return "another launch"


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


@contextmanager
def _reported(path: Path, num_bytes: int) -> Iterator[None]:
    """Turn an OSError of writing `path` into the error that names it."""
    try:
        yield
    except OSError as error:
        raise _failure(error, path, num_bytes, creating=False) from error


def _failure(
    error: OSError, path: Path, num_bytes: int, *, creating: bool
) -> OutputError | StorageError:
    reason = error.strerror or str(error)
    size = f" ({num_bytes} bytes)" if num_bytes else ""
    if error.errno in _FULL:
        return StorageError(
            f"no room for {path}{size}: {reason}; free some space or set run_dir "
            "to another file system"
        )
    if creating:
        return OutputError(f"cannot create {path}: {reason}; set run_dir to a writable place")
    return StorageError(f"writing {path}{size} failed: {reason}")
