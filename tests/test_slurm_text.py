"""The batch script as text, and what it does when bash runs it: no Slurm is needed for either.

Where a script puts itself back into the queue, a stand-in of `scontrol` notes it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from hpcmlx import config
from hpcmlx.config import FinetuneConfig, GenerateConfig
from hpcmlx.errors import ConfigError, ExitCode, LostPeerError, UsageError
from hpcmlx.inference.store import ROWS
from hpcmlx.launch import submit as submitting
from hpcmlx.launch.scripts import shipped
from hpcmlx.launch.slurm import SAVED, Batch, Shell, check_options, render, shape
from hpcmlx.launch.submit import (
    JobState,
    batch_environment,
    follow,
    parse_sacct,
    parse_scontrol,
    submit,
)
from hpcmlx.settings import SlurmConfig
from hpcmlx.training.finetune import CHECKPOINTS

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
BATCH = Batch("finetune", ["true"], "/runs/a", "/repo", "token", "/runs/a.slurm/%j.log")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_shipped_files_are_what_is_rendered(name):
    path = ROOT / "slurm" / name
    assert path.read_text() == shipped()[name], "python -m hpcmlx.launch.scripts slurm"
    subprocess.run(["bash", "-n", path], check=True)


def test_nothing_else_is_shipped():
    assert {path.name for path in (ROOT / "slurm").iterdir()} == shipped().keys() | {"chain.sh"}


def test_what_is_saved_is_where_the_jobs_save_it():
    assert dict(SAVED, finetune=f"{CHECKPOINTS}/step-*", generate=f"{ROWS}/*") == SAVED


def header(batch: Batch) -> list[str]:
    return [line[8:] for line in render(batch).splitlines() if line.startswith("#SBATCH ")]


def test_what_is_asked_of_slurm():
    options = SlurmConfig(
        partition="main,big",
        account="me",
        qos="low.prio",
        ntasks_per_node=2,
        cpus_per_task=4,
        mem="64G",
        time="2-12:00:00",
        signal_seconds=90,
        dependency="afterok:12:13,afterany:14",
        extra=["--gres=gpu:1", "--exclusive"],
    )
    assert header(replace(BATCH, num_ranks=3, options=options, array="0-3%2")) == [
        "--job-name=hpcmlx-finetune",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=4",
        "--partition=main,big",
        "--account=me",
        "--qos=low.prio",
        "--mem=64G",
        "--time=2-12:00:00",
        "--dependency=afterok:12:13,afterany:14",
        "--kill-on-invalid-dep=yes",
        "--array=0-3%2",
        "--output=/runs/a.slurm/%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@90",
        "--gres=gpu:1",
        "--exclusive",
    ]


def test_only_what_can_go_on_is_requeued():
    assert "--requeue" in header(BATCH)
    for batch in (
        replace(BATCH, job="evaluate"),
        replace(BATCH, options=SlurmConfig(max_requeues=0)),
    ):
        assert "--no-requeue" in header(batch) and "scontrol" not in render(batch)


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "partition": ["a b", "a\n#SBATCH --uid=0", "$(id)", "-x", "a,", "", "a;b"],
        "account": ["a,b", "`id`", "ä"],
        "qos": ["a/b", "x" * 101],
        "mem": ["64 G", "64GB", "-1", "1e9"],
        "time": ["1h", "1-2-3", "00:00:00:00", "1:2\n", "-5"],
        "dependency": ["12", "afterok", "afterok:x", "afterok:1 --wrap", "afterok:1?after:2"],
    }.items(),
)
def test_values_that_could_be_read_another_way_are_refused(key, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"launch.slurm.{key}="):
            render(replace(BATCH, options=SlurmConfig(**{key: value})))


@pytest.mark.parametrize(
    "text", ["gres", "-p main", "--a b", "--a=$(id)", "--a=b\n--uid=0", "--a='b'", "--A=b", "--a="]
)
def test_further_options_are_words(text):
    with pytest.raises(ConfigError, match="launch.slurm.extra"):
        check_options(SlurmConfig(extra=[text]))


def test_what_the_script_sets_cannot_be_set_again():
    with pytest.raises(ConfigError, match="sets --nodes itself; see launch.slurm.nodes"):
        check_options(SlurmConfig(extra=["--nodes=3"]))
    with pytest.raises(ConfigError, match="sets --wrap itself$"):
        check_options(SlurmConfig(extra=["--wrap=id"]))


def test_a_path_that_a_header_cannot_hold_is_refused():
    for name in ("a b", "a%u", "a\n#SBATCH --uid=0", "a'b", "ä"):
        with pytest.raises(ConfigError, match="set run_dir"):
            render(replace(BATCH, log=f"/runs/{name}.slurm/%j.log"))


def test_an_array_is_indices():
    with pytest.raises(ConfigError, match="expected indices"):
        render(replace(BATCH, array="0-3;id"))


@pytest.mark.parametrize(
    ("ranks", "nodes", "per_node", "expected"),
    [
        (4, None, None, (4, 1)),
        (4, 2, None, (2, 2)),
        (5, 2, None, (2, 3)),
        (5, None, 2, (3, 2)),
        (4, 2, 3, (2, 3)),
        (1, None, None, (1, 1)),
        (4, 2, 1, None),
        (4, 3, 2, None),
        (2, 3, None, None),
    ],
)
def test_ranks_on_nodes(ranks, nodes, per_node, expected):
    options = SlurmConfig(nodes=nodes, ntasks_per_node=per_node)
    if expected is None:
        with pytest.raises(ConfigError, match=f"{ranks} ranks"):
            shape(ranks, options)
    else:
        assert shape(ranks, options) == expected


# -- what bash makes of it --


def script(folder: Path, *command: str, **changes) -> Path:
    """A rendered script whose job is `command`; scontrol only notes that it was called."""
    fake = folder / "bin" / "scontrol"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
    fake.chmod(0o755)
    batch = Batch("finetune", command, str(folder / "run"), str(folder), "token", "%j.log")
    (folder / "job.sbatch").write_text(render(replace(batch, **changes)))
    return folder / "job.sbatch"


def environment(folder: Path, starts: int) -> dict[str, str]:
    own = {"SLURM_JOB_ID": "7", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    return {**os.environ, **own, **({"SLURM_RESTART_COUNT": str(starts)} if starts else {})}


def bash(folder: Path, *command: str, starts: int = 0, **changes) -> subprocess.CompletedProcess:
    line = ["bash", script(folder, *command, **changes)]
    env = environment(folder, starts)
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=20, check=False)


SAVE = "mkdir -p run/checkpoints/step-00000003"
WORSE = [ExitCode.OK, 1, ExitCode.USAGE, ExitCode.BAD_INPUT, ExitCode.CANNOT_CREATE, ExitCode.IO]
WORSE += [ExitCode.INTEGRITY, ExitCode.CONFIG, ExitCode.ROW_ERRORS, 137]


@pytest.mark.parametrize("code", [75, 76])
def test_a_job_that_has_saved_is_requeued(tmp_path, code):
    done = bash(tmp_path, "bash", "-c", f"{SAVE}; exit {code}", starts=19)
    assert (done.returncode, done.stdout) == (code, "")
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("code", WORSE)
def test_no_other_end_is_requeued(tmp_path, code):
    done = bash(tmp_path, "bash", "-c", f"{SAVE}; exit {int(code)}")
    assert done.returncode == code and not (tmp_path / "requeued").exists()


@pytest.mark.fault
def test_requeues_have_an_end(tmp_path):
    """Fault 20: no progress, too many, and a node that fails again and again."""
    (tmp_path / "run/checkpoints/step-00000002").mkdir(parents=True)
    done = bash(tmp_path, "bash", "-c", "exit 76")
    assert done.returncode == 76 and "saved nothing new: not requeued" in done.stderr
    done = bash(tmp_path, "bash", "-c", f"{SAVE}; exit 75", starts=20)
    assert done.returncode == 75 and "after 20 requeues: no more" in done.stderr
    done = bash(tmp_path, "touch", "begun", starts=21)
    assert done.returncode == 75 and not (tmp_path / "begun").exists()
    assert not (tmp_path / "requeued").exists()


def test_rows_count_as_progress(tmp_path):
    rows = tmp_path / "run/rows"
    rows.mkdir(parents=True)
    (rows / "a.log").write_text("one\n")
    bash(tmp_path, "bash", "-c", "echo two >> run/rows/a.log; exit 75", job="generate")
    assert (tmp_path / "requeued").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_are_passed_on_and_the_end_is_waited_for(tmp_path, number):
    """Twice, the second time while the job is saving, which it is given the time for."""
    job = (
        "trap 'echo told >> told' USR1 TERM; touch told begun; "
        f"until [ $(grep -c told told) = 2 ]; do sleep 0.02; done; {SAVE}; exit 76"
    )
    line = ["bash", script(tmp_path, "bash", "-c", job)]
    begun, told = tmp_path / "begun", tmp_path / "told"
    with subprocess.Popen(line, env=environment(tmp_path, 0), stderr=subprocess.PIPE) as process:
        for times in range(2):
            end = time.monotonic() + 10
            while not (begun.exists() and told.read_text().count("told") == times):
                assert time.monotonic() < end
                time.sleep(0.01)
            process.send_signal(number)
        assert process.wait(10) == 76
    assert (tmp_path / "requeued").exists()


@pytest.mark.fault
def test_nothing_that_a_user_gives_is_a_command(tmp_path):
    words = ["$(touch bad)", "`touch bad`", "'; touch bad; '", "a\nb", '"$HOME"', "-n", "ä b", "!x"]
    folder = tmp_path / "$(touch bad) 'x"
    folder.mkdir()
    done = bash(
        tmp_path,
        "printf",
        "%s\\n",
        *words,
        Shell('"$run_dir" "$HPCMLX_CLAIM" "$PWD"'),
        run_dir="/runs/$(touch bad)",
        directory=str(folder),
        claim="$(touch bad)",
    )
    given = [*words, "/runs/$(touch bad)", "$(touch bad)", str(folder)]
    assert done.stdout == "".join(f"{word}\n" for word in given), done.stderr
    assert not list(tmp_path.rglob("bad"))


# -- submitting and following --


def settings(folder: Path, *overrides: str) -> FinetuneConfig:
    given = ["model.path=m", "data.train=[x]", "launch=slurm", f"run_dir={folder}/run", *overrides]
    return config.compose(FinetuneConfig, CONF, "finetune", given)


def sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A stand-in of sbatch in PATH, which does `body`; a job's file."""
    path = folder / "bin" / "sbatch"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    (folder / "finetune.py").touch()
    return folder / "finetune.py"


def test_a_job_is_submitted(tmp_path, monkeypatch, capsys):
    job = sbatch(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/called; echo "12;cluster"')
    given = ["data.train=[x]", "launch=slurm", "launch.slurm.follow=false", "parallel.pp=2"]
    cfg = settings(tmp_path, *given[2:], "launch.slurm.partition=big")
    assert submit("finetune", str(job), given, cfg) == 0
    script = tmp_path / "run.slurm/job.sbatch"
    assert (tmp_path / "called").read_text() == f"--parsable {script}\n"
    assert (tmp_path / "run.slurm").stat().st_mode & 0o777 == 0o700
    text = script.read_text()
    for line in (
        f"#SBATCH --output={tmp_path}/run.slurm/%j.log",
        "#SBATCH --partition=big",
        "#SBATCH --nodes=2",
        f"run_dir={tmp_path}/run",
    ):
        assert f"\n{line}\n" in text, text
    assert "launch.kind=mpirun" in text and "launch=slurm" not in text
    assert "job 12, 2 ranks on 2 nodes, 1 on each" in capsys.readouterr().err


def test_a_job_that_slurm_refuses_leaves_nothing(tmp_path, monkeypatch):
    body = "echo 'sbatch: error: invalid partition specified: big' >&2; exit 1"
    job = sbatch(tmp_path, monkeypatch, body)
    with pytest.raises(ConfigError, match="refuses the job: invalid partition specified: big"):
        submit("finetune", str(job), [], settings(tmp_path))
    assert not list(tmp_path.glob("run*"))


def test_no_slurm_and_wrong_options_are_refused(tmp_path, monkeypatch):
    job = sbatch(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(ConfigError, match="launch.slurm.qos"):
        submit("finetune", str(job), [], settings(tmp_path, "launch.slurm.qos='a b'"))
    with pytest.raises(ConfigError, match="not a file"):
        submit("finetune", str(tmp_path / "absent.py"), [], settings(tmp_path))
    with pytest.raises(ConfigError, match="launch.hostfile"):
        settings(tmp_path, "launch.hostfile=x")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="no sbatch in PATH"):
        submit("finetune", str(job), [], settings(tmp_path))
    assert not list(tmp_path.glob("run*"))


def test_a_job_submitted_from_a_job_is_not_part_of_it():
    given = {"SLURM_RESTART_COUNT": "3", "SLURM_JOB_ID": "1", "HPCMLX_CLAIM": "x"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_PARTITION": "big", "HPCMLX_FAULT": "y"}
    assert batch_environment({**given, **kept}) == kept


def test_what_slurm_says():
    line = "JobId=7 JobName=x Comment= JobState=PENDING Reason=BeginTime Dependency=(null)"
    assert parse_scontrol(f"{line} ExitCode=0:0 RunTime=00:00:00") == JobState(
        "PENDING", "BeginTime"
    )
    ended = parse_scontrol("JobId=7 JobState=FAILED Reason=NonZeroExitCode ExitCode=77:0\n")
    assert ended == JobState("FAILED", "NonZeroExitCode", 77) and ended.is_over
    assert parse_sacct("REQUEUED|0:0\nCANCELLED by 0|0:15\n") == JobState("CANCELLED", "", 0, 15)
    assert parse_sacct("") is None and parse_sacct("slurm is down") is None


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (JobState("FAILED", "", 77), 77),
        (JobState("COMPLETED"), 75),
        (JobState("NODE_FAIL"), 75),
        (JobState("TIMEOUT", "", 0, 15), 75),
        (JobState("CANCELLED", "", 0, 15), 143),
        (JobState("OUT_OF_MEMORY", "", 0, 9), 137),
    ],
)
def test_a_job_without_a_record_has_failed(state, code):
    assert state.exit_code == code


def test_a_job_is_followed_through_requeues(tmp_path):
    log, out = tmp_path / "7.log", StringIO()
    answers = iter(
        [
            (JobState("PENDING", "Resources"), None),
            (JobState("RUNNING"), "first"),
            (None, " start\n"),
            (JobState("FAILED", "", 76), ""),  # a moment before it is queued again
            (JobState("PENDING", "BeginTime"), ""),
            (JobState("RUNNING"), "second start\n"),
            (JobState("COMPLETED"), ""),
            (JobState("COMPLETED"), "last words\n"),
        ]
    )

    def ask(job_id: str) -> JobState | None:
        state, text = next(answers)
        if text is not None:
            with open(log, "a") as file:
                file.write(text)
        return state

    assert follow("7", log, out, ask, every=0).name == "COMPLETED"
    said = [line.removeprefix("hpcmlx: job 7: ") for line in out.getvalue().splitlines()]
    assert said == [
        "PENDING (Resources)",
        "RUNNING",
        "first start",
        "PENDING (BeginTime)",
        "second start",
        "RUNNING",
        "last words",
        "COMPLETED",
    ]


def test_a_controller_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(submitting, "_PATIENCE", 0.05)
    with pytest.raises(LostPeerError, match="has not answered about job 7"):
        follow("7", tmp_path / "7.log", StringIO(), lambda _: None, every=0.01)


def test_defaults_ask_for_nothing():
    cfg = config.compose(GenerateConfig, CONF, "generate", ["model=smollm2", "launch=slurm"])
    assert cfg.launch.kind == "slurm"
    assert cfg.launch.slurm == SlurmConfig()
