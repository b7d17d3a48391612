"""Thunderbolt ports of a Mac, what is at the other end of their cables, and RDMA over them.

A port is known by the UUID of its domain. The Mac at the other end lists that UUID beside its own
port, which is how the two ends of a cable are found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcmlx.probes.commands import read_command

#: From this many Gbit/s on a link is Thunderbolt 5, and RDMA works over it.
RDMA_GBITS = 80


@dataclass(frozen=True)
class Port:
    """A Thunderbolt port.

    Attributes:
        receptacle: its number on the case; `networksetup` calls it "Thunderbolt {receptacle}".
        interface: of IP over it, as in "en5"; names change with a restart. None: not known.
        domain: UUID of this end; changes with a restart, too.
        peer: UUID of the Mac's port at the other end; None without one.
        through: the device between the two (a dock), or "".
        gbits: speed of the link, or of the port while nothing is plugged in; None: not known.
        connected: whether something is.
    """

    receptacle: str
    interface: str | None
    domain: str
    peer: str | None
    through: str
    gbits: int | None
    connected: bool

    @property
    def kind(self) -> str:
        """As in "Thunderbolt 5", after the speed."""
        if self.gbits is None:
            return "Thunderbolt"
        if self.gbits >= RDMA_GBITS:
            return "Thunderbolt 5"
        return "Thunderbolt 4" if self.gbits == 40 else "Thunderbolt"

    @property
    def rdma_device(self) -> str | None:
        """The RDMA device of a cable that goes straight to another Mac at Thunderbolt 5 speed."""
        fast = self.gbits is not None and self.gbits >= RDMA_GBITS
        if self.peer is None or self.through or not fast or self.interface is None:
            return None
        return f"rdma_{self.interface}"


@dataclass(frozen=True)
class Rdma:
    """RDMA over Thunderbolt on a host.

    Attributes:
        enabled: what `rdma_ctl status` says; None where there is no such tool.
        devices: names as in "rdma_en5".
    """

    enabled: bool | None = None
    devices: tuple[str, ...] = ()


def probe_thunderbolt(interfaces: Mapping[str, str]) -> tuple[Port, ...]:
    """The ports of this Mac.

    Args:
        interfaces: of `parse_hardware_ports`.
    """
    text = read_command("system_profiler", "SPThunderboltDataType", "-json")
    return parse_thunderbolt(text, interfaces)


def probe_rdma() -> Rdma:
    """Whether this Mac has RDMA switched on."""
    devices = parse_ibv_devices(read_command("ibv_devices"))
    return Rdma(parse_rdma_status(read_command("rdma_ctl", "status")), devices)


def parse_thunderbolt(text: str | None, interfaces: Mapping[str, str]) -> tuple[Port, ...]:
    """The ports in `system_profiler SPThunderboltDataType -json`, by receptacle.

    Args:
        text: empty or None on a Mac that did not answer: no ports.
        interfaces: name of the port to network device, of `parse_hardware_ports`.
    """
    try:
        buses = json.loads(text or "")["SPThunderboltDataType"]
        ports = [_port(bus, interfaces) for bus in buses]
    except (ValueError, LookupError, TypeError, AttributeError):
        return ()
    return tuple(sorted(filter(None, ports), key=lambda port: port.receptacle))


def _port(bus: dict[str, Any], interfaces: Mapping[str, str]) -> Port | None:
    domain, tag = bus.get("domain_uuid_key"), bus.get("receptacle_1_tag") or {}
    receptacle = tag.get("receptacle_id_key")
    if domain is None or receptacle is None:  # a bus without a port outside
        return None
    peer, through = _peer(bus.get("_items") or [], "")
    speed = re.search(r"(\d+) Gb/s", tag.get("current_speed_key") or "")
    return Port(
        receptacle=receptacle,
        interface=interfaces.get(f"Thunderbolt {receptacle}"),
        domain=domain,
        peer=peer,
        through=through,
        gbits=int(speed[1]) if speed else None,
        connected=tag.get("receptacle_status_key") == "receptacle_connected",
    )


def _peer(items: list[dict[str, Any]], through: str) -> tuple[str | None, str]:
    """The first Mac below a port, and the device that it is behind."""
    for item in items:
        if "domain_uuid_key" in item:
            return item["domain_uuid_key"], through
        peer, last = _peer(item.get("_items") or [], str(item.get("_name", "a device")))
        if peer is not None:
            return peer, last
    return None, ""


def parse_rdma_status(text: str | None) -> bool | None:
    """`rdma_ctl status` prints `enabled` or `disabled`; None for anything else."""
    return {"enabled": True, "disabled": False}.get((text or "").strip().lower())


def parse_ibv_devices(text: str | None) -> tuple[str, ...]:
    """The device names in the table that `ibv_devices` prints."""
    return tuple(re.findall(r"^\s*(rdma_\w+)\s", text or "", re.MULTILINE))
