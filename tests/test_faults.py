"""Whatever fails, every rank of the job ends at once, with one line that says what to do, the right
exit code and no claim of success."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

from hpcmlx import comm, faults
from hpcmlx.errors import ConfigError
from hpcmlx.job import Peer, check_peers
from tests.fixtures import (
    GRACE,
    ROOT,
    Outcome,
    assert_done,
    assert_nothing_left,
    assert_refused,
    copy_model,
    job_line,
    mpirun,
    run,
    run_line,
    save_model,
    start,
    write_rows,
)
from tests.fixtures import model as model

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def prompts(folder) -> Path:
    return write_rows(folder / "prompts.jsonl", [{"prompt": "Hello"}, {"prompt": "ab"}])


@pytest.fixture
def line(model, prompts, tmp_path) -> list[str]:
    """Overrides of a job that would succeed; its run directory is `tmp_path / "run"`."""
    settings = [f"model.path={model}", f"input={prompts}", f"run_dir={tmp_path / 'run'}"]
    return [*settings, "sampling.max_tokens=16"]


# -- models that cannot be used --


def index_with_two_shards(path: Path) -> None:
    """Cut model.safetensors into two shards with an index."""
    weights = mx.load(str(path / "model.safetensors"))
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{i:05}-of-00002.safetensors"
        mx.save_safetensors(str(path / shard), {n: weights[n] for n in part}, {"format": "mlx"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path: Path, num_bytes: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - num_bytes)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x80
    path.write_bytes(data)


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def damaged_models(model: Path, folder: Path) -> dict[str, Path]:
    """One model directory for each thing that can be wrong; nobody may touch `folder / "mark"`."""
    mark = folder / "mark"
    code = f"open({str(mark)!r}, 'w')\nclass Model: pass\nclass ModelArgs: pass\n"
    unknown = {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
    made = {
        "truncated": copy_model(model, folder / "truncated"),
        "header": copy_model(model, folder / "header"),
        "shard": copy_model(model, folder / "shard"),
        "unknown": copy_model(model, folder / "unknown", **unknown),
        "auto_map": copy_model(
            model,
            folder / "auto_map",
            **unknown,
            auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.ModelArgs"},
        ),
        "model_file": copy_model(model, folder / "model_file", model_file="evil.py"),
        "pickle": copy_model(model, folder / "pickle"),
        "tokenizer": copy_model(model, folder / "tokenizer"),
    }
    for path in made.values():
        (path / "evil.py").write_text(code)
    truncate(made["truncated"] / "model.safetensors", 100)
    flip(made["header"] / "model.safetensors", 40)
    index_with_two_shards(made["shard"])
    (made["shard"] / "model-00002-of-00002.safetensors").unlink()
    (made["pickle"] / "model.safetensors").unlink()
    (made["pickle"] / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    file = made["tokenizer"] / "tokenizer_config.json"
    own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Model", "evil.Model"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    (made["tokenizer"] / "tokenizer.json").unlink()
    return made


MODELS = {
    "truncated": (77, ["model.safetensors", "the file has", "copy the file again"]),
    "header": (77, ["model.safetensors", "bad safetensors header", "copy the file again"]),
    "shard": (77, ["model-00002-of-00002.safetensors is missing", "copy or fetch"]),
    "unknown": (78, ["'evil'", "upgrade mlx-lm or use another model"]),
    "auto_map": (78, ["evil", "auto_map", "never done"]),
    "model_file": (78, ["model_file", "evil.py", "never done"]),
    "pickle": (78, ["pytorch_model.bin", "never opened", "safetensors"]),
    "tokenizer": (78, ["tokenizer"]),
}


@pytest.fixture(scope="module")
def with_models(model, prompts, folder) -> dict[str, Outcome]:
    """What the job says to each damaged model, two at a time."""
    models = damaged_models(model, folder)

    def go(name: str) -> Outcome:
        run_dir = folder / f"run-{name}"
        path = f"model.path={models[name]}"
        return run("generate", path, f"input={prompts}", f"run_dir={run_dir}")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MODELS, pool.map(go, MODELS), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_used(with_models, folder, name):
    code, words = MODELS[name]
    assert_refused(with_models[name], code, *words, run_dir=folder / f"run-{name}")
    assert not (folder / "mark").exists(), "code of the model directory was run"


def test_a_model_that_one_host_has_incomplete(model, prompts, tmp_path):
    # Without a shared file system each rank has its own `llama` in its own directory.
    for rank in (0, 1):
        shutil.copytree(model, tmp_path / f"host{rank}" / "llama")
    truncate(tmp_path / "host1/llama/model.safetensors", 100)
    run_dir = tmp_path / "run"
    job = job_line("generate", "model.path=llama", f"input={prompts}", f"run_dir={run_dir}")
    job += ["parallel.pp=2"]
    wdir = [["-n", "1", "-wdir", str(tmp_path / f"host{rank}")] for rank in (0, 1)]
    outcome = run_line([*mpirun(), *wdir[0], *job, ":", *wdir[1], *job])
    words = [f"rank 1 on {comm.hostname()}", "model.safetensors", "copy the file again"]
    assert_refused(outcome, 77, *words, run_dir=run_dir)


# -- layouts that cannot be --


@pytest.mark.parametrize(
    ("ranks", "layout", "changes", "code", "words"),
    [
        (3, ["parallel.tp=2"], {}, 2, ["layout dp1_pp1_tp2 needs 2 ranks but 3 ranks started"]),
        (2, ["parallel.tp=2"], {"num_attention_heads": 1, "num_key_value_heads": 1}, 78, ["head"]),
        (2, ["parallel.pp=2"], {"num_hidden_layers": 1}, 78, ["layer"]),
        (
            2,
            ["parallel.pp=2", "parallel.pp_layers=[1,2]"],
            {},
            78,
            ["pp_layers=[1, 2]", "model has 4"],
        ),
        (2, ["parallel.tp=2"], {"model_type": "helium"}, 78, ["'helium'", "use parallel.pp"]),
    ],
    ids=["ranks", "heads", "stages", "pp_layers", "plan"],
)
def test_a_layout_that_cannot_be(line, tmp_path, ranks, layout, changes, code, words):
    if changes:
        changes = {"model_type": "llama"} | changes
        line = [*line, f"model.path={save_model(tmp_path / 'model', **changes)}"]
    outcome = run("generate", *line, *layout, ranks=ranks)
    assert_refused(outcome, code, f"on {comm.hostname()}: ", *words, run_dir=tmp_path / "run")


# -- input and output --


def test_a_row_that_cannot_be_answered(line, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, '{"prompt": '])
    run_dir = tmp_path / "run"
    # The launcher's exit code is the ranks' own.
    outcome = run("generate", *line, f"input={path}", "parallel.tp=2", "launch=mpirun")
    assert outcome.code == 64 and not outcome.survivors and not outcome.messages, outcome.err
    assert json.loads((run_dir / "completed.json").read_text())["exit_code"] == 64
    [row] = map(json.loads, (run_dir / "results.jsonl").read_text().splitlines())
    [error] = map(json.loads, (run_dir / "errors.jsonl").read_text().splitlines())
    assert (row["id"], error["id"], error["line"]) == ("1", "2", 2)
    assert f"{path}:2: not JSON" in error["error"]["message"]


def test_a_missing_input(line, tmp_path):
    outcome = run("generate", *line, f"input={tmp_path}/absent.jsonl")
    assert_refused(outcome, 65, "absent.jsonl does not exist", run_dir=tmp_path / "run")


def test_a_run_directory_that_cannot_be(line, tmp_path):
    (tmp_path / "file").touch()
    outcome = run("generate", *line, f"run_dir={tmp_path}/file/run")
    assert_refused(outcome, 73, f"cannot create {tmp_path}/file/run", "writable place")


# -- ranks that fail while the job runs --


@pytest.mark.parametrize(
    ("kind", "rank", "code"),
    [
        ("exception", 1, 70),
        ("exception", 0, 70),
        ("exit", 1, 3),
        ("exit0", 1, 70),
    ],
)
def test_a_rank_that_raises_ends_the_job(line, tmp_path, kind, rank, code):
    spec = f"rank={rank},step=3,kind={kind}"
    # A pipeline: the other rank waits in MPI for what will not come.
    outcome = run("generate", *line, "parallel.pp=2", ranks=2, env={faults.ENV: spec})
    raised = kind == "exception"
    words = ["unexpected RuntimeError"] if raised else ["sys.exit", "before the job was complete"]
    where = f"rank {rank} on {comm.hostname()}: "
    assert_refused(outcome, code, where, *words, run_dir=tmp_path / "run", traceback=raised)
    assert outcome.err.count("Traceback") == raised
    assert outcome.after(f"injected fault: {kind} at step 3 of rank {rank}") < GRACE


@pytest.mark.parametrize(
    ("kind", "word"), [("os_exit", "rank 1"), ("kill", "Killed"), ("segv", "Segmentation fault")]
)
def test_a_rank_that_dies_ends_the_job(line, tmp_path, kind, word):
    env = {faults.ENV: f"rank=1,step=3,kind={kind}"}
    outcome = run("generate", *line, "parallel.tp=2", ranks=2, env=env)
    # Which code mpirun makes of a killed rank is a race; that it is not 0 is what counts.
    assert outcome.code not in (0, 64, 75, 76), outcome.err
    assert outcome.after("injected fault") < GRACE
    assert_nothing_left(outcome, tmp_path / "run")
    assert "Traceback" not in outcome.err
    assert word in outcome.err  # mpirun's words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_the_launcher_ends_the_job(line, tmp_path, number):
    env = {faults.ENV: "rank=1,step=3,kind=hang"}
    job = start("generate", *line, "parallel.pp=2", "launch=mpirun", env=env)
    job.wait_for("injected fault")
    job.process.send_signal(number)
    outcome = job.wait(GRACE)
    assert outcome.code != 0
    assert_nothing_left(outcome, tmp_path / "run")


def test_ctrl_c_without_mpirun(line, tmp_path):
    job = start("generate", *line, env={faults.ENV: "rank=0,step=3,kind=hang"})
    job.wait_for("injected fault")
    job.process.send_signal(signal.SIGINT)
    assert_refused(job.wait(GRACE), 130, "interrupted", run_dir=tmp_path / "run")


def test_a_fault_that_is_misspelt_is_refused(monkeypatch):
    monkeypatch.setenv(faults.ENV, "rank=1,step=3,kind=explode")
    with pytest.raises(ConfigError, match="expected rank=R,step=N,kind=exception"):
        faults.strike(0, 1)


# -- ranks that do not belong together --


def test_another_hpcmlx_on_one_host(line, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "hpcmlx", other / "hpcmlx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", other / "conf")
    with open(other / "hpcmlx/mesh.py", "a") as file:
        file.write("# changed\n")
    job = job_line("generate", *line, "parallel.tp=2")
    argv = [*mpirun(), "-n", "1", *job, ":", "-n", "1", "-x", f"PYTHONPATH={other}", *job]
    host = comm.hostname()
    words = [f"host {host} (rank 1) has hpcmlx source ", f"rank 0 on {host} has ", "install"]
    assert_refused(run_line(argv), 78, *words, run_dir=tmp_path / "run")


PEER = Peer("a", "0.1.0", "0.32.4", "0.32.2", "abc", "def")


def test_equal_peers_are_accepted():
    check_peers([PEER, Peer("b", *list(vars(PEER).values())[1:])])


@pytest.mark.parametrize(
    ("key", "label"),
    [
        ("hpcmlx", "hpcmlx"),
        ("mlx", "mlx"),
        ("mlx_lm", "mlx-lm"),
        ("code", "hpcmlx source"),
        ("config", "configuration"),
    ],
)
def test_the_peer_that_differs_is_named(key, label):
    other = Peer(**(vars(PEER) | {"host": "b", key: "X"}))
    with pytest.raises(ConfigError) as caught:
        check_peers([PEER, PEER, other, other])
    message = str(caught.value)
    assert f"host b (rank 2) has {label} X, rank 0 on a has {getattr(PEER, key)}" in message


# -- the BLAS --


def test_without_a_fast_blas_there_is_a_warning(line, tmp_path):
    outcome = run("generate", *line, "sampling.max_tokens=2", env={"HPCMLX_BLAS": "none"})
    assert_done(outcome, tmp_path / "run")
    if sys.platform == "linux":
        warnings = [text for _, text in outcome.lines if "WARNING" in text]
        assert len(warnings) == 1 and "only the reference BLAS (HPCMLX_BLAS=none)" in warnings[0]


@pytest.mark.skipif(sys.platform != "linux", reason="macOS always has Accelerate")
def test_a_blas_that_is_not_there(line, tmp_path):
    outcome = run("generate", *line, env={"HPCMLX_BLAS": "/absent.so"})
    words = ["HPCMLX_BLAS='/absent.so'", "unset it"]
    assert_refused(outcome, 78, *words, run_dir=tmp_path / "run")


# -- the suite itself --


def pytest_under_mpirun(file: Path, ranks: int, expected: int, *options: str) -> Outcome:
    """What tests/run_all.py runs, on one file."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.mpi_plugin", "--with-mpi"]
    command += ["-c", os.devnull, "-p", "no:cacheprovider", *options, str(file)]
    env = {"HPCMLX_TEST_RANKS": str(expected), "PYTHONPATH": str(ROOT)}
    return run_line([*mpirun("-n", str(ranks)), *command], cwd=file.parent, **env)


def test_too_few_ranks_fail_the_suite(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("def test_it(): pass\n")
    outcome = pytest_under_mpirun(file, 1, 2)
    assert outcome.code != 0 and "expected 2 ranks, MPI gave 1" in outcome.err
    assert not outcome.survivors


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("assert mpi_world.rank == 0", ["FAILED on rank 1 of 2", "assert 1 == 0"]),
        # One barrier more than the plugin's own at the end: rank 0 waits inside MPI.
        (
            "[mpi_world.barrier() for _ in range(2 - 2 * mpi_world.rank)]",
            ["TIMEOUT on rank 0 of 2", "test_it.py"],
        ),
    ],
    ids=["failure", "hang"],
)
def test_a_test_that_fails_on_one_rank_fails_the_suite(tmp_path, body, words):
    file = tmp_path / "test_it.py"
    file.write_text(f"def test_it(mpi_world):\n    {body}\n")
    outcome = pytest_under_mpirun(file, 2, 2, "--timeout=2")
    assert outcome.code != 0
    for word in words:
        assert word in outcome.err
    assert not outcome.survivors
