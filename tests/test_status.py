"""What `status.json` says while a run goes on, and how ranks' numbers become one."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime, timedelta

import pytest

from hpcmlx.errors import OutputError
from hpcmlx.observe import status
from hpcmlx.observe.status import RankReport, State, StatusWriter, combine


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def report(rank, stage=0, replica=0, rows=0, tokens=0, waiting=0.0, elapsed=10.0, **more):
    numbers = {"prompt_tokens": 0, "kv_bytes": 0, "num_active": 0} | more
    return RankReport(
        rank,
        stage,
        replica,
        num_rows=rows,
        generated_tokens=tokens,
        waiting_seconds=waiting,
        elapsed_seconds=elapsed,
        **numbers,
    )


def read(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def writer(tmp_path, clock):
    return StatusWriter(
        tmp_path,
        total_rows=100,
        already_done=20,
        num_errors=3,
        layout="dp1_pp2_tp1",
        num_stages=2,
        clock=clock,
    )


def test_rows_are_counted_once_for_each_replica():
    # dp 2 x pp 2: rank 0 has not heard of its last row, and only rank 3 counts replica 1's.
    reports = [
        report(0, 0, 0, rows=4, tokens=90, waiting=1.0, kv_bytes=10, kv_budget=100, num_active=8),
        report(1, 1, 0, rows=5, tokens=93, waiting=3.0, kv_bytes=30, kv_budget=100, num_active=7),
        report(2, 0, 1, waiting=5.0, kv_bytes=10, kv_budget=100),
        report(3, 1, 1, rows=7, tokens=70, waiting=5.0, prompt_tokens=11, num_active=2),
    ]
    everything, replicas = combine({r.rank: r for r in reports})
    assert everything.num_rows == 12 and everything.generated_tokens == 163
    assert everything.prompt_tokens == 11 and everything.num_active == 10
    assert (everything.kv_bytes, everything.kv_budget) == (50, 300)
    assert everything.stage_busy == pytest.approx({0: 0.7, 1: 0.6})
    assert [replicas[i].num_rows for i in (0, 1)] == [5, 7]
    assert [replicas[i].busy for i in (0, 1)] == pytest.approx([0.8, 0.5])
    assert replicas[0].stage_busy == pytest.approx({0: 0.9, 1: 0.7})


def test_tensor_ranks_of_a_stage_are_averaged():
    everything, _ = combine({r: report(r, stage=0, waiting=float(r)) for r in range(3)})
    assert everything.stage_busy == pytest.approx({0: 0.9})


def test_nobody_was_heard_of():
    everything, replicas = combine({})
    assert everything.num_rows == 0 and everything.busy == 0 and everything.stage_busy == {}
    assert replicas == {}


@pytest.mark.parametrize(("waiting", "elapsed", "busy"), [(0, 0, 0), (11, 10, 0), (-1, 10, 1)])
def test_busy_is_a_share(waiting, elapsed, busy):
    assert report(0, waiting=waiting, elapsed=elapsed).busy == busy


def test_there_is_a_status_from_the_start(tmp_path, writer):
    written = read(tmp_path)
    assert written["state"] == "loading" and written["layout"] == "dp1_pp2_tp1"
    assert (written["num_done"], written["num_total"], written["num_errors"]) == (20, 100, 3)
    assert written["num_resumed"] == 20 and written["eta_seconds"] is None
    assert written["stages"] == [{"stage": 0, "busy": None}, {"stage": 1, "busy": None}]
    assert written["replicas"] == [] and written["pid"] == os.getpid()
    age = datetime.now(UTC) - datetime.fromisoformat(written["updated"])
    assert timedelta(0) <= age < timedelta(seconds=10)


def test_rates_and_the_time_left(tmp_path, writer, clock):
    clock.now += 50  # loading does not count
    writer.set_state(State.RUNNING)
    for second in range(1, 61):
        clock.now += 1
        rows = second // 4 if second <= 40 else 10 + (second - 40) // 2
        news = report(1, 1, rows=rows, tokens=second * 10, waiting=second / 4, elapsed=second)
        now = writer.update([(1, news)])
    assert json.loads(json.dumps(now.__dict__, default=vars)) == read(tmp_path)
    assert now.num_done == 40 and now.elapsed_seconds == 110
    assert (now.rows_per_sec.overall, now.tokens_per_sec.overall) == (0.333, 10.0)
    # The last 30 s began when 7 rows were done.
    assert now.rows_per_sec.recent == pytest.approx(13 / 30, abs=1e-3)
    assert now.eta_seconds == 180.0  # 60 rows at 20 a minute
    assert now.stages[1] == {"stage": 1, "busy": 0.75}
    assert now.replicas == [{"replica": 0, "busy": 0.75, "num_rows": 20, "stages": [None, 0.75]}]


def test_at_most_one_write_a_second(tmp_path, writer, clock):
    writer.set_state(State.RUNNING)
    before = os.stat(tmp_path / "status.json").st_ino
    clock.now += 0.99
    assert not writer.due and writer.update([(0, report(0, rows=1))]) is None
    assert os.stat(tmp_path / "status.json").st_ino == before
    clock.now += 0.01
    assert writer.due
    # What came while it was not time is not lost.
    assert writer.update().num_done == 21
    assert os.listdir(tmp_path) == ["status.json"]


def test_the_end_is_written_at_once_and_stops_the_clock_of_the_rates(tmp_path, writer, clock):
    with writer:
        writer.set_state(State.RUNNING)
        clock.now += 10
        writer.set_state(State.FINISHING, [(0, report(0, rows=80, tokens=500))])
        written = read(tmp_path)
        assert written["state"] == "finishing" and written["num_done"] == 100
        clock.now += 90
    written = read(tmp_path)
    assert written["state"] == "complete" and written["error"] is None
    assert written["tokens_per_sec"]["overall"] == 50.0 and written["elapsed_seconds"] == 100


def test_a_failure_is_one_line(tmp_path, writer):
    with pytest.raises(ValueError, match="two"), writer:
        raise ValueError("two\nlines")
    written = read(tmp_path)
    assert written["state"] == "failed" and written["error"] == "ValueError: two lines"


def test_other_ranks_write_nothing(tmp_path):
    with StatusWriter(
        tmp_path, total_rows=1, layout="dp1_pp1_tp1", num_stages=1, enabled=False
    ) as writer:
        assert writer.set_state(State.RUNNING) is None
        assert not writer.due and writer.update() is None
    assert os.listdir(tmp_path) == []


@pytest.mark.fault
def test_a_reader_always_sees_a_whole_file(tmp_path, writer, clock):
    stop, seen, bad = threading.Event(), set(), []

    def watch():
        while not stop.is_set():
            try:
                seen.add(read(tmp_path)["num_done"])
            except (OSError, ValueError) as error:
                bad.append(error)

    reader = threading.Thread(target=watch)
    reader.start()
    writer.set_state(State.RUNNING)
    for rows in range(300):
        clock.now += 1
        writer.update([(0, report(0, rows=rows))])
    stop.set()
    reader.join()
    assert not bad and len(seen) > 5


@pytest.mark.fault
def test_a_status_that_cannot_be_written_does_not_end_the_run(tmp_path, writer, clock, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    writer.set_state(State.RUNNING)
    warnings = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        patch.setattr(status._log, "warning", lambda text, *args: warnings.append(text % args))
        for _ in range(3):
            clock.now += 1
            assert writer.update() is None
    [message] = warnings
    assert "status.json: No space left on device; the run goes on" in message
    assert os.listdir(tmp_path) == ["status.json"] and read(tmp_path)["state"] == "running"
    clock.now += 1
    assert writer.update([(0, report(0, rows=5))]).num_done == 25


def test_a_run_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OutputError, match="absent.*No such file"):
        StatusWriter(tmp_path / "absent", total_rows=1, layout="dp1_pp1_tp1", num_stages=1)
