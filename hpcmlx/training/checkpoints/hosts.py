"""Ranks and the directories they see: who shares one, and files that travel between them.

Two hosts may share a file system and two ranks of one host may not; so nobody goes by host names:
every rank leaves a file and looks for those of the others. One rank of each directory, its leader,
does what is done once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from hpcmlx.agree import agree
from hpcmlx.comm import Communicator, hostname
from hpcmlx.errors import StorageError
from hpcmlx.files import atomic_writer, write_atomic
from hpcmlx.rundir import make_run_dir

_CHUNK_BYTES = 64 << 20
T = TypeVar("T")


class Places:
    """The directories of all ranks: one of each host, or one that all share, or anything between.

    Attributes:
        world: all ranks.
        hosts: their names, by rank.
        sharers: the ranks that see this rank's directory.
        leader_ranks: the lowest rank of each directory, ascending.
        own: which of them is the lowest of this rank's directory.
        leaders: those ranks, or None where this rank is not one.
    """

    def __init__(self, directory: Path, world: Communicator):
        """Makes the directory where it is missing. Collective.

        Raises:
            OutputError, StorageError: a rank cannot make it or write into it; on all ranks.
        """
        self.world = world
        self.hosts = world.allgather(hostname())
        token = f".seen-{secrets.token_hex(16)}"

        def leave() -> None:
            make_run_dir(directory.parent)
            write_atomic(make_run_dir(directory) / token, "")

        agree(world, leave)
        # Asked for by name: a network file system may give an old listing of a directory.
        seen = [(directory / other).exists() for other in world.allgather(token)]
        world.barrier()
        with suppress(OSError):
            (directory / token).unlink()
        leader = seen.index(True)
        self.leader_ranks = sorted(set(world.allgather(leader)))
        self.sharers = world.split(leader, world.rank, name="sharers")
        self.own = self.leader_ranks.index(leader)
        group = world.split(0 if leader == world.rank else 1, world.rank, name="leaders")
        self.leaders = group if leader == world.rank else None

    def where(self, leader: int) -> str:
        """For messages: whose directory, by its number in `leader_ranks`."""
        rank = self.leader_ranks[leader]
        return f"rank {rank} on {self.hosts[rank]}"

    def from_leaders(self, look: Callable[[], T]) -> list[T]:
        """What each leader sees, on all ranks. Collective; fails on all ranks if one does."""
        seen = agree(self.world, look if self.leaders is not None else _nothing)
        everyone = self.world.allgather(seen)
        return [everyone[rank] for rank in self.leader_ranks]

    def lead(self, work: Callable[[], None]) -> None:
        """Do something once in each directory; every directory is done when this returns.
        Collective; fails on all ranks if it does on one."""
        agree(self.world, work if self.leaders is not None else _nothing)


def spread(
    leaders: Communicator,
    root: int,
    path: Path,
    digest: str,
    wanted: bool,
    chunk_bytes: int = _CHUNK_BYTES,
) -> None:
    """Send a file of one leader to those others that want it, in chunks. Collective over leaders,
    also for one where it has failed.

    Args:
        root: who has it.
        path: on each leader, where it is or goes; it appears there when it is whole.
        digest: SHA-256 that it must have.
        wanted: whether this leader writes it.

    Raises:
        StorageError: reading it failed (on all of them), or writing it (here), or what has come is
            not what the digest says.
    """
    arriving = _arriving(leaders, root, path, chunk_bytes)
    try:
        if wanted and root != leaders.rank:
            with atomic_writer(path) as write:
                found = sha256()
                for chunk in arriving:
                    write(chunk)
                    found.update(chunk)
                if found.hexdigest() != digest:
                    raise StorageError(f"{path} came damaged from another host: run it again")
    finally:
        for _ in arriving:  # the others still need this rank
            pass


def _arriving(leaders: Communicator, root: int, path: Path, chunk_bytes: int) -> Iterator[bytes]:
    chunks = _chunks(path, chunk_bytes) if leaders.rank == root else None
    while True:
        try:
            chunk: bytes | str = b"" if chunks is None else next(chunks, b"")
        except OSError as error:
            chunk = f"reading {path} failed: {error.strerror}"
        chunk = leaders.bcast(chunk, root)
        if isinstance(chunk, str):
            raise StorageError(chunk)
        if not chunk:
            return
        yield chunk


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(size):
            yield chunk


def _nothing() -> None:
    return None
