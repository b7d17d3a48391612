"""Files that are whole or not there, and logs that only grow.

Everything a job keeps is written here: to a temporary name, flushed to the disk, renamed. libhdf5
crashes the interpreter when a write of its own fails, so it writes through Python, which takes
note of the failure and tells it nothing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import h5py

from hpcmlx.errors import OutputError, StorageError
from hpcmlx.flight import recorder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_WRITE = 1 << 30  # macOS refuses a single write of 2 GiB or more
_HASHED_AT_ONCE = 1 << 20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # as `_replacing` names them

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
            with reported(path, done):
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
                with reported(path, sink.size):
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
            raise cannot_create(error, path) from error
        with reported(path):
            flush_directory(path.parent)

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
            with reported(self.path, len(data)):
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
        with reported(self.path):
            os.close(self._fd)
            self.path.unlink()


def remove_leftovers(directory: Path) -> None:
    """Delete what writers that were killed have left in `directory` or below it. Nobody may be
    writing there.

    Raises:
        StorageError: that fails.
    """
    for path in directory.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            with reported(path):
                path.unlink(missing_ok=True)  # another rank may do the same


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """The descriptor of a temporary file that takes the place of `path` when the block ends
    without an exception."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise cannot_create(error, path) from error
    try:
        try:
            yield fd
            size = os.fstat(fd).st_size
            with reported(path, size):
                flush(fd)
        finally:
            os.close(fd)
        with reported(path, size):
            os.rename(temporary, path)
            flush_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(fd: int) -> None:
    """Get the file to the disk; macOS's fsync stops at the drive's cache."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def flush_directory(path: Path) -> None:
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


@contextmanager
def reported(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Turn an OSError of writing `path` into the StorageError that names it.

    Args:
        num_bytes: that were to be in the file, for the message; 0: not said.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(error, path, num_bytes) from error
        raise StorageError(f"writing {path}{_size(num_bytes)} failed: {_reason(error)}") from error


def cannot_create(error: OSError, path: Path) -> OutputError | StorageError:
    """The error that says why `path` was not made; a StorageError where the disk is full."""
    if error.errno in _FULL:
        return _no_room(error, path, 0)
    return OutputError(f"cannot create {path}: {_reason(error)}; set run_dir to a writable place")


def _no_room(error: OSError, path: Path, num_bytes: int) -> StorageError:
    return StorageError(
        f"no room for {path}{_size(num_bytes)}: {_reason(error)}; free some space or set run_dir "
        "to another file system"
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _size(num_bytes: int) -> str:
    return f" ({num_bytes} bytes)" if num_bytes else ""


def digest_of(file: BinaryIO) -> str:
    """SHA-256 of what is left of a file, in hex."""
    digest, buffer = hashlib.sha256(), bytearray(_HASHED_AT_ONCE)
    view = memoryview(buffer)
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(view[:count])
        recorder.tick()
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a whole file, in hex.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return digest_of(file)
    except OSError as error:
        raise StorageError(f"reading {path} failed: {error.strerror}") from error
