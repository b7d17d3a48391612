"""Nothing hangs: a thread on every rank that ends the job where no rank makes progress any more.

About once a second it tells the other ranks how far its own has got. Where a rank is silent, or
nobody makes progress, for `watchdog.timeout` seconds, every rank that still answers writes the
stacks of its threads and sends its flight recorder; the lowest of them says who is behind, leaves
`autopsy.json`, and ends the job with exit code 75. `job.py` starts and stops it.
"""

from __future__ import annotations

import faulthandler
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from hpcmlx import comm, flight
from hpcmlx.autopsy.report import AUTOPSY, stacks_file, write_autopsy
from hpcmlx.autopsy.verdict import Sighting, judge
from hpcmlx.comm import Communicator, Wire
from hpcmlx.errors import ExitCode, HpcmlxError, OutputError
from hpcmlx.flight import Flight, recorder

#: In a world of more ranks only so many, evenly spaced, hear of the others and judge.
MOST_JUDGES = 16
_BEAT, _EVIDENCE, _BYE = range(3)
_HEAD = struct.Struct("<BQ")  # kind, progress
_PATIENCE = 2.0  # seconds for the others' evidence
_LAST_RESORT = 5.0  # seconds later this rank ends itself, whatever MPI makes of it


class Clock:
    """Seconds that this thread has run: a process that was stopped, or a host that slept, has not
    heard of the others and must not hold that against them.

    Attributes:
        now: seconds since it was made.
    """

    def __init__(self, longest: float):
        """
        Args:
            longest: from one `tick` to the next no more than this counts.
        """
        self.now, self._longest, self._last = 0.0, longest, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.now += min(now - self._last, self._longest)
        self._last = now


class Heard:
    """When each rank was last heard of, and when it last made progress. Pure."""

    def __init__(self, ranks: Sequence[int], now: float):
        self.heard = dict.fromkeys(ranks, now)
        self.moved = dict.fromkeys(ranks, now)
        self._progress: dict[int, int] = {}

    def note(self, rank: int, progress: int, now: float) -> None:
        """A rank has told how far it is."""
        self.heard[rank] = now
        if self._progress.get(rank) != progress:
            self._progress[rank] = progress
            self.moved[rank] = now

    def drop(self, rank: int) -> None:
        """A rank that is through cannot be late."""
        self.heard.pop(rank, None)

    def is_stall(self, now: float, timeout: float) -> bool:
        """Whether some rank is silent, or none makes progress, for `timeout` seconds."""
        silent = any(now - last >= timeout for last in self.heard.values())
        return silent or all(now - last >= timeout for last in self.moved.values())


def judges(size: int) -> list[int]:
    """The ranks that hear of the others."""
    num = min(size, MOST_JUDGES)
    return sorted({i * size // num for i in range(num)})


class Watchdog:
    """This rank's thread. Made and stopped by all ranks together."""

    def __init__(
        self,
        world: Communicator,
        run_dir: Path,
        timeout: float,
        on_stall: Callable[[int, str], object] = lambda code, message: None,
    ):
        """
        Args:
            timeout: seconds without progress that are too many.
            on_stall: is told the exit code and why, on the rank that ends the job.
        """
        self._on_stall = on_stall
        self._world, self._run_dir, self._timeout = world, run_dir, timeout
        self._wire = Wire(world) if world.size > 1 else None
        self._interval = min(1.0, timeout / 6)
        self._main = threading.get_ident()
        self._judges = judges(world.size)
        self._leaving = threading.Event()
        self._rounds = 0
        self._last: dict[int, bytes] = {}  # what was heard of each rank
        self._evidence: dict[int, tuple[str, bytes]] = {}
        self._gone: set[int] = set()
        self._alarm = False
        self._stacks = self._open_stacks()
        (run_dir / AUTOPSY).unlink(missing_ok=True)  # of an earlier launch
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="watchdog-guard", daemon=True).start()

    def stop(self) -> None:
        """End the thread, so that MPI can be finalised. Collective."""
        self._leaving.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        stacks_file(self._run_dir, self._world.rank).unlink(missing_ok=True)

    def _open_stacks(self) -> IO[str]:
        path = stacks_file(self._run_dir, self._world.rank)
        try:
            return path.open("w")
        except OSError as error:
            raise OutputError(f"cannot create {path}: {error.strerror}") from error

    # -- the thread --

    def _run(self) -> None:
        clock = Clock(2 * self._interval)
        self._seen = Heard(range(self._world.size), 0.0)
        said_bye = False
        while not self._alarm:
            # Where even this thread cannot run, because another keeps the interpreter's lock. Only
            # the stacks: this timer goes on while the process is stopped, and must not end it then.
            faulthandler.dump_traceback_later(0.9 * self._timeout, file=self._stacks)
            recorder.look()
            clock.tick()
            self._rounds += 1
            self._seen.note(self._world.rank, recorder.progress, clock.now)
            leaving = self._leaving.is_set()
            if self._wire is None:
                if leaving:
                    return
            else:
                self._send(_BYE if leaving and not said_bye else _BEAT, said_bye)
                said_bye = leaving
                self._receive(clock.now)
                if said_bye and len(self._gone) == self._world.size - 1:
                    return
            is_judge = self._world.rank in self._judges
            if is_judge and self._seen.is_stall(clock.now, self._timeout):
                break
            if leaving:
                time.sleep(min(0.01, self._interval))
            else:
                self._leaving.wait(self._interval)
        self._end(clock.now)

    def _watch(self) -> None:
        try:
            self._run()
        except Exception as error:  # the others would take this rank for one that is silent
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"the watchdog itself has failed ({reason}); report it")
            os._exit(ExitCode.INTERNAL)

    def _guard(self) -> None:
        """Ends this rank where its watchdog itself stands still inside MPI."""
        clock, rounds, since = Clock(2.0), -1, 0.0
        while self._thread.is_alive():
            clock.tick()
            if rounds != self._rounds:
                rounds, since = self._rounds, clock.now
            if clock.now - since > self._timeout + 2 * _LAST_RESORT:
                faulthandler.dump_traceback(self._stacks)
                self._say("the watchdog stands still inside MPI; start the job again")
                os._exit(ExitCode.LOST_PEER)
            time.sleep(1.0)

    def _send(self, kind: int, said_bye: bool) -> None:
        assert self._wire is not None
        if said_bye:
            return
        # All are told of the end: who says it has nothing more under way to anybody.
        ranks = range(self._wire.size) if kind == _BYE else self._judges
        data = _HEAD.pack(kind, recorder.progress)
        if kind == _BEAT:
            data += recorder.digest()
        for rank in ranks:
            if rank != self._wire.rank and (kind == _BYE or not self._wire.under_way(rank)):
                self._wire.post(rank, data)

    def _receive(self, now: float) -> None:
        assert self._wire is not None
        for rank, data in self._wire.poll():
            kind, progress = _HEAD.unpack_from(data)
            rest = data[_HEAD.size :]
            if kind == _EVIDENCE:
                place, _, ring = rest.partition(b"\0")
                self._evidence[rank] = place.decode(), ring
                self._alarm = True
                continue
            self._seen.note(rank, progress, now)
            if kind == _BYE:
                self._gone.add(rank)
                self._seen.drop(rank)
            else:
                self._last[rank] = rest

    # -- a stall --

    def _end(self, now: float) -> None:
        """Write this rank's stacks, hear the others, let one of them speak, end the job."""
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(self._stacks)
        rank, place = self._world.rank, self._place()
        self._evidence[rank] = place, recorder.snapshot()
        if self._wire is not None:
            mine = _HEAD.pack(_EVIDENCE, recorder.progress) + place.encode() + b"\0"
            self._send_to_all(mine + self._evidence[rank][1])
            self._wait_for_evidence(now)
        if min(self._evidence) != rank:  # who speaks ends the job; unless it cannot
            time.sleep(_LAST_RESORT)
        # Whatever goes wrong from here on, a full disk or one that hangs.
        threading.Thread(target=self._last_resort, daemon=True).start()
        verdict = judge(sightings := self._sightings(now))
        path = self._run_dir / AUTOPSY
        where = ""
        with suppress(HpcmlxError):
            write_autopsy(path, verdict, sightings, rank, self._timeout)
            where = f"; see {path}"
        advice = "start the job again, or raise watchdog.timeout if it was only slow"
        self._say(f"no progress: {verdict.line}{where}; {advice}")
        self._on_stall(int(ExitCode.LOST_PEER), f"no progress: {verdict.line}")
        self._world.abort(ExitCode.LOST_PEER, flush=False)

    def _send_to_all(self, data: bytes) -> None:
        assert self._wire is not None
        for rank in range(self._wire.size):
            if rank != self._wire.rank:
                self._wire.post(rank, data)

    def _wait_for_evidence(self, now: float) -> None:
        """Until all have told or the patience is over."""
        assert self._wire is not None
        end = time.monotonic() + _PATIENCE
        while len(self._evidence) < self._wire.size and time.monotonic() < end:
            self._receive(now)
            time.sleep(0.01)

    def _sightings(self, now: float) -> dict[int, Sighting]:
        found = {}
        for rank in range(self._world.size):
            still = now - self._seen.moved[rank]
            if rank in self._evidence:
                place, ring = self._evidence[rank]
                found[rank] = Sighting(flight.parse(ring), None, still, place or None)
            elif rank not in self._gone:
                silent = now - self._seen.heard.get(rank, now)
                found[rank] = Sighting(self._last_of(rank), silent, still)
        return found

    def _last_of(self, rank: int) -> Flight:
        """Of a rank that does not answer: its file, where this host sees it, else what it told. A
        file may be an earlier launch's."""
        told = flight.unknown(rank, self._world.size)
        if rank in self._last:
            told = flight.from_digest(self._last[rank])
        with suppress(OSError, ValueError):
            own = flight.read(flight.file_of(self._run_dir, rank))
            if rank not in self._last or (own.host, own.pid) == (told.host, told.pid):
                return own
        return told

    def _place(self) -> str:
        """Where this rank's main thread is, in its own code."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return ""
        code = frame.f_code
        return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"

    def _say(self, text: str) -> None:
        # Not sys.stderr: another thread may hold its lock for ever.
        line = f"hpcmlx: rank {self._world.rank} on {comm.hostname()}: {text}\n"
        with suppress(OSError):
            os.write(2, line.encode())

    @staticmethod
    def _last_resort() -> None:
        time.sleep(_LAST_RESORT)
        os._exit(ExitCode.LOST_PEER)
