"""What a pair of ranks, and all of them together, can send in what time.

Times are of the monotonic clock. Whoever has nothing to do meanwhile sleeps: ranks that share cores
would otherwise be measured waiting for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import mlx.core as mx
import numpy as np

from hpcmlx.comm import Communicator
from hpcmlx.comm.bare import BareMPI

#: Bytes that each rank gives to a collective.
SIZES = (8, 64, 512, 4 << 10, 32 << 10, 256 << 10, 2 << 20, 16 << 20, 64 << 20)
_SMALL = 8
_LARGEST = 64 << 20
_WARM_UP = 5
#: A single large message shall take this long, so that what comes at once (a shaper's bucket, a
#: socket's buffer) does not count much.
_LARGE_SECONDS = 0.05
#: Calls between two looks at the clock take this long, so that the barrier does not count much.
_BETWEEN_SECONDS = 3e-3

#: Does so many calls in a row.
Calls = Callable[[int], None]


def quartiles(samples: np.ndarray) -> np.ndarray:
    """Lower quartile, median and upper quartile, [3]."""
    return np.percentile(samples, (25, 50, 75))


def ping_pong(bare: BareMPI, peer: int, first: bool, seconds: float) -> np.ndarray:
    """Seconds one way of a small message, half a round trip each, [samples].

    Args:
        first: whether this rank sends first; the other's samples include its waiting for the start.
        seconds: to spend on it.
    """
    data = np.zeros(_SMALL, np.uint8)

    def round_trip() -> float:
        began = perf_counter()
        if first:
            bare.send(data, peer)
        bare.recv(data, peer)
        if not first:
            bare.send(data, peer)
        return perf_counter() - began

    trial = [round_trip() for _ in range(2 * _WARM_UP)][_WARM_UP:]
    count = _agree(bare, peer, first, np.clip(seconds / np.median(trial), 20, 5000))
    return np.array([round_trip() for _ in range(count)]) / 2


def stream(bare: BareMPI, peer: int, sends: bool, seconds: float) -> np.ndarray:
    """Bytes per second of large messages one way, each of them acknowledged, [samples]; at the
    receiver they are those of the sender.

    Args:
        seconds: to spend on it.
    """
    acknowledged = np.zeros(1, np.uint8)

    def message(buffer: np.ndarray) -> float:
        began = perf_counter()
        if sends:
            bare.send(buffer, peer)
            bare.recv(acknowledged, peer)
        else:
            bare.recv(buffer, peer)
            bare.send(acknowledged, peer)
        return perf_counter() - began

    num_bytes = 256 << 10
    while True:
        buffer = np.zeros(num_bytes, np.uint8)
        took = message(buffer)
        enough = took >= _LARGE_SECONDS or num_bytes >= _LARGEST
        if _agree(bare, peer, sends, enough):
            break
        num_bytes *= 4
    count = _agree(bare, peer, sends, np.clip(seconds / took, 3, 20))
    rates = num_bytes / np.array([message(buffer) for _ in range(count)])
    if sends:
        bare.send(rates, peer)
    else:
        bare.recv(rates, peer)
    return rates


def pair(
    bare: BareMPI, peer: int, first: bool, seconds: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One way seconds, and bytes per second from the first to the second and back; the same
    numbers of rank order on both sides, the first's latency."""
    latency = ping_pong(bare, peer, first, seconds)
    return latency, stream(bare, peer, first, seconds), stream(bare, peer, not first, seconds)


def curve(
    world: Communicator,
    bare: BareMPI,
    prepare: Callable[[int], Calls],
    sizes: Sequence[int],
    seconds: float,
) -> np.ndarray:
    """Seconds of one call of a collective over sizes, of the slowest rank: lower quartile, median,
    upper quartile, [sizes, 3]. Collective.

    Args:
        prepare: gives the calls for a size in bytes.
        sizes: growing. The first whose call would take twice `seconds`, and all after it, are left
            out: NaN.
        seconds: to spend on each size.
    """
    found = np.full((len(sizes), 3), np.nan)
    last = 0.0
    for i, size in enumerate(sizes):
        if i and last * size / sizes[i - 1] > 2 * seconds and size > 1 << 20:
            break
        calls = prepare(size)
        calls(1)
        trial = _slowest(world, bare, calls, 1)
        number = int(np.clip(_BETWEEN_SECONDS / trial, 1, 100))
        count = int(np.clip(seconds / (number * trial), 3, 30))
        found[i] = quartiles(np.array([_slowest(world, bare, calls, number) for _ in range(count)]))
        last = found[i, 1]
    return found


def collectives(
    world: Communicator, bare: BareMPI, graph: dict[str, Communicator]
) -> dict[str, Callable[[int], Calls]]:
    """What there is to measure: name ("all_reduce mlx") -> how to prepare a size.

    Args:
        graph: names of MLX's back ends -> the ranks with its group.
    """
    found: dict[str, Callable[[int], Calls]] = {
        "all_reduce mpi4py": lambda size: _all_reduce(bare, size),
        "all_gather mpi4py": lambda size: _all_gather(bare, size, world.size),
    }
    for name, group in graph.items():
        found[f"all_reduce {name}"] = partial(_graph_all_reduce, group)
        found[f"all_gather {name}"] = partial(_graph_all_gather, group)
    return found


def _all_reduce(bare: BareMPI, size: int) -> Calls:
    buffer = np.zeros(size // 4, np.float32)

    def calls(number: int) -> None:
        for _ in range(number):
            bare.all_sum(buffer)

    return calls


def _all_gather(bare: BareMPI, size: int, num_ranks: int) -> Calls:
    buffer, out = np.zeros(size, np.uint8), np.zeros(size * num_ranks, np.uint8)

    def calls(number: int) -> None:
        for _ in range(number):
            bare.all_gather(buffer, out)

    return calls


def _graph_all_reduce(group: Communicator, size: int) -> Calls:
    """One after the other in one graph, as the layers of a model have them."""
    start = mx.zeros(size // 4, mx.float32)

    def calls(number: int) -> None:
        x = start
        for _ in range(number):
            x = group.all_sum(x)
        mx.eval(x)

    return calls


def _graph_all_gather(group: Communicator, size: int) -> Calls:
    start = mx.zeros(size // 4, mx.float32)

    def calls(number: int) -> None:
        x = start
        for _ in range(number):
            x = group.all_gather(x)[: size // 4]
        mx.eval(x)

    return calls


def _slowest(world: Communicator, bare: BareMPI, calls: Calls, number: int) -> float:
    """Seconds of one of `number` calls, on the rank on which they took longest."""
    bare.barrier()
    began = perf_counter()
    calls(number)
    return max(world.allgather(perf_counter() - began)) / number


def _agree(bare: BareMPI, peer: int, decides: bool, value: float) -> int:
    """What the rank that decides has found, on both."""
    number = np.array([value], np.int64)
    if decides:
        bare.send(number, peer)
    else:
        bare.recv(number, peer)
    return int(number[0])
