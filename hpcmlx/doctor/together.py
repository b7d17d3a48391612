"""What hosts can only find out together: clocks, waiting, which links their messages take."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import psutil

from hpcmlx.comm import Communicator, hostname
from hpcmlx.doctor.facts import Facts, collect, cores, from_dict

WORKS, NO_ANSWER = "works", "no answer"
#: mpirun reaches other hosts through it, so it is open there, and a refusal is an answer, too.
_SSH = 22
_CONNECT_SECONDS = 3.0
_BLOCKED = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM, errno.EACCES)
_TAG = 7


def gather(world: Communicator, run_dir: Path) -> list[Facts]:
    """The facts of all hosts, in the order of their first ranks; the same list on all ranks.
    Collective."""
    facts = collect(run_dir)
    hosts = world.allgather(hostname())
    facts.ranks = hosts.count(facts.host)
    # mpirun binds each rank to a part of them.
    usable = world.allgather(cores())
    facts.cores = len(
        {c for h, own in zip(hosts, usable, strict=True) if h == facts.host for c in own}
    )
    addresses = dict(zip(hosts, world.allgather(host_addresses(facts)), strict=True))
    meet(world)
    facts.links = links(facts, addresses)
    for peer in _to_try(facts, list(dict.fromkeys(hosts))):
        facts.sockets[peer] = try_addresses(host_addresses(facts), addresses[peer])
    facts.wait_share, facts.barrier_seconds = waiting(world)
    skews = clock_skews(world)
    first_ranks = [hosts.index(host) for host in dict.fromkeys(hosts)]
    shares = world.allgather(facts.wait_share)
    found = world.allgather(facts.to_dict() if world.rank in first_ranks else None)
    all_facts = []
    for rank in first_ranks:
        here = from_dict(found[rank])
        waits = [s for s, h in zip(shares, hosts, strict=True) if h == here.host and s is not None]
        here.wait_share = max(waits, default=None)
        if len(first_ranks) > 1:
            here.skew, here.skew_error = skews[rank]
        all_facts.append(here)
    return all_facts


def meet(world: Communicator) -> None:
    """A message between each two ranks: MPI connects only those that talk. Collective."""
    others = [rank for rank in range(world.size) if rank != world.rank]
    under_way = [world.irecv((1,), mx.uint8, rank, _TAG) for rank in others]
    under_way += [world.isend(mx.zeros((1,), mx.uint8), rank, _TAG) for rank in others]
    for pending in under_way:
        pending.wait()


def links(facts: Facts, addresses: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The interfaces that this process's open connections to each other host go through.

    Args:
        addresses: of each host, with prefixes.
    """
    try:
        open_now = psutil.Process().net_connections(kind="tcp4")
    except psutil.Error:
        open_now = []
    pairs = [(c.laddr.ip, c.raddr.ip) for c in open_now if c.raddr and c.status == "ESTABLISHED"]
    return match_links(facts, addresses, pairs)


def match_links(
    facts: Facts, addresses: Mapping[str, Sequence[str]], pairs: Sequence[tuple[str, str]]
) -> dict[str, list[str]]:
    """The same from pairs of a local and a remote address."""
    names = {_bare(a): i.name for i in facts.interfaces for a in i.addresses}
    found: dict[str, list[str]] = {}
    for host, theirs in addresses.items():
        if host == facts.host:
            continue
        # An address that both have (loopback, a container bridge) does not lead from one to other.
        remote = {_bare(a) for a in theirs} - names.keys()
        found[host] = sorted({names[own] for own, far in pairs if far in remote and own in names})
    return found


def try_addresses(own: Sequence[str], theirs: Sequence[str]) -> str:
    """Whether this interpreter can connect to a host: the first address that answers decides.

    Args:
        own, theirs: addresses with prefixes; those in a network that both are in come first.
    """
    networks = [ipaddress.ip_interface(a).network for a in own]
    hosts = [ipaddress.ip_interface(a).ip for a in theirs]
    hosts = [a for a in hosts if not a.is_loopback and str(a) not in map(_bare, own)]
    shared = sorted(hosts, key=lambda a: not any(a in network for network in networks))
    verdict = "no address"
    for address in shared[:3]:
        verdict = try_connect(str(address))
        if verdict == WORKS:
            break
    return verdict


def try_connect(host: str, port: int = _SSH, seconds: float = _CONNECT_SECONDS) -> str:
    """Whether this very interpreter can open a connection to a host.

    macOS refuses connections within the local network to programs that were not allowed it, with
    "No route to host". A host that answers that nobody listens has been reached.

    Returns:
        `WORKS`, `NO_ANSWER`, "no such host", or "blocked: …" with the system's reason.
    """
    try:
        socket.create_connection((host, port), seconds).close()
        return WORKS
    except ConnectionRefusedError:
        return WORKS
    except TimeoutError:
        return NO_ANSWER
    except socket.gaierror:
        return "no such host"
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return f"blocked: {reason}" if error.errno in _BLOCKED else f"failed: {reason}"


def waiting(world: Communicator, seconds: float = 0.3) -> tuple[float | None, float | None]:
    """What a barrier costs. Collective.

    Returns:
        The share of a core that this rank takes while it waits for a late one, and the seconds of
        one barrier for which nobody is late; None without other ranks.
    """
    if world.size == 1:
        return None, None
    share = 0.0
    for late in (0, world.size - 1):  # so that the late rank's own host is measured, too
        world.barrier()
        if world.rank == late:
            time.sleep(seconds)
            world.barrier()
            continue
        began, cpu = time.monotonic(), time.process_time()
        world.barrier()
        share = max(share, (time.process_time() - cpu) / (time.monotonic() - began))
    began, count = time.monotonic(), 50
    for _ in range(count):
        world.barrier()
    return share, (time.monotonic() - began) / count


def clock_skews(world: Communicator, rounds: int = 10) -> list[tuple[float, float]]:
    """How far each rank's wall clock is ahead of rank 0's, and how wrong that may be, in seconds.
    Collective. After Cristian (1989): the round that took the shortest counts."""
    best = [(0.0, float("inf"))] * world.size
    for _ in range(rounds):
        world.barrier()
        before, began = time.time(), time.monotonic()
        world.bcast(None)
        clocks = world.gather(time.time())
        half = (time.monotonic() - began) / 2
        if clocks is not None and half < best[0][1]:
            best = [(clock - before - half, half) for clock in clocks]
    best[0] = (0.0, 0.0)
    shared: list[tuple[float, float]] = world.bcast(best)
    return shared


def _to_try(facts: Facts, hosts: Sequence[str]) -> list[str]:
    """Hosts that a connection is tried to: the next one, unless MPI's own has shown that it works.
    Trying all from all would take long where nothing answers."""
    for peer, used in facts.links.items():
        if used:
            facts.sockets[peer] = WORKS
    if len(hosts) == 1:
        return []
    following = hosts[(hosts.index(facts.host) + 1) % len(hosts)]
    return [] if following in facts.sockets else [following]


def host_addresses(facts: Facts) -> list[str]:
    """IPv4 addresses of a host, with their prefixes."""
    return [address for interface in facts.interfaces for address in interface.addresses]


def _bare(address: str) -> str:
    return address.partition("/")[0]
