"""What every rank did when: recorded as spans, gathered on one clock.

The engine records what it computes and what it waits for; at the end of a run with `timeline=true`
the job saves the spans of all ranks in `timeline.h5`, on rank 0's clock; `gantt.py` draws them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcmlx.comm import Communicator
from hpcmlx.files import write_hdf5

#: Spans that a rank keeps: those of the beginning of the run.
LIMIT = 20_000
#: What a span can be; all but "wait" count as busy.
KINDS = ("prefill", "decode", "sample", "admit", "wait", "forward", "backward")
SPAN = np.dtype(
    [("begin", "f8"), ("end", "f8"), ("kind", "u1"), ("slot", "i4"), ("num_tokens", "i4")]
)
#: Kind -> its number in a span.
CODES = {kind: code for code, kind in enumerate(KINDS)}
WAIT = CODES["wait"]
_ROUNDS = 9  # barriers for one reading of the clocks' offset: the median is off by some 10 µs


class Timeline:
    """This rank's spans. Only the first `limit` are kept, so that a long run does not grow.

    Attributes:
        clock: what begins and ends are read from, in seconds.
    """

    def __init__(self, limit: int = LIMIT, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self._limit, self._is_full = limit, False
        self._spans: list[tuple[float, float, int, int, int]] = []
        #: (this rank's clock, rank 0's minus this rank's)
        self._offsets: list[tuple[float, float]] = []

    def record(self, kind: str, slot: int, begin: float, end: float, num_tokens: int = 0) -> None:
        """Keep a span: host time in which what it names was computed, to its end.

        Spans may overlap; where a "wait" lies inside another span, that part is idle.

        Args:
            kind: one of `KINDS`.
            slot: the microbatch.
            begin, end: readings of `clock`.
            num_tokens: rows times positions that went through.
        """
        if len(self._spans) < self._limit:
            self._spans.append((begin, end, CODES[kind], slot, num_tokens))
        else:
            self._is_full = True

    @contextmanager
    def span(self, kind: str, slot: int, num_tokens: int = 0) -> Iterator[None]:
        """Record the time of a `with` block; arguments as `record`."""
        begin = self.clock()
        yield
        self.record(kind, slot, begin, self.clock(), num_tokens)

    def align(self, world: Communicator) -> None:
        """Compare this rank's clock with rank 0's. Collective.

        Call it before the run: `gather` does it once more, and two readings tell how fast the
        clocks drift apart.
        """
        readings = []
        for _ in range(_ROUNDS):
            world.barrier()
            now = self.clock()
            readings.append((world.bcast(now) - now, now))
        offset, now = sorted(readings)[_ROUNDS // 2]
        self._offsets.append((now, offset))

    def gather(self, world: Communicator, place: tuple[int, int, int]) -> list[Lane] | None:
        """Every rank's spans on rank 0, on rank 0's clock; None elsewhere. Collective.

        Args:
            place: this rank's (dp, pp, tp) coordinates.
        """
        self.align(world)
        spans = np.array(self._spans, SPAN)
        for name in ("begin", "end"):
            spans[name] += _interpolate(self._offsets, spans[name])
        lanes = world.gather(Lane(world.rank, *place, spans, self._is_full))
        if lanes is None:
            return None
        starts = [lane.spans["begin"].min() for lane in lanes if len(lane.spans)]
        for lane in lanes:
            for name in ("begin", "end"):
                lane.spans[name] -= min(starts, default=0.0)
        return lanes

    def save(
        self, world: Communicator, place: tuple[int, int, int], run_dir: Path, layout: str
    ) -> list[Lane] | None:
        """Write `timeline.h5`. Collective.

        Args:
            place: this rank's (dp, pp, tp) coordinates.
            layout: as in `dp1_pp2_tp2`.

        Returns:
            On rank 0 what is in it, None elsewhere.

        Raises:
            StorageError: the disk is full or failing.
        """
        lanes = self.gather(world, place)
        if lanes is not None:
            write_hdf5(run_dir / "timeline.h5", lambda file: _fill(file, lanes, layout))
        return lanes


class _Off(Timeline):
    def record(self, kind: str, slot: int, begin: float, end: float, num_tokens: int = 0) -> None:
        pass

    def span(self, kind: str, slot: int, num_tokens: int = 0) -> AbstractContextManager[None]:
        return nullcontext()

    def align(self, world: Communicator) -> None:
        pass

    def save(
        self, world: Communicator, place: tuple[int, int, int], run_dir: Path, layout: str
    ) -> list[Lane] | None:
        return None


#: Takes spans and forgets them, at no cost: for runs that want no picture.
OFF: Timeline = _Off()


@dataclass(frozen=True)
class Lane:
    """What one rank did.

    Attributes:
        spans: [n] of `SPAN`; times in seconds from the first span of the run.
        is_full: later ones were not kept.
    """

    rank: int
    replica: int
    stage: int
    tp: int
    spans: np.ndarray
    is_full: bool


def _interpolate(offsets: Sequence[tuple[float, float]], at: np.ndarray) -> np.ndarray:
    """The clock's offset at times `at`, along the line through its first and last reading."""
    (begin, first), (end, last) = offsets[0], offsets[-1]
    drift = (last - first) / (end - begin) if end > begin else 0.0
    return first + drift * (at - begin)


def _fill(file: h5py.File, lanes: Sequence[Lane], layout: str) -> None:
    """One dataset per column, rank by rank; a line per rank in the group `ranks`."""
    checked: dict[str, Any] = {"fletcher32": True, "maxshape": (None,)}
    spans = np.concatenate([lane.spans for lane in lanes])
    ranks = np.repeat([lane.rank for lane in lanes], [len(lane.spans) for lane in lanes])
    file.create_dataset("rank", data=ranks.astype("i4"), **checked)
    for name in SPAN.names:
        file.create_dataset(name, data=spans[name], **checked)
    file["kind"].attrs["names"] = list(KINDS)
    file["begin"].attrs["unit"] = file["end"].attrs["unit"] = "s"
    for name in ("rank", "replica", "stage", "tp", "is_full"):
        file[f"ranks/{name}"] = [getattr(lane, name) for lane in lanes]
    file.attrs["layout"] = layout
