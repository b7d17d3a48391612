"""Index arithmetic of every split, as pure functions: no MLX, no MPI.

Units are dealt out by weight (KV-head groups, quantization groups of a hidden dim, vocabulary rows,
layers), then turned into a `Cut`: the positions along one axis of one tensor that a rank holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd, inf, lcm

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


def capped_shares(weights: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Shares of a whole in proportion to `weights`, but none above its limit: what one cannot take
    the others do, in proportion.

    Args:
        weights: one positive number per rank.
        limits: the largest share of each, as a part of the whole.

    Raises:
        ValueError: the limits together are less than the whole.
    """
    if sum(limits) < 1:
        raise ValueError(f"only {sum(limits):.0%} of the whole has room")
    shares = dict.fromkeys(range(len(weights)), 0.0)
    full: set[int] = set()
    while True:
        rest = 1 - sum(limits[i] for i in full)
        free = sum(w for i, w in enumerate(weights) if i not in full)
        for i, weight in enumerate(weights):
            shares[i] = limits[i] if i in full else rest * weight / free
        over = {i for i in shares if i not in full and shares[i] > limits[i]}
        if not over or len(full | over) == len(weights):
            return [min(shares[i], limits[i]) for i in shares]
        full |= over


def balance_layers(
    layer_costs: Sequence[float],
    num_stages: int,
    last_cost: float = 0.0,
    speeds: Sequence[float] | None = None,
    fits: Callable[[int, int, int], bool] | None = None,
) -> list[int]:
    """Cut consecutive layers into stages so that the slowest stage is as fast as it can be.

    Exact, by dynamic programming; among the best cuts the one with the smallest sum of squared
    stage times. O(num_stages * num_layers^2).

    Args:
        layer_costs: cost of each layer (bytes, seconds), not negative.
        num_stages: how many stages, each of at least one layer.
        last_cost: what the last stage bears on top (the head).
        speeds: what each stage's cost is divided by; None: all are equally fast.
        fits: whether a stage has room for the layers [start, stop): (stage, start, stop).

    Returns:
        The number of layers of each stage.

    Raises:
        ValueError: there are fewer layers than stages, or no stage, or no cut that fits.
    """
    num_layers = len(layer_costs)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_layers} layers cannot give one to each of {num_stages} stages")
    sums = list(accumulate(layer_costs, initial=0.0))
    rates = [1.0] * num_stages if speeds is None else speeds

    def time(stage: int, start: int, stop: int) -> float:
        if fits is not None and not fits(stage, start, stop):
            return inf
        head = last_cost if stop == num_layers else 0.0
        return (sums[stop] - sums[start] + head) / rates[stage]

    def best(step: Callable[[float, float], float]) -> tuple[float, list[int]]:
        """(total, counts) of the cut whose stage times, folded by `step`, are the least."""
        table: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(num_stages):
            table = {
                stop: min(
                    (step(total, time(stage, start, stop)), [*counts, stop - start])
                    for start, (total, counts) in table.items()
                    if start < stop
                )
                for stop in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1)
            }
        return table[num_layers]

    limit = best(max)[0] * (1 + 1e-12)
    if limit == inf:
        raise ValueError(f"no cut into {num_stages} stages fits")
    return best(lambda total, t: total + t * t if t <= limit else inf)[1]


def offsets(counts: Sequence[int]) -> list[Interval]:
    """Consecutive half-open intervals of the given lengths, from 0."""
    ends = list(accumulate(counts))
    return [(end - n, end) for n, end in zip(counts, ends, strict=True)]


def merge(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """The same positions in the same order with touching intervals joined, empty ones dropped."""
    merged: list[Interval] = []
    for start, stop in intervals:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def split_aligned(length: int, quantum: int, weights: Sequence[float]) -> list[Interval]:
    """Cut `length` positions into one interval per rank, in proportion to `weights`, at multiples
    of `quantum`; every rank gets at least one quantum and the last quantum may be short.

    Raises:
        ValueError: there are fewer quanta than ranks, or a weight is not positive.
    """
    counts = split_by_weight(-(-length // quantum), weights, minimum=1)
    return [(start * quantum, min(stop * quantum, length)) for start, stop in offsets(counts)]


@dataclass(frozen=True)
class HeadShare:
    """The attention heads of one rank.

    Attributes:
        query: half-open interval of query heads.
        key_value: the KV heads held, in the order of the query heads they serve. Each serves
            `len(query) / len(key_value)` consecutive query heads, so a KV head occurs more than
            once where the rank's query heads do not fall evenly on its KV heads.
    """

    query: Interval
    key_value: tuple[int, ...]

    @property
    def num_query(self) -> int:
        """Number of query heads."""
        return self.query[1] - self.query[0]


def split_heads(
    num_query: int, num_key_value: int, weights: Sequence[float], quantum: int = 1
) -> list[HeadShare]:
    """Deal attention heads out by weight.

    The unit is a KV head with the query heads that it serves. When there are too few of those for
    the ranks, the unit is the query head and KV heads are replicated.

    Args:
        num_query: query heads of the layer.
        num_key_value: KV heads; divides `num_query`.
        weights: one positive share per rank.
        quantum: query heads that must stay together (quantization groups of the output
            projection may span several).

    Raises:
        ValueError: there are fewer units of `quantum` query heads than ranks.
    """
    per_group = num_query // num_key_value
    unit = lcm(per_group, quantum)
    if -(-num_query // unit) < len(weights):
        unit = quantum
    shares = []
    for start, stop in split_aligned(num_query, unit, weights):
        served = Counter(head // per_group for head in range(start, stop))
        width = gcd(*served.values())
        held = tuple(kv for kv, count in served.items() for _ in range(count // width))
        shares.append(HeadShare((start, stop), held))
    return shares
