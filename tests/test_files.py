"""Atomic files, logs that only grow, and the log of the program."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmlx import files, log
from hpcmlx.errors import OutputError, StorageError

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
@pytest.mark.fault
def test_what_a_killed_writer_leaves_is_removed(tmp_path):
    """And nothing else that is called nearly so."""
    kept = [".tmp", "a.tmp", ".status.json.tmp", ".a.0123456789ab.tmp.h5", "a.0123456789ab.tmp"]
    (tmp_path / "rows").mkdir()
    for folder in (tmp_path, tmp_path / "rows"):
        code = (
            "import os, sys; from pathlib import Path; from hpcmlx import files\n"
            "with files.atomic_writer(Path(sys.argv[1], 'a.jsonl')) as write:\n"
            "    write('half'); os.kill(os.getpid(), 9)\n"
        )
        subprocess.run([sys.executable, "-c", code, folder], check=False)
        assert len(list(folder.glob(".a.jsonl.*.tmp"))) == 1
        for name in kept:
            (folder / name).touch()
    files.remove_leftovers(tmp_path)
    files.remove_leftovers(tmp_path / "nowhere")
    for folder in (tmp_path, tmp_path / "rows"):
        assert {p.name for p in folder.iterdir() if p.is_file()} == set(kept)


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
