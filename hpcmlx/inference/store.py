"""Finished rows, durable before anybody counts them as done, and found again after any end.

The recorder of each replica commits rows to a `RowStore`; `committed_keys` tells a resumed job what
is there already, and `collect` brings all rows to rank 0 in input order. Recorders on hosts that
share no file system each write into their own `rows/`.
"""

from __future__ import annotations

import errno
import heapq
import os
import secrets
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlx.comm import Communicator
from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.files import DurableLog, write_atomic
from hpcmlx.inference.rowfiles import (
    PLACE,
    RESTORE,
    build_commit,
    build_part,
    decode,
    encode,
    is_whole,
    read_log,
    read_part,
)
from hpcmlx.inference.rows import RowResult
from hpcmlx.rundir import make_run_dir

#: The directory of the rows, inside a run directory.
ROWS = "rows"
_CHUNK_BYTES = 4 << 20


class RowStore:
    """Where one recorder puts its rows: `rank{r}-{random}-{number}.log`, sealed as `….h5`.

    A new store never writes to a file of an earlier one.
    """

    def __init__(self, directory: Path, rank: int, *, rows_per_part: int = 512):
        """
        Args:
            directory: `rows/` of the run directory; both are made if need be.
            rank: the world rank of this recorder.
            rows_per_part: rows after which a log is sealed.

        Raises:
            OutputError: the directory cannot be made.
        """
        make_run_dir(directory.parent)
        self.directory = make_run_dir(directory)
        self.rows_per_part = rows_per_part
        self._name = f"rank{rank}-{secrets.token_hex(8)}"
        self._num_parts = 0
        self._log: DurableLog | None = None
        self._keys: list[tuple[int, int]] = []  # of the rows in the log
        self._lines: list[bytes] = []

    def commit(self, results: Sequence[RowResult]) -> None:
        """Store rows; they are on the disk when this returns. One write and one flush.

        Raises:
            StorageError: the disk is full or failing; names the file. None of these rows counts,
                unless they were stored and only sealing the full log has failed.
        """
        if not results:
            return
        lines = [encode(row) for row in results]
        keys = [row.key for row in results]
        if self._log is None:
            self._log = DurableLog(self.directory / f"{self._name}-{self._num_parts:06}.log")
            self._num_parts += 1
        self._log.append(build_commit(keys, lines))
        self._keys += keys
        self._lines += lines
        if len(self._lines) >= self.rows_per_part:
            self._seal()

    def close(self) -> None:
        """Seal what is left. Without it nothing is lost: the log is read as well."""
        if self._lines:
            self._seal()

    def _seal(self) -> None:
        assert self._log is not None
        write_atomic(self._log.path.with_suffix(".h5"), build_part(self._keys, self._lines))
        self._log.remove()
        self._log, self._keys, self._lines = None, [], []


class StoredRows:
    """Rows that were found, in input order, read from their files when they are asked for.

    Attributes:
        files: that they are in.
        places: [rows], where each (index, sample) is; ascending.
    """

    def __init__(self, files: Sequence[Path], places: np.ndarray):
        self.files = tuple(files)
        self.places = _in_order(places, self.files)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[RowResult]:
        for start, stop in _chunks(self.places["nbytes"], _CHUNK_BYTES):
            yield from map(decode, self.lines(start, stop))

    def keys(self) -> set[tuple[int, int]]:
        """(index, sample) of every row."""
        return _keys(self.places)

    def lines(self, start: int, stop: int) -> list[bytes]:
        """The lines of rows `start` to `stop`, checked.

        Raises:
            IntegrityError: a file has changed since it was recovered.
            StorageError: it cannot be read.
        """
        places = self.places[start:stop]
        lines = [b""] * len(places)
        by_file = np.lexsort((places["offset"], places["file"])).tolist()
        for file, numbers in groupby(by_file, lambda number: places["file"][number]):
            path = self.files[file]
            try:
                with path.open("rb", buffering=0) as stream:
                    for number in numbers:
                        where = places[number]
                        lines[number] = os.pread(stream.fileno(), where["nbytes"], where["offset"])
                        if not is_whole(lines[number]):
                            raise IntegrityError(f"{path} has changed while it was read; {RESTORE}")
            except OSError as error:
                raise StorageError(f"reading {path} failed: {error.strerror}") from error
        return lines


def recover(directory: Path) -> StoredRows:
    """The rows that are in `directory`, which need not exist. Nothing is changed there.

    A commit at the end of a log that is not whole was never reported as done: it is left out, by
    this recovery and every later one.

    Raises:
        IntegrityError: any other damage (file and line), or two different results for one row.
        StorageError: a file cannot be read.
    """
    names = [name for name, _ in _listing(directory)]
    return _recover(directory, names, names)


def committed_keys(world: Communicator, directory: Path) -> set[tuple[int, int]] | None:
    """(index, sample) of every row that some rank finds in its `directory`. Collective.

    Returns:
        The keys on rank 0, elsewhere None.

    Raises:
        IntegrityError, StorageError: as `recover`, on the rank that has the file.
    """
    everyone = world.gather(_my_share(world, directory).places)
    return None if everyone is None else _keys(_merged(everyone))


def collect(
    world: Communicator, directory: Path, *, chunk_bytes: int = _CHUNK_BYTES
) -> Iterator[RowResult]:
    """Every rank's rows, on rank 0, in input order. Collective.

    A file that several ranks see is read by the lowest of them, so that on a shared file system
    rank 0 reads everything itself. Rows of other hosts travel in chunks.

    Args:
        chunk_bytes: of rows, about, that rank 0 holds at once.

    Returns:
        On rank 0 the rows, to be taken to the end; on other ranks nothing, once rank 0 has what
        they hold.

    Raises:
        IntegrityError, StorageError: as `recover`, on the rank that has the file.
    """
    mine = _my_share(world, directory)
    everyone = world.gather(mine.places)
    plan = world.bcast(None if everyone is None else _plan(_merged(everyone), chunk_bytes))
    rows = _collected(world, mine, plan)
    return rows if world.rank == 0 else iter(list(rows))


def _collected(
    world: Communicator, mine: StoredRows, plan: list[tuple[int, int, bool]]
) -> Iterator[RowResult]:
    """Chunk by chunk: each rank's rows up to a key, merged on rank 0."""
    indexes, samples = mine.places["index"], mine.places["sample"]

    def key(number: int) -> tuple[int, int]:
        return indexes[number].item(), samples[number].item()

    start = 0
    for index, sample, travels in plan:
        stop = bisect_right(range(len(mine)), (index, sample), key=key)
        found = []
        if travels or world.rank == 0:
            keys = map(key, range(start, stop))
            found = list(zip(keys, mine.lines(start, stop), strict=True))
        start = stop
        parts = world.gather(found) if travels else [found]
        last = None
        for place, line in heapq.merge(*parts or []):
            if place != last:  # a row that two hosts have is one row
                yield decode(line)
            last = place


def _plan(places: np.ndarray, chunk_bytes: int) -> list[tuple[int, int, bool]]:
    """All rows in chunks: of each the last (index, sample), and whether ranks other than 0 have
    some of it.

    Args:
        places: of all ranks, `file` being the rank.
    """
    return [
        (*_key(places[stop - 1]), bool(places["file"][start:stop].any()))
        for start, stop in _chunks(places["nbytes"], chunk_bytes)
    ]


def _merged(everyone: Sequence[np.ndarray]) -> np.ndarray:
    """The places of all ranks in order, with the rank for the file."""
    places = np.concatenate(everyone)
    places["file"] = np.repeat(np.arange(len(everyone)), [len(part) for part in everyone])
    return _in_order(places, [f"the rows of rank {rank}'s host" for rank in range(len(everyone))])


def _in_order(places: np.ndarray, names: Sequence[object]) -> np.ndarray:
    """Places by (index, sample, file), each row once.

    Raises:
        IntegrityError: a row has two different results, in `names[file]` of each.
    """
    places = places[np.lexsort((places["file"], places["sample"], places["index"]))]
    repeated = np.zeros(len(places), bool)
    repeated[1:] = (np.diff(places["index"]) == 0) & (np.diff(places["sample"]) == 0)
    for second in np.flatnonzero(repeated):
        one, other = places[second - 1], places[second]
        if (one["crc"], one["nbytes"]) != (other["crc"], other["nbytes"]):
            raise IntegrityError(
                f"row {one['index']}, sample {one['sample']} has two different results, in "
                f"{names[one['file']]} and {names[other['file']]}: remove the file that does not "
                "belong to this run"
            )
    return places[~repeated]


def _chunks(nbytes: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of consecutive rows, each of about `size` bytes."""
    number = (np.cumsum(nbytes) - nbytes) // size
    edges = np.flatnonzero(np.diff(number, prepend=-1, append=-1)).tolist()
    return pairwise(edges)


def _key(place: Any) -> tuple[int, int]:
    return int(place["index"]), int(place["sample"])


def _keys(places: np.ndarray) -> set[tuple[int, int]]:
    return set(zip(places["index"].tolist(), places["sample"].tolist(), strict=True))


# -- files --


def _listing(directory: Path) -> list[tuple[str, int]]:
    """(name, bytes) of the logs and parts of a directory; none where it does not exist."""
    found = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.endswith((".log", ".h5")) and not entry.name.startswith("."):
                    found.append((entry.name, entry.stat().st_size))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"reading {directory} failed: {error.strerror}") from error
    return sorted(found)


def _my_share(world: Communicator, directory: Path) -> StoredRows:
    """The rows in those files that no lower rank sees. Collective.

    Names are random, so a file of the same name and size is the same file, seen by two ranks.
    """
    listings = world.allgather(_listing(directory))
    lower = {file for listing in listings[: world.rank] for file in listing}
    mine = [name for name, size in listings[world.rank] if (name, size) not in lower]
    return _recover(directory, mine, {name for listing in listings for name, _ in listing})


def _recover(directory: Path, names: Sequence[str], known: Collection[str]) -> StoredRows:
    """Read the files `names`; `known` are all that some rank has seen."""
    tables = [np.empty(0, PLACE)]
    for number, name in enumerate(names):
        path = directory / name
        try:
            data = path.read_bytes()
        except OSError as error:
            # Directory listings of network file systems lag: it has been sealed meanwhile.
            gone = error.errno in (errno.ENOENT, errno.ESTALE)
            if gone and path.suffix == ".log" and path.with_suffix(".h5").name in known:
                continue
            raise StorageError(f"reading {path} failed: {error.strerror}") from error
        table = read_log(path, data) if path.suffix == ".log" else read_part(path, data)
        table["file"] = number
        tables.append(table)
    return StoredRows([directory / name for name in names], np.concatenate(tables))
