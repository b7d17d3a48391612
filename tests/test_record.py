"""`run.json`, the head of `summary.json`, energy and `report.html`: what a run says of itself."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcmlx import faults, record
from hpcmlx.comm import Communicator
from hpcmlx.errors import ExitCode, IntegrityError
from hpcmlx.observe import energy, report, summary
from hpcmlx.observe.chart import chart, ticks
from hpcmlx.observe.energy import AppleMeter, NoMeter, RaplMeter, Reading
from hpcmlx.observe.record import this_host
from hpcmlx.record import Cause, Exit
from hpcmlx.rundir import lock_run_dir
from hpcmlx.versions import git_state
from tests.fixtures import (
    ROOT,
    Running,
    assert_done,
    job_line,
    model,  # noqa: F401
    run,
    run_line,
    start,
    stop_early,
    stopped_rank,
    write_rows,
)

HEAD = [
    "job",
    "layout",
    "seconds",
    "tokens",
    "tokens_per_sec",
    "energy",
    "joules_per_token",
    "exit",
]
HOST = socket.gethostname()


def launch_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())["launches"][-1]


def json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# -- a job that completes, of each kind --


@pytest.fixture(scope="module")
def tuning(model, tmp_path_factory) -> list[str]:  # noqa: F811
    folder = tmp_path_factory.mktemp("tuning")
    rows = [{"prompt": f"{i}?", "completion": f"{'NESW'[i % 4]}!"} for i in range(12)]
    train = write_rows(folder / "train.jsonl", rows)
    return [
        *(f"model.path={model}", f"data.train=[{train}]", f"data.cache={folder}/cache"),
        *("train.batch_size=4", "train.steps=3", "method.rank=2"),
    ]


@pytest.fixture(scope="module")
def generated(model, tmp_path_factory) -> Path:  # noqa: F811
    """A generate run on two ranks, with a row that cannot be answered and a hostile one."""
    folder = tmp_path_factory.mktemp("generated")
    rows = [{"id": HOSTILE, "prompt": "<b>a</b>"}, {"id": "b", "prompt": "b"}, "{"]
    prompts = write_rows(folder / "in.jsonl", rows)
    line = [f"model.path={model}", f"input={prompts}", "sampling.max_tokens=5", "parallel.pp=2"]
    outcome = run("generate", *line, "launch=mpirun", f"run_dir={folder}/run")
    assert outcome.code == 64, outcome.err
    assert "energy: " in outcome.err
    return folder / "run"


HOSTILE = "</pre><script>document.title='taken'</script><img src=x onerror=alert(1)>\"'&"


def test_the_entry_of_a_launch(generated):
    found = json_of(generated / "run.json")
    assert found["job"] == "generate"
    [launch] = found["launches"]
    assert launch["layout"] == "dp1_pp2_tp1" and launch["config"]["sampling"]["max_tokens"] == 5
    assert any(word.endswith("jobs/generate.py") for word in launch["command"])
    assert launch["versions"]["python"] and launch["source"]
    assert launch["git"].keys() & {"commit", "absent"}
    assert [host["rank"] for host in launch["hosts"]] == [0, 1]
    for host in launch["hosts"]:
        assert host["host"] == HOST and host["system"] and host["memory_bytes"] > 1 << 30
    assert launch["started"] <= launch["ended"] and launch["seconds"] > 0
    assert launch["exit"] == {
        "cause": "complete with row errors",
        "code": 64,
        "message": "",
        "rank": None,
        "host": None,
    }
    used = launch["energy"]
    if used["joules"] is None:  # as on most virtual machines: said, not guessed
        assert used["not_measured"] == {
            HOST: "no RAPL on this host (/sys/class/powercap is empty or not readable)"
        }


def test_every_summary_has_the_same_head(generated, model, tuning, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("Hello, and hello again. " * 4)
    line = [f"model.path={model}", f"input={text}", f"run_dir={tmp_path}/evaluate"]
    assert_done(run("evaluate", *line), tmp_path / "evaluate")
    assert_done(run("finetune", *tuning, f"run_dir={tmp_path}/finetune"), tmp_path / "finetune")
    for run_dir in (generated, tmp_path / "evaluate", tmp_path / "finetune"):
        found = json_of(run_dir / "summary.json")
        assert list(found)[: len(HEAD)] == HEAD
        assert found["job"] == (run_dir.name if run_dir != generated else "generate")
        took = found["tokens"] / found["tokens_per_sec"]
        assert found["tokens"] > 0 and found["seconds"] == pytest.approx(took, abs=0.001)
        assert found["exit"].startswith("complete")
        assert {"joules", "not_measured", "hosts"} <= found["energy"].keys()
        assert launch_of(run_dir)["exit"]["cause"] == found["exit"]
    page = (tmp_path / "finetune/report.html").read_text()
    assert "<svg" in page and "optimizer step" in page and "evaluation" not in page


def test_the_host_table_is_quick():
    begin = time.perf_counter()
    this_host(0)
    assert time.perf_counter() - begin < 1


# -- one that does not --


@pytest.mark.fault
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_is_named(model, tmp_path, rank):  # noqa: F811
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    line = [f"model.path={model}", f"input={prompts}", "parallel.pp=2", f"run_dir={tmp_path}/run"]
    outcome = run(
        "generate", *line, "launch=mpirun", env={faults.ENV: f"rank={rank},step=2,kind=exception"}
    )
    assert outcome.code == 70
    said = launch_of(tmp_path / "run")["exit"]
    assert (said["cause"], said["code"]) == ("failed", 70)
    assert (said["rank"], said["host"]) == (rank, HOST)
    assert "RuntimeError" in said["message"] and "\n" not in said["message"]
    assert json_of(tmp_path / "run/status.json")["state"] == "failed"
    assert "RuntimeError" in (tmp_path / "run/report.html").read_text()


@pytest.mark.fault
def test_a_record_that_cannot_be_written_holds_up_no_failure():
    """As on a disk that does not answer."""
    script = """
import time
from hpcmlx import job
from hpcmlx.observe.record import RunRecord
RunRecord.fail = lambda *_: time.sleep(100)
job._fail(ValueError("why"), None, RunRecord())
"""
    outcome = run_line([sys.executable, "-c", script])
    assert outcome.code == ExitCode.INTERNAL and "ValueError: why" in outcome.err
    assert outcome.after("unexpected ValueError") < 20


@pytest.mark.fault
def test_a_rank_that_is_killed_is_noted_by_the_launcher(model, tmp_path):  # noqa: F811
    """Neither the killed rank nor the other, which mpirun ends, can say it."""
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    line = [f"model.path={model}", f"input={prompts}", "parallel.pp=2", f"run_dir={tmp_path}/run"]
    kill = {faults.ENV: "rank=1,step=2,kind=kill"}
    outcome = run("generate", *line, "launch=mpirun", env=kill)
    assert outcome.code not in (0, 64)
    said = launch_of(tmp_path / "run")["exit"]
    assert said["cause"] in ("killed", "failed", "lost peer") and said["message"], said
    assert json_of(tmp_path / "run/status.json")["state"] == "failed"
    outcome = run("generate", *line, "launch=mpirun")  # goes on, and both launches are there
    assert_done(outcome, tmp_path / "run")
    causes = [one["exit"]["cause"] for one in json_of(tmp_path / "run/run.json")["launches"]]
    assert causes == [said["cause"], "complete"]


@pytest.mark.fault
def test_where_nobody_is_left_a_reader_can_tell(model, tmp_path):  # noqa: F811
    run_dir, prompts = tmp_path / "run", write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    line = [f"model.path={model}", f"input={prompts}", f"run_dir={run_dir}"]
    job = start("generate", *line, env={faults.ENV: "rank=0,step=2,kind=hang"})
    job.wait_for("injected fault")
    assert record.how_it_ended(run_dir) is None  # under way
    assert "under way" in report.page(run_dir)
    job.kill()
    assert job.wait().code == -signal.SIGKILL
    assert (
        launch_of(run_dir)["exit"] is None
        and json_of(run_dir / "status.json")["state"] == "running"
    )
    said = record.how_it_ended(run_dir)
    assert said is not None and said.cause is Cause.KILLED and said.code is None
    outcome = run_line(job_line("report", str(run_dir)))
    assert outcome.code == 0 and outcome.out.strip() == str(run_dir / "report.html")
    assert "nobody holds its lock" in (run_dir / "report.html").read_text()


@pytest.mark.fault
def test_one_that_is_asked_to_stop_is_preempted(tuning, tmp_path):
    line = job_line("finetune", *tuning, "train.steps=50")
    fault = {faults.ENV: "rank=0,step=3,kind=stop"}
    job = Running([*line, f"run_dir={tmp_path}/run"], ROOT, fault)
    stop_early(job, stopped_rank(job))
    assert job.wait().code == ExitCode.PREEMPTED
    said = launch_of(tmp_path / "run")["exit"]
    assert (said["cause"], said["code"]) == ("preempted", 76)


def test_what_mpirun_ends_with():
    assert record.mpirun_death(0).cause is Cause.LOST
    assert record.mpirun_death(-9).message == "mpirun was killed by signal 9 (SIGKILL)"
    assert record.mpirun_death(143) == Exit(Cause.KILLED, 143, "ended by signal 15 (SIGTERM)")
    assert record.mpirun_death(70).cause is Cause.FAILED
    assert record.mpirun_death(76).cause is Cause.PREEMPTED


def begun(run_dir: Path, token: str = "now") -> Path:
    run_dir.mkdir(exist_ok=True)
    record.begin(run_dir, "generate", {"token": token, "layout": "dp1_pp1_tp1"})
    return run_dir


def test_the_first_word_counts(tmp_path):
    """A rank says why; the launcher, later, only that."""
    begun(tmp_path)
    (tmp_path / "status.json").write_text('{"state": "running", "error": null}')
    assert not record.end(tmp_path, "another launch", Exit(Cause.FAILED, 70))
    assert record.end(tmp_path, "now", Exit(Cause.FAILED, 78, "why", 1, "there"))
    record.note_death(tmp_path, "now", Exit(Cause.FAILED, 78, "mpirun ended with 78"))
    assert launch_of(tmp_path)["exit"]["message"] == "why"
    # But for a claim of success without the record of it.
    begun(tmp_path, "later")
    assert record.end(tmp_path, "later", Exit(Cause.COMPLETE, 0))
    record.note_death(tmp_path, "later", Exit(Cause.KILLED, 75, "mpirun was killed"))
    assert launch_of(tmp_path)["exit"]["cause"] == "killed"
    status = json_of(tmp_path / "status.json")
    assert (status["state"], status["error"]) == ("failed", "mpirun was killed")


def test_a_preempted_launch_is_left_as_it_is(tmp_path):
    begun(tmp_path)
    (tmp_path / "status.json").write_text('{"state": "stopped"}')
    record.end(tmp_path, "now", Exit(Cause.PREEMPTED, 76))
    record.note_death(tmp_path, "now", record.mpirun_death(76))
    assert json_of(tmp_path / "status.json") == {"state": "stopped"}
    assert launch_of(tmp_path)["exit"]["cause"] == "preempted"


def test_a_lock_says_that_it_is_under_way(tmp_path):
    begun(tmp_path)
    fd = lock_run_dir(tmp_path)
    assert record.how_it_ended(tmp_path) is None
    os.close(fd)
    ended = record.how_it_ended(tmp_path)
    assert ended is not None and ended.cause is Cause.KILLED


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": "x"}', '{"job": 1, "launches": [{}]}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(IntegrityError, match="run.json is no run record"):
        record.read(tmp_path)


def test_git(tmp_path):
    assert git_state(tmp_path)["absent"] == f"{tmp_path} is no git checkout"

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    git("init")
    assert "absent" in git_state(tmp_path)  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = git_state(tmp_path)
    assert len(str(clean["commit"])) == 40 and not clean["dirty"] and clean["diff"] is None
    (tmp_path / "a").write_text("2")
    dirty = git_state(tmp_path)
    assert dirty["commit"] == clean["commit"] and dirty["dirty"] and len(str(dirty["diff"])) == 64


# -- energy --


def zone(root: Path, name: str, label: str, micro: int, most: int = 262_143_328_850) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / "energy_uj").write_text(f"{micro}\n")
    return folder


@pytest.fixture
def powercap(tmp_path) -> Path:
    """As on a server with two packages; /sys/class/powercap has all zones side by side."""
    root = tmp_path / "powercap"
    zone(root, "intel-rapl:0", "package-0", 1_000_000)
    zone(root, "intel-rapl:0:0", "core", 500_000)
    zone(root, "intel-rapl:0:1", "dram", 2_000_000)
    zone(root, "intel-rapl:1", "package-1", 5_000_000)
    zone(root, "intel-rapl:2", "psys", 7_000_000)
    zone(root, "intel-rapl-mmio:0", "package-0", 1_000_000)
    (root / "intel-rapl").mkdir()
    return root


def add(folder: Path, joules: float) -> None:
    path = folder / "energy_uj"
    most = int((folder / "max_energy_range_uj").read_text())
    path.write_text(str((int(path.read_text()) + int(joules * 1e6)) % most))


def test_packages_and_memory_count_once(powercap):
    meter = energy.open_meter("linux", powercap)
    for name in os.listdir(powercap):
        if (powercap / name / "energy_uj").exists():
            add(powercap / name, 10.0)
    reading = meter.stop()
    assert reading.parts == {
        "package-0": pytest.approx(10),
        "package-0 dram": pytest.approx(10),
        "package-1": pytest.approx(10),
    }
    assert reading.joules == pytest.approx(30) and reading.source == "RAPL"


def test_counters_that_wrap_around(tmp_path):
    """More than once, which only a reading in between can see."""
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 90_000_000, most=100_000_000)
    meter = RaplMeter(tmp_path, period=3600)
    total = 0.0
    for joules in (30.0, 80.0, 95.0, 5.0):
        add(folder, joules)
        meter._read()
        total += joules
    assert meter.stop().joules == pytest.approx(total)


def test_the_thread_reads_in_between(tmp_path):
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 90_000_000, most=100_000_000)
    meter = RaplMeter(tmp_path, period=0.01)
    for _ in range(3):
        add(folder, 60.0)
        seen = meter._counters[0].joules
        end = time.monotonic() + 20
        while meter._counters[0].joules == seen and time.monotonic() < end:
            time.sleep(0.005)
    assert meter.stop().joules == pytest.approx(180)


def test_a_host_without_counters_says_so(tmp_path):
    assert energy.open_meter("linux", tmp_path / "none").stop() == Reading(
        reason=f"no RAPL on this host ({tmp_path}/none is empty or not readable)"
    )
    zone(tmp_path, "intel-rapl:0", "package-0", 0).joinpath("energy_uj").unlink()
    reading = energy.open_meter("linux", tmp_path).stop()
    assert reading.joules is None and "energy_uj: No such file" in reading.reason


def test_a_counter_that_goes_away(powercap):
    meter = RaplMeter(powercap)
    (powercap / "intel-rapl:1/energy_uj").rename(powercap / "away")
    meter._read()
    (powercap / "away").rename(powercap / "intel-rapl:1/energy_uj")  # wrapped around, or not?
    reading = meter.stop()
    assert reading.joules is None and "intel-rapl:1/energy_uj" in reading.reason


class Monitor:
    """A stand-in of zeus's AppleEnergyMonitor."""

    def begin_window(self, key: str) -> None:
        self.key = key

    def end_window(self, key: str) -> SimpleNamespace:
        assert key == self.key
        cores = {"efficiency_cores_mj": [1, 2], "performance_cores_mj": [3]}
        return SimpleNamespace(
            cpu_total_mj=4000, gpu_mj=20_000, gpu_sram_mj=None, dram_mj=1500, ane_mj=0, **cores
        )


def test_a_mac(monkeypatch):
    reading = AppleMeter(SimpleNamespace(AppleEnergyMonitor=Monitor)).stop()
    assert reading.parts == {"cpu": 4.0, "gpu": 20.0, "dram": 1.5, "ane": 0.0}
    assert (reading.joules, reading.source) == (25.5, "zeus")

    def refuse() -> None:
        raise RuntimeError("no IOReport")

    with pytest.raises(energy.NotMeasuredError, match="no IOReport"):
        AppleMeter(SimpleNamespace(AppleEnergyMonitor=refuse))
    monkeypatch.setitem(__import__("sys").modules, "zeus_apple_silicon", None)
    assert "pip install 'hpcmlx[energy]'" in energy.open_meter("darwin").stop().reason


def test_joules_of_hosts_are_added_and_never_guessed():
    both = {"a": Reading(30.0, {"gpu": 30.0}, "zeus"), "b": Reading(60.0, {}, "RAPL")}
    found = energy.combine(both, 2.0)
    assert found["joules"] == 90 and energy.per_token(found, 45) == 2
    assert energy.per_token(found, None) is None and energy.per_token(found, 0) is None
    assert (
        energy.describe(found | {"joules_per_token": 2.0}) == "energy: 90 J in 2.0 s, 2 J a token"
    )
    some = energy.combine(both | {"c": NoMeter("no RAPL").stop()}, 2.0)
    assert some["joules"] == 90 and energy.per_token(some, 45) is None
    assert energy.describe(some) == "energy: 90 J in 2.0 s; without c: no RAPL"
    none = energy.combine({"c": Reading(reason="no RAPL"), "d": Reading(reason="no RAPL")}, 2.0)
    assert none["joules"] is None and energy.describe(none) == "energy: not measured: no RAPL"


def test_the_head_is_finished(tmp_path):
    totals = {"layout": "dp1_pp1_tp1", "rows": 3}
    summary.write_summary(Communicator(), tmp_path, totals, {}, seconds=2.0, num_tokens=10)
    found = json_of(tmp_path / "summary.json")
    assert list(found)[: len(HEAD)] == HEAD and found["exit"] is None
    used = energy.combine({"a": Reading(30.0, {}, "RAPL")}, 4.0)
    summary.finish_summary(tmp_path, "generate", used, "complete")
    found = json_of(tmp_path / "summary.json")
    assert (found["job"], found["exit"], found["joules_per_token"]) == ("generate", "complete", 3)
    assert (found["tokens_per_sec"], found["rows"]) == (5.0, 3)


# -- the page --


class Page(HTMLParser):
    """What a browser would make of it."""

    VOID = frozenset(["meta", "img", "line", "circle", "path"])

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_harmless(page: Page) -> None:
    """No script, nothing fetched, no markup but the template's own."""
    known = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "b", "dl"}
    known |= {"dt", "dd", "div", "table", "tr", "th", "td", "pre", "span", "figure", "figcaption"}
    known |= {"svg", "line", "text", "path", "circle", "img", "details", "summary", "footer"}
    assert {tag for tag, _ in page.tags} <= known
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:image/png;").startswith("data:image/png;")


def test_the_page_of_a_run(generated):
    text = (generated / "report.html").read_text()
    page = Page(text)
    assert_harmless(page)
    for words in (HOSTILE, "dp1_pp2_tp1", "complete with row errors", HOST, "max_tokens: 5"):
        assert words in page.text
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text
    assert "results.jsonl" in page.text and "errors.jsonl" in page.text


def test_a_page_made_of_hostile_files(tmp_path):
    """Whatever lies in a run directory is text, in every place of the page."""
    hostile = f"{HOSTILE}{{{{ 7 * 7000001 }}}}{{% for %}}"
    run_dir = tmp_path / "<script>alert(1)<"
    run_dir.mkdir()
    host = {"rank": hostile, hostile: hostile}
    launch = {"token": "t", "layout": hostile, "command": [hostile], "config": {hostile: hostile}}
    record.begin(run_dir, hostile, launch | {"hosts": [host], "versions": {hostile: hostile}})
    record.end(run_dir, "t", Exit(Cause.FAILED, 70, hostile, 1, hostile))
    record.begin(run_dir, hostile, launch | {"git": {"absent": hostile}})
    record.end(run_dir, "t", Exit(Cause.FAILED, 70, hostile, 1, hostile))
    totals = {"layout": hostile, hostile: hostile, "ranks": [{hostile: hostile}]}
    (run_dir / "summary.json").write_text(json.dumps(totals))
    rows = [
        {"custom_id": hostile, "response": {"body": {"choices": [{"text": hostile}]}}},
        {"custom_id": hostile, "response": {"body": {"choices": []}}},
        {"id": hostile, "text": hostile},
        {"id": hostile, "error": {"message": hostile}},
        hostile,
    ]
    for name in report.ROWS:
        write_rows(run_dir / name, rows)
    (run_dir / "metrics.csv").write_text(f"step,{hostile}\n0,1\n")
    (run_dir / "pipeline.png").write_bytes(b'"><script>')
    page = Page(report.page(run_dir))
    assert_harmless(page)
    assert "{{ 7 * 7000001 }}" in page.text and "49000007" not in page.text
    [picture] = [attributes for tag, attributes in page.tags if tag == "img"]
    assert base64.b64decode(str(picture["src"]).partition(",")[2]) == b'"><script>'


def test_a_page_that_cannot_be_drawn_is_no_failure(model, tmp_path):  # noqa: F811
    """A directory is in its place."""
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    line = [f"model.path={model}", f"input={prompts}", f"run_dir={tmp_path}/run"]
    assert_done(run("generate", *line), tmp_path / "run")
    (tmp_path / "run/report.html").unlink()
    (tmp_path / "run/report.html").mkdir()
    outcome = run("generate", *line)
    assert_done(outcome, tmp_path / "run")
    assert "no report.html: " in outcome.err


def test_a_page_of_nothing(tmp_path):
    outcome = run_line(job_line("report", str(tmp_path)))
    assert outcome.code == 78 and "no run.json in it" in outcome.err


def test_charts():
    assert ticks(0, 4.7) == [0, 1, 2, 3, 4, 5] and ticks(3, 3)[0] <= 3 <= ticks(3, 3)[-1]
    x = np.arange(10_000)
    y = np.where(x % 1000 == 0, np.nan, 1.0)
    drawn = chart("loss", "step", [("a", x, y), ("none", np.empty(0), np.empty(0))])
    assert drawn is not None
    [line] = drawn.lines
    numbers = [float(n) for n in re.findall(r"[\d.]+", line.path)]
    assert len(numbers) <= 2 * 500 and "nan" not in line.path and line.path.count("M") > 1
    assert min(numbers[::2]) >= drawn.left - 0.1 and max(numbers[::2]) <= drawn.right + 0.1
    assert chart("loss", "step", [("a", np.array([1]), np.array([1.0]))]) is None
