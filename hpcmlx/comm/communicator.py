"""A group of ranks and what it does together: sums in MLX's graph, messages of evaluated buffers,
Python objects."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from hpcmlx import faults
from hpcmlx.flight import CODES, Group, recorder

# mx dtypes that NumPy has no buffer for travel as integers of the same width.
_WIRE = {mx.bfloat16: mx.uint16}
_NUMPY = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.int32: np.int32,
    mx.uint32: np.uint32,
    mx.int64: np.int64,
    mx.uint16: np.uint16,
    mx.uint8: np.uint8,
    mx.bool_: np.bool_,
}

_SEND, _RECV = CODES["send"], CODES["recv"]
_ALONE = Group("alone", (0,), 255)


class Pending:
    """A message under way. Keep it until `wait`: it owns the buffer."""

    def __init__(
        self, request: Any, buffer: np.ndarray, record: int, dtype: mx.Dtype | None = None
    ):
        """
        Args:
            record: its index in the flight recorder.
        """
        self._request, self._buffer, self._dtype = request, buffer, dtype
        self._record: int | None = record

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        if not self._request.Test():
            return False
        self._ended()
        return True

    def wait(self) -> mx.array | None:
        """Block until the transfer is complete; the array for a receive, None for a send."""
        if self._record is not None:
            recorder.wait(self._record)
        begin = time.perf_counter()
        self._request.Wait()
        recorder.waiting += time.perf_counter() - begin
        self._ended()
        if self._dtype is None:
            return None
        array = mx.array(self._buffer)
        return array.view(self._dtype) if self._dtype in _WIRE else array

    def _ended(self) -> None:
        if self._record is not None:
            recorder.end(self._record)
            self._record = None


@dataclass(frozen=True)
class Communicator:
    """A group of ranks.

    Attributes:
        rank: this process's rank in the group.
        size: number of ranks.
    """

    rank: int = 0
    size: int = 1
    _mpi: Any = None
    _group: Any = None
    _flight: Group = _ALONE

    # -- inside MLX's lazy graph (tensor parallel) --

    def all_sum(self, x: mx.array) -> mx.array:
        """Sum of `x` over the ranks, in the graph. Its gradient is the identity."""
        if self.size == 1 or faults.skips():
            return x
        recorder.plan(CODES["all_sum"], self._flight, x.nbytes)
        return mx.distributed.all_sum(x, group=self._graph_group())

    def all_gather(self, x: mx.array) -> mx.array:
        """`x` of every rank concatenated along axis 0, in rank order, in the graph."""
        if self.size == 1:
            return x
        recorder.plan(CODES["all_gather"], self._flight, x.nbytes)
        return mx.distributed.all_gather(x, group=self._graph_group())

    def with_graph(self, group: Any) -> Communicator:
        """The same ranks, with another group of MLX's for what happens inside the graph."""
        return replace(self, _group=group)

    def _graph_group(self) -> Any:
        if self._group is None:
            raise RuntimeError("this communicator was split without graph=True")
        return self._group

    # -- on evaluated buffers (pipeline and data parallel) --

    def isend(self, array: mx.array, dest: int, tag: int) -> Pending:
        """Start sending `array` (evaluated here first) to rank `dest` of this group."""
        wire = array.view(_WIRE[array.dtype]) if array.dtype in _WIRE else array
        mx.eval(wire)
        buffer = np.ascontiguousarray(np.array(wire, copy=False))
        self._flight.sent[dest] += 1
        record = recorder.begin(
            _SEND, self._flight, self._flight.sent[dest], dest, buffer.nbytes, False
        )
        return Pending(self._mpi.Isend(buffer, dest, tag), buffer, record)

    def irecv(self, shape: Sequence[int], dtype: mx.Dtype, source: int, tag: int) -> Pending:
        """Start receiving an array of `shape` and `dtype` from rank `source` of this group."""
        buffer: np.ndarray = np.empty(tuple(shape), _NUMPY[_WIRE.get(dtype, dtype)])
        record = self._receives(source, buffer.nbytes)
        return Pending(self._mpi.Irecv(buffer, source, tag), buffer, record, dtype)

    def irecv_into(self, array: mx.array, source: int, tag: int) -> Pending:
        """Start receiving into the memory of `array`, which is evaluated and which a lazy graph may
        already be built on: nothing that depends on it may be evaluated before `wait`."""
        wire = array.view(_WIRE[array.dtype]) if array.dtype in _WIRE else array
        mx.eval(wire)
        buffer = np.array(wire, copy=False)
        record = self._receives(source, buffer.nbytes)
        return Pending(self._mpi.Irecv(buffer, source, tag), buffer, record)

    def _receives(self, source: int, nbytes: int) -> int:
        self._flight.received[source] += 1
        return recorder.begin(
            _RECV, self._flight, self._flight.received[source], source, nbytes, False
        )

    def sum_arrays(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The sums over the ranks of float32 arrays, in one message. Evaluates them. Collective.

        Every rank gets the same bits.
        """
        if self.size == 1 or not arrays:
            return list(arrays)
        mx.eval(arrays)
        flat = np.concatenate([np.array(a, copy=False).reshape(-1) for a in arrays])
        record = recorder.collective(CODES["sum_arrays"], self._flight, flat.nbytes)
        self._mpi.Allreduce(in_place(), flat)
        recorder.end(record)
        return _apart(flat, arrays)

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The sums over the ranks, in float64. Collective."""
        total = np.array(numbers, np.float64)
        if self.size > 1 and not faults.skips():
            record = recorder.collective(CODES["sum_numbers"], self._flight, total.nbytes)
            self._mpi.Allreduce(in_place(), total)
            recorder.end(record)
        return [float(x) for x in total]

    def ibcast(self, buffer: np.ndarray, root: int) -> Pending:
        """Start filling `buffer`, as long on every rank, with that of rank `root`. Collective."""
        record = self._starts("ibcast", buffer.nbytes)
        return Pending(self._mpi.Ibcast(buffer, root), buffer, record)

    def imax_into(self, buffer: np.ndarray) -> Pending:
        """Start replacing every number of `buffer` by the largest of all ranks. Collective."""
        from mpi4py import MPI

        record = self._starts("imax", buffer.nbytes)
        return Pending(self._mpi.Iallreduce(MPI.IN_PLACE, buffer, MPI.MAX), buffer, record)

    def _starts(self, op: str, nbytes: int) -> int:
        group = self._flight
        group.collectives += 1
        return recorder.begin(CODES[op], group, group.collectives, -1, nbytes, False)

    # -- control: Python objects and barriers --

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value if self.size == 1 else self._recorded("bcast", self._mpi.bcast, value, root)

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        if self.size == 1:
            return [value]
        return self._recorded("gather", self._mpi.gather, value, root)

    def allgather(self, value: Any) -> list[Any]:
        return (
            [value] if self.size == 1 else self._recorded("allgather", self._mpi.allgather, value)
        )

    def barrier(self) -> None:
        if self.size > 1 and not faults.skips():
            self._recorded("barrier", self._mpi.Barrier)

    def _recorded(self, op: str, call: Callable[..., Any], *args: Any) -> Any:
        record = recorder.collective(CODES[op], self._flight)
        begin = time.perf_counter()
        result = call(*args)
        recorder.waiting += time.perf_counter() - begin
        recorder.end(record)
        return result

    def split(self, color: int, key: int, graph: bool = False, name: str = "part") -> Communicator:
        """Groups of the ranks that give the same `color`, ordered by `key`. Collective.

        Args:
            graph: also make the MLX group that `all_sum` and `all_gather` need. Either every
                rank of this communicator asks for it or none does.
            name: of the groups, for reports.
        """
        if self.size == 1:
            return Communicator()
        record = recorder.collective(CODES["split"], self._flight)
        mpi = self._mpi.Split(color, key)
        group = self._group.split(color, key) if graph else None
        members = [self._flight.members[self.rank]]
        if mpi.Get_size() > 1:
            # Also because the first lowercase call duplicates the communicator: do it now.
            members = mpi.allgather(members[0])
        recorder.end(record)
        flight = recorder.group(name, members)
        return Communicator(mpi.Get_rank(), mpi.Get_size(), mpi, group, flight)

    def split_by_host(self) -> Communicator:
        """The ranks of this group that share this host's memory. Collective."""
        names = self.allgather(hostname())
        return self.split(names.index(names[self.rank]), self.rank, name="host")

    def abort(self, code: int, *, flush: bool = True) -> NoReturn:
        """End every rank of the job at once, with exit code `code`.

        Args:
            flush: what was printed; False where another thread may hold the streams for ever.
        """
        if flush:
            sys.stdout.flush()
            sys.stderr.flush()
        if self._mpi is not None:
            self._mpi.Abort(code)
        os._exit(code)


def in_place() -> Any:
    from mpi4py import MPI

    return MPI.IN_PLACE


def _apart(flat: np.ndarray, like: Sequence[mx.array]) -> list[mx.array]:
    """What `np.concatenate` put together, as arrays of the shapes of `like`."""
    parts = np.split(flat, np.cumsum([array.size for array in like])[:-1])
    return [mx.array(p.reshape(array.shape)) for p, array in zip(parts, like, strict=True)]


def hostname() -> str:
    return socket.gethostname()
