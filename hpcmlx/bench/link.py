"""`jobs/bench.py link`: what the links between the hosts of a host file can do, and which is slow.

Pairs of hosts are measured one after the other, between the first ranks of both, while all other
ranks sleep: no two pairs share a switch, a daisy chain of cables or a core at the same time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import NoReturn

import numpy as np
from rich.console import Console

from hpcmlx import comm, jaccl
from hpcmlx.bench import link_measure, link_picture, link_table
from hpcmlx.bench.link_file import FILE, Links, write_links
from hpcmlx.comm import Communicator, run_tool
from hpcmlx.comm.bare import BareMPI
from hpcmlx.doctor.facts import Facts, collect, from_dict
from hpcmlx.doctor.together import host_addresses, links, meet
from hpcmlx.errors import UsageError
from hpcmlx.extras import require
from hpcmlx.files import write_atomic
from hpcmlx.rundir import make_run_dir, reserve_run_dir

#: What each rank measured: (host, host) -> latency (best, lower quartile, median, upper), bandwidth
#: there and back (lower quartile, median, upper).
Pairs = dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def run(run_dir: str | None, seconds: float) -> NoReturn:
    """Measure, print and keep it; ends the process.

    Args:
        run_dir: where `link.h5` and the pictures go; None for a new directory under `runs`.
        seconds: to spend on each number.
    """
    run_tool("bench", lambda world: _run(world, run_dir, seconds))


def _run(world: Communicator, run_dir: str | None, seconds: float) -> int:
    if world.size == 1:
        raise UsageError("a link has two ends: mpirun -hostfile FILE python jobs/bench.py link")
    if world.rank == 0:
        require("matplotlib", "plot", "a picture of the links", "measure on a host that has it")
    place = None
    if world.rank == 0:
        made = make_run_dir(run_dir) if run_dir else None
        place = made or reserve_run_dir("link", f"ranks{world.size}")
    place = world.bcast(place)
    found = measure(world, place, seconds)
    if world.rank == 0:
        write_links(place / FILE, found)
        write_atomic(place / "link.png", link_picture.draw(found))
        link_table.show(found, Console())
        print(f"\n{place / FILE}", file=sys.stderr)
    return 0


def measure(world: Communicator, run_dir: Path, seconds: float) -> Links:
    """All pairs of hosts and all collectives; the same on all ranks. Collective.

    Args:
        run_dir: whose file system the facts of this host are about.
    """
    facts = _facts(world, run_dir)
    ranks_of = world.allgather(comm.hostname())
    hosts = list(dict.fromkeys(ranks_of))
    bare = BareMPI(world)
    mine = _pairs(world, bare, hosts, ranks_of, seconds)
    pairs = {key: value for part in world.allgather(mine) for key, value in part.items()}
    graph = {"mlx": world}
    matrix, reason = _jaccl(world, facts)
    if matrix is not None:
        graph["jaccl"] = world.with_graph(jaccl.boot(world, matrix, comm.start_backend))
    curves = {
        name: link_measure.curve(world, bare, prepare, link_measure.SIZES, seconds)
        for name, prepare in link_measure.collectives(world, bare, graph).items()
    }
    bare.close()
    about = _about(facts[0], reason)
    kinds = [_kind(f) for f in facts]
    return _assemble(hosts, [ranks_of.count(h) for h in hosts], kinds, pairs, curves, about)


def _facts(world: Communicator, run_dir: Path) -> list[Facts]:
    """Of each host, in the order of their first ranks. Collective."""
    facts = collect(run_dir)
    hosts = world.allgather(facts.host)
    addresses = dict(zip(hosts, world.allgather(host_addresses(facts)), strict=True))
    meet(world)  # connections that are not there tell no interface
    facts.links = links(facts, addresses)
    found = [from_dict(values) for values in world.allgather(facts.to_dict())]
    return [found[hosts.index(host)] for host in dict.fromkeys(hosts)]


def _pairs(
    world: Communicator,
    bare: BareMPI,
    hosts: Sequence[str],
    ranks_of: Sequence[str],
    seconds: float,
) -> Pairs:
    """What this rank has measured as the first of a pair. Collective."""
    mine: Pairs = {}
    for low, high, first, second in _schedule(hosts, ranks_of):
        bare.sleep_until_all()
        if world.rank in (first, second):
            peer = second if world.rank == first else first
            series = link_measure.pair(bare, peer, world.rank == first, seconds)
            if world.rank == first:
                latency, there, back = (link_measure.quartiles(s) for s in series)
                mine[low, high] = np.append(series[0].min(), latency), there, back
    bare.sleep_until_all()
    return mine


def _schedule(hosts: Sequence[str], ranks_of: Sequence[str]) -> Iterator[tuple[int, int, int, int]]:
    """One pair after the other: two hosts and a rank of each, then two ranks of each host."""
    own = [[rank for rank, name in enumerate(ranks_of) if name == host] for host in hosts]
    for low, high in combinations(range(len(hosts)), 2):
        yield low, high, own[low][0], own[high][0]
    for host, ranks in enumerate(own):
        if len(ranks) > 1:
            yield host, host, ranks[0], ranks[1]


def _jaccl(world: Communicator, facts: Sequence[Facts]) -> tuple[jaccl.Matrix | None, str]:
    """The matrix to start JACCL with among all ranks, or why it cannot be."""
    hosts = {f.host: jaccl.Member(f.host, f.macos, f.jaccl, f.rdma, f.ports) for f in facts}
    members = [hosts[name] for name in world.allgather(comm.hostname())]
    reason = jaccl.obstacle(members)
    return (None, reason) if reason else (jaccl.device_matrix(members), "")


def _kind(facts: Facts) -> str:
    """Of the links that messages of this host take."""
    used = {name for names in facts.links.values() for name in names}
    return ", ".join(sorted({facts.kind_of(name) for name in used} - {"unknown"}))


def _about(facts: Facts, no_jaccl: str) -> dict[str, str]:
    chosen = {name: value for name, value in os.environ.items() if name.startswith("OMPI_MCA_")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "mpi": facts.mpi or "",
        "python": facts.python,
        "jaccl": no_jaccl or "measured; not verified on hardware",
        **facts.versions,
        **chosen,
    }


def _assemble(
    hosts: Sequence[str],
    ranks: Sequence[int],
    kinds: Sequence[str],
    pairs: Pairs,
    curves: dict[str, np.ndarray],
    about: dict[str, str],
) -> Links:
    """Matrices of what single pairs have measured."""
    latency, bandwidth = (np.full((len(hosts), len(hosts), n), np.nan) for n in (4, 3))
    for (low, high), (one_way, there, back) in pairs.items():
        latency[low, high] = latency[high, low] = one_way
        if low == high:
            bandwidth[low, low] = np.minimum(there, back)
        else:
            bandwidth[low, high], bandwidth[high, low] = there, back
    return Links(
        tuple(hosts),
        tuple(ranks),
        tuple(kinds),
        latency[..., 2],
        latency[..., 0],
        bandwidth[..., 1],
        latency[..., 1::2],
        bandwidth[..., ::2],
        np.array(link_measure.SIZES),
        curves,
        about,
    )
