"""From what the ranks did last: which rank is behind, and which operation is missing.

Pure. `watchdog.py` asks on a stall with what the ranks have told it, jobs/autopsy.py afterwards
with what lies in the run directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hpcmlx.flight import Flight, Record

_CONTEXT = 16  # operations that are looked back for how it went before
_LATELY = 32  # operations that are looked at for something unusual
_LISTED = 4

Key = tuple[str, tuple[int, ...]]  # a group: its name and members


@dataclass(frozen=True)
class Sighting:
    """One rank, as it was seen last.

    Attributes:
        flight: its operations.
        silent: seconds for which nothing was heard of it; None: it answers.
        still: seconds without progress.
        place: where its main thread is ("engine.py:262 _start_step"); None where not known.
    """

    flight: Flight
    silent: float | None = None
    still: float = 0.0
    place: str | None = None

    @property
    def name(self) -> str:
        return f"rank {self.flight.rank} on {self.flight.host}"


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        kind: "desync" (sequences of operations differ), "silent", "behind" (others wait for it),
            "still" (nobody is known to be behind).
        culprits: ranks.
        line: for people.
    """

    kind: str
    culprits: tuple[int, ...]
    line: str


class _Wait(NamedTuple):
    """`rank` waits for `missing`, who have not done their part of `record`."""

    rank: int
    missing: tuple[int, ...]
    record: Record


def judge(sightings: Mapping[int, Sighting]) -> Verdict:
    """
    Args:
        sightings: of all ranks of which anything is known, by rank.
    """
    waits = [wait for rank in sightings if (wait := _waits_for(rank, sightings))]
    silent = [rank for rank, seen in sightings.items() if seen.silent is not None]
    if silent:
        return _silent(silent, waits, sightings)
    if found := _desync(sightings):
        return found
    waiting = {wait.rank for wait in waits}
    # Who is waited for and does not wait itself. In a circle one has left something out and is
    # ahead: what is missing is of the earliest step.
    waited_for = {rank for wait in waits for rank in wait.missing if rank in sightings}
    culprits = sorted(waited_for - waiting)
    if waits and not culprits:
        first = min(wait.record.step for wait in waits)
        waits = [wait for wait in waits if wait.record.step == first]
        culprits = sorted({rank for wait in waits for rank in wait.missing})
        odd = [rank for rank in culprits if _breaks_habit(sightings[rank].flight)]
        culprits = odd or culprits
    if culprits:
        return _behind(culprits, waits, sightings)
    where = "; ".join(_at(seen) for seen in list(sightings.values())[:_LISTED])
    still = min((seen.still for seen in sightings.values()), default=0.0)
    return Verdict("still", (), f"no progress since {still:.1f} s: {where}")


def _silent(
    silent: Sequence[int], waits: Sequence[_Wait], sightings: Mapping[int, Sighting]
) -> Verdict:
    names = ", ".join(sightings[rank].name for rank in silent[:_LISTED])
    since = max(sightings[rank].silent or 0.0 for rank in silent)
    line = f"{names} {'is' if len(silent) == 1 else 'are'} silent since {since:.1f} s"
    if wait := _longest([w for w in waits if set(w.missing) & set(silent)], sightings):
        line += f"; {_has_not('it' if len(silent) == 1 else 'they', wait, sightings)}"
    else:
        line += f"; last seen {_at(sightings[silent[0]], name=False)}"
    return Verdict("silent", tuple(silent), line)


def _behind(
    culprits: Sequence[int], waits: Sequence[_Wait], sightings: Mapping[int, Sighting]
) -> Verdict:
    wait = _longest([w for w in waits if set(w.missing) & set(culprits)], sightings)
    assert wait is not None
    missing = [rank for rank in wait.missing if rank in culprits]
    names = ", ".join(sightings[rank].name for rank in missing[:_LISTED])
    line = f"{_has_not(names, wait, sightings)}; {_at(sightings[missing[0]])}"
    return Verdict("behind", tuple(missing), line)


def _has_not(who: str, wait: _Wait, sightings: Mapping[int, Sighting]) -> str:
    record, seen = wait.record, sightings[wait.rank]
    does = {"send": "received", "recv": "sent"}.get(record.op, "joined")
    blocked = seen.flight.waits_in
    since = blocked.waiting if blocked and blocked.waiting else seen.flight.now
    since_text = f"since {max(0.0, seen.flight.now - since):.1f} s"
    if record.peer is None:
        have = "have" if who == "they" or ", " in who else "has"
        what = f"{record}, which rank {wait.rank} waits in {since_text}"
        return f"{who} {have} not {does} {what}"
    return f"{who} has not {does} what rank {wait.rank} waits for {since_text} in {record}"


def _at(seen: Sighting, name: bool = True) -> str:
    """Where a rank is: its operation, and the line of its program."""
    record = seen.flight.waits_in
    what = f"in {record}" if record else f"in no operation at step {seen.flight.step}"
    who = f"rank {seen.flight.rank} is " if name else ""
    return f"{who}{what}" + (f", at {seen.place}" if seen.place else "")


def _longest(waits: Sequence[_Wait], sightings: Mapping[int, Sighting]) -> _Wait | None:
    return min(waits, key=lambda wait: _begun(sightings[wait.rank]), default=None)


def _begun(seen: Sighting) -> float:
    """Seconds, negative, since it waits: clocks of hosts have nothing in common."""
    record = seen.flight.waits_in
    return 0.0 if record is None else (record.waiting or 0.0) - seen.flight.now


# -- who waits for whom --


def _waits_for(rank: int, sightings: Mapping[int, Sighting]) -> _Wait | None:
    """What rank waits in and for whom; None where it does not wait or all have done their part."""
    flight = sightings[rank].flight
    record = flight.waits_in
    if record is None or sightings[rank].silent is not None:
        return None
    if record.op == "eval":
        return _waits_in_graph(rank, sightings)
    if record.peer is not None:
        other = {"recv": "send", "send": "recv"}.get(record.op)
        seen = sightings.get(record.peer)
        if seen is not None and other is not None:
            theirs = [
                r.seq
                for r in seen.flight.records
                if (r.op, r.peer, r.key) == (other, rank, record.key)
            ]
            if max(theirs, default=0) >= record.seq and seen.silent is None:
                return None  # it is on its way
        return _Wait(rank, (record.peer,), record)
    missing = [
        member
        for member in record.members
        if member in sightings and _count(sightings[member], record.key)[0] < record.seq
    ]
    return _Wait(rank, tuple(missing), record) if missing else None


def _waits_in_graph(rank: int, sightings: Mapping[int, Sighting]) -> _Wait | None:
    """An evaluation waits for members of a group who have planned less, or who do not evaluate."""
    flight = sightings[rank].flight
    for key, (_, planned) in flight.counts.items():
        others = [m for m in key[1] if m != rank and m in sightings]
        if not planned or not others:
            continue
        counts = {member: _count(sightings[member], key)[1] for member in others}
        missing = [member for member in others if counts[member] < planned]
        seq = min(counts.values()) + 1 if missing else planned
        if not missing:
            missing = [m for m in others if not _evaluates(sightings[m])]
        if not missing:
            continue
        ours = [r for r in flight.records if r.is_planned and r.key == key]
        record = next((r for r in ours if r.seq == seq), ours[0] if ours else None)
        if record is not None:
            return _Wait(rank, tuple(missing), record)
    return None


def _evaluates(seen: Sighting) -> bool:
    return any(r.op == "eval" and r.end is None for r in seen.flight.records)


def _count(seen: Sighting, key: Key) -> tuple[int, int]:
    return seen.flight.counts.get(key, (0, 0))


# -- sequences that differ --


def _desync(sightings: Mapping[int, Sighting]) -> Verdict | None:
    """The first operation of a group that is not the same on all ranks that know of it."""
    for key in dict.fromkeys(key for seen in sightings.values() for key in seen.flight.counts):
        for planned in (False, True):
            sequences = {
                rank: dict(_sequence(sightings[rank].flight, key, planned))
                for rank in key[1]
                if rank in sightings
            }
            for seq in sorted({seq for known in sequences.values() for seq in known}):
                at = {rank: known[seq] for rank, known in sequences.items() if seq in known}
                if len({_what(record) for record in at.values()}) > 1:
                    return _differ(seq, at, sequences, sightings)
    return None


def _sequence(flight: Flight, key: Key, planned: bool) -> Iterator[tuple[int, Record]]:
    for record in flight.records:
        if record.key == key and record.peer is None and record.is_planned == planned:
            yield record.seq, record


def _what(record: Record) -> tuple[str, int, int | None, int]:
    """What must be the same on all ranks. Uneven shares differ in bytes only when gathered."""
    if record.is_planned:
        return record.op, 0, record.layer, record.step
    return record.op, record.nbytes, None, 0


def _differ(
    seq: int,
    at: Mapping[int, Record],
    sequences: Mapping[int, Mapping[int, Record]],
    sightings: Mapping[int, Sighting],
) -> Verdict:
    expected = _expected(seq, at, sequences)
    wrong = [rank for rank, record in at.items() if expected and _what(record) != _what(expected)]
    if expected is None:
        each = "; ".join(f"rank {rank} has {at[rank]}" for rank in list(at)[:_LISTED])
        return Verdict("desync", tuple(at), f"{_names(list(at), sightings)} do not agree: {each}")
    waiting = [
        (rank, seen.flight.now - record.waiting)
        for rank, seen in sightings.items()
        if rank in at and rank not in wrong and (record := seen.flight.waits_in) and record.waiting
    ]
    line = f"{_names(wrong, sightings)} has not joined {expected}"
    if waiting:
        rank, since = max(waiting, key=lambda pair: pair[1])
        line += f", which rank {rank} waits in since {since:.1f} s"
    line += f"; instead it went on to {at[wrong[0]]}"
    return Verdict("desync", tuple(wrong), line)


def _expected(
    seq: int, at: Mapping[int, Record], sequences: Mapping[int, Mapping[int, Record]]
) -> Record | None:
    """Which of the records is the right one; None where nothing says so."""
    # One that skipped has what another has one place later.
    for record in at.values():
        for other, known in sequences.items():
            later = known.get(seq + 1)
            mine = at.get(other)
            if later is None or mine is None or _what(mine) == _what(record):
                continue
            if _what(later) == _what(record):
                return mine
    # Most have it.
    votes = Counter(_what(record) for record in at.values()).most_common(2)
    if votes[0][1] > votes[1][1]:
        return next(r for r in at.values() if _what(r) == votes[0][0])
    # It went like that the last time.
    before = max(sequences.values(), key=len)
    usual = _usual([_what(before[s])[:3] for s in sorted(before) if s < seq])
    return next((r for r in at.values() if _what(r)[:3] == usual), None)


def _breaks_habit(flight: Flight) -> bool:
    """Whether a rank has lately done something else than it did after the same operations before:
    one that left something out has."""
    done = [(r.op, r.key, r.peer, r.layer) for r in flight.records if r.op != "eval"]
    return any(
        _usual(done[:place]) not in (None, done[place])
        for place in range(max(0, len(done) - _LATELY), len(done))
    )


def _usual(past: Sequence[Any]) -> Any:
    """What came after the longest stretch at the end of `past` that was there before; None where
    even the last of it is new."""
    for length in range(min(_CONTEXT, len(past) - 1), 0, -1):
        for end in range(len(past) - 1, length - 1, -1):
            if past[end - length : end] == past[len(past) - length :]:
                return past[end]
    return None


def _names(ranks: Sequence[int], sightings: Mapping[int, Sighting]) -> str:
    return ", ".join(sightings[rank].name for rank in ranks[:_LISTED])
