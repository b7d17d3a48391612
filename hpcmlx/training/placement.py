"""Where every trained parameter lies on the ranks of a replica, and who answers for which part.

A parameter may be cut over the tensor-parallel ranks, with parts that several hold (KV heads that
are too few), whole on each of them, or on two stages (a tied embedding). Each position has one
owner: it counts it in norms and writes it to checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import mlx.core as mx
from mlx import nn

from hpcmlx.comm import Communicator
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import take
from hpcmlx.parallel import layers
from hpcmlx.parallel.partition import Cut, Interval
from hpcmlx.training.checkpoints.pieces import first_held

# cut: every position on one rank. overlapping: some on several. partial: whole on all, where each
# has a part of its gradient (inside a block). equal: whole on all, and so is its gradient.
Kind = Literal["cut", "overlapping", "partial", "equal"]


@dataclass(frozen=True)
class Place:
    """One trained parameter on this rank.

    Attributes:
        shape: of the whole parameter.
        cut: the part that is here; None for all of it.
        kind: how the tensor-parallel ranks share it.
        owned: the part that this rank answers for among its tensor-parallel partners: None is all
            that is here, an empty cut nothing.
        spans: where that lies in what is here, along the cut axis; None for all of it.
        stages: which stages (ranks of the pipeline) hold it.
        first: this rank's is the first of them, which answers for it.
    """

    shape: tuple[int, ...]
    cut: Cut | None
    kind: Kind
    owned: Cut | None
    stages: tuple[int, ...]
    first: bool = True
    spans: tuple[Interval, ...] | None = None

    @property
    def owns_nothing(self) -> bool:
        """Whether others answer for all of it."""
        return not self.first or (self.owned is not None and not self.owned.intervals)

    def own(self, array: mx.array) -> mx.array:
        """Of this rank's part of the parameter what it answers for, unevaluated."""
        if self.spans is None or self.cut is None:
            return array
        return take(array, Cut(self.cut.axis, self.spans))

    def spread(self, array: mx.array) -> mx.array:
        """This rank's part in the whole shape, zero elsewhere; what it has twice is added up."""
        if self.cut is None:
            return array
        return _spread(array, self.cut, self.shape)

    def spread_own(self, array: mx.array) -> mx.array:
        """What this rank answers for in the whole shape, zero elsewhere."""
        if self.cut is None:
            return array
        if self.owned is not None and not self.owned.intervals:
            return mx.zeros(self.shape, array.dtype)
        return _spread(self.own(array), self.owned or self.cut, self.shape)

    def local(self, whole: mx.array) -> mx.array:
        """This rank's part of the whole parameter."""
        return whole if self.cut is None else take(whole, self.cut)


NOTHING = Cut(0, ())


def find_places(
    mesh: Mesh,
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    cuts: Mapping[str, Cut],
) -> dict[str, Place]:
    """The places of this rank's trained parameters `names`. Collective over the replica.

    Args:
        modules: this rank's modules by path.
        shapes: of the whole parameters.
        cuts: of those that are cut.
    """
    everyone = mesh.replica.allgather({name: cuts.get(name) for name in names})
    places = {}
    for name in names:
        held = [name in part for part in everyone]
        tp = mesh.dims.tp
        stages = tuple(s for s in range(mesh.dims.pp) if held[s * tp])
        row = everyone[mesh.pp * tp : (mesh.pp + 1) * tp]
        cut = cuts.get(name)
        kind: Kind = "cut"
        owned: Cut | None = None
        spans: tuple[Interval, ...] | None = None
        if cut is None and tp > 1:
            kind = "partial" if _in_block(modules, name) else "equal"
            owned = None if mesh.tp == 0 else NOTHING
        elif cut is not None and _overlap([part[name] for part in row]):
            kind = "overlapping"
            taken = [span for part in row[: mesh.tp] for span in part[name].intervals]
            owned, found = first_held(cut, taken)
            spans = tuple(found)
        first = stages[0] == mesh.pp
        places[name] = Place(shapes[name], cut, kind, owned, stages, first, spans)
    return places


class Gathered:
    """Whole tensors from the parts of the tensor-parallel ranks, for optimizers that need them
    (`optim.Whole`). All of these ranks call it in the same order."""

    def __init__(self, group: Communicator, places: Mapping[str, Place]):
        self._group, self._places = group, places

    def gather(self, path: str, array: mx.array) -> mx.array:
        """The whole of something that is cut as parameter `path`, equal on every rank. Evaluates
        it."""
        place = self._places[path]
        if place.cut is None or self._group.size == 1:
            return array
        (whole,) = self._group.sum_arrays([place.spread_own(array).astype(mx.float32)])
        return whole.astype(array.dtype)

    def local(self, path: str, whole: mx.array) -> mx.array:
        """This rank's part of it."""
        return self._places[path].local(whole)


def _overlap(cuts: Sequence[Cut]) -> bool:
    """Whether some position is held twice."""
    spans = sorted(span for cut in cuts for span in cut.intervals)
    return any(before[1] > after[0] for before, after in pairwise(spans))


def _spread(array: mx.array, cut: Cut, shape: tuple[int, ...]) -> mx.array:
    total = mx.zeros(shape, array.dtype)
    at = 0
    for start, stop in cut.intervals:
        index = [slice(None)] * len(shape)
        index[cut.axis] = slice(at, at + stop - start)
        padding = [(0, 0)] * len(shape)
        padding[cut.axis] = (start, shape[cut.axis] - stop)
        total = total + mx.pad(array[tuple(index)], padding)
        at += stop - start
    return total


def _in_block(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a parameter that is whole on every rank has a part of its gradient on each."""
    parallel = (layers.Block, layers.Rowwise, layers.VocabHead, layers.VocabEmbedding)
    path = name
    while path := path.rpartition(".")[0]:
        if isinstance(modules.get(path), parallel):
            return True
    return False
