"""After a launch has ended, however it ended: which checkpoints are there, and which is whole?

`CheckpointStore.find` is the caller. All hosts look, one decision is taken from what all of them
see, and a host that lacks a shard gets it from one that has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hpcmlx.agree import agree, share_failure
from hpcmlx.errors import HpcmlxError, IntegrityError, StorageError
from hpcmlx.files import sha256_of
from hpcmlx.training.checkpoints.commit import Mark, StepStore
from hpcmlx.training.checkpoints.hosts import Places, spread
from hpcmlx.training.checkpoints.manifest import MANIFEST, RESTORE, Manifest, decode, shard_name


def tidy(places: Places, steps: StepStore) -> list[dict[int, Mark]]:
    """Finish what the end of the last launch has cut off: deletions, and commits that one host is
    through with; remove other saves that were under way. Collective.

    Returns:
        What is committed, by step, in each directory.

    Raises:
        StorageError: a disk fails; on all ranks.
    """
    listings = places.from_leaders(steps.scan)
    dying = {step for listing in listings for step in listing.dying}
    places.lead(lambda: steps.condemn(dying))
    places.lead(lambda: steps.bury(dying))
    mine = listings[places.own]
    committed = {
        (step, mark.digest)
        for listing in listings
        for step, mark in listing.committed.items()
        if step not in dying
    }

    def finish() -> None:
        for step in mine.unfinished:
            here = step in mine.committed and step not in dying
            if not here and (step, mine.prepared.get(step)) in committed:
                steps.publish(step)
            else:
                steps.discard(step)

    places.lead(finish)
    return [listing.committed for listing in places.from_leaders(steps.scan)]


def complete(places: Places, steps: StepStore, step: int, marks: list[Mark | None]) -> Manifest:
    """Verify a checkpoint in every directory and bring each what it lacks. Collective.

    Args:
        marks: of the checkpoint, in each directory.

    Raises:
        IntegrityError: a file is damaged, or a shard is nowhere; names file and host.
        StorageError: reading failed, or there is no room; on all ranks.
    """
    having = [(number, mark) for number, mark in enumerate(marks) if mark is not None]
    first, known = having[0]
    for number, mark in having:
        if mark.problem:
            raise IntegrityError(f"{mark.problem} ({places.where(number)})")
        if mark.digest != known.digest:
            raise IntegrityError(
                f"{steps.path(step).name} is not the same for {places.where(number)} and "
                f"{places.where(first)}; {RESTORE}"
            )
    data = _manifest_bytes(places, steps.path(step) / MANIFEST, places.leader_ranks[first])
    manifest = decode(steps.path(step) / MANIFEST, data)
    owners = _verify(places, steps.path(step), manifest)
    if all(marks) and all(len(having) == len(marks) for having in owners.values()):
        return manifest

    is_new = marks[places.own] is None
    if is_new_somewhere := not all(marks):
        places.lead(lambda: steps.begin(step) if is_new else None)
    folder = steps.path(step, ".tmp" if is_new else "")
    failure = _fetch(places, folder, manifest, owners)
    if failure is not None and is_new:
        with suppress(StorageError):
            steps.discard(step)
    share_failure(places.world, failure)
    if is_new_somewhere:
        places.lead(lambda: steps.prepare(step, data) if is_new else None)
        places.lead(lambda: steps.publish(step) if is_new else None)
    return manifest


def _manifest_bytes(places: Places, path: Path, root: int) -> bytes:
    """One rank's file, on all ranks."""

    def read() -> bytes | None:
        try:
            return path.read_bytes() if places.world.rank == root else None
        except OSError as error:
            raise StorageError(f"reading {path} failed: {error.strerror}") from error

    data: bytes = places.world.bcast(agree(places.world, read), root)
    return data


def _verify(places: Places, folder: Path, manifest: Manifest) -> dict[int, list[int]]:
    """Compare every shard that is there with the manifest; ranks that share a directory share the
    work.

    Returns:
        The directories that have it, by rank of the shard.
    """
    sharers = places.sharers
    mine = sorted(manifest.shards)[sharers.rank :: sharers.size]

    def look() -> tuple[list[int], str]:
        """(shards that are there, what is wrong with one)"""
        present = [rank for rank in mine if (folder / shard_name(rank)).exists()]
        for rank in present:
            path = folder / shard_name(rank)
            if sha256_of(path) != manifest.shards[rank].sha256:
                return present, f"{path} is damaged: its SHA-256 is wrong; {RESTORE}"
        return present, ""

    seen = places.world.allgather((places.own, *agree(places.world, look)))
    owners: dict[int, list[int]] = {rank: [] for rank in sorted(manifest.shards)}
    for rank, (number, present, problem) in enumerate(seen):
        if problem:
            raise IntegrityError(f"{problem} (rank {rank} on {places.hosts[rank]})")
        for shard in present:
            owners[shard].append(number)
    for shard, having in owners.items():
        if not having:
            raise IntegrityError(
                f"{folder.name}/{shard_name(shard)}, written by rank {shard} on "
                f"{manifest.shards[shard].host}, is on no host any more; {RESTORE}"
            )
    return owners


def _fetch(
    places: Places, folder: Path, manifest: Manifest, owners: Mapping[int, list[int]]
) -> HpcmlxError | None:
    """Bring every shard into every directory. The first failure of this rank, which goes on all
    the same: others wait for what it sends."""
    failure: HpcmlxError | None = None
    if places.leaders is None:
        return None
    for shard, having in owners.items():
        if len(having) == places.leaders.size:
            continue
        wanted = places.own not in having and failure is None
        path, digest = folder / shard_name(shard), manifest.shards[shard].sha256
        try:
            spread(places.leaders, having[0], path, digest, wanted)
        except HpcmlxError as error:
            failure = failure or error
    return failure
