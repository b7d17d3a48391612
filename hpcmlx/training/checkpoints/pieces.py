"""Who holds what of a tensor, and how any part of it is put together from other parts.

Index arithmetic for checkpoints: what all ranks hold must make up every tensor exactly once, and
a rank of any other layout finds its own part in theirs. Pure but for `without_copies`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from hpcmlx.comm import Communicator
from hpcmlx.errors import IntegrityError
from hpcmlx.parallel.partition import Cut, Interval, merge


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor.

    Attributes:
        array: the part.
        shape: of the whole tensor.
        cut: which part it is; None: all of it.
    """

    array: mx.array
    shape: tuple[int, ...]
    cut: Cut | None = None


@dataclass(frozen=True)
class Claim:
    """What one rank says of its piece.

    Attributes:
        shape, dtype: of the whole tensor.
        cut: the part.
        held: shape of the array.
        expected: the shape that the cut gives.
    """

    shape: tuple[int, ...]
    dtype: str
    cut: Cut
    held: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor that is spread over ranks.

    Attributes:
        shape: of the whole tensor.
        dtype: as MLX calls it ("bfloat16").
        parts: by rank, each cut along the same axis; together every position exactly once.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[int, Cut]


@dataclass(frozen=True)
class Block:
    """A block of one part and where it goes in what is put together.

    Attributes:
        rank: whose part.
        source: its place in the part.
        target: its place in the result.
    """

    rank: int
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def dtype_name(dtype: mx.Dtype) -> str:
    """As in "float32"."""
    return str(dtype).rpartition(".")[2]


def storage_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A scalar is stored, and cut, as a vector of one."""
    return tuple(shape) or (1,)


def as_cut(shape: Sequence[int], cut: Cut | None) -> Cut:
    """The cut without empty and with touching intervals joined; a whole tensor is cut along
    axis 0."""
    if cut is None:
        return Cut(0, merge([(0, storage_shape(shape)[0])]))
    return Cut(cut.axis, merge(cut.intervals))


def describe(piece: Piece) -> Claim:
    """A piece without its numbers."""
    shape = tuple(piece.shape)
    dtype = dtype_name(piece.array.dtype)
    cut = as_cut(shape, piece.cut)
    expected = shape if piece.cut is None else cut.shape(storage_shape(shape))
    return Claim(shape, dtype, cut, tuple(piece.array.shape), expected)


def tabulate(held: Sequence[Mapping[str, Claim]]) -> dict[str, Tensor]:
    """The table of all tensors from what every rank holds, in the order of ranks.

    Raises:
        IntegrityError: a position of a tensor is held by no rank or twice, or ranks do not agree
            on the tensor; names the tensor.
    """
    parts: dict[str, dict[int, Cut]] = {}
    first: dict[str, tuple[int, Claim]] = {}
    for rank, tensors in enumerate(held):
        for name, own in tensors.items():
            other, known = first.setdefault(name, (rank, own))
            if (own.shape, own.dtype) != (known.shape, known.dtype):
                raise IntegrityError(
                    f"tensor {name} is {own.dtype} {list(own.shape)} on rank {rank} but "
                    f"{known.dtype} {list(known.shape)} on rank {other}"
                )
            if own.cut.axis >= len(storage_shape(own.shape)):
                raise IntegrityError(f"tensor {name} {list(own.shape)} has no axis {own.cut.axis}")
            if own.held != own.expected:
                raise IntegrityError(
                    f"tensor {name}: rank {rank} holds {list(own.held)}, its cut says "
                    f"{list(own.expected)}"
                )
            of_name = parts.setdefault(name, {})
            if prod(own.held):
                of_name[rank] = own.cut
    table = {}
    for name in sorted(first):
        known = first[name][1]
        table[name] = Tensor(known.shape, known.dtype, parts[name])
        check_whole(name, table[name])
    return table


def check_whole(name: str, tensor: Tensor) -> None:
    """
    Raises:
        IntegrityError: a position of the tensor is in no part, or in more than one.
    """
    if not prod(tensor.shape):
        return
    axes = sorted({cut.axis for cut in tensor.parts.values()})
    if len(axes) > 1:
        raise IntegrityError(f"tensor {name} is cut along axis {axes[0]} and along axis {axes[1]}")
    length = storage_shape(tensor.shape)[axes[0]] if axes else tensor.shape[0]
    held = sorted(
        (start, stop, rank) for rank, cut in tensor.parts.items() for start, stop in cut.intervals
    )
    where = f"of axis {axes[0] if axes else 0} of tensor {name} {list(tensor.shape)}"
    position, last = 0, 0
    for start, stop, rank in [*held, (length, length, -1)]:
        if start > position:
            raise IntegrityError(f"positions {position}:{start} {where} are held by no rank")
        if start < position <= length:
            raise IntegrityError(
                f"positions {start}:{min(stop, position)} {where} are held twice, by ranks {last} "
                f"and {rank}"
            )
        if stop > length:
            raise IntegrityError(f"positions {length}:{stop} {where} do not exist")
        position, last = stop, rank


def assemble(name: str, tensor: Tensor, wanted: Cut | None) -> list[Block]:
    """Which blocks of the tensor's parts make up another cut of it, in whatever layout.

    Args:
        name: for the message.
        wanted: None for the whole tensor; an interval may occur twice.

    Raises:
        IntegrityError: a position that is wanted is in no part.
    """
    shape = storage_shape(tensor.shape)
    goal = as_cut(shape, wanted)
    if goal.axis >= len(shape):
        raise IntegrityError(f"tensor {name} {list(shape)} has no axis {goal.axis}")
    if not prod(goal.shape(shape)):
        return []
    blocks, found = [], 0
    for rank, cut in tensor.parts.items():
        for source, target in _overlaps(shape, cut, goal):
            blocks.append(Block(rank, source, target))
            found += prod(part.stop - part.start for part in target)
    if found != prod(goal.shape(shape)):
        raise IntegrityError(
            f"tensor {name} {list(tensor.shape)} does not have all of the positions "
            f"{', '.join(f'{start}:{stop}' for start, stop in goal.intervals)} of axis {goal.axis}"
        )
    return blocks


def _overlaps(
    shape: tuple[int, ...], held: Cut, goal: Cut
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """(place in what is held, place in the goal) of every block that is in both."""
    whole = [slice(0, length) for length in shape]
    for held_at, start, stop in _runs(held):
        for goal_at, begin, end in _runs(goal):
            source, target = list(whole), list(whole)
            if held.axis == goal.axis:
                low, high = max(start, begin), min(stop, end)
                if low >= high:
                    continue
                source[held.axis] = slice(held_at + low - start, held_at + high - start)
                target[goal.axis] = slice(goal_at + low - begin, goal_at + high - begin)
            else:
                source[held.axis] = slice(held_at, held_at + stop - start)
                target[held.axis] = slice(start, stop)
                source[goal.axis] = slice(begin, end)
                target[goal.axis] = slice(goal_at, goal_at + end - begin)
            yield tuple(source), tuple(target)


def _runs(cut: Cut) -> Iterator[tuple[int, int, int]]:
    """(place in the cut tensor, start, stop) of each interval."""
    position = 0
    for start, stop in cut.intervals:
        yield position, start, stop
        position += stop - start


def first_held(cut: Cut, taken: Sequence[Interval]) -> tuple[Cut, list[Interval]]:
    """What of a cut is not `taken` yet, neither by an earlier interval of its own.

    Returns:
        That cut, and where its intervals are in the cut tensor.
    """
    seen = sorted(taken)
    fresh: list[Interval] = []
    places: list[Interval] = []
    for position, start, stop in _runs(cut):
        at = start
        for low, high in [*seen, (stop, stop)]:
            if at < (end := min(low, stop)):
                fresh.append((at, end))
                places.append((position + at - start, position + end - start))
            at = max(at, high)
        seen = sorted([*seen, (start, stop)])
    return Cut(cut.axis, tuple(fresh)), places


def without_copies(group: Communicator, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Pieces less what a lower rank of `group` holds as well: of replicated tensors, and of KV
    heads that serve query heads of several ranks or that one rank holds twice. Collective.

    What is left of all ranks is what a checkpoint wants: every position once. Copies must be
    equal; nobody looks.
    """
    cuts = {name: as_cut(piece.shape, piece.cut) for name, piece in pieces.items()}
    lower = group.allgather(cuts)[: group.rank]
    mine = {}
    for name, piece in pieces.items():
        taken = [span for held in lower if name in held for span in held[name].intervals]
        fresh, places = first_held(cuts[name], taken)
        if merge(fresh.intervals) == cuts[name].intervals:
            mine[name] = piece
        elif places:
            kept = [_part(piece.array, fresh.axis, *place) for place in places]
            mine[name] = Piece(mx.concatenate(kept, fresh.axis), piece.shape, fresh)
    return mine


def _part(array: mx.array, axis: int, start: int, stop: int) -> mx.array:
    return array[(slice(None),) * axis + (slice(start, stop),)]
