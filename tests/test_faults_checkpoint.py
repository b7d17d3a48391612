"""No damage to a checkpoint is silent, and no end of a save loses one."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from hashlib import sha256
from pathlib import Path

import h5py
import mlx.core as mx
import numpy as np
import pytest

from hpcmlx import files
from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.training.checkpoints import hosts, shards
from hpcmlx.training.checkpoints.manifest import MANIFEST
from hpcmlx.training.checkpoints.pieces import Piece
from hpcmlx.training.checkpoints.store import CheckpointStore
from tests.checkpoints import (
    assert_found,
    held,
    on_ranks,
    open_store,
    own,
    save,
    steps_in,
    write_on_hosts,
)
from tests.fixtures import ROOT, mpirun, run_line, small_disk

# -- damage --


@pytest.mark.fault
def test_two_hundred_damages_and_none_is_silent(tmp_path):
    store = open_store(tmp_path)
    for step in (10, 20):
        save(store, step)
    newest, rng = tmp_path / "step-00000020", random.Random(0)
    for number in range(200):
        path = newest / ("shard-00000.h5" if number % 3 else MANIFEST)
        good = path.read_bytes()
        if number % 10 == 0:
            path.write_bytes(good[: rng.randrange(len(good))])
        else:
            bad = bytearray(good)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
        with pytest.raises(IntegrityError, match=re.escape(str(path))):
            store.find()
        if number % 20 == 0:
            with store.find(skip_damaged=True) as found:
                assert_found(found, 10)
                assert str(path) in found.skipped[0]
        path.write_bytes(good)
    with store.find() as found:
        assert_found(found, 20)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["shard-00000.h5", MANIFEST])
def test_a_missing_file_is_named(tmp_path, name):
    store = open_store(tmp_path)
    for step in (10, 20):
        save(store, step, metric=1.0 / step)
    (tmp_path / "step-00000020" / name).unlink()
    for which in (None, 20, "best"):
        with pytest.raises(IntegrityError, match=f"step-00000020/{name}"):
            store.find(which)
    (tmp_path / "step-00000010" / name).unlink()
    with pytest.raises(IntegrityError, match="no checkpoint is whole: .*20.*; .*10"):
        store.find(skip_damaged=True)


@pytest.mark.fault
def test_going_on_past_a_damaged_one(tmp_path):
    store = open_store(tmp_path)
    for step in (10, 20):
        save(store, step)
    os.truncate(tmp_path / "step-00000020/shard-00000.h5", 100)
    store.find(skip_damaged=True).close()
    save(store, 20)
    assert steps_in(tmp_path) == [10, 20]
    with store.find() as found:
        assert_found(found, 20)


@pytest.mark.fault
@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"shard": "shard-00000.h5"', '"shard": "../../x.h5"', "no name of a shard"),
        ('"dtype": "uint64"', '"dtype": "pickle"', "no dtype pickle"),
        ("[[0, 12]]", "[[0, 11]]", "positions 11:12"),
        ('"metric"', '"other"', "cannot be understood"),
        ('"format": 1', '"format": 2', "another version"),
    ],
)
def test_a_manifest_that_was_made_up_is_refused(tmp_path, old, new, said):
    store = open_store(tmp_path)
    save(store, 10)
    path = tmp_path / "step-00000010" / MANIFEST
    body = path.read_text().partition("\n")[2]
    assert old in body
    body = body.replace(old, new)
    path.write_text(f'{{"sha256": "{sha256(body.encode()).hexdigest()}",\n{body}')
    with pytest.raises(IntegrityError, match=said):
        store.find()


@pytest.mark.fault
def test_damage_after_it_was_found_is_seen_when_it_is_read(tmp_path):
    store = open_store(tmp_path)
    save(store, 10)
    path = tmp_path / "step-00000010/shard-00000.h5"
    with h5py.File(path) as file:
        chunk = file["params/q"].id.get_chunk_info(0)
    with store.find() as found:
        with path.open("r+b") as file:
            file.seek(chunk.byte_offset + 3)
            file.write(b"\xff")
        with pytest.raises(IntegrityError, match="shard-00000.h5: params/q"):
            found.read("params/q")


# -- a save that fails --


@pytest.mark.fault
def test_a_full_disk_fails_the_save_and_nothing_else(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        store = open_store(disk.path / "ck")
        save(store, 10)
        big = mx.random.normal((600, 1000))
        store.save(20, {"big": Piece(big, big.shape)}, {})
        with pytest.raises(StorageError, match="no room for .*step-00000020.tmp/shard-00000.h5"):
            store.poll(wait=True)
        assert steps_in(disk.path / "ck") == [10]
        save(store, 21)
        with open_store(disk.path / "ck").find() as found:
            assert_found(found, 21)


@pytest.mark.fault
@pytest.mark.parametrize("when", [1, 2])  # the shard, the manifest
def test_a_failed_flush_fails_the_save(tmp_path, monkeypatch, when):
    store = open_store(tmp_path)
    save(store, 10)
    calls = []

    def fail(fd: int) -> None:
        calls.append(fd)
        if len(calls) == when:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    store.save(20, held((1,), 0, 20), {}) if when > 1 else None
    monkeypatch.setattr(files, "flush", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        store.save(20, held((1,), 0, 20), {}) if when == 1 else None
        store.poll(wait=True)
    monkeypatch.undo()
    assert steps_in(tmp_path) == [10]


@pytest.mark.fault
@pytest.mark.parametrize("what", ["a bit", "a number"])
def test_a_disk_that_keeps_something_else_is_noticed_before_the_commit(tmp_path, monkeypatch, what):
    def flip(path: Path) -> None:
        if what == "a number":  # with the right checksum
            with h5py.File(path, "r+") as file:
                file["a"][2] = 124.0
            return
        data = bytearray(path.read_bytes())
        data[data.index(np.float32(123.0).tobytes())] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(shards, "_forget", flip)
    store = open_store(tmp_path)
    store.save(1, {"a": Piece(mx.full((5,), 123.0), (5,))}, {})
    with pytest.raises(StorageError, match="shard-00000.h5 is not what was written"):
        store.poll(wait=True)
    assert steps_in(tmp_path) == []


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["missing", "flipped", "manifest"])
def test_all_ranks_agree_on_what_one_host_has_lost(tmp_path, damage):
    on_ranks(2, lambda world: write_on_hosts(tmp_path, world, (1, 1), 10, 20))
    path = (
        tmp_path
        / "host1/ck/step-00000020"
        / (MANIFEST if damage == "manifest" else "shard-00001.h5")
    )
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)

    errors = on_ranks(2, lambda world: CheckpointStore(own(tmp_path, world), world).find())
    assert [type(error) for error in errors] == [IntegrityError] * 2
    assert len({str(error) for error in errors}) == 1
    assert path.name in str(errors[0]) and "rank 1 on " in str(errors[0])

    def older(world):
        with CheckpointStore(own(tmp_path, world), world).find(skip_damaged=True) as found:
            assert_found(found, 10, (1, 1), world.rank)

    assert on_ranks(2, older) == [None, None]


@pytest.mark.fault
def test_a_host_that_cannot_write_fails_the_save_everywhere(tmp_path, monkeypatch):
    real = files.flush

    def fail(fd: int) -> None:
        if "host1/ck/step-00000030.tmp" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(files, "flush", fail)
    errors = on_ranks(2, lambda world: write_on_hosts(tmp_path, world, (1, 1), 10, 30))
    assert [type(error) for error in errors] == [StorageError] * 2
    assert "host1/ck/step-00000030.tmp" in str(errors[1]) and "rank 1 on " in str(errors[1])
    assert steps_in(tmp_path / "host0/ck") == steps_in(tmp_path / "host1/ck") == [10]


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["no room", "damaged on its way"])
def test_a_host_that_does_not_get_what_it_lacks(tmp_path, monkeypatch, fault):
    """It still takes part in what the others send each other."""
    on_ranks(3, lambda world: write_on_hosts(tmp_path, world, (1, 1, 1), 10))
    lost = tmp_path / "host2/ck/step-00000010"
    shutil.move(lost / "shard-00002.h5", tmp_path / "host0/ck/step-00000010")
    shutil.rmtree(lost)
    real_write, real_chunks = hosts.atomic_writer, hosts._chunks

    def write(path: Path):
        if "host2" in str(path):
            raise StorageError(f"no room for {path}")
        return real_write(path)

    def chunks(path: Path, size: int):
        for chunk in real_chunks(path, size):
            yield chunk[:-1] + bytes([chunk[-1] ^ 1])

    if fault == "no room":
        monkeypatch.setattr(hosts, "atomic_writer", write)
    else:
        monkeypatch.setattr(hosts, "_chunks", chunks)
    errors = on_ranks(3, lambda world: CheckpointStore(own(tmp_path, world), world).find())
    assert [type(error) for error in errors] == [StorageError] * 3
    assert all(re.search("no room|came damaged", str(error)) for error in errors)
    assert steps_in(tmp_path / "host2/ck") == []
    monkeypatch.undo()

    def read(world):
        with CheckpointStore(own(tmp_path, world), world).find() as found:
            assert_found(found, 10, (1, 1, 1), world.rank)

    assert on_ranks(3, read) == [None] * 3


@pytest.mark.fault
@pytest.mark.parametrize("state", ["none", "one", "dying", "half-fetched"])
def test_hosts_that_were_cut_off_at_different_moments(tmp_path, state):
    on_ranks(2, lambda world: write_on_hosts(tmp_path, world, (1, 1), 10, 20))
    one, two = (tmp_path / f"host{host}/ck" for host in range(2))
    if state in ("none", "one"):  # all had prepared, and none or one renamed
        (two / "step-00000020").rename(two / "step-00000020.tmp")
    if state == "none":
        (one / "step-00000020").rename(one / "step-00000020.tmp")
    if state == "dying":
        (two / "step-00000020").rename(two / "step-00000020.del")
        (two / "step-00000020.del/shard-00001.h5").unlink()
    if state == "half-fetched":  # what has come is no checkpoint yet
        on_ranks(2, lambda world: CheckpointStore(own(tmp_path, world), world).find().close())
        (two / "step-00000020").rename(two / "step-00000020.tmp")
        (two / "step-00000020.tmp" / MANIFEST).unlink()
    expected = 20 if state in ("one", "half-fetched") else 10

    def read(world):
        with CheckpointStore(own(tmp_path, world), world).find() as found:
            assert_found(found, expected, (1, 1), world.rank)

    assert on_ranks(2, read) == [None, None]
    assert steps_in(one) == steps_in(two) == [10, 20][: 2 if expected == 20 else 1]


# -- kills --

PRELUDE = """
    import os, shutil, signal, sys
    from pathlib import Path
    from tests.checkpoints import *
    directory = Path(sys.argv[1])
"""


def start_child(script: str, directory: Path) -> subprocess.Popen:
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.fault
def test_a_kill_before_every_single_step_of_the_protocol(tmp_path):
    """Every call that changes the disk, of a save that commits, deletes one older checkpoint and
    leaves two: killed before each of them, in turn; of the shard's writes before some."""
    child = start_child(
        """
        CALLS = "mkdir open pwrite write ftruncate fsync rename unlink rmdir".split()

        def in_child(work):
            pid = os.fork()  # before MLX has started threads
            if pid == 0:
                work()
                os._exit(0)
            return os.waitpid(pid, 0)[1]

        def begin():
            store = open_store(directory / "base", keep_best=0)
            for step in (10, 20):
                save(store, step)

        def strike_at(moment):
            left, writes = [moment], [0]
            def counted(name, real):
                def call(*args, **how):
                    writes[0] += name == "pwrite"
                    if name != "pwrite" or writes[0] % 7 == 0:
                        left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **how)
                return call
            for name in CALLS:
                setattr(os, name, counted(name, getattr(os, name)))

        def go_on(path, moment):
            store = open_store(path, keep_best=0)
            store.find().close()
            strike_at(moment)
            save(store, 30)

        assert in_child(begin) == 0
        for moment in range(1000):
            path = directory / str(moment)
            shutil.copytree(directory / "base", path)
            status = in_child(lambda: go_on(path, moment))
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, status
        print(moment, flush=True)
        """,
        tmp_path,
    )
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    newest = []
    for moment in range(int(out) + 1):
        path = tmp_path / str(moment)
        with open_store(path).find() as found:
            assert_found(found, found.step)
            newest.append(found.step)
        left = steps_in(path)
        assert left[-1] == newest[-1] and len(left) >= 2
        for step in left:  # none is half deleted
            open_store(path).find(step).close()
    assert newest == sorted(newest) and set(newest) == {20, 30}
    assert newest.count(20) > 15 and newest.count(30) > 5


_SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from hpcmlx import comm
from hpcmlx.training.checkpoints.commit import StepStore
from tests.checkpoints import *
world, kill = comm.init(), sys.argv[2] == "kill"
store = CheckpointStore(own(Path(sys.argv[1]), world), world)
found = store.find()
if found is not None:
    assert_found(found, 20, (1, 1), world.rank)
if kill and world.rank == 1:
    real = StepStore.publish
    def publish(steps, step):
        if step == 20:  # rank 0 gets through meanwhile
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        real(steps, step)
    StepStore.publish = publish
for step in (10, 20, 30)[2 * (not kill):]:
    pieces = without_copies(world, held((1, 1), world.rank, step))
    store.save(step, pieces, {"data": step * 100})
    store.poll(wait=True)
print("fine", flush=True)
comm.finalize(0)
"""


@pytest.mark.fault
def test_a_rank_that_is_killed_while_another_host_commits(tmp_path):
    line = [*mpirun("-n", "2"), sys.executable, "-c", _SCRIPT, str(tmp_path)]
    assert run_line([*line, "kill"], PYTHONPATH=str(ROOT)).code != 0
    assert (tmp_path / "host0/ck/step-00000020").is_dir()
    assert (tmp_path / "host1/ck/step-00000020.tmp").is_dir()
    outcome = run_line([*line, "go on"], PYTHONPATH=str(ROOT))
    assert outcome.out.split() == ["fine", "fine"], outcome.err
    for host in range(2):
        assert steps_in(tmp_path / f"host{host}/ck") == [20, 30]


@pytest.mark.fault
def test_at_every_instant_there_is_one(tmp_path):
    """Fifty pictures of the directory of a run that saves all the time."""
    child = start_child(
        """
        store = open_store(directory / "ck", keep_last=1, keep_best=1)
        save(store, 1)
        print("saved", flush=True)
        for step in range(2, 1000000):
            save(store, step, metric=1 / (step % 7 + 1))
        """,
        tmp_path,
    )
    try:
        assert child.stdout.readline() == "saved\n"
        rng, found_steps = random.Random(2), []
        for number in range(50):
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child.pid, signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)
            shutil.copytree(tmp_path / "ck", tmp_path / str(number))
            os.kill(child.pid, signal.SIGCONT)
            with open_store(tmp_path / str(number)).find() as found:
                assert_found(found, found.step)
                found_steps.append(found.step)
        assert found_steps == sorted(found_steps) and len(set(found_steps)) > 10
    finally:
        child.kill()
        child.communicate()
