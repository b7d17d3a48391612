"""Several hosts on this machine that jobs run over as over any: their own names, addresses, links
that can be slowed and cut, reached by ssh.

They are network, process and mount namespaces, made by the scripts of `shared/tools` beside the
checkout (or of HPCMLX_TOOLS): Linux and root. They see this machine's files, and are taken down by
a process that waits for the end of this one, whatever that end is.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures import ROOT, WITHOUT_TORCH, Running, job_line

TOOLS = Path(os.environ.get("HPCMLX_TOOLS", ROOT.parent / "shared/tools"))
# Set where packages may be installed, as on a machine that only tests: else their lack is a skip.
INSTALL = "HPCMLX_TEST_INSTALL" in os.environ
NEEDED = ("ip", "tc", "nsenter", "unshare", "ssh", "ssh-keygen")

# The hosts do not know that they share this machine's cores: ranks that wait give way, are not
# bound, and do not start a thread of the BLAS for each core.
_SHARED_CORES = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OPENBLAS_NUM_THREADS": "1",
    # Ranks on other hosts get it as well.
    "OMPI_MCA_mca_base_env_list": "PYTHONPATH",
}
_RANKS = r"prted|mpirun|/jobs/"


@dataclass(frozen=True)
class Hosts:
    """Hosts that are up.

    Attributes:
        folder: of this cluster; all hosts see it, as they see everything but /run and /dev/shm.
        names: of the hosts; jobs are started on the first.
    """

    folder: Path
    names: tuple[str, ...]

    @property
    def hostfile(self) -> Path:
        return self.folder / "hosts/hosts.txt"

    def control(self, verb: str, *arguments: str) -> str:
        """What `hosts-ctl.sh` prints."""
        line = [str(TOOLS / "hosts-ctl.sh"), str(self.folder / "hosts"), verb, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, argv: list[str], env: Mapping[str, str] | None = None) -> Running:
        """A command line on the first host."""
        enter = [str(TOOLS / "hosts-ctl.sh"), str(self.folder / "hosts"), "exec", self.names[0]]
        return Running([*enter, *argv], ROOT, {**_SHARED_CORES, **WITHOUT_TORCH, **(env or {})})

    def job(self, name: str, *overrides: str, env: Mapping[str, str] | None = None) -> Running:
        """A job over all hosts, started on the first."""
        line = job_line(name, *overrides)
        return self.start([*line, "launch=mpirun", f"launch.hostfile={self.hostfile}"], env)

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes that each host has sent and received so far, headers included."""
        found = {name: self.control("bytes", name).split() for name in self.names}
        return {name: (int(sent), int(received)) for name, (sent, received) in found.items()}

    def processes(self, name: str, pattern: str = _RANKS) -> dict[int, str]:
        """MPI's daemons and ranks on a host: process ids of this machine, command lines."""
        lines = self.control("ps", name, pattern).splitlines()
        found = {int(line.split()[0]): line.partition(" ")[2] for line in lines}
        return {pid: line for pid, line in found.items() if "hosts-ctl.sh" not in line}

    def kill(self, name: str) -> None:
        """`kill -9` of MPI's daemon on a host and of its ranks."""
        pids = self.processes(name)
        assert any("prted" in line for line in pids.values()), pids
        assert any("/jobs/" in line for line in pids.values()), pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def assert_nobody_left(self, seconds: float = 30) -> None:
        """No daemon and no rank on any host."""
        end = time.monotonic() + seconds
        while left := {name: p for name in self.names if (p := self.processes(name))}:
            assert time.monotonic() < end, left
            time.sleep(0.2)

    @contextmanager
    def another(self, name: str, place: Path, other: Path) -> Iterator[None]:
        """One host sees another file or directory at a place, as where nothing is shared."""
        self.control("exec", name, "mount", "--bind", str(other), str(place))
        try:
            yield
        finally:
            self.control("exec", name, "umount", str(place))


def why_not() -> str:
    """Why there can be no hosts here; "" where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    if not (TOOLS / "hosts-up.sh").exists():
        return f"no {TOOLS}/hosts-up.sh (HPCMLX_TOOLS)"
    missing = [c for c in NEEDED if shutil.which(c) is None]
    missing += [] if Path("/usr/sbin/sshd").exists() else ["sshd"]
    if missing and not INSTALL:
        return f"no {', '.join(missing)}: apt install iproute2 ssh, or set HPCMLX_TEST_INSTALL=1"
    return ""


def bring_up(line: Sequence[str | Path], what: str) -> None:
    """Run a script that makes hosts; where this machine does not let it, skip the test.

    One at a time on this machine: it may install packages."""
    with open(__file__) as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[-500:]
        pytest.skip(f"NOT TESTED: {what}: {Path(line[0]).name} failed: {said}")


@contextmanager
def hosts_up(number: int, rate: str, prefix: str = "host") -> Iterator[Hosts]:
    """Start them, one slot each, with links of a rate ("1gbit"); skips the test where that cannot
    be."""
    if reason := why_not():
        pytest.skip(f"NOT TESTED: jobs over several hosts: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="hpcmlx-hosts-", dir="/tmp"))
    folder.chmod(0o755)
    tools, hosts = shlex.quote(str(TOOLS)), folder / "hosts"
    down = f"cat; {tools}/hosts-down.sh {hosts}; rm -rf {folder}"
    up = [str(TOOLS / "hosts-up.sh"), str(hosts), "-n", str(number), "--prefix", prefix]
    up += ["--slots", "1", "--rate", rate, *([] if INSTALL else ["--no-install"])]
    with subprocess.Popen(
        ["bash", "-c", down], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
    ) as keeper:
        try:
            bring_up(up, "jobs over several hosts")
            yield Hosts(folder, tuple(f"{prefix}{i}" for i in range(number)))
        finally:
            keeper.stdin.close()
            keeper.wait(60)
    assert not folder.exists()
