"""Logging that knows its rank: one console for the whole job, one file per rank.

Rank 0 speaks on the console from INFO on; the others only from WARNING on, with their rank and
host. Every rank writes everything to its own file in the run directory. Called by `job.py`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.logging import RichHandler

from hpcmlx import redact
from hpcmlx.errors import OutputError

LOGGER = "hpcmlx"


class _Scrubbed(logging.Formatter):
    """A formatter that keeps what came from the environment to itself."""

    def format(self, record: logging.LogRecord) -> str:
        return redact.scrub(super().format(record))


class _OneLine(_Scrubbed):
    """A formatter whose messages stay one line, so that lines of many ranks can interleave.

    A traceback keeps its lines: it is for the person who mends the bug.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join(super().formatMessage(record).splitlines())


def setup(
    rank: int, host: str, run_dir: str | Path | None = None, stream: TextIO | None = None
) -> logging.Logger:
    """Set up the logger `hpcmlx` of this rank; a second call replaces the first.

    Args:
        rank: this process's rank in the world.
        host: its host name, for the lines of the other ranks.
        run_dir: where `logs/rank{r}.log` goes; None before there is one: console only.
        stream: the console; standard error if None. What a job prints as its result goes to
            standard output and is not logged.

    Raises:
        OutputError: the log file cannot be created.
    """
    logger = logging.getLogger(LOGGER)
    close()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    console = _console(rank, host, stream or sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.addHandler(console)
    if run_dir is not None:
        path = Path(run_dir) / "logs" / f"rank{rank}.log"
        try:
            path.parent.mkdir(exist_ok=True)
            file = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot create {path}: {error.strerror}") from error
        file.setFormatter(_OneLine(f"%(asctime)s %(levelname)s rank {rank} {host} %(message)s"))
        logger.addHandler(file)
    return logger


def close() -> None:
    """Flush and close this rank's log: call it before `os._exit`."""
    logger = logging.getLogger(LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def _console(rank: int, host: str, stream: TextIO) -> logging.Handler:
    if rank == 0 and stream.isatty():
        rich = RichHandler(
            console=Console(file=stream), show_path=False, markup=False, rich_tracebacks=False
        )
        rich.setFormatter(_Scrubbed("%(message)s"))
        return rich
    handler = logging.StreamHandler(stream)
    where = "" if rank == 0 else f"rank {rank} {host} "
    handler.setFormatter(_OneLine(f"%(asctime)s %(levelname)s {where}%(message)s", "%H:%M:%S"))
    return handler
