"""A run's numbers: what survives a kill, what a resumed run makes of it, sinks, lines, curves."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import resource
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcmlx.errors import ConfigError, IntegrityError, StorageError
from hpcmlx.observe import curves
from hpcmlx.observe.metrics import FILES, METRICS, Metrics, format_step, read_metrics
from hpcmlx.observe.sinks import MLflow, open_sinks, require_sinks

PNG = b"\x89PNG\r\n\x1a\n"


def values(step):
    return {"loss": 3.0 / (step + 1), "num_tokens": 1000 + step, "tokens_per_sec": 100.1 * step}


def run(folder, *steps, first_step=0, **options):
    with Metrics(folder, first_step=first_step, **options) as metrics:
        for step in steps:
            metrics.log(step, values(step))
            if step % 2:
                metrics.log(step, {"loss": 4.0 / (step + 1)}, "eval")


def steps_of(folder):
    return {kind: columns["step"].tolist() for kind, columns in read_metrics(folder).items()}


def built(folder):
    with h5py.File(folder / METRICS) as file:
        return {kind: {k: v[:] for k, v in group.items()} for kind, group in file.items()}


def test_rows_come_back_as_they_were(tmp_path):
    run(tmp_path, *range(5))
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == [
        {"step": step, **values(step)} for step in range(5)
    ]
    assert rows[3]["num_tokens"] == "1003"
    found, file = read_metrics(tmp_path), built(tmp_path)
    assert found.keys() == file.keys() == {"train", "eval"}
    for kind, columns in found.items():
        assert columns.keys() == file[kind].keys()
        for name, column in columns.items():
            assert column.tolist() == file[kind][name].tolist()
    assert found["train"]["step"].dtype == np.int64
    assert found["eval"]["loss"].tolist() == [2.0, 1.0]


def test_columns_may_come_and_go(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.log(0, {"loss": 1.5})
        metrics.log(1, {"loss": np.float32(0.5), "idle": 0.25})
        metrics.log(2, {"idle": float("nan")})
        metrics.log(3, {"grad_norm": float("inf"), "loss": 2})
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,loss,idle,grad_norm",
        "0,1.5,,",
        "1,0.5,0.25,",
        "2,,nan,",
        "3,2,,inf",
    ]
    train = read_metrics(tmp_path)["train"]
    assert np.array_equal(train["loss"], [1.5, 0.5, np.nan, 2.0], equal_nan=True)
    assert np.array_equal(train["grad_norm"], [np.nan] * 3 + [np.inf], equal_nan=True)


def test_a_resumed_run_does_not_double_rows(tmp_path):
    run(tmp_path, *range(8))
    run(tmp_path, *range(5, 10), first_step=5)
    expected = {"train": list(range(10)), "eval": [1, 3, 5, 7, 9]}
    assert steps_of(tmp_path) == expected
    assert {kind: columns["step"].tolist() for kind, columns in built(tmp_path).items()} == expected
    with Metrics(tmp_path, first_step=4):  # rows that are cut off are nowhere, even before others
        assert (
            steps_of(tmp_path)["train"] == built(tmp_path)["train"]["step"].tolist() == [0, 1, 2, 3]
        )
    run(tmp_path)
    assert steps_of(tmp_path) == built(tmp_path) == {}
    run(tmp_path, 0)
    assert steps_of(tmp_path) == {"train": [0]}


@pytest.mark.fault
def test_a_torn_last_line_is_dropped_at_every_byte(tmp_path):
    run(tmp_path, *range(3))
    path = tmp_path / FILES["train"]
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        complete = max(whole[:size].count(b"\n") - 1, 0)
        found = steps_of(tmp_path).get("train", [])
        assert found == list(range(complete)), "a reader meanwhile"
        run(tmp_path, *range(complete, 3), first_step=complete)
        assert path.read_bytes() == whole
    path.write_bytes(whole + b"\0" * 100)  # what a power loss may leave
    run(tmp_path, 3, first_step=3)
    assert steps_of(tmp_path)["train"] == [0, 1, 2, 3]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("line", "replacement"),
    [(1, "loss,step"), (2, "0,1.0"), (3, "1,x,1001,1"), (3, "0,1,1,1"), (3, "1,1,1,\xff"), (2, "")],
)
def test_other_damage_is_refused(tmp_path, line, replacement):
    run(tmp_path, *range(4))
    path = tmp_path / FILES["train"]
    lines = path.read_text().splitlines()
    lines[line - 1] = replacement
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    message = rf"metrics\.csv is damaged at line {line};"
    with pytest.raises(IntegrityError, match=message):
        Metrics(tmp_path, first_step=4)
    with pytest.raises(IntegrityError, match=message):
        read_metrics(tmp_path)
    assert path.read_text(encoding="latin-1").splitlines() == lines


KILLED = """
import os, signal, sys
from pathlib import Path
from hpcmlx.observe.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]), rows_per_build=3)
for step in range(7):
    metrics.log(step, {"loss": step + 0.5})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault
def test_sigkill_loses_no_row(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert steps_of(tmp_path) == {"train": list(range(7))}
    assert built(tmp_path)["train"]["loss"].tolist() == [step + 0.5 for step in range(6)]
    with Metrics(tmp_path, first_step=7):
        assert built(tmp_path)["train"]["step"].tolist() == list(range(7))


@pytest.mark.fault
def test_a_full_disk_is_an_error_with_a_name(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics = Metrics(tmp_path, rows_per_build=10_000)
    metrics.log(0, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=r"no room for .*metrics\.csv"):
            for step in range(1, 10_000):
                metrics.log(step, {"loss": 0.123456789})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(read_metrics(tmp_path)["train"]["step"]) == step  # of 0 ... step - 1
    run(tmp_path, step, first_step=step)
    assert steps_of(tmp_path)["train"] == list(range(step + 1))


def test_the_h5_file_is_built_now_and_then_and_on_flush(tmp_path):
    metrics = Metrics(tmp_path, rows_per_build=4)
    seen = []
    for step in range(9):
        metrics.log(step, {"loss": 1.0})
        there = (tmp_path / METRICS).exists()
        seen.append(len(built(tmp_path)["train"]["step"]) if there else 0)
    assert seen == [0, 0, 0, 4, 4, 4, 4, 8, 8]
    metrics.flush()
    assert len(built(tmp_path)["train"]["step"]) == 9


def test_other_ranks_write_nothing(tmp_path):
    run(tmp_path, 0, 1, enabled=False)
    assert not list(tmp_path.iterdir())


def test_wrong_rows_are_bugs(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.log(3, {"loss": 1.0})
        for step, row in ((3, {"loss": 1.0}), (4, {"a,b": 1.0}), (4, {"step": 4}), (4, {})):
            with pytest.raises(ValueError, match=r"metrics\.csv"):
                metrics.log(step, row)
        with pytest.raises(KeyError):
            metrics.log(4, {"loss": 1.0}, "evaluation")
    assert steps_of(tmp_path) == {"train": [3]}


# -- sinks --


class Recorder:
    def __init__(self, fail_at=None):
        self.rows, self.closed, self._fail_at = [], 0, fail_at

    def log(self, kind, step, values):
        if step == self._fail_at:
            raise ConnectionError("no\nroute")
        self.rows.append((kind, step, dict(values)))

    def close(self):
        self.closed += 1


def test_sinks_get_every_row_and_a_broken_one_stops_nothing(tmp_path, caplog):
    good, bad = Recorder(), Recorder(fail_at=1)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 0, 1, 2, sinks=[bad, good])
    assert [row[:2] for row in good.rows] == [("train", 0), ("train", 1), ("eval", 1), ("train", 2)]
    assert good.rows[3][2] == values(2) and good.closed == 1
    assert [row[1] for row in bad.rows] == [0] and bad.closed == 0
    [record] = caplog.records
    assert "Recorder takes no more metrics (ConnectionError: no route)" in record.getMessage()
    assert steps_of(tmp_path)["train"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name):
    find_spec = importlib.util.find_spec
    absent = {"tensorboardX", "wandb", "mlflow"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name)
    )
    with pytest.raises(ConfigError, match=rf"pip install 'hpcmlx\[{name}\]'"):
        require_sinks([name])
    with pytest.raises(ConfigError, match="choose from tensorboard, wandb, mlflow"):
        require_sinks(["tensorbord"])


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboardX", reason="NOT CHECKED: tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    for first_step, steps in ((0, range(3)), (2, range(2, 4))):
        sinks = open_sinks(["tensorboard"], tmp_path, first_step)
        run(tmp_path, *steps, first_step=first_step, sinks=sinks)
    seen = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length, CRC, payload, CRC
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                seen.append(("restart", event.step))
            seen += [(v.tag, event.step) for v in event.summary.value if v.tag.endswith("loss")]
    first = [("train/loss", 0), ("train/loss", 1), ("eval/loss", 1), ("train/loss", 2)]
    again = [("restart", 2), ("train/loss", 2), ("train/loss", 3), ("eval/loss", 3)]
    assert seen == first + again


class FakeWandB(ModuleType):
    """The parts of wandb 0.31 that are used, with its parameters."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, *, project=None, dir=None, name=None, group=None, mode=None, settings=None):
        self.calls.append(("init", project, dir, name, group, mode, settings))
        return self

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None):
        self.calls.append(("define_metric", name, step_metric))

    def log(self, data, step=None, commit=None):
        assert step is None and commit is None
        self.calls.append(("log", data))

    def finish(self, exit_code=None):
        self.calls.append(("finish", exit_code))


def test_wandb(tmp_path, monkeypatch):
    fake = FakeWandB()
    fake.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "night"
    folder.mkdir()
    run(folder, 5, first_step=5, sinks=open_sinks(["wandb"], folder, 5))
    named = {f"train/{name}": value for name, value in values(5).items()}
    assert fake.calls == [
        (
            "init",
            "hpcmlx",
            str(folder),
            "night from step 5",
            "night",
            "offline",
            {"console": "off"},
        ),
        ("define_metric", "*", "step"),
        ("log", {"step": 5, **named}),
        ("log", {"step": 5, "eval/loss": 4 / 6}),
        ("finish", None),
    ]


class FakeMLflow(ModuleType):
    """The parts of mlflow 3.17 that are used, with its parameters; module and client in one."""

    def __init__(self):
        super().__init__("mlflow")
        self.calls = []

    def MlflowClient(self, tracking_uri=None, registry_uri=None):
        self.calls.append(("client", tracking_uri))
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, artifact_location=None, tags=None):
        return "7"

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        self.calls.append(("run", experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert run_id == "abc" and len(metrics) <= 1000
        self.calls.append(("batch", [(m.key, m.value, m.step) for m in metrics]))

    def set_terminated(self, run_id, status=None, end_time=None):
        self.calls.append(("end", run_id))


def fake_mlflow(monkeypatch):
    fake = FakeMLflow()
    fake.__spec__ = SimpleNamespace()
    entities = ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(
        key=key, value=value, timestamp=timestamp, step=step
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return fake


def test_mlflow(tmp_path, monkeypatch):
    fake = fake_mlflow(monkeypatch)
    folder = tmp_path / "night"
    folder.mkdir()
    with Metrics(folder, open_sinks(["mlflow"], folder)) as metrics:
        metrics.log(0, {"loss": 2, "lr": 0.5})
        metrics.log(0, {"loss": 3.0}, "eval")
    assert fake.calls == [
        ("client", f"sqlite:///{folder}/mlflow.db"),
        ("run", "7", "night"),
        ("batch", [("train/loss", 2.0, 0), ("train/lr", 0.5, 0), ("eval/loss", 3.0, 0)]),
        ("end", "abc"),
    ]


def test_mlflow_gets_batches(tmp_path, monkeypatch):
    fake, now = fake_mlflow(monkeypatch), [0.0]
    sink = MLflow(tmp_path, 0, clock=lambda: now[0])
    for step in range(12):
        now[0] += 1.0
        sink.log("train", step, {"loss": 1.0, **{f"x{i}": 1.0 for i in range(200 * (step == 11))}})
    sizes = [len(call[1]) for call in fake.calls if call[0] == "batch"]
    assert sizes == [5, 5]  # one every 5 s, and what is waiting
    for step in range(12, 15):
        sink.log("train", step, {f"x{i}": 1.0 for i in range(200)})
    sink.close()
    sizes = [len(call[1]) for call in fake.calls if call[0] == "batch"]
    assert sizes == [5, 5, 500, 102, 200] and fake.calls[-1] == ("end", "abc")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_real_ones(tmp_path, monkeypatch, name):
    pytest.importorskip(name, reason=f"NOT CHECKED: {name} is not installed")
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    run(tmp_path, 0, 1, sinks=open_sinks([name], tmp_path))
    if name == "wandb":
        assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
        return
    client = sys.modules["mlflow"].MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    [kept] = client.search_runs([client.get_experiment_by_name("hpcmlx").experiment_id])
    history = client.get_metric_history(kept.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(0, 3.0), (1, 1.5)]
    assert kept.info.status == "FINISHED" and kept.info.run_name == tmp_path.name


def test_a_sink_that_cannot_be_opened(tmp_path, monkeypatch):
    fake = FakeWandB()
    fake.__spec__ = SimpleNamespace()

    def init(**options):
        raise RuntimeError("api key\nnot configured")

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ConfigError, match="cannot open wandb: RuntimeError: api key not config"):
        open_sinks(["wandb"], tmp_path)


# -- for people --


def test_the_line_of_a_step():
    row = {"loss": 2.34567, "grad_norm": 0.51234, "learning_rate": 1e-4, "tokens_per_sec": 12345.6}
    row |= {"peak_memory_gib": 3.25, "idle": 0.123, "num_tokens": 512}
    assert format_step(3, 100, row) == (
        "step   3/100  loss 2.3457  grad norm 0.512  lr 1.00e-04  12,346 tok/s  3.25 GiB  idle 12%"
    )
    assert format_step(99, 100, {"loss": float("nan")}) == "step  99/100  loss nan"


def test_smoothing_is_a_mean_of_what_is_there():
    line = np.array([1.0, 2.0, np.nan, 6.0, np.inf, np.nan, np.nan])
    expected = [1.5, 1.5, 4.0, 6.0, 6.0, np.nan, np.nan]
    assert curves.smooth(line, 3) == pytest.approx(expected, nan_ok=True)
    rng = np.random.default_rng(0)
    line = rng.normal(size=100)
    middle = [line[i - 3 : i + 4].mean() for i in range(3, 97)]
    assert curves.smooth(line, 7)[3:97] == pytest.approx(middle)


@pytest.mark.parametrize("num_steps", [0, 3, 200])
def test_the_curves(tmp_path, monkeypatch, num_steps):
    text = pytest.importorskip("matplotlib.text")
    said, original = [], text.Text.set_text

    def set_text(self, words):
        said.append(str(words))
        original(self, words)

    monkeypatch.setattr(text.Text, "set_text", set_text)
    run(tmp_path, *range(num_steps))
    assert curves.draw(read_metrics(tmp_path), "dp2_pp1_tp1").startswith(PNG)
    assert ("training" in said) == ("evaluation" in said) == (num_steps > 0)
    heading = {
        0: "dp2_pp1_tp1",
        3: "dp2_pp1_tp1: loss 3 → 1, evaluation 2 → 2, 100 tok/s",
        200: "dp2_pp1_tp1: loss 3 → 0.015, evaluation 2 → 0.02, 9,960 tok/s",
    }
    assert heading[num_steps] in said


def test_without_matplotlib_there_are_no_curves(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hpcmlx\[plot\]'"):
        curves.draw({})


def test_files_are_private(tmp_path):
    run(tmp_path, 0, 1)
    for name in (*FILES.values(), METRICS):
        assert os.stat(tmp_path / name).st_mode & 0o777 == 0o600
