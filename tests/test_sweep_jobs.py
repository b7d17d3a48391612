"""Sweeps as a user starts them: several jobs by one command, on this host."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import yaml

from hpcmlx import faults
from hpcmlx.errors import ConfigError
from hpcmlx.extras import require
from hpcmlx.observe.metrics import read_metrics
from tests.fixtures import (
    WITHOUT_TORCH,
    Outcome,
    Running,
    job_line,
    run_line,
    stop_early,
    stopped_rank,
    write_rows,
)
from tests.fixtures import model as model

pytestmark = pytest.mark.timeout(900)
PATIENCE = 240  # seconds for a whole sweep: a job takes about three on a quiet machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def tuning(model, folder) -> list[str]:
    rows = [{"prompt": f"{i}?", "completion": f"{'NESW'[i % 4]}!"} for i in range(12)]
    train = write_rows(folder / "train.jsonl", rows)
    return [
        *(f"model.path={model}", f"data.train=[{train}]", f"data.cache={folder}/cache"),
        *("train.batch_size=4", "optim.schedule=constant"),
    ]


def sweep(job: str, *overrides: str, cwd: Path, **env: str) -> Outcome:
    line = job_line(job, "-m", *overrides)
    return run_line(line, cwd, PATIENCE, **WITHOUT_TORCH, **env)


def started(outcome: Outcome) -> list[str]:
    """Names of the points that were started, in order."""
    return re.findall(r"^hpcmlx: (\S+): started", outcome.err, re.MULTILINE)


def record(path: Path, name: str) -> dict:
    return json.loads((path / name / "completed.json").read_text())


@pytest.mark.fault
def test_a_point_that_crashes_stops_no_other_and_is_all_that_a_second_launch_does(model, folder):
    """Two at once, on the slots of a host file; only the last point comes to the fatal step."""
    prompts = write_rows(folder / "p.jsonl", [{"prompt": f"row {i}"} for i in range(3)])
    hosts = folder / "hosts"
    hosts.write_text("localhost slots=2\n")
    path = folder / "generate"
    words = [f"model.path={model}", f"input={prompts}", "sampling.max_tokens=2,3,4,30"]
    words += [f"sweep.dir={path}", f"launch.hostfile={hosts}", "sweep.metric=generated_tokens"]
    outcome = sweep("generate", *words, cwd=folder, HPCMLX_FAULT="rank=0,step=12,kind=exception")
    assert outcome.code == 64, outcome.err
    assert not outcome.survivors
    names = [f"max_tokens={n}" for n in (2, 3, 4, 30)]
    assert started(outcome) == names
    # Two began before any had ended.
    first_two = [line for line in outcome.err.splitlines() if line.startswith("hpcmlx: max")][:2]
    assert all("started" in line for line in first_two)
    rows = [line.split() for line in outcome.out.splitlines()]
    assert rows[0][:3] == ["sampling.max_tokens", "state", "exit"]
    assert [row[1] for row in rows[1:5]] == ["complete"] * 3 + ["FAILED"]
    assert rows[4][2] == "70" and "best: max_tokens=4" in outcome.out
    assert re.search(r"max_tokens=30: .*unexpected RuntimeError", outcome.out)
    assert (path / "max_tokens=2.hosts").read_text() == "localhost slots=1\n"
    assert path.stat().st_mode & 0o777 == 0o700
    before = {name: record(path, name) for name in names[:3]}
    assert not (path / names[3] / "completed.json").exists()

    other = sweep("generate", *words, "sampling.seed=1", cwd=folder)
    assert other.code == 78 and "begun with other settings" in other.err

    outcome = sweep("generate", *words, cwd=folder)
    assert outcome.code == 0, outcome.err
    assert started(outcome) == names[3:]
    assert {name: record(path, name) for name in names[:3]} == before
    assert record(path, names[3])["exit_code"] == 0
    assert "4 points, 3 of them complete" in outcome.err
    # What the ranks have read is what the command line said.
    config = yaml.safe_load((path / names[3] / "config.yaml").read_text())
    assert (config["sampling"]["max_tokens"], config["launch"]["kind"]) == (30, "none")

    compared = run_line([*job_line("compare", str(path)), f"--json={folder}/c.json"], folder)
    assert compared.code == 0, compared.err
    assert (path / "compare.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / "c.json").read_text())
    assert [row["settings"] for row in rows] == [{"sampling.max_tokens": n} for n in (2, 3, 4, 30)]
    assert all(row["metrics"]["this_launch.tokens_per_sec"] > 0 for row in rows)


@pytest.mark.fault
def test_a_sweep_that_is_warned_saves_and_goes_on(tuning, folder):
    """SIGUSR1: what runs saves and ends with 76, nothing else begins; the same command goes on."""
    path = folder / "tune"
    words = [*tuning, "train.steps=20", "method.rank=2,4", f"sweep.dir={path}"]
    words.append("sweep.max_parallel=1")
    env = WITHOUT_TORCH | {faults.ENV: "rank=0,step=4,kind=stop"}
    running = Running(job_line("finetune", "-m", *words), folder, env)
    stop_early(running, stopped_rank(running))
    outcome = running.wait(PATIENCE)
    assert outcome.code == 76, outcome.err
    assert started(outcome) == ["rank=2"] and not outcome.survivors
    assert [line.split()[1] for line in outcome.out.splitlines()[1:3]] == ["stopped,", "not"]
    saved = [int(p.name[5:]) for p in (path / "rank=2/checkpoints").glob("step-*")]
    assert len(saved) == 1 and 3 < saved[0] < 20
    outcome = sweep("finetune", *words, cwd=folder)
    assert outcome.code == 0, outcome.err
    assert started(outcome) == ["rank=2", "rank=4"]
    assert f"going on after step {saved[0]}" in (path / "rank=2.log").read_text()
    for name in ("rank=2", "rank=4"):
        assert read_metrics(path / name)["train"]["step"].tolist() == list(range(20))


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_sweep_that_is_ended(tuning, folder, number):
    """Fault 8: Ctrl-C ends the points, and so does the death of the sweep itself."""
    path = folder / f"ended{int(number)}"
    words = [*tuning, "train.steps=100000", "method.rank=2,4,8", f"sweep.dir={path}"]
    words.append("sweep.max_parallel=2")
    running = Running(job_line("finetune", "-m", *words), folder, WITHOUT_TORCH)
    running.until(lambda: list(path.glob("rank=*/metrics.csv")))
    running.process.send_signal(number)
    outcome = running.wait(180, patience=30)
    assert not outcome.survivors
    assert not list(path.glob("*/completed.json")) and not (path / "rank=8").exists()
    if number == signal.SIGINT:
        assert outcome.code == 130 and "sweep.dir=" not in outcome.messages[-1], outcome.err


def test_a_search(tuning, folder):
    """Four trials, two at a time."""
    try:
        require("optuna", "sweep", "", "")
    except ConfigError:
        pytest.skip("NOT TESTED: hydra/sweeper=optuna needs optuna")
    path = folder / "search"
    words = [*tuning, "train.steps=2", f"data.valid=[{folder}/train.jsonl]", f"sweep.dir={path}"]
    words += ["optim.learning_rate=tag(log,interval(1e-4,1e-1))", "method.rank=2,4"]
    words += ["hydra/sweeper=optuna", "sweep.max_parallel=2"]
    outcome = sweep("finetune", *words, "sweep.trials=4", cwd=folder)
    assert outcome.code == 0, outcome.err
    points = yaml.safe_load((path / "sweep.yaml").read_text())["points"]
    assert len(points) == len(started(outcome)) == 4
    losses = {p["name"]: summary(path / p["name"])["best_loss"] for p in points}
    assert f"best: {min(losses, key=losses.get)}" in outcome.out


def test_a_job_that_begins_anew_leaves_what_was_there(model, folder):
    """Evaluation does not go on in a run directory: the failed one is put aside."""
    path, text = folder / "evaluate", folder / "text.txt"
    words = [f"model.path={model}", f"input={text}", "evaluate.stride=4,8", f"sweep.dir={path}"]
    words.append("evaluate.window=8")
    (path / "stride=4").mkdir(parents=True)
    (path / "stride=4/claim.json").write_text("{}")
    (path / "sweep.yaml").write_text(
        "job: evaluate\nmetric: x\ndirection: minimize\nkeys: [evaluate.stride]\npoints: []\n"
    )
    text.write_text("It rains in the north, and in the south it does not.\n")
    outcome = sweep("evaluate", *words, cwd=folder)
    assert outcome.code == 0, outcome.err
    names = {p.name for p in path.iterdir() if p.is_dir()}
    assert names == {"stride=4", "stride=8", "stride=4.attempt1"}
    assert outcome.out.splitlines()[0].split()[-1] == "perplexity"


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())
