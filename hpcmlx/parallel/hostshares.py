"""Default shares and stage speeds where hosts differ: by memory bandwidth, within memory. Pure.

Decoding reads every weight once a token, so a rank is as fast as its host's memory. All replicas
have one layout, and all stages the same shares: a place in the layout counts for the weakest rank
that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from hpcmlx.errors import ConfigError
from hpcmlx.launch.placement import RankHost, RankHosts
from hpcmlx.parallel.partition import capped_shares
from hpcmlx.units import format_bytes

#: Of a host's memory that weights may take by default. Metal keeps 2/3 to 3/4 of a Mac's resident,
#: and caches need some, too.
USABLE = 0.75


@dataclass(frozen=True)
class Places:
    """What the ranks of a layout have.

    Attributes:
        source: the file that says so.
        hosts: names, [stage][tensor rank], of the first replica.
        speeds: [stage][tensor rank], GB/s; all 1 where the bandwidth of some host is not known.
        limits: likewise, bytes that weights may take; infinite where nothing is known.
        unknown: hosts whose bandwidth is not known.
    """

    source: str
    hosts: tuple[tuple[str, ...], ...]
    speeds: tuple[tuple[float, ...], ...]
    limits: tuple[tuple[float, ...], ...]
    unknown: tuple[str, ...] = ()

    @property
    def differ(self) -> bool:
        """Whether the layout should be uneven."""
        return len({speed for row in self.speeds for speed in row}) > 1


def find_places(hosts: RankHosts, pp: int, tp: int) -> Places:
    """The places of a layout.

    Args:
        hosts: of the whole world; the layout's replicas lie one behind the other.
    """
    unknown = tuple(dict.fromkeys(r.name for r in hosts.ranks if r.bandwidth is None))
    replicas = [hosts.ranks[i : i + pp * tp] for i in range(0, len(hosts.ranks), pp * tp)]

    def worst(value: Callable[[RankHost], float]) -> tuple[tuple[float, ...], ...]:
        flat = [min(value(replica[i]) for replica in replicas) for i in range(pp * tp)]
        return tuple(tuple(flat[stage * tp : (stage + 1) * tp]) for stage in range(pp))

    names = [rank.name for rank in hosts.ranks]
    return Places(
        hosts.source,
        tuple(tuple(names[stage * tp : (stage + 1) * tp]) for stage in range(pp)),
        worst(lambda rank: 1.0 if unknown else rank.bandwidth or 1.0),
        worst(lambda rank: inf if rank.memory is None else USABLE * rank.memory),
        unknown,
    )


def default_shares(places: Places, num_bytes: int) -> list[float]:
    """`parallel.tp_shares` where none are given: by bandwidth, within memory, as multiples of the
    smallest to two decimals, so that they can be given by hand.

    Args:
        num_bytes: of the whole model.

    Raises:
        ConfigError: the model does not fit.
    """
    check_room(places, num_bytes)
    weights = [sum(column) for column in zip(*places.speeds, strict=True)]
    room = [sum(column) / num_bytes for column in zip(*places.limits, strict=True)]
    shares = capped_shares(weights, room)
    return [round(share / min(shares), 2) for share in shares]


def check_room(places: Places, num_bytes: int) -> None:
    """
    Raises:
        ConfigError: all hosts of a replica together have no room for the weights.
    """
    room = sum(limit for row in places.limits for limit in row)
    if num_bytes > room:
        names = dict.fromkeys(name for row in places.hosts for name in row)
        raise ConfigError(
            f"the model's weights take {format_bytes(num_bytes)}, but {', '.join(names)} have room "
            f"for {format_bytes(room)} ({USABLE:.0%} of the memory in {places.source}): use more "
            "hosts, or weights of fewer bits"
        )


def stage_speeds(places: Places, shares: Sequence[float]) -> list[float]:
    """How fast each stage reads its weights, in GB/s: as fast as the last of its ranks is done."""
    parts = [share / sum(shares) for share in shares]
    return [min(s / p for s, p in zip(row, parts, strict=True)) for row in places.speeds]


def stage_limits(places: Places, shares: Sequence[float]) -> list[float]:
    """Bytes of weights that each stage has room for, all its tensor ranks together."""
    parts = [share / sum(shares) for share in shares]
    return [min(m / p for m, p in zip(row, parts, strict=True)) for row in places.limits]


def say_shares(places: Places, shares: Sequence[float]) -> str:
    """One phrase: which shares were taken, and why."""
    ratio = ":".join(f"{share:g}" if share % 1 else f"{share:.1f}" for share in shares)
    columns = list(zip(*places.speeds, strict=True))
    same = all(len(set(column)) == 1 for column in columns)
    weights = [sum(column) for column in columns]
    free = [round(weight / min(weights), 2) for weight in weights]
    room = zip(*places.limits, strict=True)
    within = ", ".join(format_bytes(sum(column)) if sum(column) < inf else "any" for column in room)
    bound = "" if list(shares) == free else f", within memory for {within} of weights"
    told = [f"{c[0]:g}" if same else "+".join(f"{s:g}" for s in c) for c in columns]
    return f"tp shares {ratio} from {places.source}: {_gb_per_second(told)}{bound}"


def say_layers(places: Places, layers: Sequence[int]) -> str:
    """The same for stages."""
    rows = places.speeds
    told = ["+".join(f"{speed:g}" for speed in row) for row in rows]
    counts = "+".join(map(str, layers))
    return f"pp layers {counts} from {places.source}: {_gb_per_second(told)}"


def _gb_per_second(told: Sequence[str]) -> str:
    return f"{', '.join(told[:-1])}{' and ' if told[1:] else ''}{told[-1]} GB/s"
