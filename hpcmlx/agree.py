"""What one rank cannot do, all ranks leave alone: failures made everybody's.

A rank that raised by itself would leave the others waiting for it in the next collective call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hpcmlx import comm
from hpcmlx.comm import Communicator
from hpcmlx.errors import HpcmlxError

T = TypeVar("T")


def agree(world: Communicator, work: Callable[[], T]) -> T:
    """Do something on every rank that may fail on some. Collective.

    Raises:
        HpcmlxError: that of the lowest rank where it failed, on all ranks, with its rank and host.
            Where it is some other exception, a bug, its own rank raises that.
    """
    try:
        result = work()
    except Exception as error:
        share_failure(world, error)
        raise
    share_failure(world, None)
    return result


def share_failure(world: Communicator, failure: Exception | None) -> None:
    """Raise on all ranks what some of them have met, as `agree`. Collective."""
    report = None
    if failure is not None:
        known = isinstance(failure, HpcmlxError)
        where = f" (found by rank {world.rank} on {comm.hostname()})" if world.size > 1 else ""
        message = f"{failure if known else repr(failure)}{where}"
        report = (type(failure) if known else HpcmlxError, message)
    found = world.allgather(report)
    if failure is not None and not isinstance(failure, HpcmlxError):
        raise failure
    for kind, message in filter(None, found):
        raise kind(message) from failure
