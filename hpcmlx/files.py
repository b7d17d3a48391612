"""Files that are whole or not there, and run directories that belong to one launch.

Everything a job keeps is written here: to a temporary name, flushed to the disk, renamed. HDF5
images are built in memory first, because libhdf5 crashes the interpreter when the disk is full.
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
from collections.abc import Callable
from pathlib import Path

import h5py

from hpcmlx.errors import OutputError, StorageError

#: Written by `claim`, so that a second launch on the same directory is refused.
CLAIM = "claim.json"
CLAIM_ENV = "HPCMLX_CLAIM"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: str | Path, data: bytes | bytearray | memoryview | str) -> None:
    """Write `path` so that at every instant it is absent, the old file or the whole new one.

    Args:
        path: the file; its directory exists.
        data: the content; text is written as UTF-8.

    Raises:
        OutputError: the file cannot be created (read-only, no permission, no directory).
        StorageError: writing failed half-way (disk full, I/O error); no temporary file stays.
    """
    path = Path(path)
    view = memoryview(data.encode() if isinstance(data, str) else data).cast("B")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failure(error, path, view.nbytes, creating=True) from error
    try:
        try:
            done = 0
            while done < view.nbytes:
                done += os.write(fd, view[done:])
            _flush(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        _flush_directory(path.parent)
    except OSError as error:
        raise _failure(error, path, view.nbytes, creating=False) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_hdf5(path: str | Path, fill: Callable[[h5py.File], None]) -> None:
    """Build an HDF5 file in memory with `fill` and write it with `write_atomic`.

    Datasets should be created with `fletcher32=True`: with `libver="latest"`, which is set here,
    flipped bits are then found when they are read.

    Raises:
        OutputError, StorageError: as `write_atomic`.
    """
    image = io.BytesIO()
    with h5py.File(image, "w", libver="latest") as file:
        fill(file)
    write_atomic(path, image.getbuffer())


def create_run_dir(
    path: str | Path | None, job: str, layout: str, root: str | Path = "runs"
) -> Path:
    """The directory of this launch: made if need be, private (mode 700), claimed by this process.

    Args:
        path: the directory to use, new or empty; None for a new one under `root`.
        job: the job's name, for the name of a new directory.
        layout: the layout, as in `dp1_pp2_tp2`, likewise.
        root: where new directories go.

    Returns:
        The absolute path.

    Raises:
        OutputError: it has something in it already, belongs to another launch, or cannot be made.
    """
    run_dir = reserve_run_dir(job, layout, root) if path is None else make_run_dir(path)
    claim(run_dir)
    return run_dir


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
        entries = os.listdir(run_dir)
        if given and entries == [CLAIM] and _token(run_dir) == given:
            return given
        if entries:
            raise OutputError(f"run directory {run_dir} is not empty; {hint}")
        fd = os.open(run_dir / CLAIM, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(owner, file)
    except (FileExistsError, ValueError, KeyError) as error:
        raise OutputError(f"run directory {run_dir} belongs to another launch; {hint}") from error
    except OSError as error:
        raise _failure(error, run_dir, 0, creating=True) from error
    return token


def _token(run_dir: Path) -> str:
    return str(json.loads((run_dir / CLAIM).read_text())["token"])


def _flush(fd: int) -> None:
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


def _failure(
    error: OSError, path: Path, num_bytes: int, *, creating: bool
) -> OutputError | StorageError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StorageError(
            f"no room for {path} ({num_bytes} bytes): {reason}; free some space or set run_dir "
            "to another file system"
        )
    if creating:
        return OutputError(f"cannot create {path}: {reason}; set run_dir to a writable place")
    return StorageError(f"writing {path} ({num_bytes} bytes) failed: {reason}")
