"""MPI itself, for the measurement of links."""

from __future__ import annotations

import time

import numpy as np

from hpcmlx.comm.communicator import Communicator, in_place


class BareMPI:
    """MPI on NumPy buffers and nothing round it: what a link itself can do is measured on it."""

    def __init__(self, group: Communicator):
        """A communicator of its own; `group` has at least two ranks. Collective."""
        self._mpi = group._mpi.Dup()

    def send(self, buffer: np.ndarray, dest: int) -> None:
        self._mpi.Send(buffer, dest)

    def recv(self, buffer: np.ndarray, source: int) -> None:
        self._mpi.Recv(buffer, source)

    def all_sum(self, buffer: np.ndarray) -> None:
        """Put the sum over the ranks in its place. Collective."""
        self._mpi.Allreduce(in_place(), buffer)

    def all_gather(self, buffer: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` with the `buffer` of every rank, in rank order. Collective."""
        self._mpi.Allgather(buffer, out)

    def barrier(self) -> None:
        self._mpi.Barrier()

    def sleep_until_all(self) -> None:
        """A barrier for long waits: who waits sleeps, and takes no core from those who measure.
        Collective."""
        everybody = self._mpi.Ibarrier()
        while not everybody.Test():
            time.sleep(0.001)

    def close(self) -> None:
        """Collective."""
        self._mpi.Free()
