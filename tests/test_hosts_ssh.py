"""Jobs over three hosts that share nothing but files, one of them on a link of a tenth.

What must hold is what holds on one host: rows and losses are those of a single process, every
failure ends all ranks on all hosts with a line that says where.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import hpcmlx
from hpcmlx.bench.link_file import read_links
from hpcmlx.bench.link_verdict import slow_links
from hpcmlx.launch.mpirun import find_mpirun
from hpcmlx.observe.metrics import read_metrics
from tests.finetune_runs import committed, series
from tests.fixtures import (
    ROOT,
    Outcome,
    assert_done,
    assert_nothing_left,
    copy_model,
    run,
    save_model,
    stored_rows,
    write_rows,
)
from tests.ssh_hosts import Hosts, hosts_up
from tests.test_faults import index_with_two_shards

pytestmark = pytest.mark.timeout(600)
RATE, SLOW = "1gbit", "100mbit"
HIDDEN, STEPS = 512, 3
TUNING = ["train.batch_size=6", "optim.learning_rate=1e-3", "method.rank=2"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with hosts_up(3, RATE) as up:
        up.control("rate", up.names[-1], SLOW)
        yield up


@pytest.fixture(scope="module")
def model(hosts) -> Path:
    """Wide, so that activations are many against all else that travels."""
    return save_model(hosts.folder / "model", hidden_size=HIDDEN, num_hidden_layers=3)


@pytest.fixture(scope="module")
def prompts(hosts) -> Path:
    rows = [{"prompt": f"{i} " + "and so on " * 40} for i in range(8)]
    return write_rows(hosts.folder / "prompts.jsonl", rows)


@pytest.fixture(scope="module")
def generating(model, prompts) -> list[str]:
    sampling = ["sampling.max_tokens=8", "sampling.temperature=1.0"]
    return [f"model.path={model}", f"input={prompts}", *sampling]


@pytest.fixture(scope="module")
def tuning(hosts, model) -> list[str]:
    rows = [{"prompt": f"{i}?", "completion": f"{'NESW'[i % 4]}!"} for i in range(12)]
    train = write_rows(hosts.folder / "train.jsonl", rows)
    where = [f"model.path={model}", f"data.train=[{train}]", f"data.cache={hosts.folder}/cache"]
    return [*where, *TUNING]


@pytest.fixture(scope="module")
def rows(hosts, generating) -> list[tuple[str, str]]:
    """Of a single process."""
    run_dir = hosts.folder / "rows"
    assert_done(run("generate", *generating, f"run_dir={run_dir}"), run_dir)
    return texts(run_dir)


@pytest.fixture(scope="module")
def losses(hosts, tuning) -> np.ndarray:
    """Of a single process."""
    run_dir = hosts.folder / "losses"
    outcome = run("finetune", *tuning, f"train.steps={STEPS}", f"run_dir={run_dir}")
    assert_done(outcome, run_dir)
    return read_metrics(run_dir)["train"]["loss"]


def texts(run_dir: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]
    return [(row["id"], row["text"]) for row in lines]


# -- jobs --


@pytest.mark.fault
@pytest.mark.parametrize("layout", ["parallel.pp=3", "parallel.tp=3 parallel.tp_shares=[2,1,1]"])
def test_rows_are_those_of_one_process(hosts, generating, rows, layout):
    """And what the layout says must travel does so over the links."""
    run_dir = hosts.folder / layout[9:11]
    before = hosts.traffic()
    outcome = hosts.job("generate", *generating, *layout.split(), f"run_dir={run_dir}").wait(180)
    after = hosts.traffic()
    assert_done(outcome, run_dir)
    assert texts(run_dir) == rows
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [rank["host"] for rank in summary["ranks"]] == list(hosts.names)
    # One activation a token and stage; two all-reduces a layer, in which a rank gives and gets at
    # least two thirds of them. Tokens that several rows begin with are computed once.
    computed = summary["prompt_tokens"] - summary["cached_tokens"]
    activations = (computed + summary["generated_tokens"] - summary["samples"]) * HIDDEN * 4
    sent, received = np.array([np.subtract(after[name], before[name]) for name in hosts.names]).T
    print(f"{layout}: activations {activations}, sent {sent}, received {received}")
    if "pp" in layout:
        assert (sent[:2] > activations).all() and (received[1:] > activations).all()
        # The first stage gets only tokens, and nothing but activations is of that size.
        assert received[0] < activations and max(sent[1], received[2]) < 2 * activations
    else:
        assert (sent > 2 * 3 * activations * 2 / 3).all()
    hosts.assert_nobody_left()


@pytest.mark.parametrize("layout", ["parallel.pp=3", "parallel.dp=3"])
def test_losses_are_those_of_one_process(hosts, tuning, losses, layout):
    run_dir = hosts.folder / f"tune-{layout[9:11]}"
    job = hosts.job("finetune", *tuning, layout, f"train.steps={STEPS}", f"run_dir={run_dir}")
    assert_done(job.wait(180), run_dir)
    np.testing.assert_allclose(read_metrics(run_dir)["train"]["loss"], losses, atol=1e-5)
    hosts.assert_nobody_left()


def under_mpirun(hosts: Hosts, job: str, *arguments: str, timeout: float = 180) -> Outcome:
    """A job that is no batch job: as a user starts it."""
    line = [find_mpirun(), "--allow-run-as-root", "-hostfile", str(hosts.hostfile)]
    return hosts.start([*line, sys.executable, str(ROOT / f"jobs/{job}.py"), *arguments]).wait(
        timeout
    )


@pytest.mark.fault
def test_the_link_bench_names_the_slow_host(hosts):
    run_dir = hosts.folder / "link"
    # A tenth again, and no more than a host that is busy with other tests can carry.
    for name, rate in zip(hosts.names, ("400mbit", "400mbit", "40mbit"), strict=True):
        hosts.control("rate", name, rate)
    outcome = under_mpirun(hosts, "bench", "link", "--seconds", "0.05", "--run-dir", str(run_dir))
    for name, rate in zip(hosts.names, (RATE, RATE, SLOW), strict=True):
        hosts.control("rate", name, rate)
    assert outcome.code == 0, outcome.err
    links = read_links(run_dir / "link.h5")
    assert links.hosts == hosts.names
    assert links.bandwidth[0, 1] > 4 * max(links.bandwidth[0, 2], links.bandwidth[2, 1])
    slow = slow_links(links.latency_best, links.bandwidth)
    assert [s.host for s in slow if s.what == "bandwidth"] == [2]
    assert re.search(r"host2 is slow: [\d.]+ MB/s to host0 and host1", outcome.out)
    assert all(np.isfinite(curve[0]).all() for curve in links.curves.values())
    hosts.assert_nobody_left()


def test_the_doctor_visits_all_hosts(hosts):
    run_dir = hosts.folder / "doctor"
    arguments = ["--hostfile", str(hosts.hostfile), "--run-dir", str(run_dir)]
    outcome = under_mpirun(hosts, "doctor", *arguments)
    report = json.loads((run_dir / "doctor.json").read_text())
    assert [host["host"] for host in report["hosts"]] == list(hosts.names)
    serious = [finding for finding in report["findings"] if finding["serious"]]
    assert outcome.code == (78 if serious else 0), outcome.err
    for host in report["hosts"]:
        assert set(host["links"]) == set(hosts.names) - {host["host"]}
        assert all(used == ["eth0"] for used in host["links"].values())
        assert set(host["sockets"].values()) == {"works"}
    hosts.assert_nobody_left()


# -- faults --


@pytest.mark.fault
def test_a_host_loses_its_daemon_and_its_ranks(hosts, model):
    """The job ends at once, naming the host; the same command does what is missing."""
    many = write_rows(hosts.folder / "many.jsonl", [{"prompt": f"row {i}"} for i in range(60)])
    run_dir = hosts.folder / "killed"
    line = [f"model.path={model}", f"input={many}", f"run_dir={run_dir}", "parallel.pp=3"]
    line += ["inference.batch_size=2", "sampling.max_tokens=60", "sampling.temperature=1.0"]
    job = hosts.job("generate", *line)
    job.until(lambda: any(path.stat().st_size for path in run_dir.glob("rows/*")))
    hosts.kill(hosts.names[1])
    killed = time.monotonic()
    outcome = job.wait(120, patience=10)
    assert time.monotonic() - killed < 40
    assert outcome.code == 75, outcome.err
    assert_says(outcome, "mpirun lost a host, which it names above", "start the job again")
    named = [text for text in f"{outcome.out}\n{outcome.err}".splitlines() if "Remote " in text]
    assert named and named[0].endswith(" host1"), named
    assert_nothing_left(outcome, run_dir)
    hosts.assert_nobody_left()
    before = stored_rows(run_dir)
    assert 0 < len(before) < 60
    outcome = hosts.job("generate", *line).wait(180)
    assert_done(outcome, run_dir)
    after = stored_rows(run_dir)
    assert len(after) == 60
    assert {place: after[place] for place in before} == before


@pytest.mark.fault
def test_a_link_is_cut(hosts, tuning):
    """Nothing hangs, on neither side of it; training goes on from what was saved."""
    run_dir, steps = hosts.folder / "cut", 100
    line = [*tuning, "parallel.pp=3", f"train.steps={steps}", f"run_dir={run_dir}"]
    line += ["train.save_every=20"]
    job = hosts.job("finetune", *line)
    job.until(lambda: len(committed(run_dir)) >= 1)
    hosts.control("link", hosts.names[2], "down")
    cut = time.monotonic()
    try:
        outcome = job.wait(90, patience=30)
        assert time.monotonic() - cut < 60
        hosts.assert_nobody_left()
    finally:
        hosts.control("link", hosts.names[2], "up")
    assert outcome.code == 75, outcome.err
    assert_says(outcome, "lost host2, which does not answer any more", "start the job again")
    assert not outcome.survivors and not (run_dir / "completed.json").exists()
    outcome = hosts.job("finetune", *line).wait(180)
    assert_done(outcome, run_dir)
    assert series(run_dir)["step"].tolist() == list(range(steps))


@pytest.mark.fault
def test_a_shard_is_missing_on_one_host(hosts, generating, model):
    """As where no file system is shared: nobody loads, and the host is named."""
    whole = copy_model(model, hosts.folder / "whole")
    index_with_two_shards(whole)
    part = hosts.folder / "part"
    shutil.copytree(whole, part)
    (part / "model-00002-of-00002.safetensors").unlink()
    line = [*generating, f"model.path={whole}", "parallel.pp=3"]
    with hosts.another(hosts.names[1], whole, part):
        outcome = hosts.job("generate", *line, f"run_dir={hosts.folder}/part-run").wait(180)
    assert outcome.code == 77, outcome.err
    assert_says(outcome, "rank 1 on host1", "model-00002-of-00002.safetensors is missing")
    logs = "".join(path.read_text() for path in (hosts.folder / "part-run/logs").iterdir())
    assert "layout dp1_pp3" in logs and "weights from" not in logs, "a rank has loaded"
    assert_nothing_left(outcome, hosts.folder / "part-run")
    hosts.assert_nobody_left()


@pytest.mark.fault
@pytest.mark.parametrize("what", ["hpcmlx source", "mlx"])
def test_one_host_has_something_else_installed(hosts, generating, what):
    if what == "mlx":
        found = next(p for p in metadata.files("mlx") if p.name == "METADATA")
        place = Path(found.locate())
        other = hosts.folder / "METADATA"
        other.write_text(
            place.read_text().replace(f"Version: {metadata.version('mlx')}", "Version: 0.1")
        )
    else:
        place, other = Path(hpcmlx.__file__).parent, hosts.folder / "hpcmlx"
        shutil.copytree(place, other, ignore=shutil.ignore_patterns("__pycache__"))
        (other / "mesh.py").write_text((other / "mesh.py").read_text() + "# changed\n")
    run_dir = hosts.folder / f"other-{what}".replace(" ", "-")
    with hosts.another(hosts.names[2], place, other):
        job = hosts.job("generate", *generating, "parallel.pp=3", f"run_dir={run_dir}")
        outcome = job.wait(180)
    assert outcome.code == 78, outcome.err
    assert_says(outcome, f"host host2 (rank 2) has {what}", "rank 0 on host0 has", "same on every")
    assert_nothing_left(outcome, run_dir)
    hosts.assert_nobody_left()


CLOCK = """
import os, socket, sys, time
sys.modules["torch"] = None
if socket.gethostname() == "host1":
    clock = time.time
    time.time = lambda: clock() - (3600 if os.path.exists({mark!r}) else 0)
    time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.mark.fault
def test_a_clock_steps(hosts, tuning, losses):
    """The wall clock of one host goes back an hour on the way: no time in the results does."""
    patched, mark, steps = hosts.folder / "clock", hosts.folder / "clock/stepped", 60
    patched.mkdir()
    (patched / "sitecustomize.py").write_text(CLOCK.format(mark=str(mark)))
    run_dir = hosts.folder / "stepped"
    line = [*tuning, "parallel.dp=3", f"train.steps={steps}", "train.save_every=20"]
    job = hosts.job("finetune", *line, f"run_dir={run_dir}", env={"PYTHONPATH": str(patched)})
    job.until(lambda: committed(run_dir))
    mark.touch()
    assert_done(job.wait(180), run_dir)
    metrics = read_metrics(run_dir)["train"]
    np.testing.assert_allclose(metrics["loss"][:2], losses[:2], atol=1e-5)
    assert metrics["step"].tolist() == list(range(steps))
    for name, values in metrics.items():
        if "second" in name or "per_sec" in name:
            assert (values[np.isfinite(values)] >= 0).all(), name
    hosts.assert_nobody_left()


def assert_says(outcome: Outcome, *words: str) -> None:
    """One message has all of them."""
    said = [line for line in outcome.messages if all(word in line for word in words)]
    assert said, outcome.err
