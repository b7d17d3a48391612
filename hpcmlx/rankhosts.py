"""Tells every rank what the hosts of all ranks are; called by `job.py`."""

from __future__ import annotations

import logging
import socket

import psutil

from hpcmlx.comm import Communicator, hostname
from hpcmlx.launch.describe import read_cluster
from hpcmlx.launch.placement import RankHosts, Seat, rank_names, share
from hpcmlx.settings import LaunchConfig

_log = logging.getLogger(__name__)


def describe_ranks(launch: LaunchConfig, world: Communicator) -> RankHosts | None:
    """What each rank has of its host, from the files that `launch` names: rank 0 reads them.
    Collective.

    Returns:
        None where nothing is said of the hosts, or it cannot be told which rank is on which.

    Raises:
        ConfigError: a file is wrong.
    """
    seats = world.allgather(Seat(hostname(), _addresses()))
    found: RankHosts | None = None
    if world.rank == 0:
        cluster = read_cluster(launch.hostfile, launch.hosts)
        names = None if cluster is None else rank_names(cluster, seats)
        if cluster is not None and names is None:
            here = ", ".join(dict.fromkeys(seat.hostname for seat in seats))
            _log.warning(
                "%s describes %s, but the ranks are on %s and slots do not tell which is which: "
                "hosts count as alike",
                cluster.source,
                ", ".join(cluster.names),
                here,
            )
        elif cluster is not None and names is not None:
            found = share(cluster, names)
    return world.bcast(found)


def _addresses() -> tuple[str, ...]:
    entries = [entry for some in psutil.net_if_addrs().values() for entry in some]
    return tuple(entry.address for entry in entries if entry.family == socket.AF_INET)
