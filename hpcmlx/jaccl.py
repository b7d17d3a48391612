"""Tensor parallel messages over RDMA: MLX's JACCL back end inside one tensor-parallel group.

Every rank says what Thunderbolt ports its Mac has; the two ends of each cable are matched, which
gives the matrix of RDMA devices that JACCL wants; JACCL then exchanges its keys through mpi4py and
needs no address of its own. The world of JACCL is that matrix, so one that is restricted to a
tensor-parallel group makes JACCL that group's alone, beside MPI between stages and replicas.

NOT VERIFIED ON HARDWARE: it was written from MLX's sources and from recorded output of Macs, and
tested against a stand-in of `mx.distributed.init`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hpcmlx import comm
from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError
from hpcmlx.probes.commands import read_command
from hpcmlx.probes.hardware import probe_hardware
from hpcmlx.probes.interfaces import parse_hardware_ports
from hpcmlx.probes.thunderbolt import Port, Rdma, probe_rdma, probe_thunderbolt
from hpcmlx.probes.wheel import has_jaccl, wheel_tags

#: Which device of each rank (row) leads to which other rank (column).
Matrix = list[list[None | str | list[str]]]

_log = logging.getLogger(__name__)

MACOS = (26, 2)
MAX_MESH = 8
_FIRST_CHOICE = ("JACCL_RANK", "JACCL_IBV_DEVICES", "JACCL_RING", "JACCL_COORDINATOR")
_OURS = ("MLX_RANK", "MLX_IBV_DEVICES", "MLX_JACCL_RING", "MLX_JACCL_COORDINATOR")


@dataclass(frozen=True)
class Member:
    """What JACCL needs to know of the host of one rank.

    Attributes:
        host: its name.
        macos: version as numbers; empty on other systems.
        in_wheel: whether MLX's wheel has JACCL; None: not known.
    """

    host: str
    macos: tuple[int, ...]
    in_wheel: bool | None
    rdma: Rdma
    ports: tuple[Port, ...]


def connect(
    kind: str,
    group: Communicator,
    probe: Callable[[], Member] | None = None,
    init: Callable[..., Any] = comm.start_backend,
) -> Communicator:
    """The group with its collectives in the graph over RDMA, where they are to be. Collective.

    Args:
        kind: `comm.tensor`, as in `choose`.
        group: the tensor-parallel group, over MPI.
        probe: what tells of this host; `probe_member`.
        init: as in `boot`.

    Returns:
        `group` itself where it stays with MPI.

    Raises:
        ConfigError: JACCL is asked for and cannot be had, or does not start.
    """
    if kind == "mpi" or group.size == 1:
        return group
    member = (probe or probe_member)()
    matrix = choose(kind, group, member)
    if matrix is None:
        return group
    made = boot(group, matrix, init)
    _log.info("tensor-parallel messages go over RDMA (JACCL) between %d hosts", group.size)
    return group.with_graph(made)


def probe_member() -> Member:
    """Ask this host; names of RDMA devices change with a restart, so at the start of every job."""
    interfaces = parse_hardware_ports(read_command("networksetup", "-listallhardwareports"))
    return Member(
        comm.hostname(),
        probe_hardware(sys.platform).macos,
        has_jaccl(wheel_tags()),
        probe_rdma(),
        probe_thunderbolt(interfaces),
    )


def choose(kind: str, group: Communicator, member: Member) -> Matrix | None:
    """Whether this tensor-parallel group uses JACCL. Collective; the same answer on all its ranks.

    Args:
        kind: `comm.tensor`: "mpi", "jaccl", or "auto" for JACCL where nothing speaks against it.
        group: the tensor-parallel group.
        member: of `probe_member`.

    Returns:
        The matrix to `boot` with; None for MPI.

    Raises:
        ConfigError: "jaccl", and it cannot be had; says why.
    """
    if kind == "mpi" or group.size == 1:
        return None
    members = group.allgather(member)
    reason = obstacle(members)
    if reason and kind == "jaccl":
        raise ConfigError(f"comm.tensor=jaccl: {reason}; or set comm.tensor=mpi")
    if not reason:
        return device_matrix(members)
    if any(member.macos for member in members):  # elsewhere nobody expects it
        _log.info("tensor-parallel messages go through MPI, not over RDMA: %s", reason)
    return None


def obstacle(members: Sequence[Member]) -> str:
    """Why JACCL cannot connect these ranks, and what to do about it; "" where it can."""
    hosts = [member.host for member in members]
    for member in members:
        if member.macos < MACOS:
            return f"{member.host} has no macOS 26.2 or later, which RDMA needs: update it"
        if not member.in_wheel:
            return f"MLX on {member.host} has no JACCL: install the wheel for macOS 26 again"
        if hosts.count(member.host) > 1:
            return f"{member.host} has several ranks of one group: give it one slot"
        if not member.rdma.enabled:
            return f"RDMA is off on {member.host}: run `rdma_ctl enable` in macOS Recovery"
    matrix = device_matrix(members)
    for row, member in zip(matrix, members, strict=True):
        for device in _devices(row):
            if device not in member.rdma.devices:
                return f"{member.host} has a cable on {device}, which ibv_devices does not list"
    if len(members) <= MAX_MESH if is_mesh(matrix) else is_ring(matrix):
        return ""
    missing = [
        f"{hosts[i]} - {hosts[j]}"
        for i in range(len(hosts))
        for j in range(i + 1, len(hosts))
        if matrix[i][j] is None
    ]
    if not missing:
        return f"JACCL connects at most {MAX_MESH} hosts all to all, not {len(hosts)}"
    return f"no Thunderbolt 5 cable straight from {', '.join(missing)}: connect all pairs"


def device_matrix(members: Sequence[Member]) -> Matrix:
    """The device on each rank (row) that leads to each other rank (column).

    Several cables between two hosts count as many times as every connected pair has them, which is
    what JACCL asks for. They are listed in the same order at both ends.

    Args:
        members: of the group, in the order of its ranks.
    """
    end = {p.domain: (rank, p) for rank, member in enumerate(members) for p in member.ports}
    cables: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for rank, member in enumerate(members):
        for port in member.ports:
            other, far = end.get(port.peer or "", (rank, port))
            here, there = port.rdma_device, far.rdma_device
            # Each cable once, from the lower rank, and only if its far end agrees.
            if other > rank and far.peer == port.domain and here and there:
                cables.setdefault((rank, other), []).append((here, there))
    count = min(map(len, cables.values()), default=0)
    matrix: Matrix = [[None] * len(members) for _ in members]
    for (low, high), both in cables.items():
        used = sorted(both)[:count]
        matrix[low][high] = _entry([here for here, _ in used])
        matrix[high][low] = _entry([there for _, there in used])
    return matrix


def is_mesh(matrix: Matrix) -> bool:
    """Whether every rank has a cable to every other."""
    size = len(matrix)
    return all(matrix[i][j] is not None for i in range(size) for j in range(size) if i != j)


def is_ring(matrix: Matrix) -> bool:
    """Whether every rank has a cable to the next, and the last to the first."""
    size = len(matrix)
    return all(matrix[i][(i + 1) % size] is not None for i in range(size))


def boot(
    group: Communicator,
    matrix: Matrix,
    init: Callable[..., Any],
    *,
    prefer_ring: bool = False,
) -> Any:
    """Start JACCL among the ranks of a group. Collective. A process can do it once.

    It never notices a rank that is gone and then spins for ever: something that watches over MPI
    has to end the job.

    Args:
        group: the tensor-parallel group; its ranks are JACCL's.
        matrix: of `device_matrix`, the same on all ranks.
        init: `mx.distributed.init`.
        prefer_ring: for large messages; else all pairs, where there are cables.

    Returns:
        MLX's group, of the size of `group`.

    Raises:
        ConfigError: MLX does not start it.
    """

    def all_gather_factory(rank: int, size: int) -> Callable[[bytes, int], bytes]:
        if (rank, size) != (group.rank, group.size):
            raise ConfigError(f"JACCL is rank {rank} of {size}, MPI {group.rank} of {group.size}")
        return lambda data, num_bytes: b"".join(group.allgather(bytes(data)[:num_bytes]))

    with _environment(group.rank, matrix, prefer_ring):
        try:
            made = init(backend="jaccl", strict=True, all_gather_factory=all_gather_factory)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"JACCL does not start on {comm.hostname()}: {error}; devices "
                f"{json.dumps(matrix[group.rank])}; see jobs/doctor.py, or set comm.tensor=mpi"
            ) from error
    if (made.rank(), made.size()) != (group.rank, group.size):
        raise ConfigError(
            f"JACCL made a group of {made.size()} instead of {group.size} on {comm.hostname()}; "
            "set comm.tensor=mpi"
        )
    return made


@contextmanager
def _environment(rank: int, matrix: Matrix, prefer_ring: bool) -> Iterator[None]:
    """The variables that JACCL reads, while it starts; then what was there before.

    The names without `MLX_` would be taken first, wherever they come from.
    """
    before = {name: os.environ.pop(name, None) for name in (*_FIRST_CHOICE, *_OURS)}
    with tempfile.NamedTemporaryFile("w", prefix="hpcmlx-jaccl-", suffix=".json") as file:
        json.dump(matrix, file)
        file.flush()
        os.environ["MLX_RANK"] = str(rank)
        os.environ["MLX_IBV_DEVICES"] = file.name
        if prefer_ring:  # by being there, whatever its value
            os.environ["MLX_JACCL_RING"] = "1"
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _entry(devices: list[str]) -> str | list[str]:
    return devices[0] if len(devices) == 1 else devices


def _devices(row: Sequence[None | str | list[str]]) -> Iterator[str]:
    for entry in row:
        yield from [entry] if isinstance(entry, str) else entry or []
