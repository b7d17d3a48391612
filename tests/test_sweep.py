"""Sweeps without MPI: points and their names, what is refused, what is missing, who runs when."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
import yaml

from hpcmlx import config
from hpcmlx.config import CommandLine, FinetuneConfig, GenerateConfig
from hpcmlx.errors import (
    ConfigError,
    ExitCode,
    IntegrityError,
    LostPeerError,
    OutputError,
    UsageError,
)
from hpcmlx.launch.hostfile import Host
from hpcmlx.launch.mpirun import find_mpirun
from hpcmlx.launch.submit import JobState
from hpcmlx.sweep import array, plugins, run, search, table
from hpcmlx.sweep.local import Task, reason, run_tasks
from hpcmlx.sweep.points import Point, Sweep, exit_code, load_sweep, missing, point_name, state
from hpcmlx.sweep.run import run_sweep
from hpcmlx.sweep.slots import Slots
from hpcmlx.sweep.space import read_space

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
SCRIPT = str(ROOT / "jobs/generate.py")
GIVEN = ["model.path=m", "input=x"]


# -- what is asked for --


def space(*overrides: str, conf: Path = CONF):
    plugins.register()
    return read_space(GenerateConfig, conf, "generate", [*GIVEN, *overrides])


def test_what_has_several_values_is_swept():
    found = space("sampling.temperature=0,0.7", "parallel.pp=range(1,3)", "sampling=greedy,chat")
    assert list(found.swept) == ["sampling.temperature", "parallel.pp", "sampling"]
    assert found.sweeper == "basic" and "++input=x" in found.fixed
    assert found.first()[-3:] == [
        *("++sampling.temperature=0", "++parallel.pp=1", "sampling=greedy"),
    ]
    point = [*found.fixed, "++sampling.temperature=0.7", "++parallel.pp=2", "sampling=chat"]
    values = {"sampling.temperature": "0.7", "parallel.pp": "2", "sampling": "chat"}
    assert found.values(point) == values


def test_an_experiment_is_a_sweep_and_the_command_line_changes_it():
    plugins.register()
    words = ["experiment=weather_sweep", "method.rank=4", "train.steps=1,2"]
    found = read_space(FinetuneConfig, CONF, "finetune", words)
    assert found.swept == {
        "optim.learning_rate": "++optim.learning_rate=1e-3,3e-3",
        "train.steps": "++train.steps=1,2",
    }
    assert "++method.rank=4" in found.fixed
    with pytest.raises(UsageError, match="this is a sweep.*give -m"):
        config.read(FinetuneConfig, CONF, "finetune", CommandLine(tuple(words[:1])))
    with pytest.raises(UsageError, match="give -m"):
        config.read(GenerateConfig, CONF, "generate", CommandLine((*GIVEN, "sweep.trials=3")))


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("sampling.temprature=0,1", ConfigError, "did you mean sampling.temperature?"),
        ("sampling=greedy,hot", ConfigError, "conf/sampling has no hot"),
        ("sampling=glob(*)", UsageError, "name the files"),
        ("run_dir=a,b", UsageError, "run_dir: every point has a run directory of its own"),
        ("launch=mpirun,slurm", UsageError, "launch cannot be swept"),
        ("sweep.seed=1,2", UsageError, "sweep.seed cannot be swept"),
        ("sampling.seed=1", UsageError, "no key has several values"),
        ("hydra.sweep.dir=x", UsageError, "give sweep.dir="),
        ("hydra/launcher=submitit", UsageError, "give launch="),
        ("hydra/sweeper=ax", ConfigError, "expected one of basic, optuna"),
        ("hydra.sweeper._target_=os.system", UsageError, "only hydra/sweeper"),
        ("hydra.callbacks.a={_target_:os.system}", UsageError, "only hydra/sweeper"),
        ("+model._target_=a,b", ConfigError, "cannot name code"),
    ],
)
def test_what_has_no_place_in_a_sweep(override, error, words):
    with pytest.raises(error) as caught:
        space(override)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("where", "argument", "words"),
    [
        ("callbacks: {a: %s}", ", self: %s/bad", "cannot name code"),
        # Of these Hydra knows the arguments, and refuses others; without any our check is left.
        ("sweeper: %s", ", self: %s/bad", "Key 'self' not in"),
        ("launcher: %s", ", self: %s/bad", "Key 'self' not in"),
        ("sweeper: {params: {a: 1}, b: %s}", ", self: %s/bad", "Key 'b' not in"),
        ("sweeper: %s", "", "hydra.sweeper._target_=pathlib.Path.mkdir.*cannot name code"),
        ("launcher: %s", "", "hydra.launcher._target_=pathlib.Path.mkdir.*cannot name code"),
    ],
)
def test_code_that_a_file_names_is_not_called(tmp_path, where, argument, words):
    """Fault 43: Hydra would call what its own settings name."""
    target = f"{{_target_: pathlib.Path.mkdir{argument and argument % tmp_path}}}"
    text = f"input: x\nmodel: {{path: m}}\nhydra: {{{where % target}}}\n"
    (tmp_path / "generate.yaml").write_text(text)
    (tmp_path / "generate.py").touch()
    with pytest.raises(ConfigError, match=words):
        run_sweep(
            *("generate", str(tmp_path / "generate.py"), GenerateConfig, tmp_path),
            CommandLine(("sampling.seed=1,2", f"sweep.dir={tmp_path}/s"), multirun=True),
        )
    assert not (tmp_path / "bad").exists() and not (tmp_path / "s").exists()


def refused(tmp_path: Path, *overrides: str) -> Exception:
    words = (*GIVEN, f"sweep.dir={tmp_path}/s", *overrides)
    with pytest.raises((ConfigError, UsageError, OutputError)) as caught:
        run_sweep("generate", SCRIPT, GenerateConfig, CONF, CommandLine(words, multirun=True))
    return caught.value


def test_a_bad_point_refuses_a_grid_before_anything_starts(tmp_path):
    error = refused(tmp_path, "sampling.temperature=0,-1", "parallel.pp=1,2")
    assert "sampling.temperature=-1 parallel.pp=1: sampling.temperature=-1.0" in str(error)
    assert "nothing was started" in str(error) and error.exit_code == ExitCode.CONFIG
    assert not (tmp_path / "s").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/file").touch()
    assert "has something else in it" in str(refused(tmp_path, "sampling.seed=1,2"))
    (tmp_path / "s/file").unlink()
    Sweep(tmp_path / "s", "finetune", "a", "minimize", ["b"]).save()
    assert "is a sweep of finetune over b" in str(refused(tmp_path, "sampling.seed=1,2"))


def test_all_points_can_be_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = CommandLine((*GIVEN, "sampling.seed=1,2"), "config", multirun=True)
    assert run_sweep("generate", SCRIPT, GenerateConfig, CONF, command) == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [cfg["sampling"]["seed"] for cfg in shown if cfg] == [1, 2]
    assert not list(tmp_path.iterdir())


def test_a_point_that_is_asked_for_twice_is_run_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        run._Running, "run_here", lambda self, points: asked.extend(p.name for p in points) or 0
    )
    command = CommandLine((*GIVEN, "sampling.seed=1,2,1", f"sweep.dir={tmp_path}/s"), multirun=True)
    run_sweep("generate", SCRIPT, GenerateConfig, CONF, command)
    assert asked == ["seed=1", "seed=2"]


def test_a_saved_configuration_is_read_alone(tmp_path):
    cfg = config.compose(GenerateConfig, CONF, "generate", [*GIVEN, "sampling.stop=['a=b,c']"])
    (tmp_path / "a.yaml").write_text(config.to_yaml(cfg))
    quoted = config.quote("run_dir", "/a b/t=0,p=1")
    found = config.load(GenerateConfig, tmp_path / "a.yaml", ["launch.kind=mpirun", quoted])
    assert (found.sampling, found.run_dir) == (cfg.sampling, "/a b/t=0,p=1")
    assert found.launch.kind == "mpirun"
    (tmp_path / "b.yaml").write_text("input: x\nmodel: {path: m, _target_: os.system}\n")
    for path, words in ((tmp_path / "b.yaml", "cannot name code"), (tmp_path / "c", "be read")):
        with pytest.raises(ConfigError, match=words):
            config.load(GenerateConfig, path)
    with pytest.raises(ConfigError, match="unknown key launch"):
        config.load(FinetuneConfig, tmp_path / "a.yaml", ["launchh=x"])


# -- points --


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"sampling.temperature": "0.7", "parallel.pp": "2"}, "temperature=0.7__pp=2"),
        ({"optim.learning_rate": "1e-3"}, "learning_rate=1e-3"),
        ({"a.kind": "x", "b.kind": "y"}, "a.kind=x__b.kind=y"),
        ({"a": "../../etc"}, "a=..-..-etc-"),
        ({"a": "'$(rm x)'"}, "a=rm-x-"),
        ({"a": "[1,2]"}, "a=1-2-"),
        ({"a": "x" * 300}, "a=xxx"),
    ],
)
def test_names(overrides, name):
    found = point_name(overrides)
    assert found == name or (name[-1] in "-x" and found.startswith(name))
    assert re.fullmatch(r"[A-Za-z0-9_.=+-]{1,100}", found) and not found.startswith(("-", "."))


def test_names_are_different_where_values_are():
    values = ["[1,2]", "1-2", "'1-2'", "1/2", "x" * 200, "x" * 201]
    assert len({point_name({"a": value}) for value in values}) == len(values)
    sweep = Sweep(Path("/s"), "generate", "m", "minimize")
    names = {sweep.add({"a": value}, "").name.casefold() for value in ("A", "a")}
    assert len(names) == 2  # a Mac's file system takes them for the same


def sweep_of(path: Path, **codes: int | None) -> Sweep:
    """A sweep whose points `a`, `b` have ended so; with 0 or 64 they are complete."""
    sweep = Sweep(path, "generate", "speed", "maximize", ["key"])
    for name, code in codes.items():
        point = sweep.add({"key": name}, "hash")
        point.exit_code = code
        if code is not None:
            sweep.run_dir(point).mkdir()
        if code in (0, 64):
            record = json.dumps({"exit_code": code, "seconds": 2.0})
            (sweep.run_dir(point) / "completed.json").write_text(record)
            (sweep.run_dir(point) / "summary.json").write_text('{"speed": 12.5}')
    return sweep


@pytest.mark.parametrize(
    ("codes", "states", "code"),
    [
        ({"a": 0, "b": 0}, ["complete", "complete"], 0),
        ({"a": 0, "b": 64}, ["complete", "complete, rows with errors"], 64),
        ({"a": 0, "b": 70}, ["complete", "FAILED"], 64),
        ({"a": 0, "b": 76}, ["complete", "stopped, saved"], 76),
        ({"a": 76, "b": None}, ["stopped, saved", "not run"], 76),
        ({"a": 76, "b": 75}, ["stopped, saved", "FAILED"], 64),
    ],
)
def test_how_a_sweep_stands(tmp_path, codes, states, code):
    sweep = sweep_of(tmp_path, **codes)
    sweep.save()
    again = load_sweep(tmp_path)
    assert again == sweep
    assert [state(again, point) for point in again.points] == states
    assert exit_code(again, again.points) == code
    left = [point.overrides["key"] for point in missing(again, again.points)]
    assert left == [name for name, value in codes.items() if value not in (0, 64)]


def test_a_code_of_success_without_a_record_is_none(tmp_path):
    sweep = sweep_of(tmp_path, a=0)
    (tmp_path / "key=a/completed.json").unlink()
    assert missing(sweep, sweep.points) and state(sweep, sweep.points[0]) == "FAILED"
    (tmp_path / "key=a/completed.json").write_text("{")
    with pytest.raises(IntegrityError, match="completed.json cannot be read"):
        missing(sweep, sweep.points)


def test_a_sweep_goes_on_only_with_its_own_settings(tmp_path):
    sweep = sweep_of(tmp_path, a=0)
    assert sweep.add({"key": "a"}, "hash") is sweep.points[0]
    with pytest.raises(ConfigError, match="begun with other settings"):
        sweep.add({"key": "a"}, "another")
    sweep.save()
    (tmp_path / "sweep.yaml").write_text("points: [{}]")
    with pytest.raises(IntegrityError):
        load_sweep(tmp_path)
    with pytest.raises(ConfigError, match="is not a sweep"):
        load_sweep(tmp_path / "absent")


def test_the_table(tmp_path):
    sweep = sweep_of(tmp_path, a=0, b=64, c=70, d=None)
    sweep.points[2].reason = "rank 1 on [host]: it broke"
    (tmp_path / "key=b/summary.json").write_text('{"speed": 13}')
    out = StringIO()
    table.show(sweep, sweep.points, out)
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["key", "state", "exit", "seconds", "speed"]
    assert lines[1].split() == ["a", "complete", "0", "12.5"]
    assert lines[3].split() == ["c", "FAILED", "70"] and lines[4].split() == ["d", "not", "run"]
    assert lines[5:] == ["best: key=b", "key=c: rank 1 on [host]: it broke"]


# -- who runs when --


def test_slots():
    slots = Slots([Host("a", 2), Host("b", 2, ' chip="M3 Ultra"')])
    one, two = slots.take(1), slots.take(2)
    assert (one, two) == ({0: 1}, {1: 2})  # whole on one host where there is room
    assert slots.take(2) is None
    three = slots.take(1)
    assert slots.hostfile(three) == "a slots=1\n"
    slots.give_back(two)
    slots.give_back(one)
    assert slots.hostfile(slots.take(3)) == 'a slots=1\nb slots=2  # chip="M3 Ultra"\n'


def test_a_point_that_needs_more_than_there_is_runs_alone():
    slots = Slots([Host("a", 2)])
    small = slots.take(1)
    assert slots.take(3) is None
    slots.give_back(small)
    assert slots.take(3) == {} and slots.take(1) is None
    slots.give_back({})
    assert slots.take(2) == {0: 2}


def test_hosts_that_do_not_say_what_they_take_have_one_point_at_a_time():
    slots = Slots([Host("a"), Host("b", 2)])
    assert slots.take(1) == {} and slots.take(1) is None
    assert slots.hostfile({}) == "a\nb slots=2\n"
    slots.give_back({})
    assert slots.take(2) == {}


def shell(folder: Path, name: str, script: str, num_ranks: int = 1) -> Task:
    return Task(name, ["sh", "-c", f"cd {folder}; {script}"], num_ranks, folder / f"{name}.log")


MEET = "touch {0}; until [ -e {1} ]; do sleep 0.05; done; echo met"


def test_points_that_fit_run_at_once_and_one_that_fails_stops_no_other(tmp_path):
    tasks = [
        shell(tmp_path, "a", MEET.format("a", "b") + "; exit 3"),
        shell(tmp_path, "b", MEET.format("b", "a")),
        shell(tmp_path, "c", "kill -9 $$"),
        shell(tmp_path, "d", "true", num_ranks=2),
    ]
    codes = {}
    ended = run_tasks(
        tasks, Slots([Host("localhost", 2)]), None, lambda t, c, s: codes.update({t.name: c})
    )
    assert ended == 0 and codes == {"a": 3, "b": 0, "c": 137, "d": 0}
    assert (tmp_path / "a.log").read_text() == "met\n"
    assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o600


def test_a_rank_of_points_that_run_at_once_takes_one_core(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    tasks = [shell(tmp_path, n, "echo $OPENBLAS_NUM_THREADS") for n in ("a", "b")]
    run_tasks(tasks, Slots([Host("localhost", 2)]), None, lambda t, c, s: None)
    assert (tmp_path / "b.log").read_text() == "1\n"
    run_tasks(tasks[:1], Slots([Host("localhost", 2)]), None, lambda t, c, s: None)
    assert (tmp_path / "a.log").read_text() == "1\n\n"  # alone it has all of them


def test_points_run_one_after_another_where_that_is_asked_for(tmp_path):
    script = "[ ! -e busy ] || exit 1; touch busy; sleep 0.2; rm busy"
    codes = []
    tasks = [shell(tmp_path, str(i), script) for i in range(3)]
    run_tasks(tasks, Slots([Host("localhost", 4)]), 1, lambda t, c, s: codes.append(c))
    assert codes == [0, 0, 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_all_and_nothing_new_begins(tmp_path, number):
    script = "trap 'echo told; exit 9' INT TERM USR1; touch $0; while :; do sleep 0.05; done"
    tasks = [
        Task(n, ["bash", "-c", f"cd {tmp_path}; {script}", n], 1, tmp_path / f"{n}.log")
        for n in "abc"
    ]

    def tell() -> None:
        while not ((tmp_path / "a").exists() and (tmp_path / "b").exists()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=tell, daemon=True).start()
    codes = {}
    slots = Slots([Host("localhost", 2)])
    ended = run_tasks(tasks, slots, None, lambda t, c, s: codes.update({t.name: c}))
    assert ended == number and codes == {"a": 9, "b": 9}
    assert (tmp_path / "a.log").read_text() == "told\n" and not (tmp_path / "c").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ranks_of_points_that_run_at_once_are_not_bound_to_the_same_core(tmp_path):
    """By default mpirun binds the first rank to the first core, and so does every other mpirun."""
    show = "import os; print(sorted(os.sched_getaffinity(0)))"
    line = [find_mpirun(), "-n", "1", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    tasks = [
        Task(n, [*line, sys.executable, "-c", show], 1, tmp_path / f"{n}.log") for n in ("a", "b")
    ]
    codes = []
    run_tasks(tasks, Slots([Host("localhost", 2)]), None, lambda t, c, s: codes.append(c))
    assert codes == [0, 0]
    if sys.platform == "linux":
        for task in tasks:
            assert task.log.read_text().split("\n")[0] == str(sorted(os.sched_getaffinity(0)))


def test_why_a_point_failed(tmp_path, monkeypatch):
    """Also on a login node, which may have no mpirun, or another one than the log is of."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    log = tmp_path / "log"
    said = ["'/a b/mpirun' -n 2 /p /j.py", "rank 1 on x: it broke", "/c/mpirun -n 2 /p /j.py"]
    log.write_text("".join(f"hpcmlx: {t}\n" for t in [*said, "mpirun was killed by signal 9"]))
    assert reason(log) == said[1]
    log.write_text(f"hpcmlx: {said[0]}\nnothing else\n")
    assert reason(log) == reason(tmp_path / "absent") == ""


# -- arrays of Slurm --

SCONTROL = (
    "JobId=12 ArrayJobId=10 ArrayTaskId=1 JobName=x JobState=RUNNING Reason=None ExitCode=0:0\n"
    "JobId=11 ArrayJobId=10 ArrayTaskId=0 JobState=FAILED Reason=NonZeroExitCode ExitCode=70:0\n"
    "JobId=10 ArrayJobId=10 ArrayTaskId=2-3,5%2 JobState=PENDING Reason=Resources ExitCode=0:0\n"
)


def test_what_slurm_says_of_an_array():
    states = array.parse_tasks(SCONTROL)
    assert {task: s.name for task, s in states.items()} == {
        0: "FAILED", 1: "RUNNING", 2: "PENDING", 3: "PENDING", 5: "PENDING",
    }  # fmt: skip
    assert states[0].exit_code == 70
    text = (
        "10_0|NODE_FAIL|0:0\n10_0|COMPLETED|0:0\n10_1|CANCELLED by 0|0:15\n10_[2-3%1]|PENDING|0:0\n"
    )
    states = array.parse_accounting(text)
    assert {task: s.name for task, s in states.items()} == {
        0: "COMPLETED", 1: "CANCELLED", 2: "PENDING", 3: "PENDING",
    }  # fmt: skip


def test_an_array_is_followed_to_the_end_of_every_task(capsys):
    running, failed = JobState("RUNNING"), JobState("FAILED", "NonZeroExitCode", 70)
    done, again = JobState("COMPLETED"), JobState("PENDING", "BeginTime")
    answers = [
        None,
        {0: running, 1: again, 3: again},  # 3 is cancelled, 2 is of no interest
        {0: done, 1: failed},  # seems over for a moment
        {0: done, 1: again},
        {1: running},
        {1: failed},
        {1: failed},
    ]
    points = [Point("a", {}, ""), Point("b", {}, ""), None, Point("d", {}, "")]
    noted = []
    array.follow(
        *("10", points, lambda p: p.name == "a", lambda p, code, s: noted.append((p.name, code))),
        ask=lambda _: answers.pop(0),
        every=0,
    )
    assert noted == [("a", 0), ("d", 143), ("b", 70)] and not answers
    said = capsys.readouterr().err
    assert "b: task 10_1: PENDING (BeginTime)" in said and "b: task 10_1: FAILED" in said


def test_the_script_of_an_array(tmp_path, monkeypatch):
    """What bash makes of it: every task has its own run directory and claim, and requeues only
    itself."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    job = tmp_path / "python"
    job.write_text(
        f"#!{sys.executable}\n"
        "import os, sys, pathlib\n"
        "assert sys.argv[1:4] == ['-m', 'hpcmlx.sweep.point', 'finetune']\n"
        "run_dir = pathlib.Path(sys.argv[5].removesuffix('.yaml'))\n"
        "(run_dir / 'checkpoints/step-1').mkdir(parents=True)\n"
        "(run_dir / 'claim').write_text(os.environ['HPCMLX_CLAIM'])\n"
        "sys.exit(76)\n"
    )
    job.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(job))
    sweep = sweep_of(tmp_path, a=None, b=None)
    sweep.job = "finetune"
    listing = tmp_path / "the list.txt"
    listing.write_text("".join(f"{sweep.run_dir(p)}\n" for p in sweep.points))
    words = ["model.path=m", "data.train=[x]", "launch=slurm", "sweep.max_parallel=1"]
    settings = config.compose(FinetuneConfig, CONF, "finetune", words)
    text = array.script_text(sweep, "jobs/x.py", listing, 2, 3, settings)
    assert "\n#SBATCH --array=0-1%1\n" in text and "\n#SBATCH --nodes=3\n" in text
    assert f"\n#SBATCH --output={tmp_path}/array-%A_%a.log\n" in text
    own = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    env = {**os.environ, **own, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], env=env, timeout=60, check=False)
    assert done.returncode == 76
    assert (tmp_path / "key=b/claim").read_text() == "slurm-7-1"
    assert not (tmp_path / "key=a/claim").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7_1\n"


def test_an_array_that_is_under_way_is_followed_before_anything_of_it_is_touched(
    tmp_path, monkeypatch
):
    """A point is made ready, its directory put aside, only once no task is at work in it."""
    sweep = sweep_of(tmp_path, a=None, b=None, c=None)
    sweep.array, sweep.tasks = "10", ["key=a", "key=b"]
    words = [*GIVEN, "launch=slurm", "launch.slurm.follow=false"]
    settings = config.compose(GenerateConfig, CONF, "generate", words)
    answers = [None, {0: JobState("RUNNING"), 1: JobState("FAILED")}]
    answers += [dict.fromkeys((0, 1), JobState("FAILED"))] * 2
    monkeypatch.setattr(array, "array_states", lambda _: answers.pop(0))
    monkeypatch.setattr(array.submit, "require_sbatch", lambda: None)
    monkeypatch.setattr(array.submit, "sbatch", lambda _: "11")
    done = []

    def start() -> int:
        return array.run_array(
            *(sweep, sweep.points, SCRIPT, 1, settings),
            lambda point: done.append(f"write {point.name}"),
            lambda point, code, seconds: done.append(f"end {point.name}"),
        )

    with pytest.raises(LostPeerError, match="array 10 of an earlier launch.*scontrol show job 10"):
        start()
    assert not done
    assert start() == 0
    assert done == ["end key=a", "end key=b", "write key=c"]
    assert (sweep.array, sweep.tasks) == ("11", ["key=c"])


# -- a search --

optuna_only = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None,
    reason="NOT TESTED: hydra/sweeper=optuna needs optuna",
)


def run_search(sweep: Sweep, trials: int, outcome) -> list[dict[str, str]]:
    """Search over a rate and a rank; `outcome` says what becomes of a point's values."""
    asked = []

    def launch(batch):
        found = []
        for overrides in batch:
            values = dict(text.lstrip("+").split("=") for text in overrides if "fixed" not in text)
            asked.append(values)
            point = sweep.add(values, "")
            value = outcome(values)
            if value is not None:
                folder = sweep.run_dir(point)
                folder.mkdir(exist_ok=True)
                (folder / "completed.json").write_text('{"exit_code": 0, "seconds": 1}')
                (folder / "summary.json").write_text(json.dumps({"loss": value}))
            found.append(value)
        return found

    words = [
        "++fixed=1",
        "++rate=tag(log,interval(1e-4,1e-1))",
        "++rank=2,4",
        "++depth=range(1,9,2)",
    ]
    search.run(words, sweep, search.Search(trials, 2, 0), launch)
    return asked


@optuna_only
def test_a_search_learns_from_what_is_complete_and_takes_no_failure_for_a_number(tmp_path):
    sweep = Sweep(tmp_path, "finetune", "loss", "minimize", ["rate", "rank", "depth"])
    asked = run_search(sweep, 6, lambda v: None if v["rank"] == "2" else float(v["rate"]))
    assert len(asked) == 6
    assert all(1e-4 <= float(v["rate"]) <= 1e-1 and v["rank"] in "24" for v in asked)
    assert {v["depth"] for v in asked} <= {"1", "3", "5", "7"}
    failed = [v for v in asked if v["rank"] == "2"]
    assert failed
    # Again: what has failed is asked for first, what is complete not at all.
    again = run_search(sweep, 8, lambda v: float(v["rate"]))
    assert again[: len(failed)] == failed
    assert len(again) == 8 - (len(asked) - len(failed))
    complete = [v for v in asked if v not in failed]
    assert not [v for v in again if v in complete]
    assert run_search(sweep, 8, lambda v: 0.0) == []


def test_a_search_without_optuna_and_one_that_does_not_know_what_is_better(tmp_path, monkeypatch):
    words = ("hydra/sweeper=optuna", "sampling.seed=1,2", "sweep.metric=rows")
    assert "give sweep.direction" in str(refused(tmp_path, *words))
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'hpcmlx[sweep]'" in str(refused(tmp_path, *words[:2]))
