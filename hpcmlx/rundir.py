"""Run directories: made, claimed for a job, locked for one launch at a time.

The launcher and rank 0 call `open_run_dir`, and rank 0 then `lock_run_dir`. No two launches ever
write into one directory at once; a job may go on with what an earlier launch of it has left.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpcmlx.errors import ConfigError, OutputError
from hpcmlx.files import cannot_create, reported

#: Written by `claim`, so that a second launch on the same directory is refused.
CLAIM = "claim.json"
CLAIM_ENV = "HPCMLX_CLAIM"
#: Locked while a launch works in the directory; says who it is.
LOCK = "lock"
#: What a resumed run is compared with; a run directory that has one may be entered again.
MANIFEST = "manifest.json"
#: The umask of a job: what is in a run directory is its user's alone, whatever made it.
PRIVATE = 0o077
_HINT = "give another run_dir, or none for a new one"
_PATIENCE = 0.2  # seconds for a lock


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

    A directory that a launch of the same job has claimed is entered again: `lock_run_dir`, to be
    called next, keeps other launches out, and `manifest.check` those that want something else.

    Args:
        path: the directory to use, new or empty; None for a new one under `root`.
        job: the job's name, for the claim and for the name of a new directory.
        layout: the layout, as in `dp1_pp2_tp2`, likewise.
        resumable: whether this job goes on with what an earlier launch of it has left.
        resume: go on, or else refuse.
        root: where new directories go.

    Raises:
        OutputError: it has something else in it, belongs to another launch or job, or cannot be
            made.
        ConfigError: `resume`, and there is no run to go on with.
    """
    if path is not None and resumable and (Path(path) / CLAIM).is_file():
        run_dir = make_run_dir(path)
        if not _is_fresh(run_dir):
            # One that was cut off while it was written names no job: the manifest decides alone.
            owner = _claim_in(run_dir).get("job", job)
            if owner != job:
                raise OutputError(f"run directory {run_dir} belongs to a job {owner}; {_HINT}")
            return RunDir(run_dir, os.environ.get(CLAIM_ENV) or secrets.token_hex(16), True)
    if resume:
        raise ConfigError(f"resume={path}: no {CLAIM} there, so no run to go on with")
    run_dir = reserve_run_dir(job, layout, root) if path is None else make_run_dir(path)
    return RunDir(run_dir, claim(run_dir, job), False)


def make_run_dir(path: str | Path) -> Path:
    """Make the directory `path` unless it is there; the absolute path.

    Raises:
        OutputError: it cannot be made, or what would be written into it would land elsewhere.
    """
    run_dir = Path(path).absolute()
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise cannot_create(error, run_dir) from error
    refuse_links(run_dir)
    return run_dir


def refuse_links(run_dir: Path) -> None:
    """Nothing is written outside a run directory, whoever has put what into it.

    Links to something inside it are left alone; some trackers make them.

    Raises:
        OutputError: it is a symbolic link, or there is one in it that leads out.
    """
    if run_dir.is_symlink():
        raise OutputError(
            f"run directory {run_dir} is a symbolic link; give the directory that it leads to"
        )
    inside = os.path.realpath(run_dir)
    for folder, names, files in os.walk(run_dir):
        for path in (Path(folder, name) for name in (*names, *files)):
            # realpath: of a link to itself Path.resolve raises, up to Python 3.12.
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise OutputError(
                    f"run directory {run_dir}: {path.relative_to(run_dir)} is a symbolic link that "
                    f"leads out of it; remove it, or {_HINT}"
                )


def own_kernels() -> None:
    """See that MLX's folder of compiled CPU kernels, TMPDIR/mlx, is this user's alone: MLX loads
    what lies there, and in a /tmp that is shared somebody else may have made it.

    Raises:
        ConfigError: it is somebody else's.
    """
    folder = Path(tempfile.gettempdir(), "mlx")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:  # a TMPDIR that cannot be written to; MLX says so when it needs it
        return
    if found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode):
        with suppress(OSError):  # a file system that is only read, which nobody else writes to
            folder.chmod(0o700)
        return
    raise ConfigError(
        f"{folder} belongs to another user or is a link, and MLX would run the kernels in it; set "
        "TMPDIR to a directory of your own"
    )


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
                raise cannot_create(error, root) from error
            number += 1
        except OSError as error:
            raise cannot_create(error, run_dir) from error


def claim(run_dir: str | Path, job: str) -> str:
    """Mark an empty directory as this launch's own.

    A launcher claims it, puts the token it gets into the environment as `HPCMLX_CLAIM` and starts
    the ranks, which may then claim the same directory once more.

    Args:
        job: the job's name; only it may go on with what the directory will hold.

    Returns:
        The token.

    Raises:
        OutputError: there is something in it, or another launch was faster.
    """
    run_dir = Path(run_dir)
    given = os.environ.get(CLAIM_ENV)
    token = given or secrets.token_hex(16)
    owner = {
        "token": token,
        "job": job,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
    }
    try:
        if given and _is_fresh(run_dir):
            return given
        if os.listdir(run_dir):
            raise OutputError(f"run directory {run_dir} is not empty; {_HINT}")
        fd = os.open(run_dir / CLAIM, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(owner, file)
    except FileExistsError as error:
        raise OutputError(f"run directory {run_dir} belongs to another launch; {_HINT}") from error
    except OSError as error:
        raise cannot_create(error, run_dir) from error
    return token


def _is_fresh(run_dir: Path) -> bool:
    """Whether our launcher has claimed the directory and nobody has begun anything in it."""
    given = os.environ.get(CLAIM_ENV)
    if not given or os.listdir(run_dir) != [CLAIM]:
        return False
    return _claim_in(run_dir).get("token") == given


def _claim_in(run_dir: Path) -> dict[str, Any]:
    """What `claim` has written; nothing while another process is still writing it."""
    try:
        found = json.loads((run_dir / CLAIM).read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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
        raise cannot_create(error, path) from error
    try:
        _lock(fd)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        with reported(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(holder).encode(), 0)
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


def _lock(fd: int) -> None:
    """Take the lock; who only looks whether it is held has it for a moment, too."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.01)


def free_bytes(path: str | Path) -> int:
    """Bytes this user may still write where `path` is or would be made. Raises OutputError."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        found = os.statvfs(place)
    except OSError as error:
        raise cannot_create(error, place) from error
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
