"""Open MPI host files: which hosts, how many ranks on each. Read here only to refuse what is wrong
before anything starts, with its line; mpirun reads the file itself. What the comments say of the
hosts is for `describe.py`."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpcmlx.errors import ConfigError

# RFC 1123: labels of letters, digits and inner hyphens. IPv4 addresses fit; a leading hyphen, which
# ssh would take for an option, and whatever a shell could read do not.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\Z")
_OPTIONS = {"slots": "slots", "max_slots": "max_slots", "max-slots": "max_slots"}


@dataclass(frozen=True)
class Host:
    """One line of a host file.

    Attributes:
        name: host name or IPv4 address.
        slots: ranks it takes; None where the line does not say: as many as it has cores.
        comment: what follows `#` on the line.
        number: of the line.
    """

    name: str
    slots: int | None = None
    comment: str = field(default="", compare=False)
    number: int = field(default=0, compare=False)


def is_host_name(name: str) -> bool:
    """Whether `name` is a host name or an IPv4 address, safe to hand to ssh."""
    return _NAME.match(name) is not None


def parse_hostfile(path: str | Path) -> list[Host]:
    """The hosts of an Open MPI host file, in the order in which ranks fill them.

    Raises:
        ConfigError: the file cannot be read, a line is not `name slots=N`, or there is no host.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launch.hostfile={path} cannot be read: {error}") from error
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        text_of_host, _, comment = line.partition("#")
        if words := text_of_host.split():
            host = _parse_line(words, f"{path}:{number}")
            for other in hosts:
                if other.name == host.name and (other.slots or host.slots):
                    raise ConfigError(
                        f"{path}:{number}: {host.name} is there already on line {other.number}; "
                        "mpirun wants one line with all its slots"
                    )
            hosts.append(replace(host, comment=comment, number=number))
    if not hosts:
        raise ConfigError(f"{path} names no host; a line is `name slots=N`")
    return hosts


def names_of_this_host() -> set[str]:
    """Those by which a host file may mean the host that reads it."""
    name = socket.gethostname()
    return {"localhost", "127.0.0.1", name, name.partition(".")[0]}


def total_slots(hosts: list[Host]) -> int | None:
    """Ranks that fit on the hosts together; None where a host leaves it to its cores."""
    if any(host.slots is None for host in hosts):
        return None
    return sum(host.slots or 0 for host in hosts)


def _parse_line(words: list[str], where: str) -> Host:
    name, slots = words[0], None
    if not is_host_name(name):
        raise ConfigError(f"{where}: {name!a} is not a host name (letters, digits, hyphens, dots)")
    seen: dict[str, int] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key not in _OPTIONS or not equals:
            raise ConfigError(f"{where}: {word!a} is not understood; a line is `name slots=N`")
        if not re.fullmatch(r"[0-9]{1,6}", value) or int(value) == 0:
            raise ConfigError(f"{where}: {word!a}: the number of slots must be at least 1")
        seen[_OPTIONS[key]] = int(value)
    slots = seen.get("slots")
    if slots is not None and slots > seen.get("max_slots", slots):
        raise ConfigError(f"{where}: slots={slots} is more than max_slots={seen['max_slots']}")
    return Host(name, slots)
