"""Atomic files, run directories that belong to one launch, and the log."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmlx import files, log
from hpcmlx.errors import ConfigError, OutputError, StorageError

ROOT_USER = os.geteuid() == 0


@pytest.fixture
def file_size_limit():
    """No file may grow beyond 64 KiB: what a full disk or a quota looks like from inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    if not ROOT_USER:
        pytest.skip("mounting a 1 MiB file system needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path])
    if done.returncode:
        pytest.skip("this container may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_atomic(path, "first, and longer")
    files.write_atomic(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    files.write_atomic(path, memoryview(np.arange(3, dtype=np.int32)))
    assert path.read_bytes() == np.arange(3, dtype=np.int32).tobytes()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_symbolic_link_is_replaced_not_followed(tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("kept")
    (tmp_path / "out").symlink_to(target)
    files.write_atomic(tmp_path / "out", "new")
    assert target.read_text() == "kept" and (tmp_path / "out").read_text() == "new"


@pytest.mark.fault
def test_a_write_that_does_not_fit_leaves_the_old_file(tmp_path, file_size_limit):
    path = tmp_path / "a.bin"
    files.write_atomic(path, b"old")
    with pytest.raises(StorageError) as caught:
        files.write_atomic(path, bytes(100_000))
    assert str(path) in str(caught.value) and "100000 bytes" in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.fault
def test_a_full_disk_leaves_the_old_file(small_disk):
    path = small_disk / "a.h5"
    files.write_hdf5(path, lambda file: file.create_dataset("x", data=np.arange(10)))
    with pytest.raises(StorageError, match="No space left"):
        files.write_hdf5(path, lambda file: file.create_dataset("x", data=np.zeros(1 << 20)))
    with h5py.File(path) as file:
        assert file["x"][:].tolist() == list(range(10))
    assert os.listdir(small_disk) == ["a.h5"]


@pytest.mark.fault
def test_a_failed_fsync_is_a_failed_save(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(5, "Input/output error")

    path = tmp_path / "a"
    files.write_atomic(path, "old")
    monkeypatch.setattr(files, "flush", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_what_cannot_be_created_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="absent"):
        files.write_atomic(tmp_path / "absent" / "a", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Not a directory|File exists"):
        files.open_run_dir(tmp_path / "file" / "run", "generate", "dp1_pp1_tp1")
    with pytest.raises(OutputError, match="File exists"):
        files.open_run_dir(None, "generate", "dp1_pp1_tp1", root=tmp_path / "file")


@pytest.mark.skipif(ROOT_USER, reason="root may write anywhere")
def test_a_read_only_directory_is_an_output_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        files.write_atomic(tmp_path / "a", "x")


def test_hdf5_finds_a_flipped_bit(tmp_path):
    path = tmp_path / "a.h5"
    data = np.arange(1000)
    files.write_hdf5(path, lambda file: file.create_dataset("x", data=data, fletcher32=True))
    image = bytearray(path.read_bytes())
    where = image.index(data[500:504].tobytes())
    image[where] ^= 1
    path.write_bytes(image)
    with h5py.File(path) as file, pytest.raises(OSError):
        file["x"][:]


def test_eight_launches_in_one_second_get_eight_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    start = threading.Barrier(8)

    def launch(_):
        start.wait()
        return files.open_run_dir(None, "generate", "dp1_pp2_tp1", root=tmp_path).path

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(launch, range(8)))
    assert len(set(made)) == 8
    assert all(p.name.startswith("20260101-000000-generate-dp1_pp2_tp1") for p in made)
    assert all(p.is_absolute() and p.stat().st_mode & 0o777 == 0o700 for p in made)


def test_a_directory_belongs_to_one_launch(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "run"
    assert files.open_run_dir(str(path), "generate", "dp1_pp1_tp1").path == path
    with pytest.raises(OutputError, match="is not empty; give another run_dir"):
        files.open_run_dir(path, "generate", "dp1_pp1_tp1")
    # The ranks of the launch that claimed it may claim it again; those of another may not.
    monkeypatch.setenv(files.CLAIM_ENV, "of another launch")
    with pytest.raises(OutputError):
        files.open_run_dir(path, "generate", "dp1_pp1_tp1")
    monkeypatch.setenv(files.CLAIM_ENV, files._token(path))
    assert files.open_run_dir(path, "generate", "dp1_pp1_tp1").path == path
    (path / "results.jsonl").write_text("")
    with pytest.raises(OutputError):
        files.open_run_dir(path, "generate", "dp1_pp1_tp1")


def test_two_claims_at_once_have_one_winner(tmp_path):
    start = threading.Barrier(8)

    def attempt(_):
        start.wait()
        try:
            return files.claim(tmp_path)
        except OutputError:
            return None

    with ThreadPoolExecutor(8) as pool:
        tokens = [token for token in pool.map(attempt, range(8)) if token]
    assert tokens == [files._token(tmp_path)]


@pytest.mark.fault
@pytest.mark.parametrize("size", [200_000, 3_000_000])
def test_hdf5_on_a_full_disk_ends_as_an_error(small_disk, size):
    """libhdf5 itself would crash the interpreter, at once or when the file is closed."""

    def fill(file: h5py.File) -> None:
        column = file.create_dataset("x", (0,), "i4", maxshape=(None,), chunks=(1000,))
        for start in range(0, size, 1000):
            column.resize((start + 1000,))
            column[start:] = np.arange(1000)
            file.attrs[f"{start}"] = "text" * 100

    (small_disk / "other").write_bytes(bytes(600_000))
    with pytest.raises(StorageError, match=r"no room for .*a\.h5 \(\d+ bytes\)"):
        files.write_hdf5(small_disk / "a.h5", fill)
    assert os.listdir(small_disk) == ["other"]


def test_hdf5_as_h5py_writes_it_itself(tmp_path):
    def fill(file: h5py.File) -> None:
        file["x"] = np.arange(100_000)
        file.create_dataset("s", data=["a", "ü"] * 500, dtype=h5py.string_dtype())
        file["x"][::2] = 0
        assert file["x"][50_001] == 50_001  # read back while it is written

    files.write_hdf5(tmp_path / "a.h5", fill)
    with h5py.File(tmp_path / "b.h5", "w", libver="latest") as file:
        fill(file)
    with h5py.File(tmp_path / "a.h5") as one, h5py.File(tmp_path / "b.h5") as other:
        assert (one["x"][:] == other["x"][:]).all()
        assert one["s"].asstr()[:].tolist() == other["s"].asstr()[:].tolist()


def test_a_file_in_pieces_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "a"
    with files.atomic_writer(path) as write:
        write("zwölf\n")
        write(b"end")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "zwölf\nend"
    with pytest.raises(OSError, match="mine"), files.atomic_writer(path) as write:  # as it was
        write("other")
        raise OSError("mine")
    assert path.read_bytes().endswith(b"end") and os.listdir(tmp_path) == ["a"]


@pytest.mark.fault
def test_a_log_takes_nothing_after_a_failure(tmp_path, file_size_limit):
    log = files.DurableLog(tmp_path / "a.log")
    log.append(b"x" * 60_000)
    with pytest.raises(StorageError, match=r"no room for .*a\.log \(60000 bytes\)"):
        log.append(b"y" * 60_000)
    assert (tmp_path / "a.log").read_bytes() == b"x" * 60_000 and log.size == 60_000
    for use in (lambda: log.append(b"z"), log.remove):
        with pytest.raises(StorageError, match=r"a\.log"):
            use()
    with pytest.raises(OutputError, match="File exists"):
        files.DurableLog(tmp_path / "a.log")


# -- run directories that are entered again --


def begin(path: Path) -> files.RunDir:
    """A first launch, up to its lock."""
    opened = files.open_run_dir(path, "generate", "dp1_pp1_tp1", resumable=True)
    os.close(files.lock_run_dir(path))
    return opened


def test_a_run_that_was_begun_is_entered_again(tmp_path, monkeypatch):
    monkeypatch.delenv(files.CLAIM_ENV, raising=False)
    first = begin(tmp_path / "run")
    assert not first.resumed and first.path == tmp_path / "run"
    assert first.token == files._token(first.path)
    again = files.open_run_dir(tmp_path / "run", "generate", "dp2_pp1_tp1", resumable=True)
    assert again.resumed and again.path == first.path and again.token != first.token
    # A job that cannot go on with it is refused, as is a directory of something else.
    with pytest.raises(OutputError, match="is not empty"):
        files.open_run_dir(tmp_path / "run", "evaluate", "dp1_pp1_tp1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    with pytest.raises(OutputError, match="is not empty"):
        files.open_run_dir(tmp_path / "other", "generate", "dp1_pp1_tp1", resumable=True)


def test_the_launcher_and_its_ranks(tmp_path, monkeypatch):
    """The launcher opens the directory, and rank 0 with the token of the launcher once more."""
    monkeypatch.delenv(files.CLAIM_ENV, raising=False)
    how = {"resumable": True}
    launcher = files.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", **how)
    monkeypatch.setenv(files.CLAIM_ENV, launcher.token)
    rank = files.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", **how)
    assert rank == launcher and not rank.resumed
    os.close(files.lock_run_dir(rank.path))
    monkeypatch.delenv(files.CLAIM_ENV)
    launcher = files.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", **how)
    monkeypatch.setenv(files.CLAIM_ENV, launcher.token)
    rank = files.open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", **how)
    assert rank == launcher and rank.resumed and rank.token != files._token(rank.path)


def test_resume_of_what_was_never_begun(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=r"no claim\.json there"):
            files.open_run_dir(path, "generate", "dp1_pp1_tp1", resumable=True, resume=True)
    assert os.listdir(tmp_path) == []
    begin(tmp_path / "run")
    opened = files.open_run_dir(
        tmp_path / "run", "generate", "dp1_pp1_tp1", resumable=True, resume=True
    )
    assert opened.resumed


@pytest.mark.fault
def test_a_lock_lasts_until_its_process_dies(tmp_path):
    script = """
import sys, time
from hpcmlx.files import lock_run_dir
lock_run_dir(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(OutputError) as caught:
            files.lock_run_dir(tmp_path)
        assert caught.value.exit_code == 73
        who = f"in use by pid {holder.pid} on host {socket.gethostname()} since 20"
        assert who in str(caught.value)
        assert json.loads((tmp_path / files.LOCK).read_text())["pid"] == holder.pid
        holder.kill()
    fd = files.lock_run_dir(tmp_path)
    assert json.loads((tmp_path / files.LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / files.LOCK).stat().st_mode & 0o777 == 0o600
    with pytest.raises(OutputError, match=f"pid {os.getpid()} "):
        files.lock_run_dir(tmp_path)
    # A child of the holder does not inherit it.
    subprocess.run(["true"], check=True, close_fds=False)
    os.close(fd)
    os.close(files.lock_run_dir(tmp_path))


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fail(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", fail)
    with pytest.raises(OutputError, match="cannot lock .*No locks available; set run_dir to"):
        files.lock_run_dir(tmp_path)


def test_room_is_checked_before_the_work(tmp_path, small_disk):
    free = files.free_bytes(small_disk)
    assert 900_000 < free <= 1 << 20
    assert files.free_bytes(small_disk / "not/there/yet") == free
    files.check_room(small_disk, free, "the results of 5 rows")
    with pytest.raises(OutputError) as caught:
        files.check_room(small_disk / "run", 3 << 30, "the results of 5 rows")
    assert caught.value.exit_code == 73
    assert f"not enough room in {small_disk}/run: the results of 5 rows may need 3.0 GiB, " in str(
        caught.value
    )
    assert "KiB are free" in str(caught.value) or "1.0 MiB are free" in str(caught.value)


@pytest.fixture
def logger_of(tmp_path, capsys):
    yield lambda rank: log.setup(rank, "node7", tmp_path)
    log.close()


def test_rank_0_speaks_and_the_others_only_warn(tmp_path, logger_of, capsys):
    logger_of(0).info("loaded %d layers", 30)
    logger_of(3).info("not on the console")
    logging.getLogger("hpcmlx.comm").warning("slow\nlink")
    log.close()
    console = capsys.readouterr().err.splitlines()
    assert len(console) == 2
    assert console[0].endswith("INFO loaded 30 layers")
    assert console[1].endswith("WARNING rank 3 node7 slow link")
    assert "rank 0 node7 loaded 30 layers" in (tmp_path / "logs/rank0.log").read_text()
    own = (tmp_path / "logs/rank3.log").read_text().splitlines()
    assert len(own) == 2 and "rank 3 node7 not on the console" in own[0]


def test_a_second_setup_replaces_the_first(tmp_path, logger_of, capsys):
    logger_of(0)
    logger_of(0).info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert Path(tmp_path, "logs/rank0.log").read_text().count("once") == 1
