"""Rows are durable when `commit` returns, found again after any end, and never silently others."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import h5py
import pytest

from hpcmlx.comm import Communicator
from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.inference import store
from hpcmlx.inference.rowfiles import decode, encode
from hpcmlx.inference.rows import RowResult, TokenLogprobs
from hpcmlx.inference.store import RowStore, collect, committed_keys, recover
from tests.fixtures import mpirun, run_line

ALONE = Communicator()
TEXTS = ["plain", "", "Grüße, 世界 🌍\n", "a\0b", 'quote " \\ \u2028 end', "half \ud83d", "\r\n\t"]


def row(index: int, sample: int = 0, created: float = 0.0, size: int = 0) -> RowResult:
    logprobs = None
    if index % 3 == 0:
        top = ((7, -0.25), (9, float("-inf")))
        logprobs = tuple(TokenLogprobs(-0.1 * i, top[: i % 3]) for i in range(index % 5))
    return RowResult(
        index,
        f"id-{index}-ä",
        TEXTS[index % len(TEXTS)] + "x" * size,
        tuple(range(index % 5)),
        "stop" if index % 2 else "length",
        10 + index,
        0.1 * index,
        1 / 3 + index,
        sample,
        index % 4,
        created,
        index % 7,
        logprobs,
    )


def fill(directory: Path, rows: list[RowResult], batch: int = 3, rows_per_part: int = 8) -> None:
    """Commit rows and end like a process that was killed: without sealing the last log."""
    recorder = RowStore(directory, 0, rows_per_part=rows_per_part)
    for start in range(0, len(rows), batch):
        recorder.commit(rows[start : start + batch])


def files(directory: Path, suffix: str) -> list[Path]:
    return sorted(directory.glob(f"*{suffix}"))


def test_lines_keep_everything():
    for index in range(40):
        line = encode(row(index, 2, time.time()))
        assert line.count(b"\n") == 1 and encode(decode(line)) == line
        assert decode(line) == row(index, 2, decode(line).created)
        json.loads(line[9:].decode("utf-8", "surrogatepass"))
    with pytest.raises(IntegrityError):
        decode(encode(row(1)).replace(b"stop", b"stoq"))


def test_rows_are_found_in_input_order_from_logs_and_parts(tmp_path):
    rows = [row(i, sample) for i in range(20) for sample in range(2)]
    shuffled = random.Random(0).sample(rows, len(rows))
    fill(tmp_path / "run/rows", shuffled[:25])
    other = RowStore(tmp_path / "run/rows", 1, rows_per_part=5)
    other.commit(shuffled[25:])
    other.close()
    found = recover(tmp_path / "run/rows")
    assert list(found) == rows and len(found) == 40
    assert found.keys() == {r.key for r in rows}
    assert files(tmp_path / "run/rows", ".log") and len(files(tmp_path / "run/rows", ".h5")) == 3
    for path in [tmp_path / "run", tmp_path / "run/rows", *files(tmp_path / "run/rows", "")]:
        assert path.stat().st_mode & 0o077 == 0
    assert list(collect(ALONE, tmp_path / "run/rows", chunk_bytes=1000)) == rows
    assert committed_keys(ALONE, tmp_path / "run/rows") == found.keys()


def test_a_directory_that_is_not_there_has_no_rows(tmp_path):
    assert len(recover(tmp_path / "rows")) == 0 and recover(tmp_path / "rows").keys() == set()
    assert list(collect(ALONE, tmp_path / "rows")) == []
    RowStore(tmp_path / "rows", 0).close()
    assert os.listdir(tmp_path / "rows") == []


def test_a_commit_is_one_write_and_one_flush(tmp_path, monkeypatch):
    calls = []
    for name in ("write", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    recorder = RowStore(tmp_path / "rows", 0)
    recorder.commit([row(0)])
    calls.clear()
    recorder.commit([row(i) for i in range(1, 33)])
    recorder.commit([])
    assert calls == ["write", "fsync"]


def test_a_part_can_be_read_with_h5py(tmp_path):
    rows = [row(i) for i in range(8)]
    fill(tmp_path / "rows", rows, batch=4)
    [part] = files(tmp_path / "rows", ".h5")
    assert not files(tmp_path / "rows", ".log")
    with h5py.File(part) as file:
        offsets, lines = file["offsets"][:], file["lines"][:].tobytes()
        assert file["index"][:].tolist() == list(range(8)) and file["index"].fletcher32
        pairs = zip(offsets, offsets[1:], strict=False)
        assert [decode(lines[start:stop]) for start, stop in pairs] == rows


def test_the_memory_of_reading_is_bounded(tmp_path):
    fill(tmp_path / "rows", [row(i, size=20_000) for i in range(400)], 20, 50)  # 8 MB
    tracemalloc.start()
    num = sum(1 for _ in collect(ALONE, tmp_path / "rows", chunk_bytes=200_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num == 400 and peak < 3_500_000  # a part of 1 MB is read whole, once


# -- what a crash leaves --


@pytest.mark.fault
def test_twenty_kills_at_random_moments_lose_no_committed_row(tmp_path):
    """Every process goes on where the one before was killed."""
    directory, rng = tmp_path / "rows", random.Random(1)
    told: dict[tuple[int, int], bytes] = {}
    for _ in range(20):
        done = recover(directory).keys()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                recorder = RowStore(directory, 0, rows_per_part=7)
                index = 0
                while True:
                    batch = []
                    for _ in range(rng.randint(1, 5)):
                        while (index, 0) in done:
                            index += 1
                        batch.append(row(index, created=time.time(), size=rng.randint(0, 3000)))
                        index += 1
                    recorder.commit(batch)
                    os.write(write, b"".join(map(encode, batch)))
            finally:
                os._exit(1)
        os.close(write)
        timer = threading.Timer(rng.uniform(0.01, 0.12), os.kill, (pid, signal.SIGKILL))
        timer.start()
        with open(read, "rb") as pipe:
            lines = pipe.read().splitlines(keepends=True)
        timer.join()
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        for line in lines:
            if line.endswith(b"\n"):  # else killed while it told
                told[decode(line).key] = line
        found = {r.key: encode(r) for r in recover(directory)}
        assert {key: found.get(key) for key in told} == told
        rng.random()
    assert len(told) > 100
    assert [r.index for r in recover(directory)] == list(range(len(found)))  # none twice


@pytest.mark.fault
def test_a_torn_commit_at_the_end_is_dropped(tmp_path):
    rows = [row(i) for i in range(6)]
    fill(tmp_path / "rows", rows[:3])
    [log] = files(tmp_path / "rows", ".log")
    before = log.stat().st_size
    recorder = RowStore(tmp_path / "all", 0)
    recorder.commit(rows[:3])
    recorder.commit(rows[3:])
    whole = files(tmp_path / "all", ".log")[0].read_bytes()
    for size in range(before, len(whole)):
        log.write_bytes(whole[:size])
        assert list(recover(tmp_path / "rows")) == rows[:3]
    log.write_bytes(whole)
    assert list(recover(tmp_path / "rows")) == rows
    # After a power cut the end may also be there without its content.
    for start in (before, before + 50, len(whole) - 20):
        log.write_bytes(whole[:start] + bytes(len(whole) - start))
        assert list(recover(tmp_path / "rows")) == rows[:3]
    # Whoever goes on starts a new file; the torn end stays out of the way.
    again = RowStore(tmp_path / "rows", 0)
    again.commit([row(i, created=1.0) for i in range(3, 6)])
    assert list(recover(tmp_path / "rows"))[3:] == [row(i, created=1.0) for i in range(3, 6)]


@pytest.mark.fault
def test_a_crash_between_sealing_and_removing_the_log(tmp_path):
    rows = [row(i) for i in range(8)]
    recorder = RowStore(tmp_path / "rows", 0, rows_per_part=100)
    recorder.commit(rows)
    [log] = files(tmp_path / "rows", ".log")
    data = log.read_bytes()
    recorder.close()
    assert not log.exists()
    log.write_bytes(data)
    assert list(recover(tmp_path / "rows")) == rows
    assert list(collect(ALONE, tmp_path / "rows")) == rows


def test_two_results_for_one_row_are_refused(tmp_path):
    fill(tmp_path / "rows", [row(i) for i in range(5)])
    fill(tmp_path / "rows", [row(i) for i in range(3, 6)])
    assert [r.index for r in recover(tmp_path / "rows")] == list(range(6))
    fill(tmp_path / "rows", [row(4, created=1.0)])
    for read in (lambda: recover(tmp_path / "rows"), lambda: collect(ALONE, tmp_path / "rows")):
        with pytest.raises(IntegrityError, match="row 4, sample 0 has two different results"):
            read()


# -- damage --


@pytest.mark.fault
def test_two_hundred_flipped_bits(tmp_path):
    rows = [row(i) for i in range(33)]
    fill(tmp_path / "rows", rows)
    [log] = files(tmp_path / "rows", ".log")
    assert len(files(tmp_path / "rows", ".h5")) == 3
    # The last commit cannot be told from one that was cut off.
    last = log.read_bytes().rindex(b" [[") - 8
    rng, found = random.Random(2), 0
    paths = files(tmp_path / "rows", "")
    for number in range(200):
        path = log if number % 2 else rng.choice(paths[:-1] if paths[-1] == log else paths)
        data = bytearray(path.read_bytes())
        at = rng.randrange(last if path == log else len(data))
        data[at] ^= 1 << rng.randrange(8)
        original = path.read_bytes()
        path.write_bytes(data)
        try:
            assert list(recover(tmp_path / "rows")) == rows
        except IntegrityError as error:
            assert str(path) in str(error)
            found += 1
        path.write_bytes(original)
    assert found == 200
    assert list(recover(tmp_path / "rows")) == rows


def test_damage_is_named_by_file_and_line(tmp_path):
    fill(tmp_path / "rows", [row(i) for i in range(6)])
    [log] = files(tmp_path / "rows", ".log")
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"id-1", b"id-9")
    log.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match=rf"{log.name}, line 3: damaged; restore it"):
        recover(tmp_path / "rows")


def test_a_part_that_is_cut_off_or_empty(tmp_path):
    fill(tmp_path / "rows", [row(i) for i in range(8)], batch=8)
    [part] = files(tmp_path / "rows", ".h5")
    data = part.read_bytes()
    for size in (0, 100, 512, len(data) - 1):
        part.write_bytes(data[:size])
        with pytest.raises(IntegrityError, match=part.name):
            recover(tmp_path / "rows")


def test_damage_after_recovery_is_found_when_the_row_is_read(tmp_path):
    fill(tmp_path / "rows", [row(i) for i in range(11)])
    for path in files(tmp_path / "rows", ""):
        found = recover(tmp_path / "rows")
        data = path.read_bytes()
        path.write_bytes(data.replace(b"id-", b"ID-"))
        with pytest.raises(IntegrityError, match=path.name):
            list(found)
        path.write_bytes(data)


# -- disks --


@pytest.mark.fault
@pytest.mark.parametrize("rows_per_part", [10_000, 20], ids=["at the log", "at a part"])
def test_a_full_disk(tmp_path, rows_per_part):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a full disk cannot be made here: mounting a tmpfs needs Linux and root")
    try:
        recorder = RowStore(disk / "rows", 0, rows_per_part=rows_per_part)
        done: list[RowResult] = []
        with pytest.raises(StorageError, match=rf"no room for {disk}/rows/rank0.*free some") as one:
            while True:
                batch = [row(i, size=3000) for i in range(len(done), len(done) + 5)]
                recorder.commit(batch)
                done += batch
        assert one.value.exit_code == 74 and len(done) > 100
        found = list(recover(disk / "rows"))
        # Rows that were stored count, although their log could not be sealed.
        assert found == done or (rows_per_part == 20 and found == done + batch)
        assert not [name for name in os.listdir(disk / "rows") if name.endswith(".tmp")]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)  # the log is open


@pytest.mark.fault
def test_a_failed_flush_fails_the_commit_and_every_later_one(tmp_path, monkeypatch):
    recorder = RowStore(tmp_path / "rows", 0)
    recorder.commit([row(0)])
    [log] = files(tmp_path / "rows", ".log")

    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match=rf"writing {log} .*Input/output error"):
            recorder.commit([row(1)])
    with pytest.raises(StorageError):
        recorder.commit([row(2)])
    assert list(recover(tmp_path / "rows")) == [row(0)]


def test_a_failed_flush_of_a_part_leaves_the_log(tmp_path, monkeypatch):
    recorder = RowStore(tmp_path / "rows", 0)
    recorder.commit([row(0)])

    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=r"\.h5"):
        recorder.close()
    assert list(recover(tmp_path / "rows")) == [row(0)]
    assert len(os.listdir(tmp_path / "rows")) == 1


# -- several ranks --


class ThreadWorld:
    """Ranks that are threads; what they exchange is pickled, as MPI does, and counted."""

    def __init__(self, rank: int, size: int, shared: dict):
        self.rank, self.size, self._shared = rank, size, shared

    def allgather(self, value):
        data = pickle.dumps(value)
        self._shared[self.rank] = data
        self._shared["barrier"].wait(20)
        everything = [pickle.loads(self._shared[r]) for r in range(self.size)]
        self._shared["barrier"].wait(20)
        return everything

    def gather(self, value):
        if self.rank:
            size = len(pickle.dumps(value))
            self._shared["most"] = max(self._shared["most"], size)
        everything = self.allgather(value)
        return everything if self.rank == 0 else None

    def bcast(self, value):
        return self.allgather(value)[0]


def on_ranks(size: int, function) -> tuple[list, int]:
    """What `function(world)` gives on each rank, and the largest message to rank 0 in bytes."""
    shared = {"barrier": threading.Barrier(size), "most": 0}
    results: list = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadWorld(rank, size, shared))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[rank] = error
            shared["barrier"].abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results, shared["most"]


@pytest.mark.parametrize("hosts", [(0, 0, 0), (0, 1, 2), (0, 0, 1), (0, 1, 1)], ids=str)
def test_rows_of_all_hosts_come_once_and_in_order(tmp_path, hosts):
    """Ranks of one host see the same directory."""
    rows = [row(i, sample, size=400) for i in range(60) for sample in range(i % 3)]
    shuffled = random.Random(3).sample(rows, len(rows))
    for rank, host in enumerate(hosts):
        recorder = RowStore(tmp_path / f"host{host}/rows", rank, rows_per_part=7)
        for start in range(rank, len(rows), len(hosts)):
            recorder.commit([shuffled[start]])
        if rank != 2:
            recorder.close()

    def directory(world):
        return tmp_path / f"host{hosts[world.rank]}/rows"

    results, most = on_ranks(3, lambda w: list(collect(w, directory(w), chunk_bytes=3000)))
    assert results == [rows, [], []]
    # The table of what a rank has, or a chunk of rows; rank 0 reads itself what it sees.
    assert most < (6000 if set(hosts) != {0} else 700)
    keys, _ = on_ranks(3, lambda w: committed_keys(w, directory(w)))
    assert keys == [{r.key for r in rows}, None, None]


def test_a_row_that_two_hosts_have_is_one_row(tmp_path):
    """As after copying a run directory to another host."""
    fill(tmp_path / "host0/rows", [row(i) for i in range(10)])
    shutil.copytree(tmp_path / "host0/rows", tmp_path / "host1/rows")
    fill(tmp_path / "host1/rows", [row(i) for i in range(8, 14)])

    def read(world):
        return list(collect(world, tmp_path / f"host{world.rank}/rows", chunk_bytes=500))

    results, _ = on_ranks(2, read)
    assert results == [[row(i) for i in range(14)], []]
    fill(tmp_path / "host1/rows", [row(2, created=1.0)])
    results, _ = on_ranks(2, read)
    assert isinstance(results[0], IntegrityError) and "rank 1's host" in str(results[0])


def test_a_log_that_was_sealed_while_the_listing_was_old(tmp_path, monkeypatch):
    fill(tmp_path / "rows", [row(i) for i in range(8)])
    [part] = files(tmp_path / "rows", ".h5")
    stale = [(part.with_suffix(".log").name, 1), (part.name, part.stat().st_size)]
    monkeypatch.setattr(store, "_listing", lambda directory: stale)
    assert len(recover(tmp_path / "rows")) == 8
    monkeypatch.setattr(store, "_listing", lambda directory: stale[:1])
    with pytest.raises(StorageError, match="No such file"):
        recover(tmp_path / "rows")


_SCRIPT = """
import sys
from pathlib import Path
from hpcmlx import comm
from hpcmlx.inference.rows import RowResult
from hpcmlx.inference.store import RowStore, collect, committed_keys
world = comm.init()
rows = [RowResult(i, str(i), "text", (1, 2, i), "stop", 3, 0.5, 1.0) for i in range(40)]
for place in ("shared", f"host{world.rank}"):
    directory = Path(sys.argv[1], place, "rows")
    recorder = RowStore(directory, world.rank, rows_per_part=8)
    for start in range(world.rank, 40, 10):
        recorder.commit(rows[start : start + 10 : world.size])
    recorder.close()
    world.barrier()
    keys = committed_keys(world, directory)
    found = list(collect(world, directory, chunk_bytes=1000))
    assert found == (rows if world.rank == 0 else [])
    assert keys == ({(i, 0) for i in range(40)} if world.rank == 0 else None)
print("fine", flush=True)
comm.finalize(0)
"""


def test_over_mpi(tmp_path):
    line = [*mpirun("-n", "2"), sys.executable, "-c", _SCRIPT, str(tmp_path)]
    outcome = run_line(line)
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == ["fine", "fine"]
