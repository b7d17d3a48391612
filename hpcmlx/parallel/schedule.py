"""Pipeline schedules as lists of actions: no MLX, no MPI.

A rank of the pipeline holds one chunk of layers, or several that are spread over the model (virtual
stages): chunk c of rank r is global stage c * num_stages + r. `schedule` says in which order each
rank computes forward and backward passes of its chunks; the executor runs its own list in order.
Messages are not in the lists: what an action receives and sends follows from it (`source`,
`target`). `check` proves a schedule right, `simulate` says how long it takes and what it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from hpcmlx.errors import ConfigError
from hpcmlx.parallel.partition import split_by_weight


class Kind(StrEnum):
    """What a rank does with a microbatch."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Action:
    """One pass of one microbatch through one chunk of a rank.

    Attributes:
        chunk: which of the rank's chunks, from 0.
        microbatch: from 0.
    """

    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch} through chunk {self.chunk}"


#: For every rank of the pipeline what it does, in order.
Schedule = list[list[Action]]


def schedule(name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The actions of every rank.

    Args:
        name: a key of `SCHEDULES`.
        num_stages: ranks of the pipeline.
        num_microbatches: of one optimizer step of one replica; any number.
        num_chunks: chunks of layers that each rank holds; above 1 for interleaved_1f1b only.

    Raises:
        ConfigError: there is no such schedule, or it cannot have so many chunks.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"there is no schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    for what, number in (
        ("stages", num_stages),
        ("microbatches", num_microbatches),
        ("chunks", num_chunks),
    ):
        if number < 1:
            raise ConfigError(f"a schedule needs at least 1 of its {what}, got {number}")
    if (num_chunks > 1) != (name == "interleaved_1f1b"):
        fits = "2 chunks a rank or more" if num_chunks == 1 else "1 chunk a rank"
        other = "1f1b" if num_chunks == 1 else "interleaved_1f1b"
        raise ConfigError(
            f"{name} is for {fits}, got {num_chunks}: change the number or take schedule {other}"
        )
    return [
        SCHEDULES[name](rank, num_stages, num_microbatches, num_chunks)
        for rank in range(num_stages)
    ]


def gpipe(rank: int, num_stages: int, num_microbatches: int, num_chunks: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al., arXiv:1811.06965, section 2.3)."""
    rounds = [num_microbatches]
    return _one_forward_one_backward(rounds, num_chunks, num_warm_up=num_microbatches)


def one_f_one_b(rank: int, num_stages: int, num_microbatches: int, num_chunks: int) -> list[Action]:
    """Each backward as early as it can be, so that rank r keeps at most num_stages - r microbatches
    (PipeDream-Flush; Narayanan et al., arXiv:2104.04473, section 2.2.1)."""
    rounds = [num_microbatches]
    return _one_forward_one_backward(rounds, num_chunks, num_warm_up=num_stages - 1 - rank)


def interleaved_1f1b(
    rank: int, num_stages: int, num_microbatches: int, num_chunks: int
) -> list[Action]:
    """1F1B over chunks that are spread over the model, which divides the idle time by their number
    (Narayanan et al., arXiv:2104.04473, section 2.2.2).

    Microbatches go through all chunks in rounds. The paper's have num_stages microbatches and must
    come out even; here they have num_stages or more (fewer only where there are fewer in all).
    """
    num_rounds = max(1, num_microbatches // num_stages)
    rounds = split_by_weight(num_microbatches, [1] * num_rounds)  # the largest first
    # A backward can begin when the first round has reached the last chunk; from there to this
    # rank it is `num_stages - 1 - rank` ranks, there and back.
    num_warm_up = (num_chunks - 1) * rounds[0] + 2 * (num_stages - 1 - rank)
    return _one_forward_one_backward(rounds, num_chunks, num_warm_up)


#: Name -> the actions of one rank, from (rank, num_stages, num_microbatches, num_chunks).
SCHEDULES: dict[str, Callable[[int, int, int, int], list[Action]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
}


def _one_forward_one_backward(
    rounds: Sequence[int], num_chunks: int, num_warm_up: int
) -> list[Action]:
    """Warm-up: forwards; steady: a forward and a backward in turn; cool-down: backwards.

    Args:
        rounds: sizes of the groups of microbatches that go through all chunks one after another.
        num_warm_up: forwards before the first pair; no more than there are.
    """
    chunks = range(num_chunks)
    forwards = list(_in_rounds(Kind.FORWARD, rounds, chunks))
    backwards = list(_in_rounds(Kind.BACKWARD, rounds, chunks[::-1]))
    num_warm_up = min(num_warm_up, len(forwards))
    num_steady = len(forwards) - num_warm_up
    warm_up = forwards[:num_warm_up]
    pairs = zip(forwards[num_warm_up:], backwards[:num_steady], strict=True)
    steady = [action for pair in pairs for action in pair]
    cool_down = backwards[num_steady:]
    return warm_up + steady + cool_down


def _in_rounds(kind: Kind, rounds: Sequence[int], chunks: Sequence[int]) -> Iterator[Action]:
    first = 0
    for size in rounds:
        for chunk in chunks:
            for microbatch in range(first, first + size):
                yield Action(kind, chunk, microbatch)
        first += size


# -- messages --


def source(
    action: Action, rank: int, num_stages: int, num_chunks: int = 1
) -> tuple[int, Action] | None:
    """Who makes the input of an action: (rank, its action); the rank may be the own one.

    A forward gets activations from the global stage before its own, a backward the cotangent of
    its outputs from the one after.

    Returns:
        None where nothing is received: tokens go into the first global stage, and the last one
        makes its cotangent from the loss.
    """
    step = -1 if action.kind is Kind.FORWARD else 1
    return _neighbour(action, rank, step, num_stages, num_chunks)


def target(
    action: Action, rank: int, num_stages: int, num_chunks: int = 1
) -> tuple[int, Action] | None:
    """Who takes the output of an action, as `source`; None where nothing is sent."""
    step = 1 if action.kind is Kind.FORWARD else -1
    return _neighbour(action, rank, step, num_stages, num_chunks)


def tag(receiver: Action, num_microbatches: int) -> int:
    """The number of the message that `receiver` takes in; messages between two ranks overtake one
    another where they hold several chunks, or two ranks are neighbours in both directions."""
    number = receiver.chunk * num_microbatches + receiver.microbatch
    return 2 * number + (receiver.kind is Kind.BACKWARD)


def _neighbour(
    action: Action, rank: int, step: int, num_stages: int, num_chunks: int
) -> tuple[int, Action] | None:
    stage = action.chunk * num_stages + rank + step
    if not 0 <= stage < num_stages * num_chunks:
        return None
    chunk, peer = divmod(stage, num_stages)
    return peer, replace(action, chunk=chunk)


# -- what a schedule does --


@dataclass(frozen=True)
class Simulation:
    """A schedule in time.

    Attributes:
        spans: for every rank (begin, end) of each of its actions, in seconds.
        seconds: until the last rank is through.
        idle: for every rank the share of `seconds` in which it computes nothing.
        in_flight: for every rank the most pairs of chunk and microbatch that were forward and not
            yet backward: what it keeps activations for. A chunk has 1/num_chunks of its layers.
    """

    spans: list[list[tuple[float, float]]]
    seconds: float
    idle: list[float]
    in_flight: list[int]


def check(actions: Schedule, num_microbatches: int, num_chunks: int = 1) -> None:
    """Prove a schedule right for blocking receives and buffered sends.

    Raises:
        ValueError: an action is missing or done twice, or a rank waits for ever: for a neighbour,
            or for its own forward of what it is to go back through.
    """
    expected = {
        Action(kind, chunk, microbatch)
        for kind in Kind
        for chunk in range(num_chunks)
        for microbatch in range(num_microbatches)
    }
    for rank, own in enumerate(actions):
        done = set(own)
        for missing in sorted(map(str, expected - done)):
            raise ValueError(f"rank {rank} never does the {missing}")
        for unknown in sorted(map(str, done - expected)):
            raise ValueError(f"rank {rank} does the {unknown}, which does not exist")
        if len(own) > len(done):
            raise ValueError(f"rank {rank} does {len(own)} actions, {len(done)} different ones")
    spans = _play(actions, num_chunks, lambda rank, action: 1.0, 0.0)
    stuck = [
        f"rank {rank} waits in its action {len(spans[rank])}, the {own[len(spans[rank])]}"
        for rank, own in enumerate(actions)
        if len(spans[rank]) < len(own)
    ]
    if stuck:
        raise ValueError(f"the schedule never ends: {'; '.join(stuck)}")


def simulate(
    actions: Schedule,
    forward_time: float | Sequence[float],
    backward_time: float | Sequence[float],
    transfer_time: float = 0.0,
) -> Simulation:
    """Run a schedule that `check` accepts on a clock.

    Args:
        forward_time, backward_time: seconds that one microbatch takes in all layers of a rank; one
            number, or one for each rank. A chunk takes an equal share of them.
        transfer_time: seconds between the end of an action and its output's arrival on another
            rank; nobody computes less meanwhile.
    """
    num_chunks = 1 + max(action.chunk for own in actions for action in own)
    times = {Kind.FORWARD: forward_time, Kind.BACKWARD: backward_time}

    def seconds(rank: int, action: Action) -> float:
        time = times[action.kind]
        return (time[rank] if isinstance(time, Sequence) else time) / num_chunks

    spans = _play(actions, num_chunks, seconds, transfer_time)
    total = max(own[-1][1] for own in spans)
    busy = [sum(end - begin for begin, end in own) for own in spans]
    return Simulation(
        spans, total, [1 - b / total for b in busy], [_most_in_flight(own) for own in actions]
    )


def _play(
    actions: Schedule,
    num_chunks: int,
    seconds: Callable[[int, Action], float],
    transfer_time: float,
) -> list[list[tuple[float, float]]]:
    """(begin, end) of the actions of every rank, up to where it would wait for ever."""
    spans: list[list[tuple[float, float]]] = [[] for _ in actions]
    ends: dict[tuple[int, Action], float] = {}
    moving = True
    while moving:
        moving = False
        for rank, own in enumerate(actions):
            for action in own[len(spans[rank]) :]:
                needs = _needs(action, rank, len(actions), num_chunks)
                if any(need not in ends for need in needs):
                    break
                ready = [ends[need] + transfer_time * (need[0] != rank) for need in needs]
                begin = max([spans[rank][-1][1] if spans[rank] else 0.0, *ready])
                ends[rank, action] = begin + seconds(rank, action)
                spans[rank].append((begin, ends[rank, action]))
                moving = True
    return spans


def _needs(action: Action, rank: int, num_stages: int, num_chunks: int) -> list[tuple[int, Action]]:
    """What must have been done before an action: its source and, for a backward, its forward."""
    needs = [source(action, rank, num_stages, num_chunks)]
    if action.kind is Kind.BACKWARD:
        needs.append((rank, replace(action, kind=Kind.FORWARD)))
    return [need for need in needs if need is not None]


def _most_in_flight(own: Sequence[Action]) -> int:
    most = now = 0
    for action in own:
        now += 1 if action.kind is Kind.FORWARD else -1
        most = max(most, now)
    return most
