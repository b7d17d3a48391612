"""The benchmark of fine-tuning on a tiny model: what is compared trains the same, so all losses
agree. No speeds are asserted."""

from __future__ import annotations

import json
import sys

from hpcmlx.bench import tables, training, training_costs
from hpcmlx.bench.tuners import Chats
from tests.fixtures import model, mpirun, run_line  # noqa: F401

CHATS = Chats(num_steps=2, batch_size=4, num_words=(1, 6))


def two_ranks(what, model, *options):  # noqa: F811
    line = [*mpirun("-n", "2"), sys.executable, "-m", "hpcmlx.bench", what, str(model)]
    words = ("--words", "1", "6", "--steps", "1", "--rounds", "1")
    outcome = run_line([*line, *words, *options], timeout=240, OPENBLAS_NUM_THREADS="1")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out.splitlines()[-1])["result"]


def assert_trained(report, names, tolerance):
    """Every variant made the same updates, and they changed something."""
    assert list(report) == names
    for name, run in report.items():
        assert run["loss_difference"] < tolerance, name
        assert len(run["seconds"]) == len(run["losses"]) - 1 == 1
        assert run["num_tokens"] == report[names[0]]["num_tokens"]
        before, after = run["losses"]
        assert sum(after) < sum(before), name


def test_train(model):  # noqa: F811
    """mlx-lm's trainer and ours give the same losses, step by step, from the same first values."""
    report = training.train(str(model), 1, CHATS)
    names = ["hpcmlx", "mlx-lm", "mlx-lm, not compiled", "hpcmlx, recompute", "mlx-lm, recompute"]
    assert_trained(report, [*names, "hpcmlx, all targets", "mlx-lm, all targets"], 5e-5)
    assert report["hpcmlx"]["losses"] != report["hpcmlx, all targets"]["losses"]
    assert len(tables.train(report).splitlines()) == 2 + len(tables.TRAIN)


def test_layouts(model):  # noqa: F811
    report = two_ranks("train_layouts", model, "--rows", "8")
    assert_trained(report, ["one", "dp2", "pp2", "tp2", "apart"], 1e-4)
    together, one = report["apart"]["losses"], report["one"]["losses"]
    assert abs(together[0][0] - one[0][0]) < 1e-5  # two halves of a batch, before any update
    assert abs(together[1][0] - one[1][0]) > 1e-4
    assert len(tables.train_layouts(report).splitlines()) == 2 + len(tables.TRAIN_LAYOUTS)


def test_memory_over_microbatches(model):  # noqa: F811
    """gpipe keeps them all, 1f1b no more than there are stages."""
    options = ("--words", "16", "16", "--microbatches", "2", "8")
    peaks = two_ranks("train_memory", model, *options)
    assert {name: list(by_count) for name, by_count in peaks.items()} == {
        "1f1b": ["2", "8"],
        "gpipe": ["2", "8"],
    }
    first, last = ({count: ranks[0] for count, ranks in peaks[name].items()} for name in peaks)
    # When a send lets go of its array moves these peaks by an eighth; gpipe's grow threefold.
    assert first["8"] < 1.5 * first["2"]
    assert last["8"] > 2 * last["2"]
    assert len(tables.train_memory(peaks).splitlines()) == 2 + 4


def test_save(model):  # noqa: F811
    found = training_costs.save(str(model), 2, CHATS, num_layers=1)
    assert {len(values) for values in found.values()} == {2}
    # Of each parameter itself and Adam's two averages, float32.
    assert found["bytes"][0] == found["bytes"][1] > 0
    assert found["bytes"][0] % (3 * 4) == 0
    assert all(found[name][0] > 0 for name in ("seconds", "step", "call", "steps"))
    assert "MiB/s" in tables.save(found)


def test_chats_are_the_same_every_time(tmp_path):
    for name in "ab":
        CHATS.write(tmp_path / name)
    rows = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(rows) == 8
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert len({len(row["messages"][1]["content"].split()) for row in rows}) > 2


def test_a_ratio_is_the_median_over_rounds():
    report = {
        name: {"tokens_per_sec": [speed, speed + 1], "loss_difference": 1e-6}
        for name, speed in {"one": 10, "dp2": 15, "pp2": 16, "tp2": 13, "apart": 17}.items()
    }
    line = tables.train_layouts(report).splitlines()[2]
    assert line == "| dp2 : one rank | 15.5 : 10.5 | **1.48** | 1.45–1.50 | ≥ 1.8 | 1e-06 |"
