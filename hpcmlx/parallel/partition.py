"""Index arithmetic of every split, as pure functions: no MLX, no MPI.

Units are dealt out by weight (KV-head groups, quantization groups of a hidden dim, vocabulary rows,
layers), then turned into a `Cut`: the positions along one axis of one tensor that a rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Interval = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """The part of one tensor that a rank holds.

    Attributes:
        axis: the axis that is cut (non-negative).
        intervals: half-open ranges of positions along `axis`, in the order in which they are
            concatenated. A range may occur twice: a KV head that serves two query heads is
            replicated that way.
    """

    axis: int
    intervals: tuple[Interval, ...]

    @property
    def size(self) -> int:
        """Number of positions along `axis`."""
        return sum(stop - start for start, stop in self.intervals)

    def shape(self, full: Sequence[int]) -> tuple[int, ...]:
        """Shape of the cut tensor, from the shape of the whole one."""
        return tuple(self.size if i == self.axis else n for i, n in enumerate(full))

    def scaled(self, numerator: int, denominator: int) -> Cut:
        """The same cut of a tensor whose `axis` is numerator/denominator times as long
        (packed quantized weights, one scale per group).

        Raises:
            ValueError: an interval does not fall on whole positions.
        """
        intervals = []
        for start, stop in self.intervals:
            if start * numerator % denominator or stop * numerator % denominator:
                raise ValueError(f"{start}:{stop} is not a multiple of {denominator}/{numerator}")
            intervals.append((start * numerator // denominator, stop * numerator // denominator))
        return Cut(self.axis, tuple(intervals))


def split_by_weight(num_units: int, weights: Sequence[float], minimum: int = 0) -> list[int]:
    """Deal `num_units` out in proportion to `weights` (largest remainder; ties to the lower rank).

    Args:
        num_units: how many indivisible units there are.
        weights: one positive share per rank.
        minimum: the least number of units any rank may get.

    Returns:
        One count per rank; they sum to `num_units`.

    Raises:
        ValueError: a weight is not positive, or there are fewer units than `minimum` asks for.
    """
    if any(w <= 0 for w in weights):
        raise ValueError(f"shares must be positive, got {list(weights)}")
    if num_units < minimum * len(weights):
        raise ValueError(f"{num_units} units cannot give {minimum} to each of {len(weights)} ranks")
    free = num_units - minimum * len(weights)
    total = sum(weights)
    exact = [num_units * w / total for w in weights]
    # Reserve the minimum, deal the rest towards the exact share.
    want = [max(0.0, e - minimum) for e in exact]
    scale = free / sum(want) if sum(want) else 0.0
    want = [w * scale for w in want]
    counts = [int(w + 1e-9) for w in want]
    order = sorted(range(len(weights)), key=lambda r: (-(want[r] - counts[r]), r))
    for r in order[: free - sum(counts)]:
        counts[r] += 1
    return [c + minimum for c in counts]


def offsets(counts: Sequence[int]) -> list[Interval]:
    """Consecutive half-open intervals of the given lengths, from 0."""
    ends = list(accumulate(counts))
    return [(end - n, end) for n, end in zip(counts, ends, strict=True)]
