"""Spans from the ranks to the file and the picture: clocks, shares of time, what is kept."""

from __future__ import annotations

import importlib.util
import io
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError
from hpcmlx.observe import gantt
from hpcmlx.observe.gantt import busy_fraction, draw, require_matplotlib, shown_seconds
from hpcmlx.observe.timeline import KINDS, OFF, SPAN, Lane, Timeline
from tests.fixtures import assert_done, mpirun, run, run_line, write_rows
from tests.fixtures import model as model

PNG = b"\x89PNG\r\n\x1a\n"


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def spans(*rows):
    """`SPAN`s of (kind, slot, begin, end)."""
    return np.array([(b, e, KINDS.index(kind), slot, 1) for kind, slot, b, e in rows], SPAN)


def lane(stage, *rows, replica=0, tp=0, is_full=False):
    return Lane(stage, replica, stage, tp, spans(*rows), is_full)


def two_stages(num_steps):
    """Two stages, two microbatches: stage 1 works one step behind stage 0, which waits half."""
    first = [("prefill", 0, 0.0, 4.0), ("prefill", 1, 4.0, 8.0)]
    last = [("prefill", 0, 4.0, 8.0), ("prefill", 1, 8.0, 12.0)]
    for i in range(num_steps):
        at = 12.0 + i
        first += [("wait", i % 2, at - 0.5, at), ("decode", i % 2, at, at + 0.5)]
        last.append(("decode", i % 2, at, at + 1.0))
    return [lane(0, *first), lane(1, *last)]


def test_spans_are_recorded_as_given():
    clock = Clock()
    line = Timeline(clock=clock)
    with line.span("prefill", 1, 512):
        clock.now += 2.0
    line.record("decode", 0, 52.5, 53.0, num_tokens=8)
    [kept] = line.gather(Communicator(), (3, 1, 2))
    assert kept.spans.tolist() == [(0.0, 2.0, 0, 1, 512), (2.5, 3.0, 1, 0, 8)]
    assert (kept.rank, kept.replica, kept.stage, kept.tp) == (0, 3, 1, 2) and not kept.is_full


def test_a_long_run_keeps_its_beginning():
    line = Timeline(limit=3)
    for i in range(10):
        line.record("decode", 0, i, i + 1)
    [kept] = line.gather(Communicator(), (0, 0, 0))
    assert kept.spans["end"].tolist() == [1, 2, 3] and kept.is_full
    # All lanes are shown only as far as the rank with the shortest memory remembers.
    assert shown_seconds([kept, lane(1, ("decode", 0, 0.0, 10.0))]) == 3
    assert shown_seconds([lane(0), lane(1, ("decode", 0, 0.0, 10.0))]) == 10
    assert shown_seconds([lane(0)]) == 0


def test_an_unknown_kind_is_a_bug():
    with pytest.raises(KeyError):
        Timeline().record("deocde", 0, 0.0, 1.0)


def test_off_keeps_nothing(tmp_path):
    with OFF.span("decode", 0, 8):
        OFF.record("decode", 0, 0.0, 1.0)
    OFF.align(Communicator())
    assert not OFF._spans and not OFF._offsets
    assert OFF.save(Communicator(), (0, 0, 0), tmp_path, "dp1_pp1_tp1") is None
    assert not list(tmp_path.iterdir())


def test_clocks_that_differ_and_drift_are_aligned():
    root = Clock()

    def mine():  # 100 s ahead of rank 0's clock and 1 % fast
        return 1.01 * root.now + 100

    world = SimpleNamespace(
        rank=1, barrier=lambda: None, bcast=lambda _: root.now, gather=lambda value: [value]
    )
    line = Timeline(clock=mine)
    line.align(world)
    root.now += 3
    with line.span("decode", 0):
        root.now += 2
    root.now += 5
    with line.span("decode", 1):
        root.now += 1
    [kept] = line.gather(world, (0, 1, 0))
    assert kept.spans["begin"] == pytest.approx([0, 7])
    assert kept.spans["end"] == pytest.approx([2, 8])


def test_busy_is_some_span_and_no_wait():
    rows = spans(
        ("decode", 0, 0.0, 4.0),
        ("wait", 0, 1.0, 2.0),  # inside the decode
        ("wait", 0, 1.5, 2.0),
        ("admit", 0, 3.0, 5.0),  # overlaps it
        ("wait", 0, 6.0, 8.0),
    )
    assert busy_fraction(rows, [0, 10]) == pytest.approx([0.4])
    assert busy_fraction(rows, [0, 1, 2, 4, 6, 8]) == pytest.approx([1, 0, 1, 0.5, 0])
    assert busy_fraction(spans(), [0, 1, 2]).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_busy_agrees_with_sampling(seed):
    rng = np.random.default_rng(seed)
    begins, kinds = rng.integers(0, 900, 40), rng.choice(KINDS, 40)
    ends = begins + rng.integers(0, 60, 40)
    rows = spans(*zip(kinds, [0] * 40, begins, ends, strict=True))
    idle, busy = np.zeros(1000, bool), np.zeros(1000, bool)
    for kind, begin, end in zip(kinds, begins, ends, strict=True):
        (idle if kind == "wait" else busy)[begin:end] = True
    expected = (busy & ~idle).reshape(10, 100).mean(axis=1)
    assert busy_fraction(rows, np.arange(0, 1001, 100)) == pytest.approx(expected)


def test_what_is_drawn_leaves_waits_out():
    rows = spans(
        ("decode", 1, 0.0, 4.0),
        ("wait", 1, 1.0, 2.0),
        ("wait", 1, 1.5, 2.5),
        ("prefill", 0, 4.0, 9.0),
        ("wait", 0, 3.5, 5.0),
        ("wait", 0, 6.0, 6.5),
        ("decode", 1, 6.0, 6.5),
    )
    pieces = gantt._pieces(rows, 0.5, 8.0)
    decode, prefill = KINDS.index("decode"), KINDS.index("prefill")
    assert pieces[["begin", "end", "kind", "slot"]].tolist() == [
        (0.5, 1.0, decode, 1),
        (2.5, 3.5, decode, 1),
        (5.0, 6.0, prefill, 0),
        (6.5, 8.0, prefill, 0),
    ]
    total = (pieces["end"] - pieces["begin"]).sum()
    assert busy_fraction(rows, [0.5, 8.0]) == pytest.approx([total / 7.5])


def image(data):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    return matplotlib_image.imread(io.BytesIO(data), format="png")[..., :3]


def test_the_picture_of_a_short_run():
    pixels = image(draw(two_stages(20), "dp1_pp2_tp1"))
    assert pixels.shape[1] == 2400
    for color in gantt._PALETTE[:2]:
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert np.isclose(pixels, rgb, atol=0.01).all(axis=-1).sum() > 10_000


def test_what_the_picture_says(monkeypatch):
    """Labels and shares, as they are handed to matplotlib."""
    text = pytest.importorskip("matplotlib.text")
    said, original = [], text.Text.set_text

    def set_text(self, words):
        said.append(str(words))
        original(self, words)

    monkeypatch.setattr(text.Text, "set_text", set_text)
    lanes = two_stages(20)
    lanes += [Lane(i + 2, 1, i, 0, a.spans, True) for i, a in enumerate(lanes)]
    draw(lanes, "dp2_pp2_tp1")
    assert "replica 1, stage 0" in said and "microbatch 1" in said
    assert not any("tp 0" in words or "shown below" in words for words in said)
    # Rank 0 remembers 31.5 s: 8 s of prefill and 20 half seconds; stage 1 has 8 + 19.5.
    assert said.count("57% busy") == 2 and said.count("87% busy") == 2
    assert "dp2_pp2_tp1: the first 31.5 s, 72% busy" in said
    said.clear()
    draw(two_stages(2000), "dp1_pp2_tp1")
    assert "shown below" in said and "dp1_pp2_tp1: 2,012 s, 75% busy" in said
    assert "stage 0" in said


def test_a_run_without_rows_has_a_picture_too():
    pytest.importorskip("matplotlib")
    assert draw([lane(0), lane(1)], "dp1_pp2_tp1").startswith(PNG)


def test_the_legend_names_what_was_done(monkeypatch):
    """Training has microbatches of its own kinds, and neither prefill nor decode."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    labels = []
    legend = Figure.legend
    monkeypatch.setattr(
        Figure,
        "legend",
        lambda self, handles, **how: (
            labels.append([h.get_label() for h in handles]) or legend(self, handles=handles, **how)
        ),
    )
    draw([lane(0, ("forward", 0, 0.0, 1.0), ("backward", 1, 1.0, 3.0))], "dp1_pp1_tp1")
    draw([lane(0, ("prefill", 0, 0.0, 1.0), ("admit", 0, 1.0, 3.0))], "dp1_pp1_tp1")
    assert labels == [
        ["microbatch 0", "microbatch 1", "forward", "backward", "idle"],
        ["microbatch 0", "prefill", "admit", "idle"],
    ]


@pytest.mark.parametrize("num_steps", [30, 0])
def test_the_file_has_the_spans(tmp_path, num_steps):
    line = Timeline()
    for i in range(num_steps):
        line.record("decode", i % 2, 10 + i, 10.5 + i, num_tokens=8)
    [kept] = line.save(Communicator(), (0, 0, 0), tmp_path, "dp1_pp1_tp1")
    assert len(kept.spans) == num_steps
    with h5py.File(tmp_path / "timeline.h5") as file:
        assert file.attrs["layout"] == "dp1_pp1_tp1"
        assert file["begin"][:].tolist() == list(range(num_steps))
        assert file["end"][:].tolist() == [i + 0.5 for i in range(num_steps)]
        names = file["kind"].attrs["names"]
        assert {names[code] for code in file["kind"][:]} <= {"decode"}
        assert set(file["rank"][:]) <= {0} and set(file["num_tokens"][:]) <= {8}
        assert {k: v[:].tolist() for k, v in file["ranks"].items()} == {
            "rank": [0],
            "replica": [0],
            "stage": [0],
            "tp": [0],
            "is_full": [False],
        }


def test_a_job_that_draws_itself(model, tmp_path):
    pytest.importorskip("matplotlib")
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "Hello"}, {"prompt": "you"}])
    line = [f"model.path={model}", f"input={rows}", f"run_dir={tmp_path / 'run'}"]
    line += ["parallel.pp=2", "sampling.max_tokens=4", "timeline=true"]
    assert_done(run("generate", *line, ranks=2), tmp_path / "run")
    assert (tmp_path / "run" / "pipeline.png").read_bytes().startswith(PNG)
    with h5py.File(tmp_path / "run" / "timeline.h5") as file:
        assert file.attrs["layout"] == "dp1_pp2_tp1" and set(file["rank"]) == {0, 1}


SCRIPT = """
import sys, time
from pathlib import Path
from hpcmlx import comm
from hpcmlx.observe.timeline import Timeline

world = comm.init()
line = Timeline(clock=lambda: time.perf_counter() + 1000 * world.rank)
line.align(world)
world.barrier()
for _ in range(3):
    if world.rank == 0:
        with line.span("prefill", 0, 5):
            time.sleep(0.05)
    world.barrier()
    if world.rank == 1:
        with line.span("decode", 1, 5):
            time.sleep(0.05)
    world.barrier()
line.save(world, (0, world.rank, 0), Path(sys.argv[1]), "dp1_pp2_tp1")
comm.finalize(0)
"""


def test_two_ranks_with_clocks_of_their_own(tmp_path):
    outcome = run_line([*mpirun("-n", "2"), sys.executable, "-c", SCRIPT, str(tmp_path)])
    assert outcome.code == 0, outcome.err
    with h5py.File(tmp_path / "timeline.h5") as file:
        rows = sorted(zip(file["begin"], file["end"], file["rank"], strict=True))
        assert file["ranks/stage"][:].tolist() == [0, 1]
    assert [rank for _, _, rank in rows] == [0, 1, 0, 1, 0, 1]
    # They took turns, so nothing overlaps but for the error of the alignment.
    for (_, end, _), (begin, _, _) in zip(rows, rows[1:], strict=False):
        assert -0.02 < begin - end < 0.2


def test_without_matplotlib_the_run_is_refused_before_it_starts(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'hpcmlx\[plot\]'"):
        require_matplotlib()


def test_with_matplotlib_it_is_not():
    pytest.importorskip("matplotlib")
    require_matplotlib()
