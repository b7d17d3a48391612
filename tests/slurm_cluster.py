"""A real Slurm of two nodes for the tests, submitted to from its login node as a user does.

The nodes are network, process and mount namespaces of this machine, made by the scripts of
`shared/tools` beside the checkout (or of HPCMLX_TOOLS): Linux, root and Debian's Slurm. They are
taken down by a process that waits for the end of this one, whatever that end is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import WITHOUT_TORCH, Running, job_line
from tests.ssh_hosts import INSTALL, TOOLS, bring_up

#: Of the hosts' names; another one lets two runs of the tests share a machine.
PREFIX = os.environ.get("HPCMLX_TEST_PREFIX", "slurm")


@dataclass(frozen=True)
class Cluster:
    """A Slurm of two nodes; the first is the login node, too.

    Attributes:
        folder: of this cluster; all nodes see it, as they see everything but /run and /dev/shm.
    """

    folder: Path

    def line(self, *command: str) -> list[str]:
        """A command line on the login node."""
        setup = f'. {self.folder}/hosts/mpi.env; . {self.folder}/slurm/env.sh; exec "$@"'
        enter = [str(TOOLS / "hosts-ctl.sh"), str(self.folder / "hosts"), "exec", f"{PREFIX}0"]
        return [*enter, "bash", "-c", setup, "bash", *command]

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """What a command on the login node prints."""
        done = subprocess.run(
            self.line(*command),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=cwd or self.folder,
            env={**os.environ, **(env or {})},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, job: str, *overrides: str, **env: str) -> Running:
        """Submit a job, over two nodes, and follow it."""
        line = [*job_line(job, *overrides), "launch=slurm", "parallel.pp=2"]
        return Running(self.line(*line), self.folder, {**WITHOUT_TORCH, **env})

    def state(self, job_id: str) -> dict[str, str]:
        text = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def start_again(self, job_id: str) -> None:
        """Once it is back in the queue, where Slurm would let it wait for two minutes.

        Not at once: a job that starts in the second in which it was put back fails with "Job
        credential revoked"."""
        self.wait_for(job_id, "PENDING")
        time.sleep(2)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def wait_for(self, job_id: str, *names: str, seconds: float = 180) -> dict[str, str]:
        """Until a job is in one of these states."""
        return until(lambda: (s := self.state(job_id))["JobState"] in names and s, seconds)


def until(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition gives, once it gives something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it has not come to this"
        time.sleep(0.1)
    return found


def why_not() -> str:
    """Why there can be no Slurm here; "" where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    if not (TOOLS / "slurm-up.sh").exists():
        return f"no {TOOLS}/slurm-up.sh (HPCMLX_TOOLS)"
    missing = [c for c in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(c) is None]
    if missing and not INSTALL:
        return f"no {', '.join(missing)}: apt install slurm-wlm munge, or set HPCMLX_TEST_INSTALL=1"
    return ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"NOT TESTED: a real Slurm: {reason}")
    # Short, for the sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="hpcmlx-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    hosts, slurm, tools = folder / "hosts", folder / "slurm", shlex.quote(str(TOOLS))
    down = f"cat; {tools}/slurm-down.sh {slurm}; {tools}/hosts-down.sh {hosts}; rm -rf {folder}"
    option = [] if INSTALL else ["--no-install"]
    up = [
        [TOOLS / "hosts-up.sh", hosts, "-n", "2", "--prefix", PREFIX, *option],
        [TOOLS / "slurm-up.sh", slurm, "--hosts", hosts, *option],
    ]
    with subprocess.Popen(
        ["bash", "-c", down], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
    ) as keeper:
        try:
            for line in up:
                bring_up(line, "a real Slurm")
            yield Cluster(folder)
        finally:
            keeper.stdin.close()
            keeper.wait(60)
    assert not folder.exists()


def job_id(run_dir: Path) -> str:
    """Of the job that was submitted for a run directory, once it has begun."""
    return until(lambda: [p.stem for p in Path(f"{run_dir}.slurm").glob("*.log")], 180)[0]
