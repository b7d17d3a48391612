"""The doctor's findings for people: a table where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcmlx.doctor.facts import Facts
from hpcmlx.doctor.findings import Finding
from hpcmlx.units import format_bytes

UNKNOWN = "unknown"
_SERIOUS, _WORTH_KNOWING = "PROBLEM", "note"


def show(hosts: Sequence[Facts], findings: Sequence[Finding], console: Console) -> None:
    """Print both."""
    if console.is_terminal and not console.is_dumb_terminal:
        _show_table(hosts, console)
    else:
        for line in plain_lines(hosts):
            console.print(Text(line), soft_wrap=True)
    console.print()
    for finding in findings:
        word = _SERIOUS if finding.serious else _WORTH_KNOWING
        style = "bold red" if finding.serious else "yellow"
        text = Text.assemble((word, style), f"  {finding}")
        console.print(text, soft_wrap=True)
    if not any(finding.serious for finding in findings):
        console.print(Text("no problem found", style="bold green"))


def plain_lines(hosts: Sequence[Facts]) -> list[str]:
    """One line for what is the same on all hosts, else one for each host."""
    width = max(len(label) for label, _ in ROWS)
    lines = [f"{'host':{width}}  {', '.join(host.host for host in hosts)}"]
    for label, value in ROWS:
        values = [value(host) for host in hosts]
        if len(set(values)) == 1:
            lines.append(f"{label:{width}}  {values[0]}")
            continue
        for host, text in zip(hosts, values, strict=True):
            lines.append(f"{label:{width}}  {host.host}: {text}")
    return lines


def _show_table(hosts: Sequence[Facts], console: Console) -> None:
    table = Table()
    table.add_column("")
    for host in hosts:
        table.add_column(Text(host.host), overflow="fold")
    for label, value in ROWS:
        values = [value(host) for host in hosts]
        differs = len(set(values)) > 1
        style = "yellow" if differs and label not in _OF_EACH else ""
        table.add_row(Text(label), *(Text(text, style=style) for text in values))
    console.print(table)


def _bytes(count: int | None) -> str:
    return UNKNOWN if count is None else format_bytes(count)


def _yes_no(value: bool | None) -> str:
    return UNKNOWN if value is None else "yes" if value else "no"


def _wired(host: Facts) -> str:
    if host.gpu_bytes is None and host.wired_limit_bytes is None:
        return "no Metal GPU" if host.device == "cpu" else UNKNOWN
    chosen = {None: "", 0: ", chosen by macOS"}.get(host.wired_limit_bytes, ", set by hand")
    return f"{_bytes(host.gpu_bytes or host.wired_limit_bytes)}{chosen}"


def _mlx(host: Facts) -> str:
    version = host.versions.get("mlx", UNKNOWN)
    tags = f" ({', '.join(host.wheel)})" if host.wheel else ""
    return f"{version}{tags}, device {host.device}"


def _clock(host: Facts) -> str:
    if host.skew is None:
        return "the only host"
    return f"{host.skew * 1e3:+.1f} ms (± {(host.skew_error or 0) * 1e3:.1f})"


def _interfaces(host: Facts) -> str:
    if not host.links:
        return "none: one host"
    used = sorted({(tuple(names), peer) for peer, names in host.links.items()})
    parts = []
    for names, group in groupby(used, key=lambda pair: pair[0]):
        through = ", ".join(f"{name} ({host.kind_of(name)})" for name in names) or UNKNOWN
        parts.append(f"to {', '.join(peer for _, peer in group)}: {through}")
    return "; ".join(parts)


def _sockets(host: Facts) -> str:
    if not host.sockets:
        return "not tried: one host"
    return "; ".join(f"to {peer}: {verdict}" for peer, verdict in host.sockets.items())


def _rdma(host: Facts) -> str:
    state = {None: "no rdma_ctl here", True: "on", False: "off"}[host.rdma.enabled]
    return f"{state}{''.join(f', {device}' for device in host.rdma.devices)}"


def _thunderbolt(host: Facts) -> str:
    plugged = [port for port in host.ports if port.connected]
    if not plugged:
        return "nothing plugged in" if host.ports else "no ports known"
    return ", ".join(
        f"{port.receptacle}: {port.gbits or UNKNOWN} Gb/s{' to a host' if port.peer else ''}"
        f"{f' through {port.through}' if port.through else ''}"
        for port in plugged
    )


def _waiting(host: Facts) -> str:
    if host.wait_share is None or host.barrier_seconds is None:
        return "one rank: nobody to wait for"
    return f"{host.wait_share:.0%} of a core; a barrier takes {host.barrier_seconds * 1e6:.0f} µs"


ROWS: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("system", lambda h: h.system or UNKNOWN),
    ("chip", lambda h: ", ".join(filter(None, (h.chip, h.model))) or UNKNOWN),
    ("memory", lambda h: _bytes(h.memory_bytes)),
    ("GPU wired limit", _wired),
    ("ranks on cores", lambda h: f"{h.ranks} on {h.cores}"),
    ("Python", lambda h: f"{h.python} ({h.interpreter})"),
    ("hpcmlx", lambda h: f"{h.versions.get('hpcmlx', UNKNOWN)}, source {h.source}"),
    ("MLX", _mlx),
    ("mlx-lm", lambda h: h.versions.get("mlx-lm", UNKNOWN)),
    ("JACCL in the wheel", lambda h: _yes_no(h.jaccl)),
    ("neural accelerators", lambda h: _yes_no(h.accelerators)),
    ("MPI", lambda h: f"{h.mpi or UNKNOWN} ({h.libmpi})"),
    ("BLAS", lambda h: h.blas),
    ("Thunderbolt ports", _thunderbolt),
    ("RDMA", _rdma),
    ("between hosts", _interfaces),
    ("sockets", _sockets),
    ("clock", _clock),
    ("free for runs", lambda h: _bytes(h.free_bytes)),
    ("waiting", _waiting),
)
# Measured, or different by nature.
_OF_EACH = {"clock", "free for runs", "waiting", "between hosts", "sockets", "Thunderbolt ports"}
