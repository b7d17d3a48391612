"""Which link is slow: a host that is slow to everybody, or one pair of hosts. Pure.

The rest is compared with what a host in the middle has, so that neither one slow host among three,
whose links are two thirds of all, nor one very fast cable decides what is usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

#: Slow is less than this share of what is usual. Hosts of one kind differ by less.
SLOW_SHARE = 0.5
#: Late is so many times later than usual; waiting hosts that are busy otherwise stay below.
LATE_TIMES = 5.0
_PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 10: "a tenth", 20: "a twentieth"}


@dataclass(frozen=True)
class Slow:
    """A host all of whose links are slow or late, or a pair whose link is.

    Attributes:
        host: its number; of a pair the first.
        peers: the hosts at the other ends of the slow links.
        what: "bandwidth" or "latency".
        value: bytes per second or seconds: of a host, its best link.
        usual: what is usual among the hosts, likewise.
        way: "sending" or "receiving" where only that is slow.
    """

    host: int
    peers: tuple[int, ...]
    what: str
    value: float
    usual: float
    way: str = ""


def slow_links(latency: np.ndarray, bandwidth: np.ndarray) -> list[Slow]:
    """The slow hosts and, beside them, the slow pairs; nothing where there are fewer than three
    hosts, of which none is usual.

    Args:
        latency: seconds one way, [hosts, hosts]; NaN where it was not measured.
        bandwidth: bytes per second from row to column, likewise.
    """
    if len(bandwidth) < 3:
        return []
    found = list(_below(bandwidth, "bandwidth", 1 / SLOW_SHARE))
    slow = {(s.host, s.peers) for s in found}
    late = list(_below(1 / latency, "latency", LATE_TIMES))
    # What is slow is late as well, so that says nothing new.
    late = [s for s in late if (s.host, s.peers) not in slow]
    return found + [Slow(s.host, s.peers, s.what, 1 / s.value, 1 / s.usual) for s in late]


def describe(slow: Slow, hosts: Sequence[str], kinds: Sequence[str]) -> str:
    """One line: who, how slow, what the others have, and what to look at.

    Args:
        kinds: of each host's link, as in "Thunderbolt 4"; "" where not known.
    """
    pair = len(slow.peers) == 1
    name, others = hosts[slow.host], [hosts[peer] for peer in slow.peers]
    if slow.what == "latency":
        word, value, usual = "late", _seconds(slow.value), _seconds(slow.usual)
        compared = f"{slow.value / slow.usual:.0f} times that"
    else:
        word = f"slow in {slow.way}" if slow.way else "slow"
        value, usual = format_rate(slow.value), format_rate(slow.usual)
        compared = _part(slow.usual / slow.value)
    if pair:
        said = f"the link {name} - {others[0]} is {word}: {value}, others have {usual}"
    else:
        peers = "all others" if len(others) > 3 else f"{', '.join(others[:-1])} and {others[-1]}"
        said = f"{name} is {word}: {value} to {peers}, the others have {usual}"
    return f"{said} ({compared}): {_advice(slow, kinds)}"


def format_rate(bytes_per_second: float) -> str:
    """As in "118 MB/s" or "6.2 GB/s"."""
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.1f} GB/s"
    return f"{bytes_per_second / 1e6:.{0 if bytes_per_second >= 1e7 else 1}f} MB/s"


def _below(speed: np.ndarray, what: str, times: float) -> Iterator[Slow]:
    """Hosts and pairs whose speed, times `times`, stays below what is usual."""
    num_hosts = len(speed)
    apart = np.where(np.eye(num_hosts, dtype=bool), np.nan, speed)
    both = np.fmin(apart, apart.T)  # the slower direction counts
    best = np.array([np.nanmax(row, initial=0.0) for row in both])
    usual = float(np.sort(best)[::-1][(num_hosts - 1) // 2])
    slow = np.flatnonzero(best * times < usual)
    for host in slow:
        peers = tuple(int(peer) for peer in np.flatnonzero(np.isfinite(both[host])))
        out, into = np.nanmax(apart[host], initial=0), np.nanmax(apart[:, host], initial=0)
        way = "sending" if out * times < into else "receiving" if into * times < out else ""
        yield Slow(int(host), peers, what, float(best[host]), usual, way)
    for low in range(num_hosts):
        for high in range(low + 1, num_hosts):
            if both[low, high] * times < usual and not {low, high} & set(slow):
                yield Slow(low, (high,), what, float(both[low, high]), usual)


def _advice(slow: Slow, kinds: Sequence[str]) -> str:
    """What the kinds of the links say about it."""
    own = kinds[slow.host]
    ends = {slow.host, *slow.peers} if len(slow.peers) == 1 else {slow.host}
    rest = {kind for i, kind in enumerate(kinds) if i not in ends and kind}
    usual = ", ".join(sorted(rest))
    if "Wi-Fi" in own:
        return "it is on Wi-Fi: plug in a cable"
    if "Thunderbolt 5" in usual and "Thunderbolt 5" not in own:
        kind = own or "something else"
        return f"it is on {kind}, the others on {usual}: use a Thunderbolt 5 cable and port"
    if own and rest and rest != {own}:
        return f"it is on {own}, the others on {usual}"
    if own == "Thunderbolt 5":
        return "a Thunderbolt 4 cable in between? see jobs/doctor.py"
    return "look at its cable, port and switch; see jobs/doctor.py"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


def _part(times: float) -> str:
    """A tenth, for 10.4."""
    nearest = min(_PARTS, key=lambda n: abs(n - times))
    if abs(nearest - times) <= 0.12 * nearest:
        return _PARTS[nearest]
    return f"1/{times:.0f}" if times >= 10 else f"1/{times:.1f}"
