"""What is said of hosts: read, refused with its line, matched with ranks, told to mpirun."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpcmlx.config import GenerateConfig, compose
from hpcmlx.errors import ConfigError
from hpcmlx.launch import mpirun, options
from hpcmlx.launch.chips import GIB, bandwidth_of
from hpcmlx.launch.describe import Cluster, Description, parse_description, read_cluster
from hpcmlx.launch.hostfile import Host, parse_hostfile
from hpcmlx.launch.network import check_interface, interface_options
from hpcmlx.launch.placement import RankHost, Seat, crowded, fill, rank_names, share
from hpcmlx.settings import LaunchConfig
from tests.fixtures import ROOT
from tests.fixtures import mpirun as mpirun_line

STUDIO = Description("M3 Ultra", 512 * GIB, 819.0)
MINI = Description("M4 Pro", 64 * GIB, 273.0)


def write(folder: Path, text: str, name: str = "macs") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_comments_and_yaml_say_the_same(tmp_path):
    lines = (
        'studio slots=2  # chip="M3 Ultra" memory=512GiB interface=bridge0 cores=24\n'
        "mini slots=1 #chip='Apple M4 Pro' memory=64GiB bandwidth=250.5GB/s\n"
        "other slots=1  # the old one, chip=unknown\n"
        'linux slots=1  # chip="AMD EPYC 7763"\n'
    )
    commented = read_cluster(write(tmp_path, lines))
    assert commented.source == str(tmp_path / "macs")
    assert commented.hosts == {
        "studio": Description("M3 Ultra", 512 * GIB, 819.0, "bridge0", 24),
        "mini": Description("Apple M4 Pro", 64 * GIB, 250.5),
        "linux": Description("AMD EPYC 7763"),
    }
    lines = "studio slots=2\nmini slots=1 # a remark\nother slots=1\nlinux slots=1\n"
    hostfile = write(tmp_path, lines, "plain")
    assert read_cluster(hostfile) is None  # nothing is said
    text = (
        "studio:\n  chip: M3 Ultra\n  memory: 512GiB\n  interface: bridge0\n  cores: 24\n"
        "mini: {chip: Apple M4 Pro, memory: 64GiB, bandwidth: 250.5GB/s}\n"
        "linux:\n  chip: 'AMD EPYC 7763'\n"
    )
    beside = write(tmp_path, text, "plain.yaml")
    found = read_cluster(hostfile)
    assert found.hosts == commented.hosts and found.source == beside
    assert [(line.name, line.slots) for line in found.lines] == [
        ("studio", 2), ("mini", 1), ("other", 1), ("linux", 1)
    ]  # fmt: skip
    assert read_cluster(None, beside).names == ["studio", "mini", "linux"]


@pytest.mark.parametrize(
    ("comment", "words"),
    [
        ("chp=M3", ["unknown key 'chp'", "chip, memory, bandwidth, interface, cores"]),
        ("chip=M3 Ultra", ["'Ultra' is not key=value", "needs quotes"]),
        ('chip="M3 Ultra', ["no closing quotation"]),
        ("memory=512", ["memory=512: expected a size with its unit"]),
        ("memory=lots", ["memory='lots'"]),
        ("bandwidth=819", ["bandwidth='819': expected as in 819GB/s"]),
        ("bandwidth=0GB/s", ["bandwidth='0GB/s'"]),
        ("cores=0", ["cores='0'"]),
        ("memory=1GiB memory=2GiB", ["memory is there twice"]),
        ("chip=M3Ultra memory=64GiB", ["bandwidth of 'M3Ultra' is not known; give bandwidth"]),
        ('chip="M4 Max"', ["'M4 Max' is not known without its memory"]),
        ("interface=en0,en1", ["neither a network"]),
        ("interface=-x", ["neither a network"]),
        ("interface='$(id)'", ["neither a network"]),
        ("interface=10.0.1.7/24", ["has host bits set", "10.0.1.0/24"]),
    ],
)
def test_wrong_comments_are_refused_with_their_line(tmp_path, comment, words):
    hostfile = write(tmp_path, f"# macs\nstudio slots=1\nmini slots=1  # {comment}\n")
    with pytest.raises(ConfigError) as caught:
        read_cluster(hostfile)
    for word in [f"{hostfile}:3: ", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("studio:\n  chp: M3\n", 2, ["unknown key 'chp'", "valid: chip, memory"]),
        ("studio:\n  cores: 2\nmini:\n  cores: 2\n", 3, ["mini is not in", "has studio"]),
        ("studio:\n  cores: 2\n  cores: 3\n", 3, ["cores is there already on line 2"]),
        ("studio:\n  cores: 2\n\nstudio:\n  cores: 3\n", 4, ["already on line 1"]),
        ("studio:\n  chip: !!python/name:os.system\n", 2, ["tags (tag:yaml.org,2002:python/name"]),
        ("studio: !x\n  cores: 2\n", 1, ["tags (!x)"]),
        ("studio: &a\n  cores: 2\n", 1, ["anchors"]),
        ("studio: [1]\n", 1, ["expected a mapping of the keys of studio"]),
        ("studio:\n  cores: [1]\n", 2, ["cores takes one value"]),
        ("studio:\n", 1, ["expected a mapping"]),
        ("studio: {}\n", 1, ["nothing is said"]),
        ("- studio\n", 1, ["expected a mapping of host names"]),
        ("studio:\n  cores: 2\n bad: 1\n", 3, ["not YAML"]),
        ("../x:\n  cores: 2\n", 1, ["'../x' is not a host name"]),
        ("'-x':\n  cores: 2\n", 1, ["'-x' is not a host name"]),
        ('"a\\nb":\n  cores: 2\n', 1, ["'a\\nb' is not a host name"]),
        ("$(touch x):\n  cores: 2\n", 1, ["is not a host name"]),
        ("studio:\n  memory: 0x10\n", 2, ["memory='0x10'"]),
        ("studio:\n  chip: M9\n", 2, ["'M9' is not known"]),
    ],
)
def test_wrong_yaml_is_refused_with_its_line(tmp_path, text, line, words):
    hostfile, path = write(tmp_path, "studio slots=1\n"), write(tmp_path, text, "macs.yaml")
    with pytest.raises(ConfigError) as caught:
        read_cluster(hostfile)
    for word in [f"{path}:{line}: ", *words]:
        assert word in str(caught.value)


def test_files_that_cannot_be_read_or_say_it_twice(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml cannot be read"):
        read_cluster(None, str(tmp_path / "no.yaml"))
    with pytest.raises(ConfigError, match="describes no host|expected a mapping"):
        parse_description(write(tmp_path, "", "empty.yaml"))
    hostfile = write(tmp_path, "studio slots=1 # cores=2\n")
    write(tmp_path, "studio:\n  cores: 2\n", "macs.yaml")
    with pytest.raises(ConfigError, match=r"macs\.yaml:1: studio is also described in .*macs;"):
        read_cluster(hostfile)
    twice = write(tmp_path, "a slots=1\nb slots=1\na slots=1\n", "twice")
    with pytest.raises(ConfigError, match=r"twice:3: a is there already on line 1; mpirun wants"):
        read_cluster(twice)


@pytest.mark.parametrize(
    ("chip", "memory", "expected"),
    [
        ("Apple M1", 8, 68.25), ("M2 Ultra", 192, 800), ("M3 Ultra", 512, 819), ("M3 Max", 36, 300),
        ("M3 Max", 96, 300), ("M3 Max", 64, 400), ("M4 Max", 36, 410), ("M4 Max", 128, 546),
        ("M5", 32, 153), ("M5 Max", 128, 614), ("AMD EPYC 7763", 64, None), ("M4 Max", None, None),
    ],
)  # fmt: skip
def test_bandwidth_of_chips(chip, memory, expected):
    assert bandwidth_of(chip, memory and memory * GIB) == expected


def cluster(*lines: Host, **hosts: Description) -> Cluster:
    return Cluster("macs.yaml", lines, hosts)


def seats(*names: str) -> list[Seat]:
    return [Seat(name) for name in names]


def test_ranks_are_known_by_the_names_of_their_hosts():
    two = cluster(Host("studio.local", 1), Host("10.0.1.7", 1), studio=STUDIO)
    on = [Seat("studio"), Seat("mini.lan", ("127.0.0.1", "10.0.1.7"))]
    # Whatever the order is in which mpirun has placed them.
    assert rank_names(two, on[::-1]) == ["10.0.1.7", "studio.local"]
    assert rank_names(cluster(a=STUDIO, b=MINI), seats("b", "a.x", "b")) == ["b", "a", "b"]
    assert not Seat("10").is_on("10.0.1.7") and Seat("x").is_on("localhost")


def test_ranks_are_known_by_the_order_of_the_slots_where_names_do_not_tell():
    two = cluster(Host("alias1", 2), Host("alias2", 1))
    assert rank_names(two, seats("x", "x", "y")) == ["alias1", "alias1", "alias2"]
    # Two names for one host.
    here = cluster(Host("localhost", 1), Host("127.0.0.1", 1))
    assert rank_names(here, [Seat("vm", ("127.0.0.1",))] * 2) == ["localhost", "127.0.0.1"]
    # One name does tell, and it contradicts the order.
    assert rank_names(cluster(Host("alias", 1), Host("b", 1)), seats("b", "c")) is None
    assert rank_names(cluster(a=STUDIO), seats("x")) is None
    assert rank_names(two, seats(*"xxxxx")) is None  # more ranks than slots


def test_slots_are_filled_host_by_host():
    mixed = cluster(Host("a"), Host("b"), Host("a"), b=Description(cores=3))
    assert fill(mixed, 4) == ["a", "a", "b", "b"]
    assert fill(cluster(Host("a", 1), Host("b")), 1) == ["a"]
    assert fill(cluster(Host("a", 1), Host("b")), 2) is None
    assert crowded(cluster(Host("a", 4), Host("b", 2), a=Description(cores=2)), 6) == ["a"]
    assert crowded(cluster(Host("a", 4), a=Description(cores=4)), 4) == []


def test_ranks_of_one_host_share_it():
    names = ["studio", "studio", "mini", "other"]
    found = share(cluster(studio=STUDIO, mini=MINI), names)
    assert found.ranks == (
        *[RankHost("studio", 819 / 2, 256 * GIB)] * 2,
        RankHost("mini", 273.0, 64 * GIB),
        RankHost("other"),
    )


def test_the_line_of_mpirun():
    argv = mpirun.build_argv(
        "/m", "/p", "/j.py", [], 2, hostfile="-x", interface="10.0.1.0/24", bind="core"
    )
    assert argv[3:-2] == [
        *("--hostfile", "./-x", "--mca", "btl_tcp_if_include", "10.0.1.0/24"),
        *("--prtemca", "prte_if_include", "10.0.1.0/24", "--bind-to", "core"),
    ]
    for bind, expected in (("core", "core:overload-allowed"), (None, "none"), ("none", "none")):
        argv = mpirun.build_argv("/m", "/p", "/j.py", [], 2, bind=bind, oversubscribe=True)
        assert argv[3:-2] == ["--oversubscribe", "--bind-to", expected]
    with pytest.raises(ConfigError, match="a comma for the end of the name"):
        options.checked_path("a,b")


@pytest.mark.parametrize("text", ["", "-x", "a b", "$(id)", "en0\n", "../x", "10.0.1.1/24", "x,y"])
def test_what_is_no_interface(text):
    with pytest.raises(ConfigError, match="launch.interface="):
        check_interface(text, "launch.interface")
    assert interface_options("en0")[-1] == "en0"


def choose(launch: LaunchConfig, found: Cluster | None, environ: dict[str, str] | None = None):
    used = [] if found is None else found.names
    return options.choose_interface(launch, found, used, environ or {})


def test_the_interface_is_what_was_said():
    net, en0, en5 = (Description(interface=i) for i in ("10.0.1.0/24", "en0", "en5"))
    launch = LaunchConfig()
    assert choose(launch, None) is None
    assert choose(launch, cluster(a=net, b=Description(cores=1))) == "10.0.1.0/24"
    assert choose(launch, cluster(a=en0, b=en0)) == "en0"
    assert choose(launch, cluster(a=en0)) is None  # one host needs none
    assert choose(launch, cluster(a=en0, b=en0), {"OMPI_MCA_btl_tcp_if_include": "x"}) is None
    assert choose(LaunchConfig(interface="en7"), cluster(a=en0, b=en5)) == "en7"
    for other in (en5, Description(cores=1)):
        with pytest.raises(ConfigError, match=r"a: en0, b: .*launch.interface=10\.0\.1\.0/24"):
            choose(launch, cluster(a=en0, b=other))


def test_waiting_ranks_give_way_where_they_share_cores(tmp_path):
    def chosen(launch: LaunchConfig, ranks: int, **environ: str) -> options.Options:
        hosts = [Host("a", 2), Host("b", 2)]
        return options.choose_options(launch, ranks, hosts, {"a"}, 2, environ)

    hostfile = write(tmp_path, "a slots=2\nb slots=2\n")
    plain = LaunchConfig(hostfile=hostfile)
    assert chosen(plain, 4) == options.Options(None, False, None)
    write(tmp_path, "b:\n  cores: 1\n", "macs.yaml")
    assert chosen(plain, 3) == options.Options(None, False, None)
    assert chosen(plain, 4) == options.Options(None, True, True)
    assert chosen(plain, 4, OMPI_MCA_mpi_yield_when_idle="0").yield_when_idle is None
    assert chosen(LaunchConfig(yield_when_idle=True), 1).yield_when_idle is True
    env = mpirun.mpirun_environment({}, over_ssh=False, yield_when_idle=True)
    assert env == {"OMPI_MCA_mpi_yield_when_idle": "1"}


def test_in_an_allocation_the_description_has_the_interface(tmp_path):
    text = "a: {interface: 10.0.1.0/24}\nb: {interface: 10.0.1.0/24}\n"
    launch = LaunchConfig(hosts=write(tmp_path, text, "x.yaml"))
    for environ, expected in (({"SLURM_JOB_ID": "7"}, "10.0.1.0/24"), ({}, None)):
        found = options.choose_options(launch, 4, [], {"a"}, 2, environ)
        # Slurm has given the ranks cores; without it four ranks share the two of this host.
        assert (found.interface, found.oversubscribe) == (expected, not environ)


def test_a_host_that_gets_no_rank_has_no_say_in_the_interface(tmp_path):
    said = "interface=10.0.1.0/24"
    lines = f"a slots=1 # {said}\nb slots=1 # {said}\nc slots=1 # interface=10.0.2.0/24\n"
    launch = LaunchConfig(hostfile=write(tmp_path, lines))
    hosts = parse_hostfile(launch.hostfile)
    assert options.choose_options(launch, 2, hosts, {"a"}, 2, {}).interface == "10.0.1.0/24"
    with pytest.raises(ConfigError, match=r"different interfaces.*c: 10\.0\.2\.0/24"):
        options.choose_options(launch, 3, hosts, {"a"}, 2, {})


def test_names_of_variables_only():
    environ = {"HPCMLX_X": "1", "SECRET": "2", "OTHER": "3"}
    assert options.exported(environ, ["SECRET"]) == ["HPCMLX_X", "SECRET"]
    with pytest.raises(ConfigError, match="ABSENT is not set here"):
        options.exported(environ, ["ABSENT"])
    for name in ("A=1", "-x", "$(id)", "A\n", ""):
        with pytest.raises(ConfigError, match="is not the name of a variable"):
            options.exported(environ, [name])


def test_options_of_mpirun_are_refused_where_the_job_starts_none():
    base = ["model.path=m", "launch.interface=10.0.1.0/24"]
    with pytest.raises(ConfigError, match="launch.interface is for launch=mpirun"):
        compose(GenerateConfig, ROOT / "conf", "generate", base)
    cfg = compose(GenerateConfig, ROOT / "conf", "generate", [*base, "launch=mpirun"])
    assert cfg.launch.interface == "10.0.1.0/24"
    # The ranks of that mpirun do not see them, wherever they were set.
    child = mpirun.child_overrides(base, Path("/r"))
    assert child[:1] == base[:1] and "launch.interface" not in " ".join(child)
    assert mpirun._taken_back(cfg.launch) == ["launch.interface=null"]
    reset = [*base, "launch.export=[HOME]", "launch.kind=none", "launch.interface=null"]
    compose(GenerateConfig, ROOT / "conf", "generate", [*reset, "launch.export=[]"])


def test_the_shipped_example():
    found = read_cluster(str(ROOT / "hostfiles/macs.example"))
    assert list(found.hosts) == [line.name for line in found.lines] == found.names
    assert {h.bandwidth for h in found.hosts.values()} == {819, 546, 273}
    assert choose(LaunchConfig(), found) == "10.0.1.0/24"


@pytest.mark.fault
def test_mpirun_reads_comments_and_strange_paths(tmp_path):
    """The path is one argument to mpirun: nothing in it is executed."""
    folder = tmp_path / "a $(touch pwned) `touch pwned`"
    folder.mkdir()
    text = '# macs\nlocalhost slots=2  # chip="M3 Ultra" memory=96GiB interface=bridge0\n'
    path = write(folder, text, "-hosts;touch pwned")
    assert read_cluster(path).hosts["localhost"].bandwidth == 819
    for hostfile, cwd in ((path, tmp_path), ("-hosts;touch pwned", folder)):
        line = [*mpirun_line("-n", "2"), "--hostfile", options.checked_path(hostfile)]
        done = subprocess.run(
            [*line, "hostname"], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 and len(done.stdout.split()) == 2, done.stderr
    assert not list(tmp_path.rglob("pwned"))
