"""The flight recorder's ring, and what is read out of several of them: who is behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from hpcmlx import flight
from hpcmlx.autopsy.report import read_run
from hpcmlx.autopsy.verdict import Sighting, judge
from hpcmlx.errors import InputError
from hpcmlx.flight import CODES, NUM_RECORDS, Recorder, parse
from hpcmlx.watchdog import Clock, Heard, judges

# -- the ring --


def test_what_is_recorded_is_read():
    recorder = Recorder()
    recorder.rank, recorder.size, recorder.step = 3, 8, 7
    group = recorder.group("replica", [1, 3, 6])
    sent = recorder.begin(CODES["send"], group, 5, 2, 4096, False)
    summed = recorder.collective(CODES["sum_numbers"], group, 32)
    recorder.end(summed)
    recorder.layer = 4
    recorder.plan(CODES["all_sum"], group, 2304)
    recorder.plan(CODES["all_gather"], group, 8)
    evaluated = recorder.evaluation()
    recorder.wait(sent)
    read = parse(recorder.snapshot())
    assert (read.rank, read.size, read.step, read.pid) == (3, 8, 7, os.getpid())
    assert read.counts == {("replica", (1, 3, 6)): (1, 2)}
    assert [r.op for r in read.records] == ["send", "sum_numbers", "all_sum", "all_gather", "eval"]
    send, done, planned, other, evaluation = read.records
    assert (send.seq, send.peer, send.nbytes, send.step) == (5, 6, 4096, 7)
    assert done.end is not None and done.end >= done.begin and done.peer is None
    assert (planned.layer, other.layer) == (4, None)
    assert evaluation.group == "" and evaluation.index == evaluated
    assert read.waits_in == evaluation  # it waits longer than the send
    assert str(send) == "send 5 to rank 6 of group replica (4096 bytes, step 7)"
    assert str(planned) == "all_sum 1 of group replica (2304 bytes, step 7, layer 4)"


def test_the_last_256_operations_are_kept():
    recorder = Recorder()
    group = recorder.group("world", range(2))
    first = recorder.collective(CODES["barrier"], group)
    for _ in range(1000):
        last = recorder.collective(CODES["barrier"], group)
        recorder.end(last)
    recorder.end(first)  # its place is another's by now
    read = parse(recorder.snapshot())
    assert len(read.records) == NUM_RECORDS
    assert all(b.index == a.index + 1 for a, b in pairwise(read.records))
    assert read.records[-1].index == last and read.records[-1].seq == 1001
    assert read.counts == {("world", (0, 1)): (1001, 0)}
    assert read.waits_in is None


def test_an_end_that_comes_late_is_not_anothers():
    recorder = Recorder()
    group = recorder.group("world", range(2))
    first = recorder.collective(CODES["barrier"], group)
    for _ in range(NUM_RECORDS):
        last = recorder.collective(CODES["barrier"], group)
        if last != first + NUM_RECORDS:  # which has its place
            recorder.end(last)
    recorder.end(first)
    assert parse(recorder.snapshot()).waits_in.index == last


def test_what_was_begun_since_the_last_look_counts(tmp_path, monkeypatch):
    """A killed rank's file holds operations that its watchdog has not seen."""
    recorder = Recorder()
    group = recorder.group("tp", range(2))
    path = tmp_path / "flight/rank0.bin"
    recorder.open(path, 0, 2)
    before = flight.read(path)
    now = time.monotonic_ns() + 3_000_000_000
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    recorder.step = 12
    recorder.plan(CODES["all_sum"], group, 8)
    recorder.collective(CODES["barrier"], group)
    read = flight.read(path)
    assert read.counts == {("tp", (0, 1)): (1, 1)} and read.step == 12
    assert read.now == now / 1e9 and read.wall - before.wall == pytest.approx(3, abs=0.1)


def test_a_group_that_is_made_again_goes_on():
    recorder = Recorder()
    first, again = (recorder.group("host", [0, 1]) for _ in range(2))
    for group in (first, recorder.group("host", [0, 2]), again):
        recorder.end(recorder.collective(CODES["barrier"], group))
    read = parse(recorder.snapshot())
    assert read.counts == {("host", (0, 1)): (2, 0), ("host", (0, 2)): (1, 0)}
    assert [r.seq for r in read.records if r.members == (0, 1)] == [1, 2]


def test_a_digest_has_the_newest_operation():
    recorder = Recorder()
    group = recorder.group("world", range(2))
    for op in ("bcast", "barrier"):
        recorder.collective(CODES[op], group)
    recorder.look()
    told, whole = flight.from_digest(recorder.digest()), parse(recorder.snapshot())
    assert told.records == whole.records[-1:] and told.counts == whole.counts
    assert (told.host, told.pid) == (whole.host, os.getpid())
    assert len(recorder.digest()) < 1000


def test_large_groups_and_many_of_them_fit():
    recorder = Recorder()
    recorder.group("world", range(0, 30_000, 3))
    for number in range(300):
        group = recorder.group(f"part{number}", [0, 5, 7, 11])
    recorder.collective(CODES["barrier"], group)
    read = parse(recorder.snapshot())
    assert ("world", tuple(range(0, 30_000, 3))) in read.counts
    assert read.records[0].group == ""  # only known by number


def test_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a flight file"):
        parse(b"\0" * flight.SIZE)
    with pytest.raises(InputError, match=r"has no flight/rank\*.bin"):
        read_run(tmp_path)
    (tmp_path / "flight").mkdir()
    (tmp_path / "flight/rank0.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="rank0.bin cannot be read"):
        read_run(tmp_path)


def test_files_of_one_launch_are_read(tmp_path):
    """One of a rank that ended long before the others; one of an earlier launch of more ranks."""
    for rank, size in ((0, 2), (1, 2), (5, 8)):
        recorder = Recorder()
        recorder.open(flight.file_of(tmp_path, rank), rank, size)
        if rank == 0:
            monotonic, wall = time.monotonic_ns, time.time
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(time, "time", lambda: wall() + 60)  # noqa: B023
                patch.setattr(time, "monotonic_ns", lambda: monotonic() + 60 * 10**9)  # noqa: B023
                recorder.look()
    seen = read_run(tmp_path)
    assert seen.keys() == {0, 1}
    assert seen[0].silent is None and seen[1].silent == pytest.approx(60, abs=5)


KILLED = """
import sys, time
from pathlib import Path
from hpcmlx.flight import CODES, recorder
group = recorder.group("world", range(2))
recorder.open(Path(sys.argv[1]), 0, 2)
recorder.step = 12
recorder.collective(CODES["barrier"], group)
print("in it", flush=True)
time.sleep(60)
"""


@pytest.mark.fault
def test_a_killed_rank_leaves_its_ring(tmp_path):
    path = flight.file_of(tmp_path, 0)
    line = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in it\n"
        os.kill(process.pid, signal.SIGKILL)
    read = flight.read(path)
    assert str(read.waits_in) == "barrier 1 of group world (step 12)"
    assert read_run(tmp_path).keys() == {0}


def test_progress_and_what_runs_outside():
    recorder = Recorder()
    group = recorder.group("world", range(2))

    def moves() -> bool:
        before = recorder.progress
        recorder.look()
        return recorder.progress != before

    assert not moves()
    with recorder.outside():
        assert moves()
        with recorder.inside():
            assert not moves()
        assert moves()
    assert not moves()
    for act in (
        recorder.tick,
        lambda: recorder.end(recorder.collective(CODES["barrier"], group)),
        lambda: recorder.end(recorder.evaluation()),
    ):
        before = recorder.progress
        act()
        assert recorder.progress > before


def test_recording_costs_next_to_nothing(tmp_path):
    recorder = Recorder()
    group = recorder.group("tp", range(2))
    recorder.open(tmp_path / "flight/rank0.bin", 0, 2)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(2000):
            index = recorder.begin(CODES["send"], group, 1, 1, 4096, False)
            recorder.wait(index)
            recorder.end(index)
        times.append((time.perf_counter() - begin) / 2000)
    assert min(times) < 20e-6  # about 2 µs where nobody else computes


# -- the watchdog's clocks --


def test_a_stall_is_silence_or_no_progress():
    seen = Heard(range(3), 0.0)
    for now in (1.0, 2.0, 3.0, 4.0, 5.0):
        seen.note(0, 7, now)
        seen.note(1, int(now), now)  # the only one that moves
        seen.note(2, 7, now)
    assert not seen.is_stall(5.0, 3.0)
    for now in (6.0, 7.0):
        for rank in range(3):
            seen.note(rank, 7, now)
    assert not seen.is_stall(8.9, 3.0)
    for rank in range(3):
        seen.note(rank, 7, 9.0)
    assert seen.is_stall(9.0, 3.0)  # all heard, but nobody has moved since 6.0
    seen = Heard(range(2), 0.0)
    for now in range(1, 6):
        seen.note(0, now, float(now))
    assert seen.is_stall(5.0, 5.0)  # rank 1 is silent
    seen.drop(1)  # it has said that it is through
    assert not seen.is_stall(5.0, 5.0)


def test_a_clock_that_does_not_count_what_it_slept(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock(2.0)
    for step in (1.0, 1.5, 3600.0, 0.5):
        now += step
        clock.tick()
    assert clock.now == 1.0 + 1.5 + 2.0 + 0.5


def test_judges_are_spread():
    assert judges(1) == [0] and judges(5) == [0, 1, 2, 3, 4]
    assert judges(64) == list(range(0, 64, 4))
    assert len(judges(1000)) == 16 and judges(1000)[-1] > 900


# -- verdicts --


class Rank:
    """A recorder whose time is told."""

    def __init__(self, rank: int, size: int, **groups: list[int]):
        self.recorder = Recorder()
        self.recorder.rank, self.recorder.size = rank, size
        self.rank = rank
        self.groups = {name: self.recorder.group(name, m) for name, m in groups.items()}

    def does(self, *ops: str, name: str = "world", step: int = 0, blocks: bool = False) -> Rank:
        self.recorder.step = step or self.recorder.step
        for op in ops:
            index = self.recorder.collective(CODES[op], self.groups[name])
            if not (blocks and op == ops[-1]):
                self.recorder.end(index)
        return self

    def plans(self, *layers: int, step: int) -> Rank:
        self.recorder.step = step
        for layer in layers:
            self.recorder.layer = layer
            self.recorder.plan(CODES["all_sum"], self.groups["tp"], 2304)
        return self

    def receives(self, peer: int, seq: int) -> Rank:
        self.recorder.begin(CODES["recv"], self.groups["world"], seq, peer, 64, True)
        return self

    def sends(self, peer: int, seq: int) -> Rank:
        sent = self.recorder.begin(CODES["send"], self.groups["world"], seq, peer, 64, False)
        self.recorder.end(sent)
        return self

    def evaluates(self) -> Rank:
        self.recorder.evaluation()
        return self

    def seen(self, silent: float | None = None) -> Sighting:
        return Sighting(parse(self.recorder.snapshot()), silent, 3.0, "engine.py:1 run")


def world(size: int, **groups: list[int]) -> list[Rank]:
    return [Rank(rank, size, world=list(range(size)), **groups) for rank in range(size)]


def verdict(ranks: list[Rank], silent: tuple[int, ...] = ()):
    return judge({r.rank: r.seen(3.0 if r.rank in silent else None) for r in ranks})


def test_who_has_not_joined():
    ranks = world(3)
    ranks[0].does("barrier", "bcast", step=4, blocks=True)
    ranks[1].does("barrier", step=4)
    ranks[2].does("barrier", "bcast", step=4, blocks=True)
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("behind", (1,))
    assert "rank 1 on " in found.line and "has not joined bcast 2 of group world" in found.line
    assert "engine.py:1 run" in found.line


def test_who_has_not_sent():
    ranks = world(3)
    ranks[0].sends(1, 1).receives(2, 5)  # rank 2 waits for rank 1: it is not to blame
    ranks[1].sends(2, 6)
    ranks[2].sends(0, 4).receives(1, 7)
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("behind", (1,))
    assert "rank 1 on " in found.line and "recv 7 from rank 1" in found.line


def test_a_message_that_is_on_its_way_is_nobodys_fault():
    ranks = world(2)
    ranks[0].sends(1, 5)
    ranks[1].receives(0, 5)
    assert verdict(ranks).kind == "still"


def test_who_has_planned_less():
    ranks = world(2, tp=[0, 1])
    ranks[0].plans(0, 0, 1, 1, step=3).plans(0, 0, 1, 1, step=4).evaluates()
    ranks[1].plans(0, 0, 1, 1, step=3)
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("behind", (1,))
    assert "all_sum 5 of group tp (2304 bytes, step 4, layer 0)" in found.line
    assert "rank 0 waits in since" in found.line


def test_who_has_planned_as_much_but_does_not_evaluate():
    ranks = world(2, tp=[0, 1])
    for rank in ranks:
        rank.plans(0, 1, step=3)
    ranks[0].evaluates()
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("behind", (1,))
    assert "has not joined all_sum 2 of group tp" in found.line


def test_the_one_that_waits_longest_is_quoted():
    ranks = world(3)
    for rank in (0, 2):
        ranks[rank].does("barrier", blocks=True)
    seen = {rank.rank: rank.seen() for rank in ranks}
    seen[2] = replace(seen[2], flight=replace(seen[2].flight, now=seen[2].flight.now + 60))
    assert "which rank 2 waits in since 60." in judge(seen).line


def test_silence_comes_first():
    ranks = world(2, tp=[0, 1])
    ranks[0].plans(0, 1, step=3).evaluates()
    ranks[1].plans(0, step=3)
    found = verdict(ranks, silent=(1,))
    assert (found.kind, found.culprits) == ("silent", (1,))
    assert "is silent since 3.0 s; it has not joined all_sum 2 of group tp" in found.line


@pytest.mark.parametrize("skipped", range(4))
def test_one_that_skips_in_the_graph(skipped):
    ranks = world(2, tp=[0, 1])
    layers = [0, 0, 1, 1]
    for rank in ranks:
        rank.plans(*layers, step=3)
    ranks[0].plans(*layers, step=4).evaluates()
    ranks[1].plans(*(x for i, x in enumerate(layers) if i != skipped), step=4).evaluates()
    found = verdict(ranks)
    assert found.culprits == (1,)
    # Two of one layer are alike: which of them was left out cannot be told.
    assert f"layer {layers[skipped]})" in found.line and "rank 1 on " in found.line


def test_one_of_three_that_differs():
    ranks = world(3)
    for rank in ranks:
        rank.does("barrier", "bcast" if rank.rank != 2 else "gather", blocks=True)
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("desync", (2,))
    assert "has not joined bcast 2" in found.line and "went on to gather 2" in found.line


def test_one_of_three_that_gives_another_size():
    ranks = world(3)
    for rank in ranks:
        group = rank.groups["world"]
        rank.recorder.collective(CODES["sum_numbers"], group, 16 if rank.rank == 1 else 8)
    assert (verdict(ranks).kind, verdict(ranks).culprits) == ("desync", (1,))


def test_one_that_skips_where_all_layers_are_alike():
    ranks = world(2, tp=[0, 1])
    for step in range(3, 7):
        ranks[0].plans(0, 0, step=step)
        ranks[1].plans(*[0, 0][: 1 if step == 4 else 2], step=step)
    found = verdict([rank.evaluates() for rank in ranks])
    assert (found.kind, found.culprits) == ("desync", (1,))
    assert "has not joined all_sum 4 of group tp (2304 bytes, step 4, layer 0)" in found.line


def test_two_that_differ_are_told_by_how_it_went_before():
    ranks = world(2)
    for rank in ranks:
        rank.does("barrier", "bcast", "gather", "barrier", "bcast", "gather", "barrier")
    ranks[0].does("gather", blocks=True)
    ranks[1].does("bcast", blocks=True)
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("desync", (0,))


def test_two_that_differ_without_a_past_are_both_named():
    ranks = world(2)
    ranks[0].does("gather", blocks=True)
    ranks[1].does("bcast", blocks=True)
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("desync", (0, 1))
    assert "gather 1" in found.line and "bcast 1" in found.line


def test_in_a_circle_the_earlier_step_counts():
    ranks = world(2)
    ranks[0].does("sum_numbers", step=3, blocks=True)
    ranks[1].recorder.step = 4  # has left it out
    ranks[1].receives(0, 9)
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("behind", (1,))
    assert "has not joined sum_numbers 1" in found.line


def test_nobody_is_behind():
    ranks = world(2, tp=[0, 1])
    for rank in ranks:
        rank.plans(0, 1, step=3).evaluates()
    found = verdict(ranks)
    assert (found.kind, found.culprits) == ("still", ())
    assert "no progress since 3.0 s: rank 0 is in evaluation 1 (step 3)" in found.line


def test_files_lie_where_they_are_looked_for():
    assert flight.file_of(Path("run"), 3) == Path("run/flight/rank3.bin")
