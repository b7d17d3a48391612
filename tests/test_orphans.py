"""Whatever is killed above the ranks, no rank outlives it by more than a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcmlx import comm, faults, orphans
from tests.fixtures import ROOT, Running, mpirun, run_line, start, write_rows
from tests.fixtures import model as model

pytestmark = pytest.mark.fault
LIMIT = 4.0  # seconds to the last rank's end; a watcher looks once a second

# Rank 0 sleeps, rank 1 computes without a pause, rank 2 waits inside MPI.
IDLE_BUSY_WAITING = """
import os, sys, time
from hpcmlx import comm, orphans
world = comm.init()
orphans.watch_parent()
print("ready", world.rank, "below", os.getppid(), file=sys.stderr, flush=True)
if world.rank == 0:
    time.sleep(600)
while world.rank == 1:
    sum(range(1000))
world.barrier()
"""
# In place of ssh: another host is this one under another name.
FAKE_SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec unshare --uts sh -c 'hostname "$0"; exec sh -c "$1"' "$host" "$*"
"""
LEAVES_CLEANLY = """
from hpcmlx import comm, orphans
world = comm.init()
orphans.watch_parent(seconds=0.01)
world.barrier()
comm.finalize(0)
"""
# A process in the background whose parent ends at once.
ORPHAN = """
import sys, time
from hpcmlx import orphans
orphans.watch_parent(seconds=0.05)
print("watching", flush=True)
time.sleep(1)
print("still here", flush=True)
"""
HOLDER = """
import sys
from hpcmlx import orphans
with orphans.lifeline() as path:
    print(path, flush=True)
    sys.stdin.read()
"""


def assert_all_gone(job: Running) -> None:
    """Every process of the job ends within the limit; the test's own clean-up does not help."""
    begin = time.monotonic()
    while left := job._survivors(0.0):
        if time.monotonic() - begin > LIMIT:
            job.kill()
            pytest.fail(f"{list(left.values())} still run after {LIMIT:g} s:\n{job._text()}")
        time.sleep(0.05)
    job.wait()


def test_ranks_end_when_mpirun_is_killed():
    line = [*mpirun("-n", "3"), sys.executable, "-c", IDLE_BUSY_WAITING]
    job = Running(line, ROOT, {})
    for rank in range(3):
        job.wait_for(f"ready {rank}")
    assert len(job._survivors(0.0)) >= 4
    job.process.kill()
    assert_all_gone(job)


@pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "--uts", "true"]).returncode != 0,
    reason="NOT TESTED: a second host name needs Linux and root",
)
def test_ranks_end_when_the_daemon_of_their_host_is_killed(tmp_path):
    ssh = tmp_path / "ssh"
    ssh.write_text(FAKE_SSH)
    ssh.chmod(0o755)
    line = [*mpirun("-n", "2"), "--host", f"{comm.hostname()}:1,elsewhere:1"]
    line += ["--prtemca", "plm_ssh_agent", str(ssh), sys.executable, "-c", IDLE_BUSY_WAITING]
    job = Running(line, ROOT, {})
    job.wait_for("ready 0")
    job.wait_for("ready 1")
    [parent] = [text.split()[-1] for _, text in job.lines if text.startswith("ready 1")]
    assert int(parent) != job.process.pid
    os.kill(int(parent), signal.SIGKILL)
    assert_all_gone(job)


@pytest.mark.parametrize("killed", ["mpirun", "launcher"])
def test_a_job_ends_when_what_started_it_is_killed(model, tmp_path, killed):
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "Hello"}])
    line = [f"model.path={model}", f"input={prompts}", f"run_dir={tmp_path / 'run'}"]
    line += ["parallel.pp=2", "sampling.max_tokens=16"]
    env = {faults.ENV: "rank=1,step=3,kind=hang"}
    if killed == "mpirun":
        job = start("generate", *line, ranks=2, env=env)
    else:
        job = start("generate", *line, "launch=mpirun", env=env)
    job.wait_for("injected fault")
    job.process.kill()
    assert_all_gone(job)
    assert not (tmp_path / "run" / "completed.json").exists()
    if killed == "launcher":  # mpirun lives on to pass the line
        assert "the launcher that started mpirun is gone" in job._text()


def test_a_watched_job_still_ends_well():
    outcome = run_line([*mpirun("-n", "2"), sys.executable, "-c", LEAVES_CLEANLY])
    assert outcome.code == 0, outcome.err
    assert not outcome.survivors


def outlives(script: str, key: str, **env: str) -> tuple[str, str, int]:
    """What a process says, and how it ends, whose holder of the lifeline is killed; the file must
    be gone."""
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=pipe, stdout=pipe, text=True)
    path = holder.stdout.readline().strip()
    env = os.environ | env | {key: path}
    line = [sys.executable, "-c", script]
    process = subprocess.Popen(line, env=env, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "watching\n"
    holder.kill()  # it is not waited for: a zombie must not count as alive
    out, err = process.communicate(timeout=10)
    holder.communicate()
    assert not Path(path).exists()
    return out, err, process.returncode


def test_a_rank_whose_launcher_dies_says_so_and_ends_with_75():
    said = outlives(ORPHAN, orphans.LIFELINE_ENV, OMPI_COMM_WORLD_RANK="3")
    where = f"hpcmlx: rank 3 on {comm.hostname()}: "
    message = f"{where}the launcher that started mpirun is gone; start the job again\n"
    assert said == ("", message, 75)


def test_a_launcher_whose_sweep_dies_is_ended_as_by_a_user():
    script = ORPHAN.replace("watch_parent", "watch_sweep")
    assert outlives(script, orphans.SWEEP_ENV) == ("", "", -signal.SIGTERM)


def test_the_lifeline_goes_with_its_launcher():
    with orphans.lifeline() as path:
        descriptor = orphans._open_lifeline(path)
        assert not orphans._is_free(descriptor)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert orphans._is_free(descriptor)  # and the child, which lives on, has not inherited it
    os.close(descriptor)
    assert child.poll() is None and not Path(path).exists()
    child.communicate(b"\n")
    # A rank on another host has no such file: those on the launcher's host watch it.
    assert orphans._open_lifeline(path) is None


@pytest.mark.parametrize("as_rank", [True, False])
def test_only_a_rank_ends_with_its_parent(as_rank):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}
    if as_rank:
        env["OMPI_COMM_WORLD_RANK"] = "0"
    shell = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & read line', sys.executable, ORPHAN],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert shell.stdout.readline() == "watching\n"
    said, _ = shell.communicate("\n", timeout=10)  # ends the shell, then waits for its child
    assert ("still here" in said) is not as_rank
    assert ("is gone; start the job again" in said) is as_rank


def test_the_watch_does_not_keep_the_interpreter():
    script = "from hpcmlx import orphans; orphans.watch_parent(); print('end')"
    env = os.environ | {"PMIX_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"end\n", b"")
