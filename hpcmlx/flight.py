"""What this rank did last: a ring of its last operations in a file that outlives the process.

`comm/` and those who evaluate record every operation's begin and end; the file is memory that the
kernel keeps, so it can be read after any death of the process, `kill -9` included. Collectives
inside MLX's graph have no hook at run time: they are recorded as planned when the graph is built,
the evaluation that runs them as an operation of its own. `watchdog.py` looks at `progress`.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from hpcmlx.errors import OutputError

#: Inside a run directory; a file `rankN.bin` per rank.
FOLDER = "flight"
TRACE_ENV = "HPCMLX_TRACE_COMM"
NUM_RECORDS = 256

# In the order of their codes.
OPS: tuple[str, ...] = ("", "send", "recv", "barrier", "bcast", "gather", "allgather")
OPS += ("sum_arrays", "sum_numbers", "ibcast", "imax", "split", "fetch_add", "free", "close")
OPS += ("all_sum", "all_gather", "eval")
CODES = {name: code for code, name in enumerate(OPS)}
#: Inside MLX's graph: planned in order, run by an evaluation.
PLANNED = ("all_sum", "all_gather")

_MAGIC = b"hpcmlxF1"
# magic, rank, size, pid; at the watchdog's last look: clock, wall clock, progress, step
_HEAD = struct.Struct("<8sIIIxxxxqdQq")
_COUNTS, _NUM_GROUPS = 128, 32  # collectives and planned ones of each group, u32 each
_PAIR = struct.Struct("<II")
_TEXT, _RING = 512, 4096
# number in its sequence, op, group, peer, layer, step, bytes; begin, waiting, end in ns; index
_RECORD = struct.Struct("<IBBhhxxiQqqqQ")
_TIME = struct.Struct("<q")
_WAITING, _END = 32, 40
SIZE = _RING + NUM_RECORDS * _RECORD.size


class Group:
    """A group of ranks, and how far this rank is in its sequences of operations.

    Attributes:
        name: as in "tp".
        members: world ranks, by their rank in the group.
        number: of the group on this rank.
        collectives, planned: so many were begun; so many put into a graph.
    """

    __slots__ = ("collectives", "members", "name", "number", "planned", "received", "sent")

    def __init__(self, name: str, members: Sequence[int], number: int):
        self.name, self.members, self.number = name, tuple(members), number
        self.collectives = self.planned = 0
        self.sent: defaultdict[int, int] = defaultdict(int)
        self.received: defaultdict[int, int] = defaultdict(int)


class Recorder:
    """This rank's ring: in memory until `open` gives it a file.

    Attributes:
        progress: grows with all that this rank gets done; only that it changes says something.
        step: what the rank is at (decode or training step); stamped into every record.
        evaluating, waiting: seconds spent in evaluations; in messages and control collectives.
        layer: of the model that the next planned operation belongs to; -1: not known.
    """

    def __init__(self) -> None:
        self.progress, self.step, self.layer = 0, 0, -1
        self.evaluating = self.waiting = 0.0
        self.rank, self.size = 0, 1
        self._buffer: bytearray | mmap.mmap = bytearray(SIZE)
        self._count, self._newest = count(1), 0
        self._outside = False
        self._evaluations = 0
        self._trace = os.environ.get(TRACE_ENV, "") not in ("", "0")
        self.groups: list[Group] = []

    def open(self, path: Path, rank: int, size: int) -> None:
        """Keep the ring in the file `path` from now on; an earlier launch's is replaced.

        Raises:
            OutputError: it cannot be made.
        """
        self.rank, self.size = rank, size
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                # Written, not only made long: a page without a block is a SIGBUS on a full disk.
                os.pwrite(fd, bytes(self._buffer), 0)
                self._buffer = mmap.mmap(fd, SIZE)
            finally:
                os.close(fd)
        except OSError as error:
            raise OutputError(
                f"cannot create {path}: {error.strerror}; set run_dir to a writable place"
            ) from error
        self._write_text()
        self.look()

    def group(self, name: str, members: Sequence[int]) -> Group:
        """Begin the sequences of a group of world ranks, or go on with them where the same ranks
        had a group of that name before."""
        for known in self.groups:
            if (known.name, known.members) == (name, tuple(members)):
                return known
        group = Group(name, members, min(len(self.groups), 255))
        self.groups.append(group)
        self._write_text()
        return group

    # -- operations --

    def begin(self, op: int, group: Group, seq: int, peer: int, nbytes: int, waits: bool) -> int:
        """An operation begins.

        Args:
            op: of `CODES`.
            seq: its number, from 1, among those that must match: of a group's collectives, or of
                the messages from one rank to another.
            peer: the other rank in the group, -1 for collectives.
            waits: it does not return before it is done.

        Returns:
            Its index, for `wait` and `end`.
        """
        index = self._newest = next(self._count)
        self.progress += 1
        now = time.monotonic_ns()
        who = peer if peer < 0 else group.members[peer]
        _RECORD.pack_into(
            self._buffer, _RING + (index % NUM_RECORDS) * _RECORD.size,
            seq, op, group.number, who, -1, self.step, nbytes, now, now if waits else 0, 0, index,
        )  # fmt: skip
        if self._trace:
            self._print(OPS[op], group, seq, who, nbytes)
        return index

    def wait(self, index: int) -> None:
        """From now on nothing else is done before the operation is."""
        if self._newest - index < NUM_RECORDS:
            at = _RING + (index % NUM_RECORDS) * _RECORD.size
            _TIME.pack_into(self._buffer, at + _WAITING, time.monotonic_ns())

    def end(self, index: int) -> None:
        """The operation is done."""
        self.progress += 1
        if self._newest - index < NUM_RECORDS:
            at = _RING + (index % NUM_RECORDS) * _RECORD.size
            _TIME.pack_into(self._buffer, at + _END, time.monotonic_ns())

    def collective(self, op: int, group: Group, nbytes: int = 0) -> int:
        """A collective of the group begins, and waits."""
        group.collectives += 1
        return self.begin(op, group, group.collectives, -1, nbytes, True)

    def plan(self, op: int, group: Group, nbytes: int) -> None:
        """A collective becomes part of a graph."""
        group.planned += 1
        layer, self.layer = self.layer, -1
        index = self._newest = next(self._count)
        now = time.monotonic_ns()
        _RECORD.pack_into(
            self._buffer, _RING + (index % NUM_RECORDS) * _RECORD.size, group.planned, op,
            group.number, -1, layer, self.step, nbytes, now, 0, now, index,
        )  # fmt: skip
        if self._trace:
            self._print(f"plan {OPS[op]}", group, group.planned, -1, nbytes, layer)

    def evaluation(self) -> int:
        """An evaluation begins, which runs what was planned; `end` it."""
        self._evaluations += 1
        return self.begin(_EVAL, _NOBODY, self._evaluations, -1, 0, True)

    def tick(self) -> None:
        """Something else got done: a tensor read, a row tokenized."""
        self.progress += 1

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What runs in the block cannot tell how far it is (a download, another package): as long
        as this process is alive, that counts as progress."""
        before, self._outside = self._outside, True
        try:
            yield
        finally:
            self._outside = before
            self.tick()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What other code calls back: here every step counts by itself again."""
        before, self._outside = self._outside, False
        try:
            yield
        finally:
            self._outside = before

    # -- the watchdog's look --

    def look(self) -> None:
        """Note that this process lives, and how far it is in every sequence."""
        if self._outside:
            self.progress += 1
        wall, now = time.time(), time.monotonic_ns()
        _HEAD.pack_into(
            self._buffer, 0, _MAGIC, self.rank, self.size, os.getpid(), now, wall,
            self.progress, self.step,
        )  # fmt: skip
        for group in self.groups[:_NUM_GROUPS]:
            at = _COUNTS + group.number * _PAIR.size
            _PAIR.pack_into(self._buffer, at, group.collectives, group.planned)

    def digest(self) -> bytes:
        """The part of `snapshot` that is small enough to be sent all the time: its head, and the
        newest operation."""
        at = _RING + (self._newest % NUM_RECORDS) * _RECORD.size
        return bytes(self._buffer[:_RING].rstrip(b"\0")) + bytes(
            self._buffer[at : at + _RECORD.size]
        )

    def snapshot(self) -> bytes:
        """What the file holds."""
        self.look()
        return bytes(self._buffer)

    def _write_text(self) -> None:
        """Host and groups as JSON; groups that find no room are left out."""
        groups = [{"name": g.name, "members": _short(g.members)} for g in self.groups[:_NUM_GROUPS]]
        while True:
            text = json.dumps({"host": socket.gethostname(), "groups": groups}).encode()
            if len(text) < _RING - _TEXT:
                break
            groups.pop()
        self._buffer[_TEXT:_RING] = text.ljust(_RING - _TEXT, b"\0")

    def _print(self, op: str, group: Group, seq: int, peer: int, nbytes: int, at: int = -1) -> None:
        whom = "" if peer < 0 else f" peer {peer}"
        where = "" if group is _NOBODY else f" {nbytes} bytes{whom} group {group.name}"
        layer = f" layer {at}" if at >= 0 else ""
        line = f"comm: rank {self.rank} {op} {seq}{where}{layer} step {self.step}\n"
        os.write(2, line.encode())


def _short(members: Sequence[int]) -> list[int] | dict[str, int]:
    """Ranks, or first, step and number where they are evenly spaced."""
    if len(members) < 3:
        return list(members)
    step = members[1] - members[0]
    if step > 0 and tuple(members) == tuple(range(members[0], members[-1] + 1, step)):
        return {"first": members[0], "step": step, "size": len(members)}
    return list(members)


_EVAL = CODES["eval"]
_NOBODY = Group("", (), 255)
#: This process's own.
recorder = Recorder()


# -- reading --


@dataclass(frozen=True)
class Record:
    """One operation. Times are seconds of its rank's clock; see `Recorder.begin`.

    Attributes:
        index: in the order in which its rank began them.
        group: its name; empty for an evaluation.
        members: world ranks of the group.
        peer: world rank, None for collectives.
        layer: None where not known.
        waiting: since when the rank did nothing else; None: it did not wait.
        end: None: it is not done.
    """

    index: int
    op: str
    seq: int
    group: str
    members: tuple[int, ...]
    peer: int | None
    layer: int | None
    step: int
    nbytes: int
    begin: float
    waiting: float | None
    end: float | None

    @property
    def is_planned(self) -> bool:
        return self.op in PLANNED

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """Of its group, the same on all of its ranks."""
        return self.group, self.members

    def __str__(self) -> str:
        if self.op == "eval":
            return f"evaluation {self.seq} (step {self.step})"
        towards = {"send": "to", "recv": "from"}.get(self.op, "of")
        whom = "" if self.peer is None else f" {towards} rank {self.peer}"
        layer = "" if self.layer is None else f", layer {self.layer}"
        size = f"{self.nbytes} bytes, " if self.nbytes else ""
        what = f"{self.op} {self.seq}{whom} of group {self.group}"
        return f"{what} ({size}step {self.step}{layer})"


@dataclass(frozen=True)
class Flight:
    """A rank's file as it was read.

    Attributes:
        now: the rank's clock when it was last seen alive, seconds; 0 where that is not known.
        wall: the same moment as UTC seconds.
        counts: (group, members) -> (collectives begun, planned).
        records: oldest first.
    """

    rank: int
    size: int
    pid: int
    host: str
    now: float
    wall: float
    progress: int
    step: int
    counts: dict[tuple[str, tuple[int, ...]], tuple[int, int]]
    records: tuple[Record, ...]

    @property
    def waits_in(self) -> Record | None:
        """The operation that the rank is in: of several threads', the one that waits longest."""
        open_ones = [r for r in self.records if r.waiting is not None and r.end is None]
        return min(open_ones, key=lambda r: r.waiting or 0.0, default=None)


def parse(data: bytes) -> Flight:
    """
    Raises:
        ValueError: it is not what a recorder writes.
    """
    if len(data) != SIZE or data[:8] != _MAGIC:
        raise ValueError("not a flight file")
    _, rank, size, pid, clock, wall, progress, step = _HEAD.unpack_from(data)
    text = json.loads(data[_TEXT:_RING].rstrip(b"\0"))
    names = [(g["name"], _members(g["members"])) for g in text["groups"]]
    counts = {
        name: _PAIR.unpack_from(data, _COUNTS + number * _PAIR.size)
        for number, name in enumerate(names)
    }
    records = []
    for slot in range(NUM_RECORDS):
        fields = _RECORD.unpack_from(data, _RING + slot * _RECORD.size)
        seq, op, number, peer, layer, at_step, nbytes, begin, waiting, end, index = fields
        if not index or op >= len(OPS):
            continue
        group, members = names[number] if number < len(names) else ("", ())
        records.append(
            Record(
                index, OPS[op], seq, group, members,
                None if peer < 0 else peer, None if layer < 0 else layer, at_step, nbytes,
                begin / 1e9, waiting / 1e9 if waiting else None, end / 1e9 if end else None,
            )
        )  # fmt: skip
    records.sort(key=lambda record: record.index)
    for record in records:  # what was begun since the watchdog's last look
        collectives, planned = counts.get(record.key, (0, 0))
        if record.is_planned:
            counts[record.key] = collectives, max(planned, record.seq)
        elif record.peer is None and record.group:
            counts[record.key] = max(collectives, record.seq), planned
    times = [t for r in records for t in (r.begin, r.waiting, r.end) if t is not None]
    now = max([clock / 1e9, *times])
    step = max([step, *(r.step for r in records)])
    return Flight(
        rank, size, pid, text["host"], now, wall + now - clock / 1e9, progress, step, counts,
        tuple(records),
    )  # fmt: skip


def read(path: Path) -> Flight:
    """
    Raises:
        OSError: it cannot be read.
        ValueError: it is not a flight file.
    """
    return parse(path.read_bytes())


def file_of(run_dir: Path, rank: int) -> Path:
    """Where a rank's ring is."""
    return run_dir / FOLDER / f"rank{rank}.bin"


def from_digest(data: bytes) -> Flight:
    """What `Recorder.digest` says; its one operation only."""
    head, record = data[: -_RECORD.size], data[-_RECORD.size :]
    return parse(head.ljust(_RING, b"\0") + record.ljust(SIZE - _RING, b"\0"))


def unknown(rank: int, size: int) -> Flight:
    """A rank that nothing is known of."""
    return Flight(rank, size, 0, "an unknown host", 0.0, 0.0, 0, 0, {}, ())


def _members(value: list[int] | dict[str, int]) -> tuple[int, ...]:
    if isinstance(value, list):
        return tuple(value)
    first, step, size = value["first"], value["step"], value["size"]
    return tuple(range(first, first + step * size, step))
