"""One visit of the doctor: all hosts asked, compared, shown and written down."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from rich.console import Console

from hpcmlx import comm
from hpcmlx.comm import Communicator
from hpcmlx.doctor.description import write_description
from hpcmlx.doctor.facts import Facts
from hpcmlx.doctor.findings import Finding, examine, socket_fix
from hpcmlx.doctor.table import show
from hpcmlx.doctor.together import WORKS, gather, try_connect
from hpcmlx.errors import ConfigError, ExitCode, OutputError
from hpcmlx.files import write_atomic
from hpcmlx.launch.hostfile import names_of_this_host, parse_hostfile
from hpcmlx.rundir import make_run_dir, reserve_run_dir

REPORT = "doctor.json"


def visit(
    world: Communicator,
    run_dir: str | None,
    console: Console | None = None,
    *,
    description: str | None = None,
    hostfile: str | None = None,
) -> ExitCode:
    """Ask all hosts, print what they are and what is wrong, write `doctor.json`. Collective.

    Args:
        run_dir: where the report goes; None for a new directory under `runs`.
        description: YAML file to write for `launch.hosts`, with what the hosts are.
        hostfile: whose names the hosts have in it; None: those that they give themselves.

    Returns:
        `ExitCode.CONFIG` where something serious was found.

    Raises:
        OutputError: the directory or the report cannot be made, or the description is there.
        ConfigError: it cannot be told which host is which in the host file.
    """
    place = None
    if world.rank == 0:
        if description and os.path.lexists(description):
            raise OutputError(f"{description} is there already: remove it, or write another")
        layout = f"ranks{world.size}"
        place = make_run_dir(run_dir) if run_dir else reserve_run_dir("doctor", layout)
    place = world.bcast(place)
    hosts = gather(world, place)
    findings = examine(hosts)
    if world.rank == 0:
        show(hosts, findings, console or Console())
        write_atomic(place / REPORT, to_json(hosts, findings))
        print(f"\n{place / REPORT}", file=sys.stderr)
        if description:
            write_atomic(description, write_description(hosts, hostfile).encode())
            print(description, file=sys.stderr)
    serious = any(finding.serious for finding in findings)
    return ExitCode.CONFIG if serious else ExitCode.OK


def check_connections(hostfile: str) -> None:
    """Whether this interpreter can connect to the hosts of a host file. Before MPI: it would hang
    where macOS refuses its connections.

    Raises:
        ConfigError: a host cannot be reached, or the file cannot be read.
    """
    if os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0") != "0":
        return
    here = names_of_this_host()
    names = list(dict.fromkeys(host.name for host in parse_hostfile(hostfile)))
    others = [name for name in names if name not in here]
    with ThreadPoolExecutor(max_workers=16) as pool:
        verdicts = dict(zip(others, pool.map(try_connect, others), strict=True))
    bad = {name: verdict for name, verdict in verdicts.items() if verdict != WORKS}
    for name, verdict in bad.items():
        raise ConfigError(
            f"{sys.executable} on {comm.hostname()} cannot connect to {name} ({verdict}); "
            f"{socket_fix(verdict, sys.platform == 'darwin')}"
        )


def to_json(hosts: Sequence[Facts], findings: Sequence[Finding]) -> bytes:
    """The report as it is kept."""
    report = {
        "hosts": [host.to_dict() for host in hosts],
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(report, indent=2).encode() + b"\n"
