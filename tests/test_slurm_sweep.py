"""Sweeps on a real Slurm: one array, a task for every point."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from hpcmlx.observe.metrics import read_metrics
from tests.fixtures import WITHOUT_TORCH, Running, job_line, save_model, write_rows
from tests.slurm_cluster import cluster as cluster
from tests.slurm_cluster import until

pytestmark = pytest.mark.timeout(900)
PATIENCE = 300


@pytest.fixture(scope="module")
def model(cluster) -> Path:
    return save_model(cluster.folder / "model", num_hidden_layers=2)


def start(cluster, job: str, *overrides: str, **env: str) -> Running:
    line = job_line(job, "-m", "launch=slurm", *overrides)
    return Running(cluster.line(*line), cluster.folder, {**WITHOUT_TORCH, **env})


def array_of(path: Path) -> str:
    """The id of the array that was submitted for a sweep."""
    file = path / "sweep.yaml"
    return until(lambda: file.exists() and yaml.safe_load(file.read_text())["array"], 180)


def ended(path: Path) -> dict[str, int | None]:
    points = yaml.safe_load((path / "sweep.yaml").read_text())["points"]
    return {point["name"]: point["exit_code"] for point in points}


@pytest.mark.fault
def test_an_array_of_four_points(cluster, model):
    """One crashes, one is cancelled while it waits; the same command then does these two."""
    prompts = write_rows(cluster.folder / "p.jsonl", [{"prompt": f"row {i}"} for i in range(3)])
    path = cluster.folder / "sweep"
    words = [f"model.path={model}", f"input={prompts}", "sampling.max_tokens=30,2,3,4"]
    words += [f"sweep.dir={path}", "sweep.max_parallel=2", "launch.slurm.partition=main"]
    words += ["launch.slurm.time='00:05:00'"]
    running = start(cluster, "generate", *words, HPCMLX_FAULT="rank=0,step=12,kind=exception")
    first = array_of(path)
    cluster.run("scancel", f"{first}_3")
    outcome = running.wait(PATIENCE)
    assert outcome.code == 64, outcome.err
    names = [f"max_tokens={n}" for n in (30, 2, 3, 4)]
    assert ended(path) == dict(zip(names, (70, 0, 0, 143), strict=True))
    assert f"max_tokens=4: task {first}_3: CANCELLED" in outcome.err
    assert re.search(r"max_tokens=30: .*unexpected RuntimeError", outcome.out)
    assert "#SBATCH --array=0-3%2" in (path / "array.sbatch").read_text()
    assert "complete" in (path / "max_tokens=2.log").read_text()
    before = [(path / name / "completed.json").read_bytes() for name in names[1:3]]

    outcome = start(cluster, "generate", *words).wait(PATIENCE)
    assert outcome.code == 0, outcome.err
    assert "4 points, 2 of them complete" in outcome.err
    second = array_of(path)
    assert second != first and f"array {second}: 2 tasks" in outcome.err
    assert set(ended(path).values()) == {0}
    after = [(path / name / "completed.json").read_bytes() for name in names[1:3]]
    assert after == before
    claimed = json.loads((path / "max_tokens=4/completed.json").read_text())["launch"]
    assert claimed == f"slurm-{second}-1"


@pytest.mark.fault
def test_a_task_that_is_warned_is_requeued_alone(cluster, model):
    """One task of an array has the array's own number, by which Slurm would requeue all."""
    rows = [{"prompt": f"{i}?", "completion": f"{'NESW'[i % 4]}!"} for i in range(12)]
    train = write_rows(cluster.folder / "train.jsonl", rows)
    path = cluster.folder / "warned"
    running = start(
        cluster,
        *("finetune", f"model.path={model}", f"data.train=[{train}]", "train.batch_size=4"),
        *(f"data.cache={cluster.folder}/cache", "train.steps=150", "method.rank=2,4"),
        f"sweep.dir={path}",
    )
    array = array_of(path)
    # The number of the array is that of one of its tasks.
    task = until(lambda: cluster.state(array).get("ArrayTaskId", "").isdigit(), 180)
    states = {n: cluster.state(f"{array}_{n}") for n in (0, 1)}
    task = next(n for n, state in states.items() if state["JobId"] == array)
    run_dir = path / f"rank={(2, 4)[task]}"
    until(lambda: (run_dir / "metrics.csv").exists() and read_metrics(run_dir).get("train"), 120)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_{task}")
    until(lambda: cluster.state(f"{array}_{task}")["Restarts"] == "1", 120)
    cluster.start_again(f"{array}_{task}")
    outcome = running.wait(PATIENCE)
    assert outcome.code == 0, outcome.err
    assert cluster.state(f"{array}_{1 - task}")["Restarts"] == "0"
    log = (path / f"{run_dir.name}.log").read_text()
    assert "ended with 76: requeued" in log and "going on after step" in log
    for name in ("rank=2", "rank=4"):
        assert read_metrics(path / name)["train"]["step"].tolist() == list(range(150))
