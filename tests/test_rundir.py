"""Run directories: new ones for every launch, one job's and one launch's, entered again."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hpcmlx import rundir
from hpcmlx.errors import ConfigError, OutputError
from tests.test_files import small_disk as small_disk


def token_in(run_dir: Path) -> str:
    return json.loads((run_dir / rundir.CLAIM).read_text())["token"]


def test_what_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory|File exists"):
        rundir.open_run_dir(tmp_path / "file" / "run", "generate", "dp1_pp1_tp1")
    with pytest.raises(OutputError, match="File exists"):
        rundir.open_run_dir(None, "generate", "dp1_pp1_tp1", root=tmp_path / "file")


def test_eight_launches_in_one_second_get_eight_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    start = threading.Barrier(8)

    def launch(_):
        start.wait()
        return rundir.open_run_dir(None, "generate", "dp1_pp2_tp1", root=tmp_path).path

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(launch, range(8)))
    assert len(set(made)) == 8
    assert all(p.name.startswith("20260101-000000-generate-dp1_pp2_tp1") for p in made)
    assert all(p.is_absolute() and p.stat().st_mode & 0o777 == 0o700 for p in made)


def test_a_directory_belongs_to_one_launch(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "run"
    assert rundir.open_run_dir(str(path), "generate", "dp1_pp1_tp1").path == path
    with pytest.raises(OutputError, match="is not empty; give another run_dir"):
        rundir.open_run_dir(path, "generate", "dp1_pp1_tp1")
    # The ranks of the launch that claimed it may claim it again; those of another may not.
    monkeypatch.setenv(rundir.CLAIM_ENV, "of another launch")
    with pytest.raises(OutputError):
        rundir.open_run_dir(path, "generate", "dp1_pp1_tp1")
    monkeypatch.setenv(rundir.CLAIM_ENV, token_in(path))
    assert rundir.open_run_dir(path, "generate", "dp1_pp1_tp1").path == path
    (path / "results.jsonl").write_text("")
    with pytest.raises(OutputError):
        rundir.open_run_dir(path, "generate", "dp1_pp1_tp1")


def test_two_claims_at_once_have_one_winner(tmp_path):
    start = threading.Barrier(8)

    def attempt(_):
        start.wait()
        try:
            return rundir.claim(tmp_path, "generate")
        except OutputError:
            return None

    with ThreadPoolExecutor(8) as pool:
        tokens = [token for token in pool.map(attempt, range(8)) if token]
    assert tokens == [token_in(tmp_path)]


# -- entered again --


def begin(path: Path) -> rundir.RunDir:
    """A first launch, up to its lock."""
    opened = rundir.open_run_dir(path, "generate", "dp1_pp1_tp1", resumable=True)
    os.close(rundir.lock_run_dir(path))
    return opened


def test_a_run_that_was_begun_is_entered_again(tmp_path, monkeypatch):
    monkeypatch.delenv(rundir.CLAIM_ENV, raising=False)
    first = begin(tmp_path / "run")
    assert not first.resumed and first.path == tmp_path / "run"
    assert first.token == token_in(first.path)
    again = rundir.open_run_dir(tmp_path / "run", "generate", "dp2_pp1_tp1", resumable=True)
    assert again.resumed and again.path == first.path and again.token != first.token
    # A job that cannot go on with anything is refused, as is a directory of something else.
    with pytest.raises(OutputError, match="is not empty"):
        rundir.open_run_dir(tmp_path / "run", "evaluate", "dp1_pp1_tp1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    with pytest.raises(OutputError, match="is not empty"):
        rundir.open_run_dir(tmp_path / "other", "generate", "dp1_pp1_tp1", resumable=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_another_job_is_not_gone_on_with(tmp_path, monkeypatch, resume):
    monkeypatch.delenv(rundir.CLAIM_ENV, raising=False)
    path = tmp_path / "run"
    rundir.open_run_dir(path, "evaluate", "dp1_pp1_tp1")
    os.close(rundir.lock_run_dir(path))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for given in ("", "of a launcher"):
        monkeypatch.setenv(rundir.CLAIM_ENV, given)
        with pytest.raises(OutputError) as caught:
            rundir.open_run_dir(path, "generate", "dp1_pp1_tp1", resumable=True, resume=resume)
        assert caught.value.exit_code == 73
        assert str(caught.value) == (
            f"run directory {path} belongs to a job evaluate; "
            "give another run_dir, or none for a new one"
        )
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("text", ["", '{"token": "ab', "null", '{"token": "abc"}'])
def test_a_claim_that_names_no_job_leaves_it_to_the_manifest(tmp_path, monkeypatch, text):
    """Power that fails while it is written must not cost the run."""
    monkeypatch.delenv(rundir.CLAIM_ENV, raising=False)
    begin(tmp_path / "run")
    (tmp_path / "run" / rundir.CLAIM).write_text(text)
    opened = rundir.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", resumable=True)
    assert opened.resumed


def test_the_launcher_and_its_ranks(tmp_path, monkeypatch):
    """The launcher opens the directory, and rank 0 with the token of the launcher once more."""
    monkeypatch.delenv(rundir.CLAIM_ENV, raising=False)
    how = {"resumable": True}
    launcher = rundir.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", **how)
    monkeypatch.setenv(rundir.CLAIM_ENV, launcher.token)
    rank = rundir.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", **how)
    assert rank == launcher and not rank.resumed
    os.close(rundir.lock_run_dir(rank.path))
    monkeypatch.delenv(rundir.CLAIM_ENV)
    launcher = rundir.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", **how)
    monkeypatch.setenv(rundir.CLAIM_ENV, launcher.token)
    rank = rundir.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", **how)
    assert rank == launcher and rank.resumed and rank.token != token_in(rank.path)


def test_resume_of_what_was_never_begun(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=r"no claim\.json there"):
            rundir.open_run_dir(path, "generate", "dp1_pp1_tp1", resumable=True, resume=True)
    assert os.listdir(tmp_path) == []
    begin(tmp_path / "run")
    opened = rundir.open_run_dir(
        tmp_path / "run", "generate", "dp1_pp1_tp1", resumable=True, resume=True
    )
    assert opened.resumed


@pytest.mark.fault
def test_a_lock_lasts_until_its_process_dies(tmp_path):
    script = """
import sys, time
from hpcmlx.rundir import lock_run_dir
lock_run_dir(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(OutputError) as caught:
            rundir.lock_run_dir(tmp_path)
        assert caught.value.exit_code == 73
        who = f"in use by pid {holder.pid} on host {socket.gethostname()} since 20"
        assert who in str(caught.value)
        assert json.loads((tmp_path / rundir.LOCK).read_text())["pid"] == holder.pid
        holder.kill()
    fd = rundir.lock_run_dir(tmp_path)
    assert json.loads((tmp_path / rundir.LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / rundir.LOCK).stat().st_mode & 0o777 == 0o600
    with pytest.raises(OutputError, match=f"pid {os.getpid()} "):
        rundir.lock_run_dir(tmp_path)
    # A child of the holder does not inherit it.
    subprocess.run(["true"], check=True, close_fds=False)
    os.close(fd)
    os.close(rundir.lock_run_dir(tmp_path))


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fail(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(rundir.fcntl, "flock", fail)
    with pytest.raises(OutputError, match="cannot lock .*No locks available; set run_dir to"):
        rundir.lock_run_dir(tmp_path)


def test_room_is_checked_before_the_work(tmp_path, small_disk):
    free = rundir.free_bytes(small_disk)
    assert 900_000 < free <= 1 << 20
    assert rundir.free_bytes(small_disk / "not/there/yet") == free
    rundir.check_room(small_disk, free, "the results of 5 rows")
    with pytest.raises(OutputError) as caught:
        rundir.check_room(small_disk / "run", 3 << 30, "the results of 5 rows")
    assert caught.value.exit_code == 73
    assert f"not enough room in {small_disk}/run: the results of 5 rows may need 3.0 GiB, " in str(
        caught.value
    )
    assert "KiB are free" in str(caught.value) or "1.0 MiB are free" in str(caught.value)
