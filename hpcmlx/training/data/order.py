"""Which examples come when: every epoch's order of rows, as a pure function of (seed, epoch).

A row is one example, or with packing several that fit into one sequence. Nothing here knows of
ranks or microbatches, so the order of a run is the same in every layout. `batches.py` deals it out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

#: The examples of one row.
Row = tuple[int, ...]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# Global batches that are sorted by length together: at most so many and a quarter of the epoch, or
# the same examples would meet in every epoch.
_SORT_WINDOW, _SORT_PART = 32, 4
_PACK_WINDOW = 4096  # examples that are packed together


def permutation(count: int, *key: int) -> Int64:
    """The numbers below `count` in an order that depends on `key` alone.

    Random keys are sorted, rather than `Generator.permutation` called: NumPy may change that one
    from version to version, but no bit generator's raw output (NEP 19).
    """
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(draws, kind="stable")


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows as a greedy rule can: best fit, the longest first.

    Like first fit it needs at most 11/9 of the fewest rows, and a sorted list finds its row.

    Args:
        lengths: of the items, none above `capacity`.

    Returns:
        The items of each row, by their position in `lengths`.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left, and of which row; ascending
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        at = bisect_left(room, (lengths[item], 0))
        if at == len(room):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(item)
        if free > lengths[item]:
            insort(room, (free - lengths[item], row))
    return rows


@dataclass(frozen=True)
class Epoch:
    """The rows of one epoch: row i holds `ids[bounds[order[i]]:bounds[order[i] + 1]]`.

    Attributes:
        ids: every example once.
        bounds: [rows + 1] where rows begin and end in `ids`.
        order: [rows] a permutation.
    """

    ids: Int64
    bounds: Int64
    order: Int64

    def __len__(self) -> int:
        return len(self.order)

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop`, in order."""
        return [
            tuple(self.ids[self.bounds[row] : self.bounds[row + 1]].tolist())
            for row in self.order[start:stop]
        ]


def shuffled_epoch(lengths: Int32, seed: int, epoch: int, batch_size: int) -> Epoch:
    """An epoch of single examples in which those of a global batch are of similar lengths.

    A window of some batches is sorted by length and cut into batches, and then all batches are
    shuffled. Epochs follow one another without a gap, so one batch may lie across two of them;
    the examples of such a batch stay as they were drawn.
    """
    count = len(lengths)
    order = permutation(count, seed, epoch, 0)
    begin = min(-epoch * count % batch_size, count)  # of the first batch that is all this epoch's
    num_batches = (count - begin) // batch_size
    end = begin + num_batches * batch_size
    whole = order[begin:end]
    num_sorted = max(1, min(_SORT_WINDOW, num_batches // _SORT_PART))
    window = np.arange(len(whole)) // (num_sorted * batch_size)
    whole = whole[np.lexsort((lengths[whole], window))].reshape(num_batches, batch_size)
    whole = whole[permutation(num_batches, seed, epoch, 1)]
    ids = np.concatenate([order[:begin], whole.ravel(), order[end:]])
    return Epoch(ids, np.arange(count + 1), np.arange(count))


def packed_epoch(lengths: Int32, seed: int, epoch: int, capacity: int) -> Epoch:
    """An epoch of rows of at most `capacity` tokens, each of as many examples as fit.

    Packed are random examples, window by window; then all rows are shuffled.
    """
    order = permutation(len(lengths), seed, epoch, 0)
    pieces, sizes = [], [0]
    for start in range(0, len(order), _PACK_WINDOW):
        window = order[start : start + _PACK_WINDOW]
        rows = pack(lengths[window].tolist(), capacity)
        pieces.append(window[list(chain.from_iterable(rows))])
        sizes += map(len, rows)
    bounds = np.cumsum(sizes)
    return Epoch(np.concatenate(pieces), bounds, permutation(len(bounds) - 1, seed, epoch, 1))
