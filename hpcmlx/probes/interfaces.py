"""Network interfaces of a host: their addresses, and what kind of link each of them is."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from hpcmlx.probes.commands import read_command, read_text
from hpcmlx.probes.thunderbolt import Port

LOOPBACK, VIRTUAL, WIFI, ETHERNET, UNKNOWN = "loopback", "virtual", "Wi-Fi", "Ethernet", "unknown"
_SYS = Path("/sys/class/net")
_LOOPBACK_TYPE = "772"  # ARPHRD_LOOPBACK in linux/if_arp.h
_ETHERNET_TYPE = "1"


@dataclass(frozen=True)
class Interface:
    """
    Attributes:
        name: as in "en0".
        kind: "Thunderbolt 5", "Thunderbolt 4", "Thunderbolt", "Ethernet", "Wi-Fi", "loopback",
            "virtual" or "unknown".
        addresses: IPv4 addresses with the length of their prefix, as in "10.0.1.2/24".
    """

    name: str
    kind: str
    addresses: tuple[str, ...]


def probe_interfaces(
    platform: str, hardware_ports: Mapping[str, str], ports: Sequence[Port]
) -> tuple[Interface, ...]:
    """The interfaces of this host that have an IPv4 address.

    Args:
        platform: `sys.platform`.
        hardware_ports: of `parse_hardware_ports`; empty on Linux.
        ports: the Thunderbolt ports of a Mac.
    """
    members = parse_bridge_members(read_command("ifconfig")) if platform == "darwin" else {}
    found = []
    for name, entries in psutil.net_if_addrs().items():
        addresses = tuple(
            f"{entry.address}/{_prefix(entry.netmask)}"
            for entry in entries
            if entry.family == socket.AF_INET
        )
        if addresses:
            kind = (
                mac_kind(name, hardware_ports, ports, members)
                if platform == "darwin"
                else linux_kind(name)
            )
            found.append(Interface(name, kind, addresses))
    return tuple(found)


def parse_hardware_ports(text: str | None) -> dict[str, str]:
    """Name of the port to network device ("Thunderbolt 1": "en2"), as in the output of
    `networksetup -listallhardwareports`."""
    pairs = re.findall(r"^\s*Hardware Port: (.+?)\s*\n\s*Device: (\S+)", text or "", re.MULTILINE)
    return dict(pairs)


def parse_bridge_members(text: str | None) -> dict[str, tuple[str, ...]]:
    """The interfaces below each bridge, as in the output of `ifconfig`."""
    members: dict[str, tuple[str, ...]] = {}
    name = ""
    for line in (text or "").splitlines():
        if head := re.match(r"([\w.-]+): flags=", line):
            name = head[1]
        elif member := re.match(r"\s+member: (\S+)", line):
            members[name] = (*members.get(name, ()), member[1])
    return members


def mac_kind(
    name: str,
    hardware_ports: Mapping[str, str],
    ports: Sequence[Port],
    bridges: Mapping[str, tuple[str, ...]],
) -> str:
    """What an interface of a Mac is.

    A Thunderbolt bridge is as slow as the slowest cable in it.

    Args:
        bridges: of `parse_bridge_members`.
    """
    if re.fullmatch(r"lo\d+", name):
        return LOOPBACK
    label = next((port for port, device in hardware_ports.items() if device == name), "")
    if label == "Wi-Fi":
        return WIFI
    if label == "Thunderbolt Bridge":
        plugged = [p for p in ports if p.interface in bridges.get(name, ()) and p.connected]
        slowest = min(plugged, key=lambda port: port.gbits or 0, default=None)
        return slowest.kind if slowest else "Thunderbolt"
    if label.startswith("Thunderbolt"):
        return next((port.kind for port in ports if port.interface == name), "Thunderbolt")
    if "Ethernet" in label or "LAN" in label:
        return ETHERNET
    # Tunnels of a VPN, bridges of virtual machines, AirDrop's own.
    if re.fullmatch(r"(utun|bridge|vmenet|vmnet|ipsec|awdl|llw|gif|stf|feth|tap|tun)\d+", name):
        return VIRTUAL
    return UNKNOWN


def linux_kind(name: str, root: Path = _SYS) -> str:
    """What an interface of a Linux host is, after /sys/class/net.

    Args:
        root: that directory.
    """
    place = root / name
    kind = read_text(place / "type")
    if kind == _LOOPBACK_TYPE:
        return LOOPBACK
    if (place / "wireless").exists() or (place / "phy80211").exists():
        return WIFI
    if kind is None:
        return UNKNOWN
    if not (place / "device").exists():  # made by software: bridge, veth, tunnel
        return VIRTUAL
    if (place / "device" / "driver").resolve().name == "thunderbolt-net":
        return _linux_thunderbolt((place / "device").resolve().parent)
    return ETHERNET if kind == _ETHERNET_TYPE else UNKNOWN


def _linux_thunderbolt(link: Path) -> str:
    """Of a network service on a link to another host, with its speed per lane, as in `20.0 Gb/s`,
    and its lanes."""
    speed = re.match(r"([\d.]+) Gb/s", read_text(link / "rx_speed") or "")
    lanes = read_text(link / "rx_lanes") or ""
    if not speed or not lanes.isdecimal():
        return "Thunderbolt"
    gbits = float(speed[1]) * int(lanes)
    return "Thunderbolt 5" if gbits >= 80 else "Thunderbolt 4" if gbits == 40 else "Thunderbolt"


def _prefix(netmask: str | None) -> int:
    """The length of the prefix that a mask is, as in 255.255.255.0; 32 without one."""
    if not netmask:
        return 32
    return sum(int(part).bit_count() for part in netmask.split("."))
