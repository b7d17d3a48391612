"""Pipeline schedules: every one proved to end, on a clock, and as the charts that show them."""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hpcmlx.errors import ConfigError
from hpcmlx.parallel.schedule import (
    SCHEDULES,
    Action,
    Kind,
    check,
    schedule,
    simulate,
    source,
    tag,
    target,
)
from hpcmlx.parallel.schedule_chart import chart, draw

F, B = Kind.FORWARD, Kind.BACKWARD
STAGES, MICROBATCHES = range(1, 6), range(1, 10)
GRID = [
    (name, p, m, v)
    for name in SCHEDULES
    for p in STAGES
    for m in MICROBATCHES
    for v in ((2, 3) if name == "interleaved_1f1b" else (1,))
]


def brief(own, chunks=False):
    """A rank's actions as in "F0 F1 B0"; with chunks "F0.1" is microbatch 0 of chunk 1."""
    kinds = {F: "F", B: "B"}
    return " ".join(f"{kinds[a.kind]}{a.microbatch}{f'.{a.chunk}' if chunks else ''}" for a in own)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_ends_with_everything_done_once(name):
    for _, p, m, v in (case for case in GRID if case[0] == name):
        actions = schedule(name, p, m, v)
        assert len(actions) == p
        check(actions, m, v)


def test_the_lists_of_the_papers():
    assert [brief(own) for own in schedule("gpipe", 2, 3)] == ["F0 F1 F2 B0 B1 B2"] * 2
    assert [brief(own) for own in schedule("1f1b", 3, 4)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    # Figure 4 of arXiv:2104.04473, its last device, up to the second round.
    last = schedule("interleaved_1f1b", 4, 8, 2)[3]
    assert brief(last, chunks=True).startswith(
        "F0.0 F1.0 F2.0 F3.0 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 F4.0 B0.0 F5.0 B1.0"
    )


def test_idle_time_is_the_papers():
    for name, p, m, v in GRID:
        result = simulate(schedule(name, p, m, v), 1.0, 2.0)
        if m >= p or v == 1:
            assert result.idle == pytest.approx([(p - 1) / (v * m + p - 1)] * p), (name, p, m, v)
            assert result.seconds == pytest.approx(3 * (m + (p - 1) / v))
        else:  # not enough microbatches to fill the pipeline even once
            assert result.seconds <= 3 * (m + p - 1) + 1e-9, (name, p, m, v)


def test_what_is_in_flight():
    for name, p, m, v in GRID:
        kept = simulate(schedule(name, p, m, v), 1.0, 2.0).in_flight
        if name == "gpipe":
            assert kept == [m] * p
        elif name == "1f1b":
            assert kept == [min(m, p - rank) for rank in range(p)]
        else:  # warm-up and one more, as Megatron-LM's, whose rounds are of p microbatches
            largest = -(-m // max(1, m // p))
            bound = [(v - 1) * largest + 2 * (p - 1 - rank) + 1 for rank in range(p)]
            assert kept == [min(m * v, most) for most in bound], (name, p, m, v)


def test_messages_have_two_ends_and_a_number_of_their_own():
    for _, p, m, v in (case for case in GRID if case[2] in (1, 5)):
        actions = [Action(kind, c, i) for kind in Kind for c in range(v) for i in range(m)]
        tags: dict[tuple[int, int], list[int]] = {}
        for rank in range(p):
            for action in actions:
                to = target(action, rank, p, v)
                if to is not None:
                    peer, receiver = to
                    assert source(receiver, peer, p, v) == (rank, action)
                    tags.setdefault((rank, peer), []).append(tag(receiver, m))
        assert sum(map(len, tags.values())) == 2 * m * (p * v - 1)
        assert all(len(numbers) == len(set(numbers)) for numbers in tags.values())


def test_the_ends_of_the_model_have_no_neighbour():
    assert source(Action(F, 0, 3), 0, 4, 2) is None and target(Action(B, 0, 3), 0, 4, 2) is None
    assert target(Action(F, 1, 3), 3, 4, 2) is None and source(Action(B, 1, 3), 3, 4, 2) is None
    assert target(Action(F, 0, 3), 3, 4, 2) == (0, Action(F, 1, 3))  # back to the first rank
    assert source(Action(B, 0, 3), 3, 4, 2) == (0, Action(B, 1, 3))


def swap(own, one, other):
    return [other if a == one else one if a == other else a for a in own]


def test_a_wrong_schedule_is_found_out():
    def wrong(own, message, m=3):
        with pytest.raises(ValueError, match=message):
            check([own, good[1]], m)

    good = schedule("1f1b", 2, 3)
    check(good, 3)
    wrong(good[0][:-1], "rank 0 never does the backward of microbatch 2 through chunk 0")
    wrong(good[0], "never does the backward of microbatch 3", m=4)
    wrong(good[0], "microbatch 2 through chunk 0, which does not exist", m=2)
    wrong([*good[0], good[0][0]], "rank 0 does 7 actions, 6 different ones")
    backward_first = swap(good[0], Action(F, 0, 2), Action(B, 0, 2))
    wrong(backward_first, "never ends: rank 0 waits in its action 3, the backward of microbatch 2")
    # Each waits for what the other does next.
    crossed = swap(good[0], Action(F, 0, 1), Action(B, 0, 0))
    check([crossed, good[1]], 3)
    crossed_too = [Action(F, 0, i) for i in (0, 1)] + [Action(B, 0, i) for i in (0, 1)]
    crossed_too += [Action(F, 0, 2), Action(B, 0, 2)]
    with pytest.raises(ValueError, match=r"rank 0 waits in its action 1,.*; rank 1 waits in its"):
        check([crossed, crossed_too], 3)


def test_clocks_of_unequal_stages_and_links():
    result = simulate(schedule("1f1b", 2, 2), [1.0, 2.0], [2.0, 4.0], transfer_time=0.5)
    # F0 F1 B0 B1 | F0 B0 F1 B1: stage 1 is the slow one and waits for nothing after its first.
    assert result.spans[1] == [(1.5, 3.5), (3.5, 7.5), (7.5, 9.5), (9.5, 13.5)]
    assert result.spans[0] == [(0.0, 1.0), (1.0, 2.0), (8.0, 10.0), (14.0, 16.0)]
    assert result.seconds == 16.0 and result.idle == pytest.approx([10 / 16, 4 / 16])
    assert result.in_flight == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1", 4, 8), "no schedule '1f1': choose one of gpipe, 1f1b, interleaved_1f1b"),
        (("1f1b", 4, 8, 2), "1f1b is for 1 chunk a rank, got 2: .* schedule interleaved_1f1b"),
        (("interleaved_1f1b", 4, 8), "is for 2 chunks a rank or more, got 1: .* schedule 1f1b"),
        (("gpipe", 0, 8), "at least 1 of its stages, got 0"),
        (("gpipe", 2, 0), "at least 1 of its microbatches, got 0"),
        (("gpipe", 2, 1, -1), "at least 1 of its chunks, got -1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        schedule(*arguments)


# -- charts --


def plain(width):
    return Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)


def test_the_chart_in_plain_text():
    assert chart("1f1b", 2, 3, console=plain(80)).splitlines() == [
        "1f1b, 2 stages, 3 microbatches: 25% idle",
        "rank 0 >0>>1>......<<0<<<>2><<1<<<...<<2<<<",
        "rank 1 ...>0><<0<<<>1><<1<<<>2><<2<<<......",
        "rank 0 to 1: idle 25% 25%; microbatches in flight 2 1",
        "> forward  < backward  . idle",
    ]
    one = chart("gpipe", 1, 1, console=plain(80))
    assert one.splitlines()[1:3] == [
        "rank 0 >0><<0<<<",
        "rank 0: idle 0%; microbatches in flight 1",
    ]


def test_no_lane_is_wider_than_the_terminal():
    for width in (20, 40, 80, 200):
        for name, p, m, v in (
            ("gpipe", 3, 7, 1),
            ("1f1b", 12, 40, 1),
            ("interleaved_1f1b", 4, 8, 3),
        ):
            lines = chart(name, p, m, v, console=plain(width)).splitlines()
            lanes = [line for line in lines if re.match(r" ?rank +\d+ [^t]", line)]
            assert len(lanes) == p and len({len(lane) for lane in lanes}) == 1
            assert all(len(lane) <= width for lane in lanes)
    [hint] = [line for line in lines if "has room for all numbers" in line]
    wide = chart("interleaved_1f1b", 4, 8, 3, console=plain(int(hint.split()[3])))
    lanes = [line for line in wide.splitlines() if line.startswith("rank") and "idle" not in line]
    for lane in lanes:
        assert len(re.findall(r"[0-7][abc]", lane)) == 2 * 8 * 3


def test_the_chart_in_colours():
    coloured = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    text = chart("1f1b", 2, 3, console=coloured)
    lane = text.splitlines()[1]
    forward, backward = "48;2;0;114;178m", "48;2;230;159;0m"
    assert lane.count(forward) == lane.count(backward) == 3
    without = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert without[1].rstrip() == "rank 0 ▏0 ▏1 ......▏  0  ▏2 ▏  1  ...▏  2"


def test_the_picture(monkeypatch):
    matplotlib_text = pytest.importorskip("matplotlib.text")
    said, original = [], matplotlib_text.Text.set_text

    def set_text(self, words):
        said.append(str(words))
        original(self, words)

    monkeypatch.setattr(matplotlib_text.Text, "set_text", set_text)
    assert draw("interleaved_1f1b", 2, 4, 2).startswith(b"\x89PNG\r\n\x1a\n")
    assert "interleaved_1f1b, 2 stages of 2 chunks, 4 microbatches: 11% idle" in said
    assert "backward, chunk 1" in said and "11% idle\n1.5 in flight" in said
    assert said.count("3") >= 2 * 2 * 2


def test_without_matplotlib_there_is_no_picture(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hpcmlx\[plot\]'"):
        draw("1f1b", 2, 2)


def test_the_command(tmp_path):
    def plan(*arguments):
        line = [sys.executable, "jobs/plan.py", "schedule", *arguments]
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(line, capture_output=True, text=True, cwd=root, timeout=60)

    pytest.importorskip("matplotlib")
    picture = tmp_path / "a.png"
    size = ["--pp", "4", "--microbatches", "8"]
    done = plan("--name", "interleaved_1f1b", "--chunks", "2", *size, "--picture", str(picture))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "interleaved_1f1b, 4 stages of 2 chunks, 8 microbatches: 16% idle"
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = plan("--name", "1f1b", "--chunks", "2", *size)
    assert refused.returncode == 78 and not refused.stdout
    assert refused.stderr.startswith("plan: 1f1b is for 1 chunk a rank, got 2")
