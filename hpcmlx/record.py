"""`run.json`: what was asked for, where it ran and how it ended, a launch after the other.

Rank 0 begins and ends the entry of its launch (`observe/record.py`). Where it could not end it,
because it was killed, whoever is left does: another rank, or the launcher of `launch=mpirun` and
`launch=slurm`. Where nobody was left, the entry has no `exit` and nobody holds the run directory's
lock: `how_it_ended` tells. Only `completed.json` means success.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from hpcmlx.errors import ExitCode, HpcmlxError, IntegrityError, StorageError
from hpcmlx.files import write_atomic
from hpcmlx.rundir import LOCK

RECORD = "run.json"
#: Written by rank 0 after the last barrier: the only sign of success. mpirun's own exit code is
#: 0 when it loses a host, and by race that of a healthy rank when another was killed.
COMPLETED = "completed.json"
STATUS = "status.json"
_LAUNCHES = 50  # of a run that are kept


class Cause(StrEnum):
    """Why a launch ended."""

    COMPLETE = "complete"
    ROW_ERRORS = "complete with row errors"
    PREEMPTED = "preempted"  # saved, to go on
    FAILED = "failed"
    KILLED = "killed"
    LOST = "lost peer"


@dataclass(frozen=True)
class Exit:
    """How a launch ended.

    Attributes:
        code: the job's exit code; None where nobody saw it.
        message: the line that said it; "" where there was nothing to say.
        rank, host: that said it; None where it was the launcher.
    """

    cause: Cause
    code: int | None
    message: str = ""
    rank: int | None = None
    host: str | None = None


def completion(run_dir: str | Path) -> dict[str, Any] | None:
    """A run's completion record; None where it is not complete.

    Raises:
        IntegrityError: it is damaged.
    """
    path = Path(run_dir, COMPLETED)
    try:
        found = json.loads(path.read_text())
        int(found["exit_code"])
        return dict(found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} cannot be read ({error}): delete it and start the job again"
        ) from error


def cause_of(code: int) -> Cause:
    """The cause that an exit code stands for."""
    known = {
        ExitCode.OK: Cause.COMPLETE,
        ExitCode.ROW_ERRORS: Cause.ROW_ERRORS,
        ExitCode.PREEMPTED: Cause.PREEMPTED,
        ExitCode.LOST_PEER: Cause.LOST,
    }
    if code in known:
        return known[ExitCode(code)]
    return Cause.KILLED if code < 0 or 128 < code <= 128 + signal.NSIG else Cause.FAILED


def read(run_dir: str | Path) -> dict[str, Any]:
    """What is in `run.json`: the job's name and its launches, the newest last.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is no run record.
        StorageError: it cannot be read.
    """
    path = Path(run_dir) / RECORD
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found["job"], str) or not isinstance(found["launches"][-1], dict):
            raise TypeError("not a record")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"reading {path} failed: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{path} is no run record ({error}); move it away") from error
    return found


def begin(run_dir: str | Path, job: str, launch: Mapping[str, Any]) -> None:
    """Add the entry of a launch.

    Args:
        launch: plain values, among them "token".

    Raises:
        IntegrityError: the file is damaged.
        OutputError, StorageError: it cannot be written.
    """
    try:
        launches = read(run_dir)["launches"]
    except FileNotFoundError:
        launches = []
    entry = {**launch, "started": now(), "ended": None, "exit": None}
    _write(run_dir, {"job": job, "launches": [*launches, entry][-_LAUNCHES:]})


def end(run_dir: str | Path, token: str, exit: Exit, **more: Any) -> bool:
    """End the entry of a launch, unless it has ended already.

    Args:
        token: of the launch.
        more: further plain values of the entry.

    Returns:
        Whether it was ended now.

    Raises:
        IntegrityError, OutputError, StorageError: as `begin`.
    """
    try:
        found = read(run_dir)
    except FileNotFoundError:  # the launch has not come so far, or this host has no copy
        return False
    launch = found["launches"][-1]
    if launch.get("token") != token or launch["exit"] is not None:
        return False
    launch |= {**more, "ended": now(), "exit": asdict(exit)}
    _write(run_dir, found)
    return True


def note_death(run_dir: str | Path, token: str, exit: Exit) -> None:
    """For whoever outlives a launch that has left no completion record: end its entry, and set a
    `status.json` that still says otherwise to failed. Never fails: the job has failed already."""
    with suppress(HpcmlxError, OSError):
        found = read(run_dir)
        launch = found["launches"][-1]
        if launch.get("token") == token:
            was = (launch["exit"] or {}).get("cause")
            if was not in (None, Cause.COMPLETE, Cause.ROW_ERRORS):
                return  # by the rank that knew why
            # Complete but for the record of it counts as nothing.
            launch |= {"ended": now(), "exit": asdict(exit)}
            _write(run_dir, found)
        fail_status(run_dir, exit.message or exit.cause)


def fail_status(run_dir: str | Path, message: str) -> None:
    """Set `status.json`, where there is one, to failed.

    Raises:
        OutputError, StorageError: it cannot be written.
    """
    path = Path(run_dir) / STATUS
    try:
        status = json.loads(path.read_bytes())
        if status["state"] == "failed":
            return
    except (OSError, ValueError, LookupError, TypeError):
        return
    status |= {"state": "failed", "error": message, "updated": now()}
    write_atomic(path, json.dumps(status, indent=2) + "\n")


def mpirun_death(code: int) -> Exit:
    """How a launch ended whose ranks have left no word.

    Args:
        code: of `launch.mpirun.run`: mpirun's exit code, or -N where it was killed by signal N.
    """
    if code in (0, 255):  # 255: its ssh connection to a host broke
        what = f"mpirun ended with {code} before the job was complete"
        return Exit(Cause.LOST, int(ExitCode.LOST_PEER), what)
    if code < 0:
        return Exit(Cause.KILLED, int(ExitCode.LOST_PEER), f"mpirun was killed by {_signal(-code)}")
    cause = cause_of(code)
    if cause is Cause.KILLED:
        return Exit(cause, code, f"ended by {_signal(code - 128)}")
    return Exit(cause, code, f"mpirun ended with {code}; the job's log says why")


def how_it_ended(run_dir: str | Path) -> Exit | None:
    """Of the newest launch; None while it is under way.

    A launch that was killed together with its launcher has ended nothing: its entry is open, but
    the kernel has let go of its lock.

    Raises:
        FileNotFoundError, IntegrityError, StorageError: as `read`.
    """
    said = read(run_dir)["launches"][-1]["exit"]
    if said is not None:
        return Exit(**{**said, "cause": Cause(said["cause"])})
    if is_locked(run_dir):
        return None
    return Exit(
        Cause.KILLED, None, "no end was recorded and nobody holds its lock: it was killed, or its "
        "host was lost",
    )  # fmt: skip


def is_locked(run_dir: str | Path) -> bool:
    """Whether a launch works in the directory."""
    try:
        fd = os.open(Path(run_dir) / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _signal(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _write(run_dir: str | Path, found: Mapping[str, Any]) -> None:
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    write_atomic(Path(run_dir) / RECORD, text.encode("utf-8", "replace"))
