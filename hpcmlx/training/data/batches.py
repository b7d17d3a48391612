"""Global batches and how their rows are dealt to replicas and microbatches.

Everything is a pure function of lengths, seed and step number, so that all ranks agree on every
microbatch's shape without a message, and a run goes on anywhere. The layout decides only who gets
which row of a global batch. Called by the trainer, on every rank alike.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import mlx.core as mx
import numpy as np

from hpcmlx.errors import ConfigError
from hpcmlx.training.data.examples import Sample
from hpcmlx.training.data.order import Epoch, Row, packed_epoch, shuffled_epoch


class Samples(Protocol):
    """What `collate` reads from: a `Dataset`."""

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Rows:
    """What a microbatch is made of.

    Attributes:
        rows: the examples of each row, one unless they are packed; none: a row of padding, which
            stands where a replica has no more rows but the others have.
        length: of every row in tokens, padding included.
        packed: whether rows hold several examples.
    """

    rows: tuple[Row, ...]
    length: int
    packed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, length] of the tokens."""
        return len(self.rows), self.length

    @property
    def ids(self) -> tuple[int, ...]:
        """The examples, row by row."""
        return tuple(chain.from_iterable(self.rows))


@dataclass(frozen=True)
class Step:
    """One global batch.

    Attributes:
        ids: its examples in the order of the stream, which is the same in every layout.
        num_targets: tokens to be predicted, over the whole global batch.
        microbatches: of each dp replica its microbatches, as many for each.
        epoch: in which it begins, from 0.
    """

    ids: tuple[int, ...]
    num_targets: int
    microbatches: tuple[tuple[Rows, ...], ...]
    epoch: int


@dataclass(frozen=True)
class Microbatch:
    """The tokens of some rows.

    Attributes:
        tokens: [rows, length] int32, padded on the right with 0.
        targets: [rows, length] bool: whether tokens[b, t] is to be predicted from position t - 1.
        segments: [rows, length] int32: in packed rows 1, 2, … for the examples, between which
            there is no attention, and 0 for padding; None where rows are not packed.
        ids: the examples, row by row.
    """

    tokens: mx.array
    targets: mx.array
    segments: mx.array | None
    ids: tuple[int, ...]


class Batches:
    """The global batches of a run.

    The stream of rows is one epoch after the other without a gap; step n covers its rows from n *
    `global_batch_size` on. So the number of steps done is all there is to know of a run's place.
    The last batch of the last epoch has the rows that are left.

    Attributes:
        num_steps: of the whole run.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        num_targets: np.ndarray,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        max_length: int,
        dp: int = 1,
        packing: bool = False,
        pad_to: int = 32,
        num_epochs: int | None = None,
        num_steps: int | None = None,
    ):
        """
        Args:
            lengths: [samples] in tokens.
            num_targets: [samples] tokens to be predicted.
            seed: of the order.
            global_batch_size: rows of a step, over all replicas.
            micro_batch_size: rows that go through the model together, at most.
            max_length: tokens of a row, at most.
            dp: number of replicas.
            packing: whether to fill rows with several examples.
            pad_to: what a row's length is a multiple of, unless that were above `max_length`.
            num_epochs: how often every example is seen; this or `num_steps` is given.
            num_steps: how many steps there are, through as many epochs as it takes.

        Raises:
            ConfigError: a number below 1 or a seed below 0; both or none of `num_epochs` and
                `num_steps`; there are no examples, or one is longer than `max_length`.
        """
        _check_settings(
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp=dp,
            pad_to=pad_to,
            num_epochs=num_epochs,
            num_steps=num_steps,
        )
        if seed < 0:
            raise ConfigError(f"seed={seed} must not be negative")
        if (num_epochs is None) == (num_steps is None):
            raise ConfigError("give either num_epochs or num_steps")
        self._lengths = np.asarray(lengths, np.int32)
        self._num_targets = np.asarray(num_targets, np.int64)
        if not len(self._lengths):
            raise ConfigError("there are no examples to train on")
        if (longest := int(self._lengths.max())) > max_length:
            raise ConfigError(
                f"an example has {longest} tokens, more than max_length={max_length}; prepare the "
                "data with the same max_length"
            )
        self._seed, self._packing = seed, packing
        self._batch, self._micro, self._dp = global_batch_size, micro_batch_size, dp
        self._max_length, self._pad_to = max_length, pad_to
        self._starts = [0]  # first row of each epoch in the stream, as far as it was needed
        self._epochs: dict[int, Epoch] = {}
        if num_steps is None:
            assert num_epochs is not None
            self._num_rows = self._start(num_epochs)
            num_steps = -(-self._num_rows // global_batch_size)
        else:
            self._num_rows = num_steps * global_batch_size
        self.num_steps: int = num_steps

    def step(self, n: int) -> Step:
        """Step `n`, from 0. Raises IndexError where there is no such step."""
        if not 0 <= n < self.num_steps:
            raise IndexError(f"step {n} of {self.num_steps}")
        start = n * self._batch
        rows = self._rows(start, min(start + self._batch, self._num_rows))
        ids = tuple(chain.from_iterable(rows))
        num_targets = int(self._num_targets[list(ids)].sum())
        lengths = [int(self._lengths[list(row)].sum()) for row in rows]
        microbatches = tuple(
            tuple(self._microbatch([rows[i] for i in group]) for group in replica)
            for replica in deal(lengths, self._dp, self._micro)
        )
        return Step(ids, num_targets, microbatches, self._epoch_at(start))

    def _microbatch(self, rows: Sequence[Row]) -> Rows:
        rows = rows or [()]
        longest = max(int(self._lengths[list(row)].sum()) for row in rows)
        length = max(1, -(-longest // self._pad_to)) * self._pad_to
        return Rows(tuple(rows), min(length, self._max_length), self._packing)

    def _rows(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop` of the stream."""
        rows: list[Row] = []
        while start < stop:
            number = self._epoch_at(start)
            first, end = self._starts[number], min(stop, self._start(number + 1))
            rows += self._epoch(number).rows(start - first, end - first)
            start = end
        return rows

    def _epoch_at(self, row: int) -> int:
        """The epoch that a row of the stream belongs to."""
        while self._starts[-1] <= row:
            self._start(len(self._starts))
        return bisect_right(self._starts, row) - 1

    def _start(self, number: int) -> int:
        """Where epoch `number` begins in the stream. With packing each has another number of rows,
        and all before it are packed to find out."""
        while len(self._starts) <= number:
            last = len(self._starts) - 1
            size = len(self._epoch(last)) if self._packing else len(self._lengths)
            self._starts.append(self._starts[-1] + size)
        return self._starts[number]

    def _epoch(self, number: int) -> Epoch:
        """The rows of an epoch; those of the last two asked for are kept, which a step may span."""
        if number not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            if self._packing:
                epoch = packed_epoch(self._lengths, self._seed, number, self._max_length)
            else:
                epoch = shuffled_epoch(self._lengths, self._seed, number, self._batch)
            self._epochs[number] = epoch
        return self._epochs[number]


def deal(lengths: Sequence[int], dp: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Deal the rows of a global batch to replicas, in microbatches.

    Rows of similar lengths go together, which saves padding; then each microbatch, the dearest
    first, goes to the replica that has least to do and not all of its microbatches.

    Args:
        lengths: of the rows, in tokens.
        dp: number of replicas.
        micro_batch_size: rows of a microbatch, at most.

    Returns:
        Of each replica its microbatches, each the positions of its rows, the dearest first. All
        replicas have as many, and sizes differ by one row at most; where there are too few rows
        some are empty.
    """
    per_replica = -(-len(lengths) // (dp * micro_batch_size))
    num_groups = per_replica * dp
    size, rest = divmod(len(lengths), num_groups)
    by_length = iter(sorted(range(len(lengths)), key=lambda i: -lengths[i]))
    # The longest rows are in the smaller groups.
    groups = [
        [next(by_length) for _ in range(size + (g >= num_groups - rest))] for g in range(num_groups)
    ]

    def cost(group: Sequence[int]) -> int:
        return len(group) * max((lengths[i] for i in group), default=0)

    dealt: list[list[list[int]]] = [[] for _ in range(dp)]
    loads = [0] * dp
    for group in sorted(groups, key=lambda group: -cost(group)):
        free = [r for r in range(dp) if len(dealt[r]) < per_replica]
        least = min(free, key=lambda r: (loads[r], len(dealt[r])))
        dealt[least].append(group)
        loads[least] += cost(group)
    return dealt


def collate(dataset: Samples, rows: Rows) -> Microbatch:
    """Read the tokens of a microbatch.

    Raises:
        IntegrityError: as the dataset.
    """
    tokens = np.zeros(rows.shape, np.int32)
    targets = np.zeros(rows.shape, bool)
    segments = np.zeros(rows.shape, np.int32)
    for b, row in enumerate(rows.rows):
        start = 0
        for number, index in enumerate(row, 1):
            sample = dataset[index]
            place = b, slice(start, start + len(sample.tokens))
            tokens[place], targets[place], segments[place] = sample.tokens, sample.targets, number
            start += len(sample.tokens)
    return Microbatch(
        mx.array(tokens),
        mx.array(targets),
        mx.array(segments) if rows.packed else None,
        rows.ids,
    )


def _check_settings(**settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
