"""The bar on a terminal, the lines elsewhere, and when answers are printed."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from hpcmlx.observe.progress import FEW, ProgressBar, seconds_left


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)


@pytest.fixture(autouse=True)
def a_terminal_that_is_not_dumb(monkeypatch):
    """Whatever terminal the tests themselves run in."""
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def lines():
    """The messages that are logged while the test runs."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("hpcmlx.observe.progress")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_few_answers_are_printed_with_their_markup_as_it_is(lines):
    out, clock = console(terminal=False), Clock()
    with ProgressBar(2, "rows", True, console=out, clock=clock) as bar:
        bar.show("q1", "[bold]four[/bold]")
        clock.now += 60
        bar.show("q2", "")
    assert out.file.getvalue() == "q1  (1/2)\n[bold]four[/bold]\n\nq2  (2/2)\n\n\n"
    assert lines == []


def test_of_many_rows_only_a_line_now_and_then(lines):
    out, clock = console(terminal=False), Clock()
    with ProgressBar(1000, "rows", True, num_errors=1, console=out, clock=clock) as bar:
        for _ in range(250):
            clock.now += 0.125
            bar.show("q", "an answer")
    assert out.file.getvalue() == ""
    assert lines == [
        "rows 80/1000 (8%), 8.0 rows/s, 1 error, 0:01:55 left",
        "rows 160/1000 (16%), 8.0 rows/s, 1 error, 0:01:45 left",
        "rows 240/1000 (24%), 8.0 rows/s, 1 error, 0:01:35 left",
    ]


def test_rows_of_other_replicas_and_of_earlier_launches(lines):
    clock = Clock()
    with ProgressBar(
        1000, "rows", True, already_done=400, console=console(False), clock=clock
    ) as bar:
        clock.now += 5
        bar.set(410, 55.5)
        clock.now += 5
        bar.set(500, 61.25, num_errors=3)
        bar.show("q", "counted here, before the others' numbers come")
        bar.set(500, 61.25)
        assert bar.done == 501
    # 100 rows of this launch in 10 s.
    assert lines == ["rows 500/1000 (50%), 61.2 tok/s, 3 errors, 0:00:50 left"]


def test_a_terminal_has_a_bar_and_no_lines(lines):
    out, clock = console(terminal=True), Clock()
    with ProgressBar(FEW + 1, "rows", True, console=out, clock=clock) as bar:
        clock.now += 20
        bar.set(17, 61.25, num_errors=2)
        bar.show("q", "an answer")
    last = [line for line in out.file.getvalue().splitlines() if "/51" in line][-1]
    for text in ("rows", f"18/{FEW + 1}", "61.2 tok/s", "2 errors", "0:00:37 left"):
        assert text in last
    assert "an answer" not in out.file.getvalue() and lines == []


@pytest.mark.parametrize("total", [3, 1000])
def test_other_ranks_are_silent(lines, total):
    out, clock = console(terminal=True), Clock()
    with ProgressBar(total, "rows", False, console=out, clock=clock) as bar:
        bar.show("q", "an answer")
        clock.now += 60
        bar.advance()
    assert out.file.getvalue() == "" and lines == [] and bar.done == 2


def test_a_dumb_terminal_is_none(lines, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out, clock = console(terminal=True), Clock()
    with ProgressBar(1000, "tokens", True, console=out, clock=clock) as bar:
        clock.now += 10
        bar.advance(500)
    assert out.file.getvalue() == ""
    assert lines == ["tokens 500/1000 (50%), 50.0 tokens/s, 0:00:10 left"]


def test_seconds_left():
    assert seconds_left(0, 10, 5.0) is None
    assert seconds_left(5, 10, 5.0) == 10.0
    assert seconds_left(0, 0, 0.0) == 0.0
