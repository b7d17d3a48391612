"""Whether any rank of a group wants to stop, known to all of them at the same point of a schedule.

A signal reaches ranks at different moments, and ranks that left a schedule at different points
would wait for each other for ever. Nobody waits for a vote either: the answer is that of a few
calls ago. The engine is the caller.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from hpcmlx.comm import Communicator, Pending

# Calls until an answer is looked at: stages are less than that apart, so it has arrived.
_LAG = 2


class StopVote:
    """Made and closed by all ranks of the group together, which call `ask` equally often."""

    def __init__(self, group: Communicator):
        self._group = group
        self._under_way: deque[tuple[np.ndarray, Pending]] = deque()
        self._seen = False

    def ask(self, wanted: bool) -> bool:
        """Whether some rank wanted to stop a few calls ago; the same on every rank.

        Args:
            wanted: whether this rank does.
        """
        if self._group.size == 1:
            return wanted
        vote = np.array([wanted], np.int32)
        self._under_way.append((vote, self._group.imax_into(vote)))
        if len(self._under_way) > _LAG:
            self._count()
        return self._seen

    def close(self) -> None:
        """Take what is still under way."""
        while self._under_way:
            self._count()

    def _count(self) -> None:
        vote, pending = self._under_way.popleft()
        pending.wait()
        self._seen = self._seen or bool(vote[0])
