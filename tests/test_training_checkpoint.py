"""Checkpoints: any layout reads what any other saved; which are kept, and where a run goes on."""

from __future__ import annotations

import json
import os
import re
import threading

import h5py
import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.errors import IntegrityError, OutputError
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.checkpoints import hosts, shards
from hpcmlx.training.checkpoints.manifest import MANIFEST
from hpcmlx.training.checkpoints.pieces import Piece, without_copies
from hpcmlx.training.checkpoints.store import CheckpointStore
from tests.checkpoints import (
    LAYOUTS,
    TIMEOUT,
    assert_equal,
    assert_found,
    held,
    on_ranks,
    open_store,
    own,
    save,
    steps_in,
    write_on_hosts,
)

# -- saving and reading --


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_every_layout_reads_what_a_layout_saved(tmp_path, saved):
    def write(world):
        store = CheckpointStore(tmp_path / "run/ck", world)
        mine = without_copies(world, held(saved, world.rank, 40))
        store.save(40, mine, {"data": 4000}, 0.5)
        assert store.poll(wait=True) == 40

    on_ranks(len(saved), write)
    folder = tmp_path / "run/ck/step-00000040"
    assert sorted(os.listdir(folder)) == [
        MANIFEST,
        *(f"shard-{rank:05}.h5" for rank in range(len(saved))),
    ]
    for path in [tmp_path / "run", tmp_path / "run/ck", folder, *folder.iterdir()]:
        assert path.stat().st_mode & 0o077 == 0

    for wanted in LAYOUTS:

        def read(world, wanted=wanted):
            with CheckpointStore(tmp_path / "run/ck", world).find() as found:
                assert_found(found, 40, wanted, world.rank)
                assert found.metric == 0.5

        assert on_ranks(len(wanted), read) == [None] * len(wanted)


def test_a_shard_explains_itself(tmp_path):
    store = open_store(tmp_path)
    array = mx.array([[1.0, 2.0]]).astype(mx.bfloat16)
    store.save(3, {"a/b": Piece(array, (1, 2), Cut(1, ((0, 2),)))}, {})
    store.poll(wait=True)
    with h5py.File(tmp_path / "step-00000003/shard-00000.h5") as file:
        assert file["a/b"].fletcher32 and file["a/b"].dtype == np.uint16
        assert dict(file["a/b"].attrs)["dtype"] == "bfloat16"
        assert file["a/b"].attrs["shape"].tolist() == [1, 2] and file["a/b"].attrs["cut_axis"] == 1
        assert file["a/b"].attrs["cut_intervals"].tolist() == [[0, 2]]
    manifest = json.loads((tmp_path / "step-00000003" / MANIFEST).read_text())["checkpoint"]
    assert manifest["tensors"]["a/b"]["dtype"] == "bfloat16"


def test_a_save_keeps_what_it_was_given(tmp_path, monkeypatch):
    """Arrays that are updated in place while the thread writes; views that are not contiguous."""
    go = threading.Event()
    real = shards.write_hdf5
    monkeypatch.setattr(shards, "write_hdf5", lambda *a: (go.wait(TIMEOUT), real(*a)))
    array, turned = mx.zeros((4, 3)), mx.arange(6).reshape(2, 3).T
    state = {"order": [1, 2]}
    store = open_store(tmp_path)
    store.save(1, {"a": Piece(array, (4, 3)), "t": Piece(turned, (3, 2))}, state)
    array += 1
    array[0] = 7
    mx.eval(array)
    state["order"].append(3)
    assert store.poll() is None  # nothing waits
    go.set()
    assert store.poll(wait=True) == 1 and store.poll(wait=True) is None
    with open_store(tmp_path).find() as found:
        assert found.state == {"order": [1, 2]}
        assert_equal(found.read("a"), mx.zeros((4, 3)))
        assert_equal(found.read("t"), turned)


def test_a_second_save_waits_for_the_first(tmp_path):
    store = open_store(tmp_path)
    for step in (1, 2):
        store.save(step, held((1,), 0, step), {"data": step * 100})
    assert (tmp_path / "step-00000001").is_dir() and store.poll(wait=True) == 2
    with store.find(1) as found:
        assert_found(found, 1)


def test_what_cannot_be_saved_is_refused_on_every_rank(tmp_path):
    def write(world, **changes):
        store = CheckpointStore(tmp_path / "ck", world)
        mine = without_copies(world, held((1, 1), world.rank))
        if world.rank == 1:
            mine |= changes.get("pieces", {})
            for name in changes.get("without", ()):
                del mine[name]
        store.save(1, mine, {"data": changes.get("state", {}).get(world.rank)})

    extra = {"params/norm": Piece(mx.zeros(7), (7,))}
    complex_ = {"c": Piece(mx.zeros(2, mx.complex64), (2,))}
    mx.eval(extra["params/norm"].array, complex_["c"].array)  # a stream is of one thread
    for changes, said in [
        ({"pieces": extra}, r"params/norm \[7\] are held twice, by ranks 0 and 1"),
        ({"without": ["params/q"]}, r"positions 6:12 .* params/q .* no rank"),
        ({"pieces": complex_}, "tensor c: complex64"),
        ({"state": {0: 1, 1: 2}}, "state .* not the same on rank 1"),
    ]:
        errors = on_ranks(2, lambda world, changes=changes: write(world, **changes))
        assert [type(error) for error in errors] == [IntegrityError] * 2
        assert len({str(error) for error in errors}) == 1 and re.search(said, str(errors[0]))
        assert steps_in(tmp_path / "ck") == []


def test_what_is_not_there_is_not_read(tmp_path):
    store = open_store(tmp_path)
    assert store.find() is None and store.find("best") is None
    save(store, 1)
    assert store.find(2) is None and store.find("best") is None
    with store.find(1) as found:
        for name, cut, said in [
            ("params/z", None, "no tensor params/z"),
            ("params/q", Cut(0, ((0, 2), (11, 13))), "positions 0:2, 11:13 of axis 0"),
            ("params/norm", Cut(1, ((0, 1),)), "no axis 1"),
        ]:
            with pytest.raises(IntegrityError, match=said):
                found.read(name, cut)


# -- which are kept, and where a run goes on --


def test_old_ones_go_and_the_best_stays(tmp_path):
    store = open_store(tmp_path)
    for step, metric in enumerate([0.9, 0.2, 0.5, 0.2, 0.7, float("nan"), None]):
        save(store, step, metric)
    assert steps_in(tmp_path) == [3, 5, 6]
    with store.find("best") as found:
        assert_found(found, 3)
    store = open_store(tmp_path, keep_last=1, keep_best=0)
    store.find().close()
    save(store, 8)
    assert steps_in(tmp_path) == [6, 8]


def test_a_step_is_written_once_and_never_before_another(tmp_path):
    store = open_store(tmp_path)
    save(store, 5)
    before = (tmp_path / "step-00000005" / MANIFEST).stat().st_ino
    store.save(5, {}, {})
    assert store.poll(wait=True) is None
    assert (tmp_path / "step-00000005" / MANIFEST).stat().st_ino == before
    with pytest.raises(ValueError, match="step 4 comes before step 5"):
        store.save(4, {}, {})
    with pytest.raises(OutputError, match="checkpoints of another run, step 5"):
        save(open_store(tmp_path), 9)


def test_going_back_leaves_the_later_ones_behind(tmp_path):
    store = open_store(tmp_path, keep_last=9)
    for step in (10, 20, 30, 40):
        save(store, step)
    store = open_store(tmp_path, keep_last=9)
    store.find(20).close()
    store.save(30, {"new": Piece(mx.ones(2), (2,))}, {})
    store.poll(wait=True)
    assert steps_in(tmp_path) == [10, 20, 30]
    with store.find() as found:
        assert set(found.tensors) == {"new"}


# -- hosts without a shared file system: every rank has a directory of its own --


def test_every_host_gets_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(hosts.spread, "__defaults__", (1000,))
    on_ranks(3, lambda world: write_on_hosts(tmp_path, world, (3, 1, 2), 10, 20))
    for host in range(3):
        names = os.listdir(tmp_path / f"host{host}/ck/step-00000020")
        assert sorted(names) == [MANIFEST, f"shard-{host:05}.h5"]

    def read(world):  # four ranks: one more host, which has nothing yet
        with CheckpointStore(own(tmp_path, world), world).find() as found:
            assert_found(found, 20, (1, 1, 1, 1), world.rank)

    assert on_ranks(4, read) == [None] * 4
    for host in range(4):
        folder = tmp_path / f"host{host}/ck/step-00000020"
        assert len(os.listdir(folder)) == 4
        assert steps_in(folder.parent) == ([20] if host == 3 else [10, 20])
