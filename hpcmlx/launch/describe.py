"""What the hosts of a job are: chip, memory, bandwidth, interface, cores.

It stands behind `#` on a host's line of the host file, or in a YAML file beside it
(`hostfiles/macs.yaml` for `hostfiles/macs`). mpirun reads neither. `rankhosts.py` tells the ranks,
`mpirun.py` reads interfaces and cores from it, `jobs/doctor.py --write` writes one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpcmlx.errors import ConfigError
from hpcmlx.launch.chips import bandwidth_of
from hpcmlx.launch.hostfile import Host, is_host_name, parse_hostfile
from hpcmlx.launch.network import check_interface
from hpcmlx.units import parse_bytes

_BANDWIDTH = re.compile(r"(\d{1,6}(?:\.\d+)?) ?GB/s", re.ASCII)


@dataclass(frozen=True)
class Description:
    """What a host is; None for what is not said.

    Attributes:
        chip: as in "M3 Ultra".
        memory: of the whole host, in bytes.
        bandwidth: of its memory, in GB/s; that of the chip where only this is said.
        interface: what MPI is to use there: a name, or a network as in "10.0.1.0/24".
        cores: that ranks may use.
    """

    chip: str | None = None
    memory: int | None = None
    bandwidth: float | None = None
    interface: str | None = None
    cores: int | None = None


@dataclass(frozen=True)
class Cluster:
    """The hosts of a job.

    Attributes:
        source: the file that describes them, for messages.
        lines: of the host file; empty without one.
        hosts: name -> what it is; hosts that nobody describes are not in it.
    """

    source: str
    lines: tuple[Host, ...]
    hosts: Mapping[str, Description]

    @property
    def names(self) -> list[str]:
        """Of all hosts, each once."""
        return list(dict.fromkeys([line.name for line in self.lines] or self.hosts))


def read_cluster(hostfile: str | None, described: str | None = None) -> Cluster | None:
    """The host file with what is said of its hosts.

    Args:
        hostfile: `launch.hostfile`.
        described: `launch.hosts`; None for the YAML file beside the host file, if there is one.

    Returns:
        None where neither says what a host is.

    Raises:
        ConfigError: a file is wrong: with its line, and what would be right.
    """
    lines = tuple(parse_hostfile(hostfile)) if hostfile is not None else ()
    hosts: dict[str, Description] = {}
    for line in lines:
        if (found := parse_comment(line.comment, f"{hostfile}:{line.number}")) is None:
            continue
        if hosts.setdefault(line.name, found) != found:
            raise ConfigError(
                f"{hostfile}:{line.number}: {line.name} was something else on a line before"
            )
    path = described
    if path is None and hostfile is not None and Path(f"{hostfile}.yaml").exists():
        path = f"{hostfile}.yaml"
    if path is None:
        return Cluster(str(hostfile), lines, hosts) if hosts else None
    in_yaml = parse_description(path)
    known = {line.name for line in lines}
    for name, (_, number) in in_yaml.items():
        if name in hosts:
            raise ConfigError(
                f"{path}:{number}: {name} is also described in {hostfile}; keep one of the two"
            )
        if described is None and name not in known:
            raise ConfigError(
                f"{path}:{number}: {name} is not in {hostfile}, which has {', '.join(known)}"
            )
    hosts |= {name: description for name, (description, _) in in_yaml.items()}
    return Cluster(path, lines, hosts)


def parse_comment(comment: str, where: str) -> Description | None:
    """What the comment on a host's line says; None where it is a remark, which is one that does
    not begin with `key=`.

    Args:
        where: "file:line" for messages.

    Raises:
        ConfigError: an unknown key, a value that does not fit, a quote that does not end.
    """
    if not re.match(r"\s*[\w-]+=", comment):
        return None
    try:
        words = shlex.split(comment)
    except ValueError as error:
        raise ConfigError(f"{where}: {comment.strip()!a}: {str(error).lower()}") from None
    values: dict[str, tuple[str, str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(
                f'{where}: {word!a} is not key=value; a value with spaces needs quotes: chip="M4"'
            )
        if key in values:
            raise ConfigError(f"{where}: {key} is there twice")
        values[key] = (value, where)
    return _description(values, where)


def parse_description(path: str | Path) -> dict[str, tuple[Description, int]]:
    """Host name -> (what it is, its line), of a YAML file that maps names to keys and values.

    All values are text to the parser; nothing is ever constructed from a tag.

    Raises:
        ConfigError: not such a file: a tag, an anchor, a key that is there twice or not known.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            mark = f"{path}:{event.start_mark.line + 1 if event.start_mark else 1}"
            if (tag := getattr(event, "tag", None)) is not None:
                raise ConfigError(f"{mark}: tags ({tag}) are not read; write the plain value")
            if getattr(event, "anchor", None) is not None:
                raise ConfigError(f"{mark}: anchors (& and *) are not read; write it out")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    hosts: dict[str, tuple[Description, int]] = {}
    for name, node, number in _entries(root, path, "host names"):
        if not is_host_name(name):
            raise ConfigError(f"{path}:{number}: {name!a} is not a host name")
        values: dict[str, tuple[str, str]] = {}
        for key, value, at in _entries(node, path, f"the keys of {name}", number):
            if not isinstance(value, yaml.ScalarNode):
                raise ConfigError(f"{path}:{at}: {key} takes one value")
            values[key] = (value.value, f"{path}:{at}")
        hosts[name] = _description(values, f"{path}:{number}"), number
    if not hosts:
        raise ConfigError(f"{path} describes no host")
    return hosts


def _entries(
    node: Any, path: str | Path, what: str, number: int = 1
) -> Iterator[tuple[str, Any, int]]:
    """(key, value's node, line) of a mapping."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{number}: expected a mapping of {what}, as in `chip: M4 Max`")
    seen: dict[str, int] = {}
    for key, value in node.value:
        at = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{at}: a key is one word")
        if key.value in seen:
            raise ConfigError(
                f"{path}:{at}: {key.value} is there already on line {seen[key.value]}"
            )
        seen[key.value] = at
        yield key.value, value, at


def _description(values: Mapping[str, tuple[str, str]], where: str) -> Description:
    """Check texts, each given with its own place."""
    found: dict[str, Any] = {}
    for key, (text, at) in values.items():
        if key not in _READERS:
            raise ConfigError(f"{at}: unknown key {key!a} (valid: {', '.join(_READERS)})")
        found[key] = _READERS[key](text, at)
    chip, memory = found.get("chip"), found.get("memory")
    if chip is not None and "bandwidth" not in found:
        found["bandwidth"] = bandwidth_of(chip, memory)
        # Of what is no Mac nobody has to know it; a Mac's must not be lost by a slip of the pen.
        if found["bandwidth"] is None and re.match(r"(Apple )?M\d", chip):
            at = values["chip"][1]
            raise ConfigError(
                f"{at}: the memory bandwidth of {chip!a} is not known"
                + (" without its memory" if bandwidth_of(chip, 0) else "")
                + "; give bandwidth, as in 400GB/s"
            )
    if not found:
        raise ConfigError(f"{where}: nothing is said of the host (valid: {', '.join(_READERS)})")
    return Description(**found)


def _chip(text: str, where: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ConfigError(f"{where}: chip={text!a}: expected a name, as in M3 Ultra")
    return text.strip()


def _memory(text: str, where: str) -> int:
    if text.strip().isdecimal():
        raise ConfigError(f"{where}: memory={text}: expected a size with its unit, as in 512GiB")
    return parse_bytes(text, f"{where}: memory")


def _bandwidth(text: str, where: str) -> float:
    match = _BANDWIDTH.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{where}: bandwidth={text!a}: expected as in 819GB/s")
    return float(match[1])


def _interface(text: str, where: str) -> str:
    return check_interface(text, f"{where}: interface")


def _cores(text: str, where: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise ConfigError(f"{where}: cores={text!a}: expected a number from 1 on")
    return int(text)


_READERS: Mapping[str, Callable[[str, str], Any]] = {
    "chip": _chip,
    "memory": _memory,
    "bandwidth": _bandwidth,
    "interface": _interface,
    "cores": _cores,
}
