"""pytest plugin for runs under mpirun; load it with `-p tests.mpi_plugin`, before pytest-mpi.

MLX must bring MPI up before anybody else imports mpi4py, or it silently sees one rank and every
test passes vacuously. So this happens here, first, and a run that has fewer ranks than it was
asked for ends at once. A test that fails or exceeds its time on any rank ends the job on all ranks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

import pytest

from hpcmlx import comm

EXPECTED = int(os.environ["HPCMLX_TEST_RANKS"])

# A copy, because pytest captures standard error itself while a test runs.
_stderr = os.fdopen(os.dup(2), "w")
_timers: dict[str, threading.Timer] = {}

world = comm.init()
if world.size != EXPECTED:
    print(f"expected {EXPECTED} ranks, MPI gave {world.size}", file=_stderr, flush=True)
    world.abort(3)
if world.rank:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one report, rank 0's


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        where = f"rank {world.rank} of {world.size}"
        print(
            f"\nFAILED on {where}: {item.nodeid}\n{report.longreprtext}", file=_stderr, flush=True
        )
        world.abort(1)


def pytest_collectreport(report):
    if report.failed:
        print(f"\nrank {world.rank}: {report.longreprtext}", file=_stderr, flush=True)
        world.abort(1)


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item, settings):
    """pytest-timeout's own timer is a signal, which a rank that waits inside MPI never sees."""

    def expire() -> None:
        where = f"rank {world.rank} of {world.size}"
        print(f"\nTIMEOUT on {where}: {item.nodeid}", file=_stderr, flush=True)
        faulthandler.dump_traceback(_stderr)
        world.abort(1)

    timer = threading.Timer(settings.timeout, expire)
    timer.daemon = True
    timer.start()
    _timers[item.nodeid] = timer
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item):
    _timers.pop(item.nodeid).cancel()
    return True


_status = 0


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    global _status
    _status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    if world.size == 1:  # a world of one needs no MPI, but pytest-mpi has started it
        from mpi4py import MPI

        MPI.Finalize()
    comm.finalize(_status)


@pytest.fixture(scope="session")
def mpi_world() -> comm.Communicator:
    """All ranks of the run."""
    return world
