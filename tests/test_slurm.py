"""Jobs on a real Slurm of two nodes (`slurm_cluster.py`)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from hpcmlx import faults
from hpcmlx.observe.metrics import read_metrics
from tests.fixtures import ROOT, WITHOUT_TORCH, assert_done, save_model, stored_rows, write_rows
from tests.slurm_cluster import PREFIX, job_id, until
from tests.slurm_cluster import cluster as cluster

pytestmark = pytest.mark.timeout(900)
STEPS = 100


@pytest.fixture(scope="module")
def model(cluster) -> Path:
    return save_model(cluster.folder / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def tuning(cluster, model) -> list[str]:
    rows = [{"prompt": f"{i}?", "completion": f"{'NESW'[i % 4]}!"} for i in range(12)]
    train = write_rows(cluster.folder / "train.jsonl", rows)
    return [
        *(f"model.path={model}", f"data.train=[{train}]", f"data.cache={cluster.folder}/cache"),
        *("train.batch_size=4", "optim.learning_rate=1e-3", "method.rank=2"),
    ]


def test_a_job_over_two_nodes(cluster, model):
    prompts = write_rows(cluster.folder / "p.jsonl", [{"prompt": f"row {i}"} for i in range(6)])
    run_dir = cluster.folder / "generate"
    outcome = cluster.start(
        "generate",
        *(f"model.path={model}", f"input={prompts}", f"run_dir={run_dir}"),
        *("sampling.max_tokens=4", "launch.slurm.partition=main", "launch.slurm.time='00:05:00'"),
    ).wait(180)
    assert_done(outcome, run_dir)
    assert len((run_dir / "results.jsonl").read_text().splitlines()) == 6
    state = cluster.state(job_id(run_dir))
    assert (state["JobState"], state["NodeList"]) == ("COMPLETED", f"{PREFIX}[0-1]")
    hosts = {rank["host"] for rank in json.loads((run_dir / "summary.json").read_text())["ranks"]}
    assert hosts == {f"{PREFIX}0", f"{PREFIX}1"}
    # The follower shows the log, from the first line to the last.
    for text in (": RUNNING", "layout dp1_pp2_tp1", f"complete: {run_dir}", ": COMPLETED"):
        assert text in outcome.err, outcome.err


@pytest.mark.fault
def test_a_job_that_is_preempted_goes_on(cluster, tuning):
    """A job of a partition that goes first takes both nodes: Slurm warns, the job saves, ends with
    76 and goes back into the queue; then it does the steps that are left, each once."""
    run_dir = cluster.folder / "tune"
    running = cluster.start(
        "finetune",
        *(*tuning, f"run_dir={run_dir}", f"train.steps={STEPS}", "train.save_every=1000"),
        **{faults.ENV: "rank=0,step=1,kind=slow"},  # Slurm takes seconds
    )
    job = job_id(run_dir)
    until(lambda: (run_dir / "metrics.csv").exists() and read_metrics(run_dir).get("train"), 180)
    urgent = cluster.run(
        *("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null"),
        *("--wrap", "true"),
    ).strip()
    until(lambda: cluster.state(job)["Restarts"] == "1", 180)
    cluster.wait_for(urgent, "COMPLETED")
    saved = [int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")]
    assert len(saved) == 1 and 0 < saved[0] < STEPS
    assert not (run_dir / "completed.json").exists()
    cluster.start_again(job)
    outcome = running.wait(180)
    assert_done(outcome, run_dir)
    for text in (
        f"asked to stop: step {saved[0]} of {STEPS} is saved",
        "ended with 76: requeued",
        f"going on after step {saved[0]}",
        ": PENDING (BeginTime)",
        ": COMPLETED",
    ):
        assert text in outcome.err, outcome.err
    assert read_metrics(run_dir)["train"]["step"].tolist() == list(range(STEPS))


@pytest.mark.fault
def test_generation_that_is_warned_goes_on(cluster, model):
    """It ends early and is requeued: every row once."""
    rows = [{"prompt": f"row {i}"} for i in range(80)]
    prompts, run_dir = write_rows(cluster.folder / "many.jsonl", rows), cluster.folder / "warned"
    running = cluster.start(
        "generate",
        *(f"model.path={model}", f"input={prompts}", f"run_dir={run_dir}"),
        *("inference.batch_size=2", "sampling.max_tokens=60", "sampling.temperature=1.0"),
    )
    job = job_id(run_dir)
    until(lambda: any(path.stat().st_size for path in run_dir.glob("rows/*")), 180)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: cluster.state(job)["Restarts"] == "1", 180)
    cluster.start_again(job)
    outcome = running.wait(180)
    assert_done(outcome, run_dir)
    for text in (
        *("asked to stop: ", "ended with 76: requeued"),
        *(" answers are there, ", ": COMPLETED"),
    ):
        assert text in outcome.err, outcome.err
    assert len(stored_rows(run_dir)) == len(rows)


@pytest.mark.fault
def test_a_job_is_cancelled(cluster, tuning):
    run_dir = cluster.folder / "cancelled"
    running = cluster.start("finetune", *tuning, f"run_dir={run_dir}", "train.steps=100000")
    job = job_id(run_dir)
    until(lambda: (run_dir / "metrics.csv").exists(), 180)
    cluster.run("scancel", job)
    outcome = running.wait(180, patience=30)
    assert outcome.code == 143, outcome.err
    assert outcome.messages[-1].startswith(f"hpcmlx: job {job} is not complete: CANCELLED")
    assert not outcome.survivors
    assert cluster.state(job)["Restarts"] == "0"


def test_a_chain(cluster, tuning, model):
    """Three jobs by one command, each after the one before."""
    folder = cluster.folder / "repository"
    folder.mkdir()
    for name, target in ((".venv", Path(sys.prefix)), ("jobs", ROOT / "jobs")):
        (folder / name).symlink_to(target)
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    for path in (folder / "slurm").glob("*.sbatch"):
        path.write_text(path.read_text().replace("--nodes=4", "--nodes=2"))
    text = folder / "text.txt"
    text.write_text("It rains in the north, and in the south it does not.\n")
    words = ["bash", "slurm/chain.sh", "runs/tune", *tuning, "train.steps=2", "--", f"input={text}"]
    submitted = cluster.run(*words, cwd=folder, env=WITHOUT_TORCH).splitlines()
    assert [line.split()[1:] for line in submitted] == [
        ["finetune", "runs/tune"],
        ["export", "runs/tune.adapter"],
        ["evaluate", "runs/tune.evaluate"],
    ]
    jobs = [line.split()[0] for line in submitted]
    last = cluster.wait_for(jobs[-1], "COMPLETED", "FAILED", "CANCELLED", seconds=180)
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    assert last["JobState"] == "COMPLETED", logs
    assert (folder / "runs/tune.adapter/adapters.safetensors").exists()
    summary = json.loads((folder / "runs/tune.evaluate/summary.json").read_text())
    assert summary["perplexity"] > 1
    ends = [cluster.state(job)["EndTime"] for job in jobs]
    assert ends == sorted(ends)
