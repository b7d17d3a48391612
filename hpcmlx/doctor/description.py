"""What the doctor has found out about hosts, as the file that jobs read (`launch/describe.py`)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

import yaml

from hpcmlx.doctor.facts import Facts
from hpcmlx.errors import ConfigError
from hpcmlx.launch.chips import bandwidth_of
from hpcmlx.launch.describe import Cluster
from hpcmlx.launch.hostfile import is_host_name, parse_hostfile
from hpcmlx.launch.placement import Seat, rank_names


def write_description(hosts: Sequence[Facts], hostfile: str | None) -> str:
    """The YAML text.

    Args:
        hostfile: whose names the hosts get; None: those that they give themselves.

    Raises:
        ConfigError: it cannot be told which host is which in the host file, or a host's own name
            could not be read again.
    """
    names = [host.host for host in hosts] if hostfile is None else _names(hosts, hostfile)
    network = _network(hosts)
    text = (
        f"# What the hosts{f' of {hostfile}' if hostfile else ''} are, as jobs/doctor.py found.\n"
    )
    for name, host in zip(names, hosts, strict=True):
        if not is_host_name(name):
            raise ConfigError(f"{name!a} is not a host name; give --hostfile with the one to use")
        text += f"{name}:\n"
        if host.chip:
            text += _entry("chip", host.chip)
        if host.memory_bytes:
            text += _entry("memory", _size(host.memory_bytes))
        if bandwidth_of(host.chip or "", host.memory_bytes) is None:
            text += "  # bandwidth: not known for this chip; give it, as in 100GB/s\n"
        if network is not None:
            used = ", ".join(f"{i}, {host.kind_of(i)}" for i in _used(host))
            text += _entry("interface", network).rstrip() + f"  # {used}\n"
        if host.macos:  # elsewhere mpirun may have bound the doctor to some of them
            text += _entry("cores", host.cores)
    return text


def _names(hosts: Sequence[Facts], hostfile: str) -> list[str]:
    seats = [
        Seat(host.host, tuple(a.partition("/")[0] for i in host.interfaces for a in i.addresses))
        for host in hosts
        for _ in range(host.ranks)
    ]
    names = rank_names(Cluster(hostfile, tuple(parse_hostfile(hostfile)), {}), seats)
    if names is None:
        here = ", ".join(host.host for host in hosts)
        raise ConfigError(f"{hostfile} does not tell which of its hosts are {here}")
    starts = [sum(host.ranks for host in hosts[:i]) for i in range(len(hosts))]
    return [names[start] for start in starts]


def _used(host: Facts) -> list[str]:
    return sorted({name for names in host.links.values() for name in names})


def _network(hosts: Sequence[Facts]) -> str | None:
    """The one that all connections between hosts go through; None where there is no one."""
    found = set()
    for host in hosts:
        for name in _used(host):
            addresses = next((i.addresses for i in host.interfaces if i.name == name), ())
            found |= {str(ipaddress.ip_interface(address).network) for address in addresses}
    return found.pop() if len(found) == 1 and all(map(_used, hosts)) else None


def _size(count: int) -> str:
    return f"{count >> 30}GiB" if count % (1 << 30) == 0 else f"{count >> 20}MiB"


def _entry(key: str, value: Any) -> str:
    return f"  {yaml.safe_dump({key: value}, width=1000, allow_unicode=True)}"
