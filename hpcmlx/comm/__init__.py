"""MPI and MLX in one process: the only package that imports mpi4py and uses `mx.distributed`.

`init` brings both up in the one order that works (MLX calls MPI_Init, mpi4py attaches) and gives a
`Communicator`; without mpirun it gives one of size 1 that needs no MPI. Collectives inside a
lazy graph (`all_sum`, `all_gather`) go through MLX, everything else through mpi4py on evaluated
buffers. Every operation is recorded in this process's flight recorder.
"""

from hpcmlx.comm.communicator import Communicator, Pending, hostname
from hpcmlx.comm.evaluation import evaluate, start_evaluation
from hpcmlx.comm.startup import (
    finalize,
    find_libmpi,
    init,
    launched_by_mpi,
    run_tool,
    start_backend,
)
from hpcmlx.comm.unawaited import Counter, Mailbox, Wire

__all__ = [
    "Communicator",
    "Counter",
    "Mailbox",
    "Pending",
    "Wire",
    "evaluate",
    "finalize",
    "find_libmpi",
    "hostname",
    "init",
    "launched_by_mpi",
    "run_tool",
    "start_backend",
    "start_evaluation",
]
