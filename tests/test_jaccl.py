"""JACCL's device matrix, environment and start, against a stand-in of MLX: no hardware here."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest

from hpcmlx import jaccl
from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError
from hpcmlx.jaccl import Member, boot, choose, device_matrix, is_mesh, is_ring, obstacle
from hpcmlx.probes.thunderbolt import Port, Rdma
from tests.fixtures import assert_refused, run
from tests.fixtures import model as model
from tests.test_probes import ports_of


class Ranks(Communicator):
    """A group whose ranks are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: dict):
        super().__init__(rank, size)
        object.__setattr__(self, "_barrier", barrier)
        object.__setattr__(self, "_table", table)

    def allgather(self, value: Any) -> list:
        self._table[self.rank] = value
        self._barrier.wait(5)
        values = [self._table[rank] for rank in range(self.size)]
        self._barrier.wait(5)
        return values


def on_ranks(size: int, work) -> list:
    """`work(group)` on every rank; what each returned or raised."""
    barrier, table, results = threading.Barrier(size), {}, [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Ranks(rank, size, barrier, table))
        except ConfigError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return results


def port(interface: str, domain: str, peer: str | None, gbits: int = 80, through: str = "") -> Port:
    return Port(interface, interface, domain, peer, through, gbits, peer is not None)


def member(host: str, *ports: Port) -> Member:
    devices = tuple(f"rdma_{p.interface}" for p in ports)
    return Member(host, (26, 2), True, Rdma(True, devices), ports)


def mesh(size: int) -> list[Member]:
    """Hosts that are all cabled to each other, each with its own names of interfaces."""
    return [
        member(
            f"mac{i}",
            *(port(f"en{10 * i + j}", f"{i}-{j}", f"{j}-{i}") for j in range(size) if j != i),
        )
        for i in range(size)
    ]


def ring(size: int) -> list[Member]:
    return [
        member(
            f"mac{i}",
            port("en1", f"{i}-{(i + 1) % size}", f"{(i + 1) % size}-{i}"),
            port("en2", f"{i}-{(i - 1) % size}", f"{(i - 1) % size}-{i}"),
        )
        for i in range(size)
    ]


# -- the matrix --


def test_two_macs_as_recorded():
    hosts = [member(name, *ports_of(name)) for name in ("studio", "macbook")]
    # The second cable goes through a disk tower at 40 Gb/s: no RDMA.
    assert device_matrix(hosts) == [[None, "rdma_en3"], ["rdma_en1", None]]
    assert obstacle(hosts) == ""


def test_a_mesh():
    assert device_matrix(mesh(3)) == [
        [None, "rdma_en1", "rdma_en2"],
        ["rdma_en10", None, "rdma_en12"],
        ["rdma_en20", "rdma_en21", None],
    ]
    assert obstacle(mesh(8)) == ""


def test_a_tensor_parallel_group_sees_its_own_hosts_only():
    assert device_matrix([mesh(4)[1], mesh(4)[3]]) == [[None, "rdma_en13"], ["rdma_en31", None]]


def test_a_ring_is_enough():
    matrix = device_matrix(ring(4))
    assert matrix[0] == [None, "rdma_en1", None, "rdma_en2"]
    assert is_ring(matrix) and not is_mesh(matrix)
    assert obstacle(ring(4)) == ""


def test_two_cables_are_listed_in_the_same_order_at_both_ends():
    hosts = [
        member("a", port("en2", "a2", "b9"), port("en1", "a1", "b8")),
        member("b", port("en8", "b8", "a1"), port("en9", "b9", "a2")),
    ]
    assert device_matrix(hosts) == [
        [None, ["rdma_en1", "rdma_en2"]],
        [["rdma_en8", "rdma_en9"], None],
    ]


def test_every_pair_gets_as_many_cables_as_the_poorest():
    hosts = [*ring(3)]
    extra = [port("en7", "x0", "x1"), port("en7", "x1", "x0")]
    for i, more in enumerate(extra):
        hosts[i] = replace(hosts[i], ports=(*hosts[i].ports, more))
    entries = [entry for row in device_matrix(hosts) for entry in row]
    assert all(entry is None or isinstance(entry, str) for entry in entries)


def test_a_cable_that_only_one_end_sees_does_not_count():
    hosts = [member("a", port("en1", "a1", "b1")), member("b", port("en1", "b1", None))]
    assert device_matrix(hosts) == [[None, None], [None, None]]
    assert "from a - b" in obstacle(hosts)
    hosts = [hosts[0], member("b", port("en1", "b1", "of another"))]  # plugged over meanwhile
    assert device_matrix(hosts) == [[None, None], [None, None]]


def test_no_rdma_through_a_dock():
    assert port("en1", "a1", "b1").rdma_device == "rdma_en1"
    assert port("en1", "a1", "b1", through="Dock").rdma_device is None


# -- what speaks against it --


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"macos": (26, 1)}, "mac1 has no macOS 26.2"),
        ({"macos": ()}, "mac1 has no macOS 26.2"),
        ({"in_wheel": False}, "MLX on mac1 has no JACCL"),
        ({"in_wheel": None}, "MLX on mac1 has no JACCL"),
        ({"rdma": Rdma(False, ("rdma_en10",))}, "RDMA is off on mac1: run `rdma_ctl enable`"),
        ({"rdma": Rdma()}, "RDMA is off on mac1"),
        ({"rdma": Rdma(True, ())}, "mac1 has a cable on rdma_en10, which ibv_devices does not"),
        ({"host": "mac0"}, "mac0 has several ranks"),
        ({"ports": (port("en10", "1-0", "0-1", 40),)}, "no Thunderbolt 5 cable straight from mac0"),
        ({"ports": ()}, "no Thunderbolt 5 cable straight from mac0 - mac1: connect all pairs"),
    ],
)
def test_an_obstacle_is_named(change, said):
    hosts = mesh(2)
    hosts[1] = replace(hosts[1], **change)
    assert said in obstacle(hosts)


def test_missing_cables_are_all_named():
    hosts = ring(5)
    hosts[2] = replace(hosts[2], ports=hosts[2].ports[:1])
    assert "mac1 - mac2" in obstacle(hosts) and "mac0 - mac2" in obstacle(hosts)


def test_more_hosts_than_jaccl_connects():
    assert "at most 8" in obstacle(mesh(9))


# -- auto, mpi, jaccl --


def test_auto_takes_it_where_all_agree():
    hosts = mesh(2)
    assert on_ranks(2, lambda g: choose("auto", g, hosts[g.rank])) == [device_matrix(hosts)] * 2
    assert on_ranks(2, lambda g: choose("jaccl", g, hosts[g.rank])) == [device_matrix(hosts)] * 2
    assert on_ranks(2, lambda g: choose("mpi", g, hosts[g.rank])) == [None] * 2


def test_one_host_without_it_is_enough_for_all_to_use_mpi():
    hosts = [mesh(2)[0], replace(mesh(2)[1], rdma=Rdma(False))]
    assert on_ranks(2, lambda g: choose("auto", g, hosts[g.rank])) == [None, None]
    refused = on_ranks(2, lambda g: choose("jaccl", g, hosts[g.rank]))
    assert [str(error) for error in refused] == [str(refused[0])] * 2
    assert "comm.tensor=jaccl: RDMA is off on mac1" in str(refused[0])


def test_a_group_of_one_needs_nothing():
    assert choose("jaccl", Communicator(), mesh(1)[0]) is None


def test_this_host_has_no_jaccl():
    found = jaccl.probe_member()
    if not found.macos:
        assert found.ports == () and found.in_wheel is False and found.rdma == Rdma()


# -- the start --


@dataclass
class Group:
    """What MLX's `init` gives."""

    _rank: int
    _size: int

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def stand_in(seen: list[dict]):
    """`mx.distributed.init` as far as MLX's sources show it: it reads the environment and the file,
    then exchanges what it is to connect with."""

    def init(*, backend: str, strict: bool, all_gather_factory) -> Group:
        with open(os.environ["MLX_IBV_DEVICES"]) as file:
            matrix = json.load(file)
        rank, size = int(os.environ["MLX_RANK"]), len(matrix)
        ours = {n: v for n, v in os.environ.items() if n.startswith(("JACCL_", "MLX_JACCL"))}
        gather = all_gather_factory(rank, size)
        answers = [gather(bytes([rank]) * n, n) for n in (4, 1)]
        call = {"backend": backend, "strict": strict, "matrix": matrix, "env": ours}
        seen.append(call | {"file": os.environ["MLX_IBV_DEVICES"], "answers": answers})
        return Group(rank, size)

    return init


class OneByOne(Communicator):
    """Rank `rank` of two, whose other rank sends the same kind of thing."""

    def allgather(self, value: bytes) -> list[bytes]:
        return [bytes([rank]) * len(value) for rank in range(self.size)]


class Agreeing(Communicator):
    """One rank of a group whose hosts are known."""

    def __init__(self, rank: int, size: int, members: list[Member]):
        super().__init__(rank, size)
        object.__setattr__(self, "_members", members)

    def allgather(self, value: Any) -> list:
        return self._members

    def with_graph(self, group: Any) -> Communicator:
        return Communicator(self.rank, self.size, None, group)


@pytest.mark.parametrize("rank", [0, 1])
def test_boot(rank, monkeypatch):
    for name in ("JACCL_RANK", "JACCL_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "JACCL_RING"):
        monkeypatch.setenv(name, "somebody else's")
    monkeypatch.setenv("MLX_RANK", "7")
    before = dict(os.environ)
    seen: list[dict] = []
    matrix = device_matrix(mesh(2))
    made = boot(OneByOne(rank, 2), matrix, stand_in(seen))
    assert (made.rank(), made.size()) == (rank, 2)
    (call,) = seen
    assert (call["backend"], call["strict"], call["matrix"]) == ("jaccl", True, matrix)
    assert call["answers"] == [b"\0\0\0\0\1\1\1\1", b"\0\1"]  # size x bytes, in rank order
    assert call["env"] == {}  # JACCL takes these first
    assert dict(os.environ) == before and not os.path.exists(call["file"])


def test_a_ring_can_be_preferred():
    seen: list[dict] = []
    boot(OneByOne(0, 2), device_matrix(mesh(2)), stand_in(seen), prefer_ring=True)
    assert seen[0]["env"] == {"MLX_JACCL_RING": "1"} and "MLX_JACCL_RING" not in os.environ


def test_a_start_that_fails_names_host_and_devices_and_leaves_no_trace(monkeypatch):
    before = dict(os.environ)
    monkeypatch.setattr(jaccl.comm, "hostname", lambda: "mac0")

    def init(**_: Any) -> None:
        raise RuntimeError("[jaccl] Couldn't allocate protection domain")

    with pytest.raises(ConfigError, match=r"on mac0: .*protection domain.*rdma_en1.*doctor"):
        boot(OneByOne(0, 2), device_matrix(mesh(2)), init)
    assert dict(os.environ) == before


def test_a_group_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="a group of 1 instead of 2"):
        boot(OneByOne(0, 2), device_matrix(mesh(2)), lambda **_: Group(0, 1))


def test_a_group_is_connected_where_it_can_be(caplog):
    """`comm.tensor`, from the probes to the group whose graph goes over RDMA."""
    caplog.set_level("INFO", "hpcmlx.jaccl")
    macs = mesh(2)

    def start(*, backend: str, strict: bool, all_gather_factory) -> str:
        return Group(rank, 2) if backend == "jaccl" and strict else None

    for kind in ("auto", "jaccl"):
        for rank in range(2):
            group = Agreeing(rank, 2, macs)
            made = jaccl.connect(kind, group, lambda: macs[rank], start)  # noqa: B023
            assert (made.rank, made.size, made._group) == (rank, 2, Group(rank, 2))
    assert "over RDMA (JACCL) between 2 hosts" in caplog.text
    group = Agreeing(0, 2, [macs[0], replace(macs[1], in_wheel=False)])
    assert jaccl.connect("auto", group, lambda: macs[0], start) is group
    assert "go through MPI, not over RDMA: MLX on mac1 has no JACCL" in caplog.text
    assert jaccl.connect("mpi", group, pytest.fail) is group
    assert jaccl.connect("jaccl", Communicator(), pytest.fail) == Communicator()


def test_a_job_that_asks_for_it_is_refused_where_it_cannot_be_had(model, tmp_path):
    common = [f"model.path={model}", "input=jobs/prompts.jsonl", "sampling.max_tokens=2"]
    line = [*common, "parallel.tp=2", f"run_dir={tmp_path / 'run'}", "comm.tensor=jaccl"]
    outcome = run("generate", *line, ranks=2)
    words = ["comm.tensor=jaccl: ", "has no macOS 26.2 or later", "or set comm.tensor=mpi"]
    assert_refused(outcome, 78, *words, run_dir=tmp_path / "run")


@pytest.mark.skipif(mx.distributed.is_available("jaccl"), reason="would start it")
def test_mlx_itself_takes_the_call_and_says_that_it_has_none():
    with pytest.raises(ConfigError, match="JACCL does not start"):
        boot(OneByOne(0, 2), device_matrix(mesh(2)), mx.distributed.init)
