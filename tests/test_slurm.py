"""Jobs on a real Slurm of two nodes, submitted from its login node as a user does.

The nodes are network, process and mount namespaces of this machine, made by the scripts of
`shared/tools` beside the checkout (or of HPCMLX_TOOLS): Linux, root and Debian's Slurm. They are
taken down by a process that waits for the end of this one, whatever that end is.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpcmlx.observe.metrics import read_metrics
from tests.fixtures import (
    ROOT,
    WITHOUT_TORCH,
    Running,
    assert_done,
    job_line,
    save_model,
    stored_rows,
    write_rows,
)

pytestmark = pytest.mark.timeout(300)
TOOLS = Path(os.environ.get("HPCMLX_TOOLS", ROOT.parent / "shared/tools"))
# Set where packages may be installed, as on a machine that only tests: else their lack is a skip.
INSTALL = "HPCMLX_TEST_INSTALL" in os.environ
STEPS = 150


@dataclass(frozen=True)
class Cluster:
    """A Slurm of two nodes; the first is the login node, too.

    Attributes:
        folder: of this cluster; all nodes see it, as they see everything but /run and /dev/shm.
    """

    folder: Path

    def line(self, *command: str) -> list[str]:
        """A command line on the login node."""
        setup = f'. {self.folder}/hosts/mpi.env; . {self.folder}/slurm/env.sh; exec "$@"'
        enter = [str(TOOLS / "hosts-ctl.sh"), str(self.folder / "hosts"), "exec", "slurm0"]
        return [*enter, "bash", "-c", setup, "bash", *command]

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """What a command on the login node prints."""
        done = subprocess.run(
            self.line(*command),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=cwd or self.folder,
            env={**os.environ, **(env or {})},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, job: str, *overrides: str) -> Running:
        """Submit a job, over two nodes, and follow it."""
        line = [*job_line(job, *overrides), "launch=slurm", "parallel.pp=2"]
        return Running(self.line(*line), self.folder, WITHOUT_TORCH)

    def state(self, job_id: str) -> dict[str, str]:
        text = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def start_again(self, job_id: str) -> None:
        """Once it is back in the queue, where Slurm would let it wait for two minutes.

        Not at once: a job that starts in the second in which it was put back fails with "Job
        credential revoked"."""
        self.wait_for(job_id, "PENDING")
        time.sleep(2)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def wait_for(self, job_id: str, *names: str, seconds: float = 60) -> dict[str, str]:
        """Until a job is in one of these states."""
        return until(lambda: (s := self.state(job_id))["JobState"] in names and s, seconds)


def until(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition gives, once it gives something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it has not come to this"
        time.sleep(0.1)
    return found


def why_not() -> str:
    """Why there can be no Slurm here; "" where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    if not (TOOLS / "slurm-up.sh").exists():
        return f"no {TOOLS}/slurm-up.sh (HPCMLX_TOOLS)"
    missing = [c for c in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(c) is None]
    if missing and not INSTALL:
        return f"no {', '.join(missing)}: apt install slurm-wlm munge, or set HPCMLX_TEST_INSTALL=1"
    return ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"NOT TESTED: a real Slurm: {reason}")
    # Short, for the sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="hpcmlx-slurm-", dir="/tmp"))
    folder.chmod(0o755)
    hosts, slurm, tools = folder / "hosts", folder / "slurm", shlex.quote(str(TOOLS))
    down = f"cat; {tools}/slurm-down.sh {slurm}; {tools}/hosts-down.sh {hosts}; rm -rf {folder}"
    option = [] if INSTALL else ["--no-install"]
    up = [
        [TOOLS / "hosts-up.sh", hosts, "-n", "2", "--prefix", "slurm", *option],
        [TOOLS / "slurm-up.sh", slurm, "--hosts", hosts, *option],
    ]
    with subprocess.Popen(
        ["bash", "-c", down], stdin=subprocess.PIPE, start_new_session=True, cwd="/"
    ) as keeper:
        try:
            for line in up:
                subprocess.run(line, check=True, timeout=300, stdout=subprocess.DEVNULL)
            yield Cluster(folder)
        finally:
            keeper.stdin.close()
            keeper.wait(60)
    assert not folder.exists()


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


def job_id(run_dir: Path) -> str:
    """Of the job that was submitted for a run directory, once it has begun."""
    return until(lambda: [p.stem for p in Path(f"{run_dir}.slurm").glob("*.log")], 60)[0]


def test_a_job_over_two_nodes(cluster, model):
    prompts = write_rows(cluster.folder / "p.jsonl", [{"prompt": f"row {i}"} for i in range(6)])
    run_dir = cluster.folder / "generate"
    outcome = cluster.start(
        "generate",
        *(f"model.path={model}", f"input={prompts}", f"run_dir={run_dir}"),
        *("sampling.max_tokens=4", "launch.slurm.partition=main", "launch.slurm.time='00:05:00'"),
    ).wait(60)
    assert_done(outcome, run_dir)
    assert len((run_dir / "results.jsonl").read_text().splitlines()) == 6
    state = cluster.state(job_id(run_dir))
    assert (state["JobState"], state["NodeList"]) == ("COMPLETED", "slurm[0-1]")
    hosts = {rank["host"] for rank in json.loads((run_dir / "summary.json").read_text())["ranks"]}
    assert hosts == {"slurm0", "slurm1"}
    # The follower shows the log, from the first line to the last.
    for text in (": RUNNING", "layout dp1_pp2_tp1", f"complete: {run_dir}", ": COMPLETED"):
        assert text in outcome.err, outcome.err


@pytest.mark.fault
def test_a_job_that_is_preempted_goes_on(cluster, tuning):
    """A job of a partition that goes first takes both nodes: Slurm warns, the job saves, ends with
    76 and goes back into the queue; then it does the steps that are left, each once."""
    run_dir = cluster.folder / "tune"
    running = cluster.start(
        "finetune", *tuning, f"run_dir={run_dir}", f"train.steps={STEPS}", "train.save_every=1000"
    )
    job = job_id(run_dir)
    until(lambda: (run_dir / "metrics.csv").exists() and read_metrics(run_dir).get("train"), 60)
    urgent = cluster.run(
        *("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null"),
        *("--wrap", "true"),
    ).strip()
    until(lambda: cluster.state(job)["Restarts"] == "1", 60)
    cluster.wait_for(urgent, "COMPLETED")
    saved = [int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*")]
    assert len(saved) == 1 and 0 < saved[0] < STEPS
    assert not (run_dir / "completed.json").exists()
    cluster.start_again(job)
    outcome = running.wait(90)
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
    until(lambda: any(path.stat().st_size for path in run_dir.glob("rows/*")), 60)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: cluster.state(job)["Restarts"] == "1", 60)
    cluster.start_again(job)
    outcome = running.wait(90)
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
    until(lambda: (run_dir / "metrics.csv").exists(), 60)
    cluster.run("scancel", job)
    outcome = running.wait(60, patience=10)
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
