"""Who holds the others up, from what each rank's time went into."""

from __future__ import annotations

import pytest

from hpcmlx.observe.stragglers import Pace, Probe, own_seconds, scores, slowest


def test_stages_know_what_they_wait():
    paces = [Pace(0, 10, 7, 3, None, 100), Pace(1, 10, 1, 8, None, 100)]
    assert own_seconds(paces) == [3, 9]
    found, reason = scores(paces)
    assert found == [pytest.approx(1 / 3), pytest.approx(3)] and reason is None
    assert slowest(paces, found) == 1


def test_a_slow_replica_does_less_in_the_same_time():
    paces = [
        Pace(0, 10, 0, 9, None, 300),
        Pace(1, 10, 0, 9, None, 300),
        Pace(2, 10, 0, 9, None, 90),
    ]
    found, _ = scores(paces)
    assert found[2] == pytest.approx(300 / 90) and slowest(paces, found) == 2


def test_a_tensor_parallel_rank_that_comes_late():
    # Rank 0 waits for rank 1 inside the graph: its evaluations last longer.
    paces = [Pace(0, 10, 0, 9, 0.01, 100), Pace(0, 10, 0, 3, 0.01, 100)]
    assert own_seconds(paces) == [4, 10]


def test_a_tensor_parallel_rank_that_computes_slowly():
    # All leave an evaluation together: only the probe tells.
    paces = [Pace(0, 10, 0, 9, 0.01, 100), Pace(0, 10, 0, 9, 0.03, 100)]
    assert own_seconds(paces) == [pytest.approx(4), pytest.approx(10)]
    found, _ = scores(paces)
    assert slowest(paces, found) == 1


def test_equal_ranks_are_not_named():
    paces = [Pace(rank, 10, 1, 8, None, 100) for rank in range(4)]
    found, reason = scores(paces)
    assert found == [1, 1, 1, 1] and reason is None and slowest(paces, found) is None


def test_where_there_is_nothing_to_compare_it_says_so():
    assert scores([Pace(0, 10, 0, 9, None, 100)]) == (
        [None],
        "one rank has none to be compared with",
    )
    found, reason = scores([Pace(0, 10, 0, 9, None, 100), Pace(1, 10, 0, 9, None, 0)])
    assert found == [None, None] and reason == "a replica has done no work"


def test_a_short_run_names_nobody():
    paces = [Pace(0, 0.5, 0.4, 0.1, None, 10), Pace(1, 0.5, 0, 0.5, None, 10)]
    found, _ = scores(paces)
    assert found[1] == pytest.approx(5) and slowest(paces, found) is None


def test_the_probe_is_done_now_and_then():
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.25
        return now

    probe = Probe(True, clock)
    assert probe.seconds is None
    for _ in range(12):  # every look costs 0.25 s, a probe 0.25 s more and then 2 s of nothing
        probe.look()
    assert probe.seconds == 0.25 and now < 4
    before = now
    probe.look(now=True)
    assert now - before == 0.5  # whether it was time or not
    off = Probe(False, clock)
    off.look()
    assert off.seconds is None
