"""The errors a job ends with, each with its exit code and a one-line message.

A message says what is wrong, where, and what to do; `run_job` prints it without a traceback
and ends every rank with the code. Anything that is not an `HpcmlxError` is a bug and ends with
a traceback and exit code 70.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of a job (the numbers follow sysexits.h where it has one)."""

    OK = 0
    USAGE = 2
    ROW_ERRORS = 64  # finished, but some rows ended as error objects
    BAD_INPUT = 65
    INTERNAL = 70
    CANNOT_CREATE = 73
    IO = 74
    LOST_PEER = 75  # hang or lost peer: requeue
    PREEMPTED = 76  # checkpoint saved: requeue
    INTEGRITY = 77  # never requeue
    CONFIG = 78


class HpcmlxError(Exception):
    """Base class: a failure whose cause is known and whose message is meant for the user."""

    exit_code = ExitCode.INTERNAL


class UsageError(HpcmlxError):
    """The command line or the launch does not make sense (wrong rank count, no MPI)."""

    exit_code = ExitCode.USAGE


class InputError(HpcmlxError):
    """Input data (a prompt file, a text file) cannot be used."""

    exit_code = ExitCode.BAD_INPUT


class OutputError(HpcmlxError):
    """The run directory or a result file cannot be created."""

    exit_code = ExitCode.CANNOT_CREATE


class StorageError(HpcmlxError):
    """Reading or writing failed half-way (disk full, I/O error)."""

    exit_code = ExitCode.IO


class LostPeerError(HpcmlxError):
    """A rank hangs or has gone."""

    exit_code = ExitCode.LOST_PEER


class IntegrityError(HpcmlxError):
    """Stored bytes are not what they claim to be: a truncated shard, a missing tensor."""

    exit_code = ExitCode.INTEGRITY


class ConfigError(HpcmlxError):
    """The configuration, the model or the layout is refused."""

    exit_code = ExitCode.CONFIG
