"""Fixtures of the tests that run under mpirun on every rank at once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from hpcmlx import comm


@pytest.fixture(scope="session")
def world() -> comm.Communicator:
    return comm.init()


@pytest.fixture(scope="session")
def shared(world) -> Path:
    """One folder for all ranks."""
    folder = world.bcast(tempfile.mkdtemp(prefix="hpcmlx-mpi-") if world.rank == 0 else None)
    yield Path(folder)
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def on_root(world):
    """Run a function on rank 0 and give every rank what it returned; the twin is computed once.

    What fails on rank 0 fails the test there, which ends the job on every rank.
    """

    def run(function):
        return world.bcast(function() if world.rank == 0 else None)

    return run
