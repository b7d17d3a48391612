"""Runs beside each other: the table, the files, the picture."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.observe import compare, compare_plot
from hpcmlx.observe.metrics import Metrics
from hpcmlx.sweep.points import Sweep
from tests.fixtures import ROOT, job_line, run_line


def make_run(path: Path, rate: float, rank: int, *, loss: float | None, steps: int = 3) -> Path:
    """A run directory as fine-tuning leaves it; `loss` None: it was cut off."""
    path.mkdir()
    config = {
        "model": {"path": "m"},
        "optim": {"learning_rate": rate},
        "method": {"rank": rank, "modules": ["*"]},
        "run_dir": str(path),
        "launch": {"kind": "none"},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    with Metrics(path) as metrics:
        for step in range(steps):
            metrics.log(step, {"loss": 4.0 / (step + 1) * rate})
        metrics.log(steps, {"loss": rate}, "eval")
    if loss is not None:
        totals = {"best_loss": loss, "layout": "dp1_pp1_tp1", "ttft_seconds": {"p50": 0.5}}
        (path / "summary.json").write_text(json.dumps({**totals, "ranks": [{"rank": 0}]}))
        (path / "completed.json").write_text('{"exit_code": 0, "seconds": 1.0}')
    return path


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Four points; of the third there is no completion record, the fourth was not begun."""
    folder = tmp_path / "sweep"
    folder.mkdir()
    made = Sweep(folder, "finetune", "best_loss", "minimize", ["optim.learning_rate"])
    for rate, loss in ((0.1, 1.25), (0.2, 0.123456789), (0.4, None)):
        point = made.add({"optim.learning_rate": str(rate)}, "")
        make_run(made.run_dir(point), rate, 8, loss=loss)
    made.points[2].exit_code = 70
    made.add({"optim.learning_rate": "0.8"}, "")
    made.save()
    return folder


def table(*paths: Path, wanted: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    runs = compare.read_runs(paths)
    return compare.table(runs, compare.differing(runs), compare.shown_metrics(runs, wanted))


def test_the_points_of_a_sweep(sweep):
    header, rows = table(sweep)
    assert header == ["run", "optim.learning_rate", "state", "best_loss", "train_loss",
                      "ttft_seconds.p50"]  # fmt: skip
    assert rows[0][1:] == ["0.1", "complete", "1.25", "0.13333", "0.5"]
    assert rows[1][1:4] == ["0.2", "complete", "0.12346"]
    # What is not complete has no numbers, whatever it has logged.
    assert rows[2][1:] == ["0.4", "FAILED", "", "", ""]
    assert rows[3][1:] == ["null", "not run", "", "", ""]


def test_runs_that_were_started_by_hand(tmp_path):
    one = make_run(tmp_path / "one", 0.1, 2, loss=1.0)
    two = make_run(tmp_path / "two", 0.1, 8, loss=None)
    header, rows = table(one, two, wanted=("best_loss",))
    assert header == ["run", "method.rank", "state", "best_loss"]
    assert rows == [["one", "2", "complete", "1"], ["two", "8", "not complete", ""]]
    with pytest.raises(ConfigError, match="no run has a number speed; there are: best_loss"):
        table(one, wanted=("speed",))
    with pytest.raises(ConfigError, match="neither a run nor a sweep"):
        table(tmp_path)


def test_files_have_the_numbers_in_full(sweep):
    runs = compare.read_runs([sweep])
    keys, metrics = compare.differing(runs), compare.shown_metrics(runs)
    rows = list(csv.DictReader(io.StringIO(compare.as_csv(runs, keys, metrics))))
    assert [row["best_loss"] for row in rows] == ["1.25", "0.123456789", "", ""]
    plain = json.loads(compare.as_json(runs, keys, metrics))
    assert plain[1]["metrics"]["best_loss"] == 0.123456789 and plain[2]["state"] == "FAILED"
    assert plain[0]["settings"] == {"optim.learning_rate": 0.1}


def test_curves_are_those_of_the_hdf5_file(tmp_path):
    run_dir = make_run(tmp_path / "run", 0.1, 2, loss=1.0)
    (run_dir / "metrics.csv").unlink()
    curves = compare.read_curves(run_dir)
    assert np.allclose(curves["train"]["loss"], [0.4, 0.2, 0.4 / 3])
    assert curves["eval"]["step"].tolist() == [3]
    data = bytearray((run_dir / "metrics.h5").read_bytes())
    with h5py.File(run_dir / "metrics.h5") as file:
        at = file["train/loss"].id.get_chunk_info(0).byte_offset
    data[at] ^= 1
    (run_dir / "metrics.h5").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"metrics\.h5 is damaged"):
        compare.read_curves(run_dir)


@pytest.mark.parametrize("keys", [["optim.learning_rate"], ["method.rank", "model.path"], []])
def test_the_picture(sweep, tmp_path, keys):
    runs = [
        *compare.read_runs([sweep]),
        *compare.read_runs([make_run(tmp_path / "x", 0.3, 4, loss=2)]),
    ]
    assert compare_plot.draw(runs, keys, "best_loss").startswith(b"\x89PNG")
    assert compare_plot.draw(runs, keys, None).startswith(b"\x89PNG")
    assert compare_plot.label(runs[2], ["optim.learning_rate"]) == "learning_rate 0.4 (FAILED)"


def test_the_command(sweep, tmp_path):
    line = [*job_line("compare", str(sweep)), f"--csv={tmp_path}/t.csv", f"--plot={tmp_path}/p.png"]
    outcome = run_line(line, ROOT)
    assert outcome.code == 0, outcome.err
    assert "FAILED" in outcome.out and (tmp_path / "p.png").exists()
    assert (tmp_path / "t.csv").read_text().startswith("run,optim.learning_rate,state,best_loss,")
    outcome = run_line(job_line("compare", str(tmp_path)), ROOT)
    assert outcome.code == 78 and outcome.err.startswith("compare: ")
