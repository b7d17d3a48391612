"""A fine-tuning job and what may happen to it: whatever ends a launch, the next one goes on as if
nothing had happened, and nothing is begun that cannot end well.

The truth is a run that nothing happened to: the same losses and weights, bit for bit, come out of
the same layout, and the same losses but for rounding out of others. `FAULTS` says which test shows
what becomes of each fault of the project's table; the numbers are the table's.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx import faults
from hpcmlx.comm import hostname
from hpcmlx.errors import OutputError
from hpcmlx.settings_finetune import TrainConfig
from hpcmlx.training.optim import Optimizer, OptimSettings
from hpcmlx.training.resume import check_checkpoint_room, drop_later_lines
from tests import fixtures
from tests.finetune_runs import (
    committed,
    files,
    num_rows,
    series,
    state,
)
from tests.fixtures import (
    GRACE,
    Outcome,
    Running,
    assert_done,
    assert_marked,
    assert_nothing_left,
    assert_refused,
    save_model,
    small_disk,
    stop_early,
    stopped_rank,
    write_rows,
)

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]

# Of each fault: tests of this module, and of others as module.test.
_STORE = "test_faults_checkpoint"
FAULTS = {
    4: ["test_five_kills_change_nothing"],
    9: ["test_power_loss", f"{_STORE}.test_at_every_instant_there_is_one"],
    16: ["test_a_signal_ends_a_launch_and_loses_no_step"],
    17: ["test_signals_at_bad_moments"],
    18: ["test_mpirun_is_ended"],
    19: ["test_signals_at_bad_moments"],
    22: ["test_a_full_disk", f"{_STORE}.test_a_full_disk_fails_the_save_and_nothing_else"],
    24: ["test_too_little_room_is_seen_before_the_model_loads", "test_room_for_checkpoints"],
    25: [f"{_STORE}.test_a_kill_before_every_single_step_of_the_protocol"],
    26: [f"{_STORE}.test_a_kill_before_every_single_step_of_the_protocol"],
    27: ["test_damage_is_refused", f"{_STORE}.test_two_hundred_damages_and_none_is_silent"],
    28: ["test_damage_is_refused", f"{_STORE}.test_all_ranks_agree_on_what_one_host_has_lost"],
    31: [f"{_STORE}.test_a_failed_flush_fails_the_save"],
    33: ["test_bad_rows_are_seen_before_the_model_loads"],
    36: ["test_a_run_that_was_begun_differently"],
    37: ["test_a_run_that_was_begun_differently"],
    38: ["test_a_gradient_that_is_no_number", "test_too_many_of_them"],
    39: ["test_a_flipped_bit_on_one_replica"],
    45: ["mpi.test_training_layouts.test_every_pair_of_layouts"],
    46: ["mpi.test_training.test_as_the_twin"],
}
MUST_HOLD = {4, 9, *range(16, 20), 22, *range(24, 29), 31, 33, *range(36, 40), 45, 46}
PLAIN = {46}  # holds without any fault

LAYOUTS = {
    "alone": (0, []),
    "pp2": (2, ["parallel.pp=2"]),
    "tp2": (2, ["parallel.tp=2"]),
    "dp2": (2, ["parallel.dp=2", "optim.zero1=true"]),
    "dp3": (3, ["parallel.dp=3"]),
}
STEPS, SAVE_EVERY = 24, 3
ROWS_IN = [
    {"prompt": f"City {i}: rain, {i * i % 41} degrees", "completion": f"{'NESW'[i % 4]} {i} C"}
    for i in range(30)
]


def test_every_fault_has_its_test():
    assert FAULTS.keys() == MUST_HOLD
    assert_marked(FAULTS, "test_faults_finetune", PLAIN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults-finetune")


@pytest.fixture(scope="module")
def env(folder) -> dict[str, str]:
    """Jobs start in half the time without torch, and end sooner without a picture."""
    (folder / "quick").mkdir()
    lines = "import sys\nsys.modules['torch'] = sys.modules['matplotlib'] = None\n"
    (folder / "quick/sitecustomize.py").write_text(lines)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "quick"), str(fixtures.ROOT)])}


@pytest.fixture(scope="module")
def common(folder) -> list[str]:
    model = save_model(folder / "model", num_hidden_layers=2)
    train = write_rows(folder / "train.jsonl", ROWS_IN)
    # The default eps makes an update of a gradient that is nothing but rounding.
    return [
        *(f"model.path={model}", f"data.train=[{train}]", f"data.cache={folder}/cache"),
        *("optim.learning_rate=1e-3", "optim.eps=1e-5", "optim.warmup_steps=2", "method.rank=4"),
        *("train.batch_size=6", f"train.steps={STEPS}", "train.check_every=10"),
    ]


@pytest.fixture(scope="module")
def begin(common, env) -> Callable[..., Running]:
    """Start a launch of a run."""

    def start(run_dir: Path, layout: str, *overrides: str, fault: str = "") -> Running:
        ranks, own = LAYOUTS[layout]
        line = [*common, *own, f"run_dir={run_dir}", *overrides]
        if "launch=mpirun" in overrides:
            ranks = 0
        more = {faults.ENV: fault} if fault else {}
        return fixtures.start("finetune", *line, ranks=ranks, env=env | more)

    return start


@pytest.fixture(scope="module")
def launch(begin) -> Callable[..., Outcome]:
    """A launch, and how it ended."""

    def run(run_dir: Path, layout: str, *overrides: str, fault: str = "") -> Outcome:
        return begin(run_dir, layout, *overrides, fault=fault).wait(120)

    return run


@pytest.fixture(scope="module")
def truth(launch, folder) -> Callable[[str], Path]:
    """The run directory of a layout's run that nothing happened to."""

    def run_dir(layout: str) -> Path:
        path = folder / f"truth-{layout}"
        if not path.exists():
            assert_done(launch(path, layout), path)
            assert state(path).step == num_rows(path) == STEPS
        return path

    return run_dir


def assert_like(run_dir: Path, truth: Path) -> None:
    """The same losses and the same weights, bit for bit."""
    assert_done_files(run_dir)
    found, expected = series(run_dir), series(truth)
    for name, column in expected.items():
        assert np.array_equal(found[name], column), f"{name}: {found[name]} {column}"
    assert state(run_dir) == state(truth)


def assert_done_files(run_dir: Path) -> None:
    assert (run_dir / "completed.json").exists() and not list(run_dir.rglob("*.tmp"))


def assert_nearly_like(run_dir: Path, truth: Path) -> None:
    """The same losses but for rounding."""
    assert_done_files(run_dir)
    assert np.array_equal(series(run_dir)["step"], series(truth)["step"])
    assert np.abs(series(run_dir)["loss"] - series(truth)["loss"]).max() <= 1e-5


def assert_stopped(outcome: Outcome, run_dir: Path, layout_steps: int) -> int:
    """It was asked to stop and lost no step. Gives the steps that are done."""
    assert outcome.code == 76, outcome.err
    assert f"run it again with run_dir={run_dir}" in outcome.err
    assert_nothing_left(outcome, run_dir)
    steps = state(run_dir).step
    assert layout_steps < steps < STEPS, outcome.err
    assert steps == num_rows(run_dir) == committed(run_dir)[-1]
    return steps


@pytest.mark.parametrize("layout", ["pp2", "tp2", "dp2"])
def test_layouts_agree(truth, layout):
    assert_nearly_like(truth(layout), truth("alone"))


# -- ranks, mpirun and launches that end --


def test_five_kills_change_nothing(truth, launch, tmp_path):
    """Fault 4: ranks are killed at random steps, again and again in one run directory."""
    rng, run_dir, saved = random.Random(11), tmp_path / "run", 0
    for ahead in rng.sample([2, 4, 5, 7, 8], 5):
        step = min(saved + ahead, STEPS)
        fault = f"rank={rng.randrange(2)},step={step},kind=kill"
        outcome = launch(run_dir, "dp2", f"train.save_every={SAVE_EVERY}", fault=fault)
        assert outcome.code != 0 and "injected fault: kill" in outcome.err, outcome.err
        assert not outcome.survivors and not (run_dir / "completed.json").exists()
        before, saved = saved, committed(run_dir)[-1] if committed(run_dir) else 0
        assert saved >= before and saved % SAVE_EVERY == 0
        # One interval, and what was done while the next checkpoint was being written: a save waits
        # for the one before.
        assert num_rows(run_dir) - saved < 2 * SAVE_EVERY
    assert saved > 0
    assert_done(launch(run_dir, "dp2", f"train.save_every={SAVE_EVERY}"), run_dir)
    assert_like(run_dir, truth("dp2"))


def test_power_loss(truth, begin, launch, tmp_path):
    """Fault 9: fifty pictures of a run directory, each with a checkpoint that is whole and the
    metrics of all steps before it; from there the run ends as it would have."""
    run_dir, rng = tmp_path / "run", random.Random(5)
    job = begin(run_dir, "alone", "train.save_every=1")
    job.until(lambda: bool(committed(run_dir)), pause=0)
    saved = []
    for number in range(50):
        time.sleep(rng.uniform(0, 0.04))
        job.process.send_signal(signal.SIGSTOP)
        os.waitpid(job.process.pid, os.WUNTRACED)
        copy = tmp_path / str(number)
        shutil.copytree(run_dir, copy)
        saved.append(state(copy).step)
        job.process.send_signal(signal.SIGCONT)
        assert num_rows(copy) >= saved[-1] >= max(saved)
    assert_done(job.wait(120), run_dir)
    assert_like(run_dir, truth("alone"))
    assert saved[0] < STEPS // 2 and len(set(saved)) > 5, saved
    again = tmp_path / "0"
    assert_done(launch(again, "alone"), again)
    assert_like(again, truth("alone"))
    elsewhere = next(tmp_path / str(n) for n, step in enumerate(saved) if step > saved[0])
    assert_done(launch(elsewhere, "tp2"), elsewhere)
    assert_nearly_like(elsewhere, truth("alone"))


def test_mpirun_is_ended(truth, begin, launch, tmp_path):
    """Fault 18: SIGTERM leaves the last checkpoint as it is, and the run goes on from it."""
    run_dir, options = tmp_path / "run", [f"train.save_every={SAVE_EVERY}"]
    job = begin(run_dir, "tp2", *options, fault=f"rank=1,step={2 * SAVE_EVERY + 3},kind=hang")
    job.wait_for("injected fault")
    job.process.send_signal(signal.SIGTERM)
    outcome = job.wait(120, patience=GRACE)
    assert outcome.code != 0
    assert_nothing_left(outcome, None)
    assert state(run_dir).step in (SAVE_EVERY, 2 * SAVE_EVERY)
    assert_done(launch(run_dir, "tp2", *options), run_dir)
    assert_like(run_dir, truth("tp2"))


def test_a_signal_ends_a_launch_and_loses_no_step(truth, begin, launch, tmp_path):
    """Fault 16, through the launcher: SIGUSR1 saves and ends with 76; `resume` goes on."""
    run_dir = tmp_path / "run"
    job = begin(run_dir, "pp2", "launch=mpirun", fault="rank=1,step=6,kind=stop")
    stop_early(job, stopped_rank(job))
    outcome = job.wait(120)
    steps = assert_stopped(outcome, run_dir, 5)
    assert committed(run_dir) == [steps]
    assert f"asked to stop: step {steps} of {STEPS} is saved" in outcome.err
    outcome = launch(run_dir, "pp2", "launch=mpirun")
    assert_done(outcome, run_dir)
    assert f"going on after step {steps}" in outcome.err
    assert_like(run_dir, truth("pp2"))


def test_signals_at_bad_moments(truth, begin, launch, tmp_path):
    """Faults 17 and 19: while the model loads, while a rank waits in a collective call for another
    one, and, many of them, during a save; all in one run directory, under mpirun."""
    run_dir = tmp_path / "run"
    job = begin(run_dir, "dp2", fault="rank=1,step=1,kind=stop")
    job.wait_for("layout")
    job.process.send_signal(signal.SIGUSR1)
    os.kill(stopped_rank(job), signal.SIGCONT)
    steps = assert_stopped(job.wait(120), run_dir, 0)

    job = begin(run_dir, "dp2", fault=f"rank=1,step={steps + 3},kind=stop")
    late = stopped_rank(job)
    time.sleep(0.5)  # rank 0 gets to the next sum, and waits there
    stop_early(job, late)
    steps = assert_stopped(job.wait(120), run_dir, steps + 2)

    job = begin(run_dir, "dp2", "train.save_every=2", fault="rank=1,step=1,kind=slow")
    job.wait_for(f"step {steps + 1:2}/")
    saves = run_dir / "checkpoints"
    job.until(lambda: any(name.endswith(".tmp") for name in os.listdir(saves)), pause=0)
    for _ in range(10):
        job.process.send_signal(signal.SIGUSR1)
        time.sleep(0.001)
    assert_stopped(job.wait(120), run_dir, steps + 1)

    assert_done(launch(run_dir, "dp2"), run_dir)
    assert_like(run_dir, truth("dp2"))


# -- disks --


def test_a_full_disk(truth, begin, launch, tmp_path):
    """Fault 22: one line; the checkpoint before is whole, and with more room the run goes on."""
    with small_disk(tmp_path / "disk", "2m") as disk:
        run_dir, filler = disk.path / "run", disk.path / "filler"
        job = begin(run_dir, "alone", "train.save_every=4", fault="rank=0,step=1,kind=slow")
        job.until(lambda: bool(committed(run_dir)), pause=0)
        job.process.send_signal(signal.SIGSTOP)
        free = os.statvfs(disk.path)
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 60_000))
        job.process.send_signal(signal.SIGCONT)
        outcome = job.wait(120)
        # The save and the metrics are written side by side: either may meet the full disk first.
        message = assert_refused(
            outcome, 74, f"no room for {run_dir}/", "free some", run_dir=run_dir
        )
        assert "/shard-00000.h5" in message or "/metrics.h5" in message, message
        saved = state(run_dir)
        assert saved.step == committed(run_dir)[-1] <= num_rows(run_dir) < STEPS
        filler.unlink()
        assert_done(launch(run_dir, "alone"), run_dir)
        assert_like(run_dir, truth("alone"))


def test_too_little_room_is_seen_before_the_model_loads(launch, tmp_path):
    """Fault 24."""
    with small_disk(tmp_path / "disk", "200k") as disk:
        run_dir = disk.path / "run"
        outcome = launch(run_dir, "pp2", "train.save_every=2")
        words = [f"not enough room in {run_dir}/checkpoints: the checkpoints that are kept may"]
        assert_refused(outcome, 73, *words, "free some", run_dir=run_dir)
        assert "layers" not in outcome.err


@pytest.mark.parametrize(
    ("dtype", "save_every", "there", "needed"),
    [
        (mx.float32, None, 0, "a checkpoint may need 3.0 MiB"),
        (mx.bfloat16, None, 0, "a checkpoint may need 3.5 MiB"),
        (mx.float32, 10, 0, "the checkpoints that are kept may need 12.0 MiB"),
        (mx.float32, 60, 0, "the checkpoints that are kept may need 6.0 MiB"),
        (mx.float32, 10, 9 << 20, "are kept may need 3.0 MiB"),
    ],
)
def test_room_for_checkpoints(tmp_path, monkeypatch, dtype, save_every, there, needed):
    """Fault 24: parameters, their averages and copies; the newest beside those that are kept, less
    what is there already."""
    monkeypatch.setattr("hpcmlx.rundir.free_bytes", lambda _: 0)
    if there:
        (tmp_path / "step-00000010").mkdir()
        (tmp_path / "step-00000010/shard-00000.h5").write_bytes(bytes(there))
    cfg = TrainConfig(save_every=save_every, keep_last=2, keep_best=1)
    trained = {"a.weight": mx.zeros((512, 512), dtype)}
    with pytest.raises(OutputError, match=needed):
        check_checkpoint_room(tmp_path, cfg, 100, trained, Optimizer(OptimSettings(), 100))


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damage_is_refused(truth, launch, tmp_path, damage):
    """Faults 27 and 28: before the model loads, and the file is named."""
    run_dir = tmp_path / "run"
    shutil.copytree(truth("pp2"), run_dir)
    shard = run_dir / f"checkpoints/step-{STEPS:08}/shard-00001.h5"
    if damage == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)
    outcome = launch(run_dir, "alone")
    assert_refused(outcome, 77, f"step-{STEPS:08}/shard-00001.h5", "restore")
    assert "layers" not in outcome.err


def test_answers_of_steps_that_are_done_again_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    drop_later_lines(path, 0)
    assert not path.exists()
    lines = [json.dumps({"step": step, "answer": "ä"}) + "\n" for step in (-1, 4, 9)]
    path.write_text("".join(lines) + '{"step": 14, "ans')
    for first, kept in ((15, 3), (9, 2), (-1, 0)):
        drop_later_lines(path, first)
        assert path.read_text() == "".join(lines[:kept])


# -- numbers --


def test_a_gradient_that_is_no_number(launch, tmp_path):
    """Fault 38: the step changes nothing, and is counted."""
    run_dir, fault = tmp_path / "run", "rank=1,step=3,kind=nan"
    outcome = launch(run_dir, "pp2", "train.steps=3", "train.save_every=1", fault=fault)
    assert_done(outcome, run_dir)
    assert "step 2: loss" in outcome.err and "nothing was changed" in outcome.err
    assert json.loads((run_dir / "summary.json").read_text())["skipped_steps"] == 1
    assert series(run_dir)["skipped"].tolist() == [0, 0, 1]
    before, after = state(run_dir, 2), state(run_dir, 3)
    assert before.digest == after.digest and after.progress["num_skipped"] == 1


def test_too_many_of_them(launch, tmp_path):
    """Fault 38: then the job ends; what was saved is from before."""
    run_dir, options = tmp_path / "run", ["train.save_every=1", "train.max_bad_steps=1"]
    outcome = launch(run_dir, "alone", *options, fault="rank=0,step=3,kind=nan")
    words = ["loss or gradient was not finite", "step 2", "optim.learning_rate"]
    assert_refused(outcome, 70, *words, run_dir=run_dir)
    assert state(run_dir).step == 2


def test_a_flipped_bit_on_one_replica(launch, tmp_path):
    """Fault 39: the next comparison names rank and host; no checkpoint has it."""
    run_dir, options = tmp_path / "run", ["train.save_every=2", "train.check_every=1"]
    outcome = launch(run_dir, "dp3", *options, fault="rank=1,step=3,kind=flip")
    words = [f"parameters of rank 1 on {hostname()} differ", "last checkpoint", "test that host"]
    assert_refused(outcome, 77, *words, run_dir=run_dir)
    assert state(run_dir).step == 2 and num_rows(run_dir) == 3


# -- what a launch is told --


def test_a_run_that_was_begun_differently(truth, launch, tmp_path):
    """Faults 36 and 37: every difference is named, nothing is changed, no model is loaded."""
    run_dir = truth("alone")
    other = write_rows(tmp_path / "train.jsonl", ROWS_IN[:-1])
    before = files(run_dir)
    options = [f"data.train=[{other}]", "method.rank=5", "optim.name=adam", "train.batch_size=5"]
    outcome = launch(run_dir, "alone", *options)
    words = ["begun differently", "data.train was", "method.rank was 4, is 5"]
    words += ['optim.name was "adamw", is "adam"', "train.batch_size was 6, is 5"]
    assert_refused(outcome, 78, *words)
    assert files(run_dir) == before and "layers" not in outcome.err


def test_a_run_that_is_done_is_left_alone(truth, launch):
    run_dir = truth("dp2")
    before = files(run_dir)
    outcome = launch(run_dir, "dp2")
    assert_done(outcome, run_dir)
    assert f"all {STEPS} steps are done already" in outcome.err and "layers" not in outcome.err
    assert files(run_dir) == before


def test_bad_rows_are_seen_before_the_model_loads(launch, tmp_path):
    """Fault 33."""
    rows = [ROWS_IN[0], ROWS_IN[1], '{"prompt": "cut', ROWS_IN[2], {"prompt": "no answer"}]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    outcome = launch(tmp_path / "run", "pp2", f"data.train=[{path}]")
    assert_refused(outcome, 65, f"{path}:3: ", "1 more bad row", run_dir=tmp_path / "run")
    assert "layers" not in outcome.err
