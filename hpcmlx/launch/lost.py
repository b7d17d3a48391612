"""Which hosts are gone, when mpirun says that it has lost one."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

#: mpirun's exit code where the ssh connection to a host's daemon broke, which no job ends with.
#: Where it first notices that the daemon's own connection did, it ends with 0.
SSH_BROKE = 255
_SSH = 22
_CONNECT_SECONDS = 2.0


def silent(hosts: Sequence[str]) -> list[str]:
    """Those of the hosts that do not answer: without power, network or route."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        answers = list(pool.map(_answers, hosts))
    return [host for host, answer in zip(hosts, answers, strict=True) if not answer]


def describe(hosts: Sequence[str]) -> str:
    """What has happened to a job that was not complete when mpirun ended with 0 or `SSH_BROKE`.

    Args:
        hosts: of the job, but for this one.

    Returns:
        What mpirun has done, as the rest of a sentence.
    """
    gone = silent(hosts)
    if gone:
        verb = "does" if len(gone) == 1 else "do"
        return (
            f"lost {', '.join(gone)}, which {verb} not answer any more: look at power, cable and "
            "network"
        )
    return (
        "lost a host, which it names above (`Remote host` or `Remote daemon`); all hosts answer now"
    )


def _answers(host: str) -> bool:
    try:
        socket.create_connection((host, _SSH), _CONNECT_SECONDS).close()
    except ConnectionRefusedError:  # ssh is on another port: somebody has said so
        return True
    except OSError:
        return False
    return True
