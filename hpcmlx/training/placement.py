"""Where every trained parameter lies on the ranks of a replica, and who answers for which part.

A parameter may be cut over the tensor-parallel ranks, with parts that several hold (KV heads that
are too few), whole on each of them, or on two stages (a tied embedding). Each position has one
owner: it counts it in norms and writes it to checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
from mlx import nn

from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import take
from hpcmlx.parallel import layers
from hpcmlx.parallel.partition import Cut, Interval

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
        owned: the part that this rank answers for: None is all that is here, an empty cut nothing.
        stages: of the stages (0 ... pp - 1, ranks of the pipeline) that hold it, all.
    """

    shape: tuple[int, ...]
    cut: Cut | None
    kind: Kind
    owned: Cut | None
    stages: tuple[int, ...]

    @property
    def owns_nothing(self) -> bool:
        return self.owned is not None and not self.owned.intervals

    def own(self, array: mx.array) -> mx.array:
        """Of this rank's part of the parameter what it answers for, unevaluated."""
        if self.owned is None or self.cut is None:
            return array
        return take(array, Cut(self.cut.axis, tuple(_inside(self.owned, self.cut))))

    def spread(self, array: mx.array) -> mx.array:
        """This rank's part in the whole shape, zero elsewhere; what it has twice is added up."""
        if self.cut is None:
            return array
        return _spread(array, self.cut, self.shape)

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
        kind: Kind
        owned: Cut | None
        if tp == 1:
            kind, owned = "cut", None
        elif cut is None:
            kind = "partial" if _in_block(modules, name) else "equal"
            owned = None if mesh.tp == 0 else NOTHING
        else:
            parts = owners([part[name].intervals for part in row])
            exact = all(
                tuple(mine) == part[name].intervals for mine, part in zip(parts, row, strict=True)
            )
            kind = "cut" if exact else "overlapping"
            owned = None if exact else Cut(cut.axis, tuple(parts[mesh.tp]))
        if stages[0] != mesh.pp:
            owned = NOTHING
        places[name] = Place(shapes[name], cut, kind, owned, stages)
    return places


def owners(held: Sequence[Sequence[Interval]]) -> list[list[Interval]]:
    """What each rank answers for, of the intervals that each holds: a position is the first's that
    holds it. Pure."""
    taken: list[Interval] = []
    result = []
    for intervals in held:
        mine: list[Interval] = []
        for interval in intervals:
            free = [interval]
            for start, stop in taken:
                free = [
                    (a, b)
                    for low, high in free
                    for a, b in ((low, min(high, start)), (max(low, stop), high))
                    if a < b
                ]
            mine += free
            taken += free
        result.append(mine)
    return result


def _inside(part: Cut, whole: Cut) -> list[Interval]:
    """Where the intervals of `part` lie in an array cut by `whole`."""
    found = []
    for start, stop in part.intervals:
        at = 0
        for low, high in whole.intervals:
            if low <= start and stop <= high:
                found.append((at + start - low, at + stop - low))
                break
            at += high - low
        else:
            raise ValueError(f"{start}:{stop} is not in one piece of {whole.intervals}")
    return found


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
