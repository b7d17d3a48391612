"""Nothing hangs: a rank that stops, computes for ever or leaves an operation out ends the job in
time, with 75, and one line that names it and the operation that is missing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpcmlx import faults, flight
from hpcmlx.comm import hostname
from tests.finetune_runs import series
from tests.fixtures import (
    WITHOUT_TORCH,
    Outcome,
    assert_done,
    assert_nothing_left,
    job_line,
    mpirun,
    run,
    run_line,
    start,
    stopped_rank,
    write_rows,
)
from tests.fixtures import model as model

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]
# Seconds; the machine may be busy, and a rank that starts slowly must not count as one that hangs.
STALL = 6.0
# From the first sign to the end: the stall, the others' evidence, and mpirun's way of ending ranks.
END = STALL + 25.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("watchdog")


@pytest.fixture(scope="module")
def generate(model, folder) -> list[str]:
    """Overrides of a generate job of some 16 steps."""
    prompts = write_rows(folder / "in.jsonl", [{"prompt": f"Hello {i}"} for i in range(4)])
    return [f"model.path={model}", f"input={prompts}", "sampling.max_tokens=16"]


@pytest.fixture(scope="module")
def finetune(model, folder) -> list[str]:
    rows = [{"prompt": f"City {i}", "completion": f"{i} C"} for i in range(12)]
    train = write_rows(folder / "train.jsonl", rows)
    line = [f"model.path={model}", f"data.train=[{train}]", f"data.cache={folder}/cache"]
    return [*line, "train.batch_size=4", "train.steps=12"]


def assert_stalled(outcome: Outcome, run_dir: Path, rank: int, *words: str) -> dict:
    """The job has ended as it should after a stall of `rank`; its autopsy."""
    assert outcome.code == 75, outcome.err
    [message] = outcome.messages
    assert f"rank {rank} on {hostname()}" in message.partition("no progress: ")[2], message
    for word in words:
        assert word in message, message
    assert outcome.after("injected fault") < END
    assert_nothing_left(outcome, run_dir)
    autopsy = json.loads((run_dir / "autopsy.json").read_text())
    assert autopsy["culprits"] == [rank] and autopsy["line"] in message
    return autopsy


# job, layout, kind, rank; words of the message
STALLS = {
    "stop-tp-1": ("generate", "tp", "stop", 1, ["is silent since", "all_sum", "of group tp ("]),
    "stop-tp-0": ("generate", "tp", "stop", 0, ["is silent since", "all_sum", "of group tp ("]),
    "stop-pp-1": ("generate", "pp", "stop", 1, ["is silent since", "recv", "of group replica ("]),
    "busy-tp": ("generate", "tp", "busy", 1, ["all_sum", "faults.py", "strike"]),
    "busy-pp": ("generate", "pp", "busy", 1, ["recv", "faults.py", "strike"]),
    "skip-tp": ("generate", "tp", "skip", 1, ["has not joined all_sum", "step 3), which rank 0"]),
    "train-stop-pp": ("finetune", "pp", "stop", 1, ["is silent since", "recv"]),
    "train-skip-dp": ("finetune", "dp", "skip", 1, ["has not joined sum_numbers", "step 3)"]),
}


@pytest.fixture(scope="module")
def stalls(generate, finetune, folder) -> dict[str, Outcome]:
    """How these jobs end. They mostly wait, so some run beside each other."""

    def go(name: str) -> Outcome:
        job, layout, kind, rank, _ = STALLS[name]
        line = [*(generate if job == "generate" else finetune), f"run_dir={folder / name}"]
        line += [f"parallel.{layout}=2", f"watchdog.timeout={STALL}"]
        env = {**WITHOUT_TORCH, faults.ENV: f"rank={rank},step=3,kind={kind}"}
        return run(job, *line, ranks=2, env=env, timeout=120)

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(STALLS, pool.map(go, STALLS), strict=True))


@pytest.mark.parametrize("name", STALLS)
def test_a_rank_that_hangs_ends_the_job(stalls, folder, name):
    _, _, kind, rank, words = STALLS[name]
    autopsy = assert_stalled(stalls[name], folder / name, rank, *words)
    ranks = {entry["rank"]: entry for entry in autopsy["ranks"]}
    assert ranks.keys() == {0, 1}
    assert (ranks[rank]["silent_seconds"] is not None) == (kind == "stop")
    other = (folder / name / f"flight/rank{1 - rank}.stacks").read_text()
    assert "in run_job" in other  # its main thread, wherever that was
    if kind == "busy":
        assert "in strike" in (folder / name / f"flight/rank{rank}.stacks").read_text()


def test_one_process_needs_no_mpi_to_be_ended(generate, tmp_path):
    line = [*generate, f"run_dir={tmp_path / 'run'}", f"watchdog.timeout={STALL}"]
    outcome = run("generate", *line, env={faults.ENV: "rank=0,step=3,kind=busy"})
    assert outcome.code == 75, outcome.err
    [message] = outcome.messages
    assert "rank 0 is in no operation at step 3, at faults.py" in message
    assert "in strike" in (tmp_path / "run/flight/rank0.stacks").read_text()
    [launch] = json.loads((tmp_path / "run/run.json").read_text())["launches"]
    assert (launch["exit"]["cause"], launch["exit"]["code"]) == ("lost peer", 75)
    assert launch["exit"]["message"] in message
    assert_nothing_left(outcome, tmp_path / "run")


def test_without_a_watchdog_nobody_looks(generate, tmp_path):
    line = [*generate, f"run_dir={tmp_path / 'run'}", "watchdog.timeout=null"]
    job = start("generate", *line, env={faults.ENV: "rank=0,step=3,kind=hang"})
    job.wait_for("injected fault")
    assert not (tmp_path / "run/flight/rank0.stacks").exists()
    job.kill()
    assert flight.read(flight.file_of(tmp_path / "run", 0)).step == 2  # of the last operation


def test_a_pause_changes_nothing(generate, tmp_path):
    line = [*generate, "parallel.pp=2", "watchdog.timeout=15"]
    clean = run("generate", *line, f"run_dir={tmp_path / 'clean'}", ranks=2)
    assert_done(clean, tmp_path / "clean")
    env = {faults.ENV: "rank=1,step=3,kind=stop"}
    job = start("generate", *line, f"run_dir={tmp_path / 'run'}", ranks=2, env=env)
    pid = stopped_rank(job)
    time.sleep(4)
    os.kill(pid, signal.SIGCONT)
    outcome = job.wait()
    assert_done(outcome, tmp_path / "run")
    assert not outcome.messages
    results = [(tmp_path / name / "results.jsonl").read_bytes() for name in ("clean", "run")]
    assert results[0] == results[1]


# -- a rank that is slow --

SLOW = {"pp": "generate", "tp": "generate", "dp": "finetune"}


@pytest.fixture(scope="module")
def slow(generate, finetune, folder) -> dict[str, Outcome]:
    """The same jobs, clean and with rank 1 several times slower."""

    def go(name: str) -> Outcome:
        layout, kind = name.split("-")
        line = [*(generate if SLOW[layout] == "generate" else finetune), f"parallel.{layout}=2"]
        where = f"run_dir={folder / name}"
        env = WITHOUT_TORCH | ({faults.ENV: "rank=1,step=1,kind=slow"} if kind == "slow" else {})
        return run(SLOW[layout], *line, where, ranks=2, env=env, timeout=120)

    names = [f"{layout}-{kind}" for layout in SLOW for kind in ("clean", "slow")]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(go, names), strict=True))


@pytest.mark.parametrize("layout", SLOW)
def test_a_slow_rank_is_named_and_changes_nothing(slow, folder, layout):
    for kind in ("clean", "slow"):
        assert_done(slow[f"{layout}-{kind}"], folder / f"{layout}-{kind}")
    outcome, run_dir = slow[f"{layout}-slow"], folder / f"{layout}-slow"
    [said] = [text for _, text in outcome.lines if "WARNING straggler" in text]
    assert f"rank 1 on {hostname()} needs " in said
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["straggler"] == 1 and summary["straggler_reason"] is None
    first, second = [rank["straggler_score"] for rank in summary["ranks"]]
    assert second >= 2 > 1 > first
    if SLOW[layout] == "generate":
        results = [folder / f"{layout}-{kind}/results.jsonl" for kind in ("clean", "slow")]
        assert results[0].read_bytes() == results[1].read_bytes()
    else:
        clean, late = (series(folder / f"{layout}-{kind}") for kind in ("clean", "slow"))
        assert clean.keys() == late.keys() and all((clean[k] == late[k]).all() for k in clean)


# -- killed from outside --


def test_killed_from_outside_the_files_tell(generate, tmp_path):
    run_dir = tmp_path / "run"
    line = [*generate, "parallel.pp=2", f"run_dir={run_dir}"]
    env = {faults.ENV: "rank=1,step=3,kind=hang"}
    job = start("generate", *line, ranks=2, env=env)
    job.wait_for("injected fault")
    time.sleep(2)  # until rank 0 waits for it
    job.process.kill()
    end = time.monotonic() + 30
    while job._survivors(0.0) and time.monotonic() < end:
        time.sleep(0.1)
    assert not job._survivors(0.0)
    job.wait()
    told = subprocess.run(
        job_line("autopsy", str(run_dir)), capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stderr
    said = told.stdout.partition("the files say: ")[2].splitlines()[0]
    assert f"rank 1 on {hostname()} has not sent what rank 0 waits for" in said
    # Which step it had come to is noted with an operation, and about once a second.
    assert re.search("rank 1 is in no operation at step [23]", said)
    assert "recv" in said and "group replica" in told.stdout


def test_autopsy_of_something_else(tmp_path):
    told = run_line(job_line("autopsy", str(tmp_path)))
    assert told.code == 65 and "has no flight/rank*.bin" in told.err


# -- one that leaves an operation out --

SCRIPT = """
import sys
from pathlib import Path
import mlx.core as mx
from hpcmlx import comm
from hpcmlx.flight import file_of, recorder
from hpcmlx.watchdog import Watchdog
run_dir, what, who, when = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
world = comm.init()
recorder.open(file_of(run_dir, world.rank), world.rank, world.size)
group = world.split(0, world.rank, graph=True, name="tp")
watchdog = Watchdog(world, run_dir, 3.0)
x, peer = mx.ones(8), 1 - world.rank
ops = {
    "barrier": group.barrier,
    "bcast": lambda: group.bcast("text"),
    "gather": lambda: group.gather(world.rank),
    "sum_numbers": lambda: group.sum_numbers([1.0]),
    "all_sum": lambda: comm.evaluate(group.all_sum(x)),
    "allgather": lambda: group.allgather(world.rank),
    "sum_arrays": lambda: group.sum_arrays([x]),
    "all_gather": lambda: comm.evaluate(group.all_gather(x)),
}
for step in range(1, 9):
    recorder.step = step
    for name, op in ops.items():
        if not (name == what and world.rank == who and step == when):
            op()
    if what == "send" and world.rank == who and step == when:
        continue
    sent = group.isend(x, peer, 0)
    group.irecv((8,), mx.float32, peer, 0).wait()
    sent.wait()
watchdog.stop()
comm.finalize(0)
"""
# The operation, the rank that leaves it out, in which round.
SKIPS = [
    ("barrier", 0, 3), ("barrier", 1, 5), ("bcast", 0, 3), ("gather", 1, 4), ("sum_numbers", 0, 2),
    ("sum_numbers", 1, 6), ("all_sum", 1, 3), ("all_sum", 0, 5), ("allgather", 1, 4),
    ("all_gather", 1, 2),
]  # fmt: skip


def script(folder: Path, *args: str) -> Outcome:
    folder.mkdir()
    line = [*mpirun("-n", "2"), sys.executable, "-c", SCRIPT, str(folder), *args]
    return run_line(line, timeout=120, **WITHOUT_TORCH)


@pytest.fixture(scope="module")
def skips(folder) -> Sequence[Outcome]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda i: script(folder / f"skip{i}", *map(str, SKIPS[i])), range(10)))


@pytest.mark.parametrize("number", range(10))
def test_a_rank_that_leaves_an_operation_out(skips, folder, number):
    what, rank, when = SKIPS[number]
    outcome, run_dir = skips[number], folder / f"skip{number}"
    assert outcome.code == 75, outcome.err
    [message] = outcome.messages
    assert f"rank {rank} on {hostname()} has not joined {what} " in message, message
    assert f"step {when})" in message.partition("which rank")[0], message
    assert json.loads((run_dir / "autopsy.json").read_text())["culprits"] == [rank]
    assert not outcome.survivors


def test_a_rank_that_sends_too_little(folder):
    outcome = script(folder / "send", "send", "1", "4")
    assert outcome.code == 75, outcome.err
    [message] = outcome.messages
    assert f"rank 1 on {hostname()} " in message and " 4 from rank 1 of group tp" in message


def test_every_message_is_printed(folder):
    folder = folder / "trace"
    folder.mkdir()
    line = [*mpirun("-n", "2"), sys.executable, "-c", SCRIPT, str(folder), "none", "0", "0"]
    outcome = run_line(line, **WITHOUT_TORCH, **{flight.TRACE_ENV: "1"})
    assert outcome.code == 0 and not outcome.survivors, outcome.err
    said = [text for _, text in outcome.lines if text.startswith("comm: ")]
    for rank in range(2):
        mine = [text for text in said if text.startswith(f"comm: rank {rank} ")]
        # A split; 8 rounds of six collectives, two planned, two evaluations, a send, a receive; and
        # the barrier at the end.
        assert len(mine) == 1 + 8 * 12 + 1, mine
        assert f"comm: rank {rank} send 3 32 bytes peer {1 - rank} group tp step 3" in mine
        assert f"comm: rank {rank} plan all_sum 3 32 bytes group tp step 2" in mine


# -- one process --

ALONE = """
import shutil, sys, time
from pathlib import Path
from hpcmlx import comm
from hpcmlx.flight import file_of, recorder
from hpcmlx.watchdog import Watchdog
run_dir, what = Path(sys.argv[1]), sys.argv[2]
world = comm.init()
recorder.open(file_of(run_dir, 0), 0, 1)
watchdog = Watchdog(world, run_dir, 1.0)
print("begun", flush=True)
if what == "unwritable":
    shutil.rmtree(run_dir)
    time.sleep(60)
with recorder.outside():
    sys.stdin.readline()
watchdog.stop()
comm.finalize(0)
"""


def alone(run_dir: Path, what: str) -> subprocess.Popen[str]:
    """A process whose watchdog has begun."""
    run_dir.mkdir()
    pipe = subprocess.PIPE
    line = [sys.executable, "-c", ALONE, str(run_dir), what]
    process = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_stall_ends_the_job_where_nothing_can_be_written(tmp_path):
    process = alone(tmp_path / "run", "unwritable")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "no progress: " in err and "autopsy.json" not in err and "Traceback" not in err


def test_a_process_that_was_stopped_for_long_goes_on(tmp_path):
    process = alone(tmp_path / "run", "wait")
    process.send_signal(signal.SIGSTOP)
    time.sleep(8)  # longer than any of the watchdog's limits
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate("\n", timeout=30)
    assert process.returncode == 0, err
