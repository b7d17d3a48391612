"""ZeRO-1: every replica remembers, and updates, its share of the parameters only.

Optimizer state is the largest thing in full fine-tuning that all replicas hold alike. Here a
parameter has one owner among the data-parallel ranks, which updates it and sends it to the others
(Rajbhandari et al. 2020, section 5.1, with whole parameters as the units). `Zero1` stands in for
the `Optimizer` it wraps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import mlx.core as mx
import numpy as np

from hpcmlx.comm import Communicator, evaluate
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.optim import Optimizer

PIECE = 32 << 20  # bytes that an owner sends at a time, unless one parameter is larger
_MESSAGE = 1 << 30  # bytes; MPI counts in 32 bits


def assign(sizes: Mapping[str, int], dp: int) -> dict[str, int]:
    """The owner of every parameter: the largest first, each to whoever has the least so far.

    Args:
        sizes: bytes by name.
        dp: number of owners.
    """
    loads = [0] * dp
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        loads[owner] += sizes[name]
        owners[name] = owner
    return owners


class Zero1:
    """An `Optimizer` whose state is spread over the replicas."""

    def __init__(self, optimizer: Optimizer, dp_group: Communicator, sizes: Mapping[str, int]):
        """
        Args:
            optimizer: this rank's; it gets to see owned parameters only.
            dp_group: the ranks with the same part of every replica.
            sizes: bytes of every parameter. Tensor-parallel ranks must give the same ones, so
                those of whole tensors: their owners then are tensor-parallel partners again, which
                adafactor and muon need.
        """
        self._optimizer, self._group = optimizer, dp_group
        self._owners = assign(sizes, dp_group.size)
        self.settings = optimizer.settings

    def owner(self, name: str) -> int:
        """The rank of `dp_group` that needs the gradient of parameter `name`; no other does."""
        return self._owners[name]

    @property
    def state(self) -> dict[str, mx.array]:
        """State of the parameters that this rank owns."""
        return self._optimizer.state

    def init(self, params: Mapping[str, mx.array]) -> None:
        """As `Optimizer.init`; `params` are all of them, owned or not."""
        self._optimizer.init(self._owned(params))

    def restore(self, state: Mapping[str, mx.array]) -> None:
        """As `Optimizer.restore`. What others own may be among `state` and is left out."""
        rank = self._group.rank
        own = {n: v for n, v in state.items() if self._owners.get(n.rpartition("/")[0]) == rank}
        self._optimizer.restore(own)

    def update(
        self, params: Mapping[str, mx.array], grads: Mapping[str, mx.array], step: int
    ) -> dict[str, mx.array]:
        """The parameters after update number `step`, evaluated, equal on all ranks. Collective.

        Args:
            params: all of them.
            grads: at least those of the parameters that this rank owns.
        """
        new = self._optimizer.update(self._owned(params), self._owned(grads), step)
        evaluate(new, self._optimizer.state)
        if self._group.size == 1:
            return new
        return _share(self._group, params, new, self._owners)

    def learning_rate(self, step: int) -> float:
        """As `Optimizer.learning_rate`."""
        return self._optimizer.learning_rate(step)

    def state_cut(self, name: str, cuts: Mapping[str, Cut | None]) -> Cut | None:
        """As `Optimizer.state_cut`."""
        return self._optimizer.state_cut(name, cuts)

    def _owned(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        return {n: a for n, a in arrays.items() if self._owners[n] == self._group.rank}


def _share(
    group: Communicator,
    params: Mapping[str, mx.array],
    new: Mapping[str, mx.array],
    owners: Mapping[str, int],
) -> dict[str, mx.array]:
    """Everybody's `new`. All owners send at once, a piece each, so that links carry both ways."""
    shared = dict(new)
    streams = [_pieces(params, owners, root) for root in range(group.size)]
    for pieces in zip_longest(*streams, fillvalue=[]):
        buffers = [
            _bytes([new[name] for name in names])
            if root == group.rank
            else np.empty(sum(params[name].nbytes for name in names), np.uint8)
            for root, names in enumerate(pieces)
        ]
        requests = [
            group.ibcast(buffer[start : start + _MESSAGE], root)
            for root, buffer in enumerate(buffers)
            for start in range(0, len(buffer), _MESSAGE)
        ]
        for request in requests:
            request.wait()
        for root, (names, buffer) in enumerate(zip(pieces, buffers, strict=True)):
            if root != group.rank:
                shared |= _arrays(buffer, names, params)
    return {name: shared[name] for name in sorted(shared)}


def _pieces(
    params: Mapping[str, mx.array], owners: Mapping[str, int], root: int
) -> Iterator[list[str]]:
    """The names of what `root` owns, by as many as fit into one piece."""
    piece: list[str] = []
    filled = 0
    for name in sorted(name for name in params if owners[name] == root):
        if piece and filled + params[name].nbytes > PIECE:
            yield piece
            piece, filled = [], 0
        piece.append(name)
        filled += params[name].nbytes
    if piece:
        yield piece


def _bytes(arrays: Sequence[mx.array]) -> np.ndarray:
    """What the arrays are made of, one after the other."""
    if not arrays:
        return np.empty(0, np.uint8)
    flat = mx.concatenate([array.reshape(-1).view(mx.uint8) for array in arrays])
    evaluate(flat)
    return np.array(flat, copy=False)


def _arrays(
    buffer: np.ndarray, names: Sequence[str], like: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """The arrays that `buffer` is made of; dtypes and shapes are those of `like`."""
    arrays, start = {}, 0
    for name in names:
        stop = start + like[name].nbytes
        flat = mx.array(buffer[start:stop])
        arrays[name] = flat.view(like[name].dtype).reshape(like[name].shape)
        start = stop
    return arrays
