"""What ranks tell each other without waiting: a shared counter, values for rank 0, bytes."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from hpcmlx.comm.communicator import Communicator, hostname
from hpcmlx.flight import CODES, recorder


class Counter:
    """A number that all ranks of a group count up, in the memory of its rank 0 (MPI one-sided).

    Nobody waits for anybody: a rank that is slow simply counts less often. Made and closed by all
    ranks together.
    """

    def __init__(self, group: Communicator):
        self._group, self._value, self._window = group, 0, None
        self._calls = 0
        self._stop: threading.Event | None = None
        if group.size == 1:
            return
        from mpi4py import MPI

        mpi = group._mpi
        self._window = MPI.Win.Allocate(8 if group.rank == 0 else 0, 8, comm=mpi)
        if group.rank == 0:
            self._window.Lock(0, MPI.LOCK_EXCLUSIVE)
            memory: Any = self._window.tomemory()
            np.frombuffer(memory, np.int64)[0] = 0
            self._window.Unlock(0)
        remote = len(set(group.allgather(hostname()))) > 1
        if group.rank == 0 and remote:
            # Over a network rank 0 answers only from inside MPI, and a prefill can take seconds.
            self._stop = threading.Event()
            threading.Thread(target=self._answer, args=(mpi, self._stop), daemon=True).start()
        group.barrier()
        self._window.Lock_all()

    def fetch_add(self, count: int) -> int:
        """Add `count` and give the number from before."""
        if self._window is None:
            before, self._value = self._value, self._value + count
            return before
        from mpi4py import MPI

        added, found = np.array([count], np.int64), np.empty(1, np.int64)
        self._calls += 1
        record = recorder.begin(CODES["fetch_add"], self._group._flight, self._calls, 0, 8, True)
        self._window.Fetch_and_op(added, found, 0, 0, MPI.SUM)
        self._window.Flush(0)
        recorder.end(record)
        return int(found[0])

    def close(self) -> None:
        """Give the memory back. Collective."""
        if self._window is not None:
            self._window.Unlock_all()
            self._group.barrier()
            if self._stop is not None:
                self._stop.set()
            record = recorder.collective(CODES["free"], self._group._flight)
            self._window.Free()
            recorder.end(record)
            self._window = None

    @staticmethod
    def _answer(mpi: Any, stop: threading.Event) -> None:
        while not stop.wait(0.0005):
            mpi.Iprobe()


class Mailbox:
    """Small Python values from any rank to rank 0, which nobody waits for.

    Made and closed by all ranks together. The values of one rank arrive in order.
    """

    def __init__(self, group: Communicator):
        self._rank, self._flight = group.rank, group._flight
        self._own: list[tuple[int, Any]] = []
        self._mpi = group._mpi.Dup() if group.size > 1 else None
        self._sends: list[Any] = []

    def post(self, value: Any) -> None:
        """Send `value` to rank 0; returns at once."""
        if self._mpi is None or self._rank == 0:
            self._own.append((0, value))
        else:
            self._sends = [s for s in self._sends if not s.Test()]
            # Synchronous: a send that is complete has been received, so `close` loses nothing.
            self._sends.append(self._mpi.issend(value, 0))

    def poll(self) -> list[tuple[int, Any]]:
        """On rank 0 the (rank, value) pairs that have arrived since the last call."""
        arrived, self._own = self._own, []
        if self._mpi is not None and self._rank == 0:
            from mpi4py import MPI

            status = MPI.Status()
            while self._mpi.Iprobe(status=status):
                source = status.Get_source()
                arrived.append((source, self._mpi.recv(source=source)))
        return arrived

    def close(self) -> list[tuple[int, Any]]:
        """Collect what is still under way: on rank 0 what `poll` would have given. Collective."""
        if self._mpi is None:
            return self.poll()
        record = recorder.collective(CODES["close"], self._flight)
        for send in self._sends:
            send.Wait()
        everybody = self._mpi.Ibarrier()
        arrived = []
        while not everybody.Test():
            arrived += self.poll()
            time.sleep(0.001)
        recorder.end(record)
        return arrived + self.poll()


class Wire:
    """Messages of bytes between any ranks of a group, on a communicator of their own. Nothing here
    waits for another rank, so a thread may use it beside whatever the others do.

    Made by all ranks together; the messages from one rank to another arrive in order.
    """

    def __init__(self, group: Communicator):
        self.rank, self.size = group.rank, group.size
        self._mpi = group._mpi.Dup()
        self._sends: list[tuple[int, Any, bytes]] = []

    def under_way(self, dest: int) -> bool:
        """Whether a message to `dest` has not left yet."""
        self._sends = [send for send in self._sends if not send[1].Test()]
        return any(to == dest for to, _, _ in self._sends)

    def post(self, dest: int, data: bytes) -> None:
        """Send `data` to rank `dest`; returns at once."""
        self._sends.append((dest, self._mpi.Isend(data, dest), data))

    def poll(self) -> list[tuple[int, bytes]]:
        """The (rank, data) pairs that have arrived since the last call."""
        from mpi4py import MPI

        status, arrived = MPI.Status(), []
        while self._mpi.Iprobe(status=status):
            source, buffer = status.Get_source(), bytearray(status.Get_count(MPI.BYTE))
            # Its head is here; a big one's rest comes only while its sender lives.
            self._mpi.Recv(buffer, source)
            arrived.append((source, bytes(buffer)))
        return arrived
