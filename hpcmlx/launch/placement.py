"""Which host each rank is on, among those of a host file and its description. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hpcmlx.launch.describe import Cluster, Description


@dataclass(frozen=True)
class Seat:
    """Where a rank finds itself.

    Attributes:
        hostname: what the host calls itself.
        addresses: its IPv4 addresses.
    """

    hostname: str
    addresses: tuple[str, ...] = ()

    def is_on(self, name: str) -> bool:
        """Whether this host is the one that a host file calls `name`."""
        if name in ("localhost", self.hostname) or name in self.addresses:
            return True
        is_address = name.replace(".", "").isdecimal()
        return not is_address and name.partition(".")[0] == self.hostname.partition(".")[0]


@dataclass(frozen=True)
class RankHost:
    """What a rank has of its host: ranks on one host share it equally.

    Attributes:
        name: of the host.
        bandwidth: GB/s.
        memory: bytes.
    """

    name: str
    bandwidth: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class RankHosts:
    """What all ranks have.

    Attributes:
        source: the file that says so.
        ranks: one entry per rank of the world.
    """

    source: str
    ranks: tuple[RankHost, ...]


def rank_names(cluster: Cluster, seats: Sequence[Seat]) -> list[str] | None:
    """The host of each rank: by the name or address of the host it is on; where that does not tell
    (an alias, two names of one host), by the order in which mpirun fills the host file's slots.

    Returns:
        None where neither tells.
    """
    hits = [[name for name in cluster.names if seat.is_on(name)] for seat in seats]
    if all(len(names) == 1 for names in hits):
        return [names[0] for names in hits]
    order = fill(cluster, len(seats))
    if order is None:
        return None
    sure = [(names[0], name) for names, name in zip(hits, order, strict=True) if len(names) == 1]
    return order if all(found == name for found, name in sure) else None


def fill(cluster: Cluster, num_ranks: int) -> list[str] | None:
    """The host of each rank where mpirun fills the lines of the host file one after the other.

    Returns:
        None where a line that is needed says neither `slots` nor the cores of its host.
    """
    order: list[str] = []
    times = Counter(line.name for line in cluster.lines)
    for name, count in times.items():
        # A host that is there several times has a slot for each, and they are filled together.
        slots = next(line.slots for line in cluster.lines if line.name == name)
        slots = slots or (count if count > 1 else cluster.hosts.get(name, Description()).cores)
        if len(order) < num_ranks and slots is None:
            return None
        order += [name] * (slots or 0)
    return order[:num_ranks] if len(order) >= num_ranks else None


def share(cluster: Cluster, names: Sequence[str]) -> RankHosts:
    """What each rank has of its host.

    Args:
        names: of `rank_names`.
    """
    here = Counter(names)
    ranks = []
    for name in names:
        known, count = cluster.hosts.get(name, Description()), here[name]
        ranks.append(
            RankHost(
                name,
                None if known.bandwidth is None else known.bandwidth / count,
                None if known.memory is None else known.memory / count,
            )
        )
    return RankHosts(cluster.source, tuple(ranks))


def crowded(cluster: Cluster, num_ranks: int) -> list[str]:
    """Hosts with more ranks than cores, of those whose cores are known."""
    counts = Counter(fill(cluster, num_ranks) or ())
    cores = {name: cluster.hosts.get(name, Description()).cores for name in counts}
    return [name for name, count in counts.items() if count > (cores[name] or count)]
