"""Jobs on hosts that are said to differ: who gets how much, and the rows of one process."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.finetune_runs import series
from tests.fixtures import assert_done, assert_refused, run, save_model, write_rows
from tests.ssh_hosts import Hosts, hosts_up

pytestmark = pytest.mark.timeout(600)
# Two names of this host: which rank is on which then follows from the slots.
FAST_AND_SLOW = "localhost:\n  bandwidth: 800GB/s\n127.0.0.1:\n  bandwidth: 400GB/s\n"


@dataclass(frozen=True)
class Work:
    """A model with eight layers, eight KV heads and a file of prompts.

    Attributes:
        twin: the answers of one process, a line each.
    """

    folder: Path
    arguments: tuple[str, ...]
    twin: list[str]

    def hostfile(self, name: str, lines: str, description: str) -> str:
        path = self.folder / name
        path.write_text(lines)
        Path(f"{path}.yaml").write_text(description)
        return f"launch.hostfile={path}"

    def rows(self, run_dir: Path) -> list[str]:
        return sorted((run_dir / "results.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    folder = tmp_path_factory.mktemp("uneven")
    model = save_model(
        folder / "model",
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        hidden_size=256,
    )
    # The last is long enough for messages that Open MPI would spread over all networks.
    prompts = write_rows(folder / "p.jsonl", [{"prompt": "row " * i} for i in (1, 2, 5, 9, 100)])
    arguments = (f"model.path={model}", f"input={prompts}", "sampling.max_tokens=6")
    outcome = run("generate", *arguments, f"run_dir={folder}/twin")
    assert_done(outcome, folder / "twin")
    return Work(folder, arguments, sorted((folder / "twin/results.jsonl").read_text().splitlines()))


def layers_of_ranks(run_dir: Path) -> list[str]:
    texts = [path.read_text() for path in sorted((run_dir / "logs").glob("rank*.log"))]
    return [re.search(r"this rank: layers (\d+-\d+)", text)[1] for text in texts]


def test_shares_of_two_ranks(work):
    hosts = work.hostfile("two", "localhost slots=1\n127.0.0.1 slots=1\n", FAST_AND_SLOW)
    run_dir = work.folder / "tp2"
    outcome = run(
        "generate", *work.arguments, hosts, "parallel.tp=2", f"run_dir={run_dir}", ranks=2
    )
    assert_done(outcome, run_dir)
    said = f"tp shares 2.0:1.0 from {work.folder}/two.yaml: 800 and 400 GB/s"
    assert [line for line in outcome.err.splitlines() if line.endswith(said)]
    assert work.rows(run_dir) == work.twin
    # What it says, given by hand, is the same layout.
    by_hand = work.folder / "by-hand"
    shares = ("parallel.tp_shares=[2.0,1.0]", "parallel.tp=2", f"run_dir={by_hand}")
    assert_done(run("generate", *work.arguments, hosts, *shares, ranks=2, timeout=180), by_hand)
    size = r"(\d+ MiB of weights from \d+ MiB)"
    for name in ("logs/rank0.log", "logs/rank1.log"):
        texts = [(folder / name).read_text() for folder in (run_dir, by_hand)]
        assert re.findall(size, texts[0]) == re.findall(size, texts[1]) != []
        assert "tp shares" not in texts[1]
    assert work.rows(by_hand) == work.twin


def test_stages_of_three_ranks(work):
    """The second host's two ranks have half of it each."""
    hosts = work.hostfile("three", "localhost slots=1\n127.0.0.1 slots=2\n", FAST_AND_SLOW)
    run_dir = work.folder / "pp3"
    outcome = run(
        "generate", *work.arguments, hosts, "parallel.pp=3", f"run_dir={run_dir}", ranks=3
    )
    assert_done(outcome, run_dir)
    said = re.search(r"pp layers (\d)\+(\d)\+(\d) from \S+: 800, 200 and 200 GB/s", outcome.err)
    first, second, third = map(int, said.groups())
    assert first >= 4 and third <= second  # the head is on the last
    ends = [(0, first - 1), (first, first + second - 1), (first + second, 7)]
    assert layers_of_ranks(run_dir) == [f"{start}-{end}" for start, end in ends]
    assert work.rows(run_dir) == work.twin


def test_training_follows_the_hosts(work):
    hosts = work.hostfile("train", "localhost slots=1\n127.0.0.1 slots=1\n", FAST_AND_SLOW)
    rows = [{"prompt": f"{i}?", "completion": f"{'NESW'[i % 4]}!"} for i in range(8)]
    train = write_rows(work.folder / "train.jsonl", rows)
    arguments = [
        *(work.arguments[0], f"data.train=[{train}]", f"data.cache={work.folder}/cache"),
        *("train.steps=3", "train.batch_size=4", "method.rank=2"),
    ]
    alone, two = work.folder / "tune1", work.folder / "tune2"
    assert_done(run("finetune", *arguments, f"run_dir={alone}", timeout=180), alone)
    layout = ("parallel.pp=2", f"run_dir={two}")
    outcome = run("finetune", *arguments, hosts, *layout, ranks=2, timeout=180)
    assert_done(outcome, two)
    said = re.search(r"pp layers (\d)\+(\d) from \S+/train.yaml: 800 and 400 GB/s", outcome.err)
    assert int(said[1]) > int(said[2])
    assert series(two)["loss"] == pytest.approx(series(alone)["loss"], abs=1e-5)


def test_a_model_that_fits_nowhere_is_refused_before_it_is_read(work):
    small = "localhost:\n  memory: 64KiB\n127.0.0.1:\n  memory: 128KiB\n"
    hosts = work.hostfile("small", "localhost slots=1\n127.0.0.1 slots=1\n", small)
    for layout in ("parallel.tp=2", "parallel.pp=2"):
        run_dir = work.folder / f"small-{layout[9:11]}"
        outcome = run(
            "generate", *work.arguments, hosts, layout, f"run_dir={run_dir}", ranks=2, timeout=180
        )
        words = ("weights take", "room for", f"{work.folder}/small.yaml")
        assert_refused(outcome, 78, *words, run_dir=run_dir)


def test_a_wrong_description_is_refused_with_its_line(work):
    hosts = work.hostfile("wrong", "localhost slots=2\n", "localhost:\n  chp: M4\n")
    for how in ({"ranks": 2}, {}):
        more = ("parallel.tp=2", f"run_dir={work.folder}/wrong-run")
        more += () if how else ("launch=mpirun",)
        outcome = run("generate", *work.arguments, hosts, *more, **how)
        assert_refused(outcome, 78, f"{work.folder}/wrong.yaml:2: unknown key 'chp' (valid: chip")


# -- real hosts --

NETWORK = "10.182.7"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts with a second network between them, which has no names."""
    with hosts_up(3, "1gbit", "uneven") as found:
        pids = found.folder / "hosts/run"
        switch = ["nsenter", "-t", (pids / "switch.pid").read_text().strip(), "-n", "ip", "link"]
        run_quietly(*switch, "add", "br1", "type", "bridge")
        run_quietly(*switch, "set", "br1", "up")
        for number, name in enumerate(found.names):
            pid = (pids / f"{name}.pid").read_text().strip()
            end = ["type", "veth", "peer", "name", "eth1", "netns", pid]
            run_quietly(*switch, "add", f"q{number}", *end)
            run_quietly(*switch, "set", f"q{number}", "master", "br1", "up")
            inside = ["nsenter", "-t", pid, "-n", "ip"]
            run_quietly(*inside, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth1")
            run_quietly(*inside, "link", "set", "eth1", "up")
        yield found


def run_quietly(*line: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def received(hosts: Hosts) -> dict[str, dict[str, int]]:
    """Host -> bytes that each of its two interfaces has received."""
    found = {}
    for name in hosts.names:
        text = hosts.control("exec", name, "cat", "/proc/net/dev")
        counts = re.findall(r"^\s*(eth\d):\s*(\d+)", text, re.MULTILINE)
        found[name] = {interface: int(count) for interface, count in counts}
    return found


@pytest.mark.parametrize("said_by", ["the launch", "the description"])
def test_three_hosts_one_twice_as_fast_and_a_network_of_choice(hosts, work, said_by):
    launch = said_by == "the launch"
    interface = "" if launch else f"\n  interface: {NETWORK}.0/24"
    speeds = zip(hosts.names, (800, 400, 400), strict=True)
    text = "\n".join(f"{name}:\n  bandwidth: {n}GB/s{interface}" for name, n in speeds)
    path = hosts.folder / f"{said_by.split()[1]}.yaml"
    path.write_text(text)
    run_dir = hosts.folder / f"run-{said_by.split()[1]}"
    options = [f"launch.hosts={path}", "launch.bind=none", "launch.yield_when_idle=true"]
    options += [f"launch.interface={NETWORK}.0/24"] if launch else []
    before = received(hosts)
    job = hosts.job("generate", *work.arguments, "parallel.tp=3", f"run_dir={run_dir}", *options)
    outcome = job.wait(180)
    assert_done(outcome, run_dir)
    assert f"tp shares 2.0:1.0:1.0 from {path}: 800, 400 and 400 GB/s" in outcome.err
    assert work.rows(run_dir) == work.twin
    ranks = json.loads((run_dir / "summary.json").read_text())["ranks"]
    assert [rank["host"] for rank in ranks] == list(hosts.names)
    after = received(hosts)
    for name in hosts.names:
        by_ssh, chosen = (after[name][i] - before[name][i] for i in ("eth0", "eth1"))
        # mpirun's ssh sessions are on the other network: keys, and what it prints.
        assert chosen > 10 * by_ssh > 0, (name, by_ssh, chosen)
