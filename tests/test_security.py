"""What a job must not do: run what data or configuration names, show a secret, let others read,
write elsewhere, listen.

Faults 41 to 44, as far as they go beyond one part: hostile templates are in test_tokenizer.py and
test_faults_generate.py, single files in test_checkpoint.py and test_faults_models.py, options of
Slurm in test_slurm_text.py, host files in test_launch.py.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest

from hpcmlx import config, faults, log, redact
from hpcmlx.config import FinetuneConfig, GenerateConfig
from hpcmlx.errors import ConfigError, OutputError, UsageError
from hpcmlx.job import CONF
from hpcmlx.launch import mpirun
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.rundir import open_run_dir, own_kernels
from tests.finetune_runs import committed
from tests.fixtures import (
    ROOT,
    WITHOUT_TORCH,
    Outcome,
    Running,
    _marked,
    assert_done,
    assert_refused,
    copy_model,
    job_line,
    model,  # noqa: F401
    run,
    run_line,
    start,
    write_rows,
)

SECRET = "correct-horse-7Qz"
TOKEN = {"MY_TOKEN": SECRET}
PACKAGE = sorted([*(ROOT / "hpcmlx").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


def listing(folder: Path) -> dict[str, int]:
    """Every file below, with the time of its last change, and every directory."""
    return {
        str(path.relative_to(folder)): 0 if path.is_dir() else path.lstat().st_mtime_ns
        for path in folder.rglob("*")
    }


def everything_in(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below as bytes, those of HDF5 also by what is in them."""
    for path in folder.rglob("*"):
        yield path, str(path.relative_to(folder)).encode()
        if path.is_file():
            yield path, path.read_bytes()
        if path.suffix == ".h5":
            with h5py.File(path, "r") as file:
                found: list[Any] = [dict(file.attrs)]

                def visit(name: str, node: Any, found: list[Any] = found) -> None:
                    found.append((name, dict(node.attrs)))
                    if isinstance(node, h5py.Dataset) and node.dtype.kind in "OSU":
                        found.append(np.asarray(node[()]).tolist())
                    elif isinstance(node, h5py.Dataset) and node.dtype == np.uint8:
                        found.append(node[()].tobytes())  # texts one after the other

                file.visititems(visit)
            yield path, repr(found).encode()


# -- one run of each job with a secret, under a loose umask, in a home of its own --


@dataclass
class Private:
    """A run, and what was seen of it.

    Attributes:
        folder: with the run in `run`, the working directory `cwd`, and `home` and `tmp`.
        commands: command lines of all of its processes.
    """

    folder: Path
    outcome: Outcome
    commands: set[str]
    before: Mapping[str, int]

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


def private_run(folder: Path, model: Path, job: str, *overrides: str) -> Private:  # noqa: F811
    """Run a job whose model lies where only a secret of the environment says."""
    for name in ("home", "tmp", "cwd"):
        (folder / name).mkdir()
    copy_model(model, folder / f"models/{SECRET}")
    if (kernels := Path(tempfile.gettempdir(), "mlx")).is_dir():  # compiling takes long
        shutil.copytree(kernels, folder / "tmp/mlx")
    line = job_line(job, f"model.path='{folder}/models/${{oc.env:MY_TOKEN}}'", *overrides)
    places = {"HOME": f"{folder}/home", "TMPDIR": f"{folder}/tmp", "XDG_CACHE_HOME": ""}
    before = listing(folder)
    loose = os.umask(0o022)
    try:
        line += ["launch=mpirun", f"run_dir={folder}/run"]
        job_ = Running(line, folder / "cwd", {**WITHOUT_TORCH, **TOKEN, **places})
    finally:
        os.umask(loose)
    commands: set[str] = set()
    while job_.process.poll() is None:
        commands |= set(_marked(f"HPCMLX_TEST_MARK={job_.mark}").values())
        time.sleep(0.05)
    return Private(folder, job_.wait(), commands, before)


@pytest.fixture(scope="module")
def private(model, tmp_path_factory) -> dict[str, Private]:  # noqa: F811
    """A generate run and a finetune run on two ranks."""
    found = {}
    folder = tmp_path_factory.mktemp("generate")
    prompts = write_rows(folder / "in.jsonl", [{"id": "a", "prompt": "a"}, {"prompt": "b"}])
    line = [f"input={prompts}", "sampling.max_tokens=4", "sampling.stop=['${oc.env:MY_TOKEN}']"]
    line += ["parallel.pp=2", "timeline=true"]
    found["generate"] = private_run(folder, model, "generate", *line)
    folder = tmp_path_factory.mktemp("finetune")
    rows = [{"prompt": f"{i}?", "completion": f"{'NESW'[i % 4]}!"} for i in range(12)]
    train = write_rows(folder / "train.jsonl", rows)
    line = [f"data.train=[{train}]", f"data.cache={folder}/cache", "train.batch_size=4"]
    line += ["train.steps=2", "method.rank=2", "parallel.pp=2", "train.prompt_tokens=3"]
    line += ["train.prompts=['${oc.env:MY_TOKEN}']", "optim.no_decay=['${oc.env:MY_TOKEN}']"]
    found["finetune"] = private_run(folder, model, "finetune", *line)
    for one in found.values():
        assert_done(one.outcome, one.run_dir)
    return found


JOBS = pytest.mark.parametrize("job", ["generate", "finetune"])


@pytest.mark.fault
@JOBS
def test_a_secret_is_in_no_file_and_no_message(private, job):
    """Fault 44: in its place stands what was written."""
    seen = private[job]
    for path, content in everything_in(seen.run_dir):
        assert SECRET.encode() not in content, path
    assert SECRET not in seen.outcome.err + seen.outcome.out
    assert "${oc.env:MY_TOKEN}" in (seen.run_dir / "config.yaml").read_text()
    [launch] = json.loads((seen.run_dir / "run.json").read_text())["launches"]
    assert launch["config"]["model"]["path"].endswith("/models/${oc.env:MY_TOKEN}")
    assert "${oc.env:MY_TOKEN}" in (seen.run_dir / "report.html").read_text()


@pytest.mark.fault
@JOBS
def test_a_secret_is_in_no_command_line(private, job):
    """Fault 44: of the launcher, of mpirun, of the ranks."""
    commands = private[job].commands
    assert any("mpirun" in c for c in commands) and any(f"{job}.py" in c for c in commands)
    assert not [command for command in commands if SECRET in command]


@JOBS
def test_what_a_job_leaves_is_its_users_alone(private, job):
    run_dir = private[job].run_dir
    paths = [run_dir, *run_dir.rglob("*")]
    assert len(paths) > 10
    loose = [path for path in paths if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    assert not loose


@JOBS
def test_nothing_is_written_elsewhere(private, job):
    """NL6. Caches are declared: data.cache, what matplotlib and the BLAS keep of a host, and the
    kernels that MLX compiles for a CPU."""
    seen = private[job]
    new = {f"{n}/" for n, when in listing(seen.folder).items() if seen.before.get(n) != when}
    declared = ("run/", "cache/", "home/.cache/matplotlib/", "home/.config/matplotlib/")
    declared += ("home/.cache/hpcmlx/", "tmp/mlx/")
    above = ("home/.cache/", "home/.config/")
    assert not [name for name in new if not name.startswith(declared) and name not in above]
    assert not set(seen.before) - set(listing(seen.folder)), "something was removed"


@pytest.mark.fault
def test_an_export_finds_the_model_where_the_secret_says(private, tmp_path):
    seen = private["finetune"]
    line = job_line("export", str(seen.run_dir), "--to", "mlx-adapter")
    assert committed(seen.run_dir)
    outcome = run_line([*line, str(tmp_path / "a")])
    assert outcome.code == 78 and "${oc.env:MY_TOKEN}: cannot be resolved here" in outcome.err
    outcome = run_line([*line, str(tmp_path / "b")], **TOKEN)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "b/adapters.safetensors").exists()


@pytest.mark.fault
def test_a_failure_does_not_tell_either(tmp_path):
    """Fault 44: of what the secret was used for."""
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    for line, env in (
        (["model.path='${oc.env:MY_TOKEN}'"], TOKEN),
        (["model.path='/x/${oc.env:MY_TOKEN}/y'", "launch=mpirun"], TOKEN),
    ):
        run_dir = tmp_path / f"run{len(line)}"
        outcome = run("generate", *line, f"input={prompts}", f"run_dir={run_dir}", env=env)
        message = assert_refused(outcome, 78, "${oc.env:MY_TOKEN}", run_dir=run_dir)
        assert SECRET not in message + outcome.err
        for path, content in everything_in(run_dir):
            assert SECRET.encode() not in content, path
        exit = json.loads((run_dir / "run.json").read_text())["launches"][-1]["exit"]
        assert exit["cause"] == "failed" and "${oc.env:MY_TOKEN}" in exit["message"]


@pytest.mark.fault
def test_a_batch_script_has_no_secret(tmp_path, monkeypatch, capfd):
    """Fault 44, and private files: of launch=slurm."""
    from hpcmlx.launch.submit import submit

    fake = tmp_path / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\numask > {tmp_path}/umask\necho "$@" > {tmp_path}/argv\necho 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MY_TOKEN", SECRET)
    overrides = ["model.path='/m/${oc.env:MY_TOKEN}'", "data.train=['${oc.env:MY_TOKEN}']"]
    overrides += [f"run_dir={tmp_path}/run", "launch=slurm", "launch.slurm.follow=false"]
    settings = config.compose(FinetuneConfig, CONF, "finetune", overrides)
    assert submit("finetune", str(ROOT / "jobs/finetune.py"), overrides, settings) == 0
    for path, content in everything_in(tmp_path):
        assert SECRET.encode() not in content, path
    assert SECRET not in "".join(capfd.readouterr())
    script = (tmp_path / "run.slurm/job.sbatch").read_text()
    assert "${oc.env:MY_TOKEN}" in script and "\numask 077\n" in script
    # The umask that sbatch itself sees is what Slurm makes the log with.
    line = [*job_line("finetune", *overrides), f"run_dir={tmp_path}/second"]
    outcome = run_line(line, **WITHOUT_TORCH)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "umask").read_text().strip() == "0077"


# -- messages --


def test_values_of_the_environment_are_put_back_to_what_was_written(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("WORD", "llama")
    monkeypatch.setenv("RANKS", "2")
    overrides = ["model.path='/m/${oc.env:MY_TOKEN}'", "input='${oc.env:WORD}'"]
    overrides += ["parallel.tp='${oc.env:RANKS}'", "run_dir='/r/${oc.env:MY_TOKEN}'"]
    settings = config.compose(GenerateConfig, CONF, "generate", overrides)
    found = redact.secrets(config.to_dict(settings), settings.unresolved)
    assert found == {
        f"/m/{SECRET}": "/m/${oc.env:MY_TOKEN}",
        SECRET: "${oc.env:MY_TOKEN}",
        "llama": "${oc.env:WORD}",
    }
    redact.hide(found)
    try:
        assert redact.scrub(f"no /m/{SECRET}: x{SECRET}y, llama2 llama 2") == (
            "no /m/${oc.env:MY_TOKEN}: x${oc.env:MY_TOKEN}y, llama2 ${oc.env:WORD} 2"
        )
        logger = log.setup(0, "here", tmp_path)
        try:
            raise ValueError(SECRET)
        except ValueError:
            logger.exception("it is %s", SECRET)
        log.close()
        text = (tmp_path / "logs/rank0.log").read_text()
        assert "it is ${oc.env:MY_TOKEN}" in text and "ValueError" in text and SECRET not in text
    finally:
        redact.hide({})


@pytest.mark.parametrize(
    "text",
    ["${oc.env:MY_TOKEN,none}", '${oc.env:"MY_TOKEN"}', "${ oc.env : MY_TOKEN }"]
    + ["${oc.env:${input}}", "${oc.decode:${oc.env:LIST}}"],
)
def test_however_the_variable_is_written(monkeypatch, text):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("LIST", f'["a {SECRET}", "{SECRET}"]')
    key = "sampling.stop" if "LIST" in text else "model.path"
    overrides = ["model.path=m", "input=MY_TOKEN", f"{key}='{text}'"]
    settings = config.compose(GenerateConfig, CONF, "generate", overrides)
    assert settings.unresolved == {key: text}
    redact.hide(redact.secrets(config.to_dict(settings), settings.unresolved))
    try:
        assert SECRET not in redact.scrub(f"no {settings.model.path} in {settings.sampling.stop}")
    finally:
        redact.hide({})


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("api_key=abc", "api_key=(hidden)"),
        ("++launch.hub-token=abc", "++launch.hub-token=(hidden)"),
        ("DB_PASSWORD=a=b", "DB_PASSWORD=(hidden)"),
        ("token='${oc.env:X}'", "token='${oc.env:X}'"),
        ("sampling.max_tokens=5", "sampling.max_tokens=5"),
        ("train.prompt_tokens=5", "train.prompt_tokens=5"),
        ("input=https://me:secret@host/x", "input=https://(hidden)@host/x"),
        (f"input=hf_{'a' * 30}", "input=(hidden)"),
        ("input=ghp_0123456789012345678901", "input=(hidden)"),
        ("input=/data/chapter_final.jsonl", "input=/data/chapter_final.jsonl"),
    ],
)
def test_what_looks_like_a_secret_is_not_recorded(word, shown):
    assert redact.command_line([word]) == [shown]


def test_a_configuration_without_what_looks_like_a_secret():
    given = {"a": {"api_key": "x", "max_tokens": 3, "stop": [f"sk-{'a' * 30}"]}, "password": None}
    kept = {"a": {"api_key": "(hidden)", "max_tokens": 3, "stop": ["(hidden)"]}, "password": None}
    assert redact.values(given) == kept


# -- fault 41: nothing is executed --


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["_target_", "tag", "auto_map", "model_file", "bin", "pt"])
def test_nothing_that_data_or_configuration_names_is_run(model, tmp_path, kind):  # noqa: F811
    """Fault 41: code 78 and no trace of it."""
    mark, path = tmp_path / "mark", tmp_path / "model"
    changes = {
        "auto_map": {"model_type": "unheard_of", "auto_map": {"AutoModel": "own.Model"}},
        "model_file": {"model_file": "own.py"},
    }
    copy_model(model, path, **changes.get(kind, {}))
    (path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass\n")
    if kind in ("bin", "pt"):
        (path / "model.safetensors").unlink()
        name = {"bin": "pytorch_model.bin", "pt": "consolidated.00.pt"}[kind]
        (path / name).write_bytes(pickle.dumps(Evil(mark)))
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    line = [f"model.path={path}", f"input={prompts}", f"run_dir={tmp_path}/run"]
    if kind == "_target_":
        line.append(f"sampling.stop=[{{_target_: os.mkdir, path: {mark}}}]")
    if kind == "tag":
        line.append(f"+sampling.stop=!!python/object/apply:os.mkdir [{mark}]")
    if kind in ("auto_map", "bin"):
        # Where Python would find the module, if somebody imported it.
        outcome = run("generate", *line, cwd=path, env={"PYTHONPATH": f"{path}:{ROOT}"})
        assert_refused(outcome, 78, run_dir=tmp_path / "run")
    else:
        with pytest.raises((ConfigError, UsageError)):
            open_checkpoint(config.compose(GenerateConfig, CONF, "generate", line).model.path)
    assert not mark.exists()


def test_no_pickle_and_no_shell_in_the_source():
    """Nothing here reads or writes a pickle, evaluates text or starts a shell.

    mpi4py pickles small Python values between ranks: on the wire, of the same job, on no disk."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    modules |= {"torch", "socketserver", "http.server", "xmlrpc.server"}
    calls = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
    calls |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "socket.create_server"}
    calls |= {"asyncio.start_server", "hydra.utils.instantiate", "instantiate"}
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not modules & set(names), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                where = f"{path}:{node.lineno}"
                assert ast.unparse(node.func) not in calls, where
                for keyword in node.keywords:
                    value = ast.unparse(keyword.value)
                    assert (keyword.arg, value) not in {
                        ("shell", "True"),
                        ("allow_pickle", "True"),
                        ("trust_remote_code", "True"),
                    }, where


def test_a_job_listens_nowhere(model, tmp_path):  # noqa: F811
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    line = [f"model.path={model}", f"input={prompts}", f"run_dir={tmp_path}/run"]
    job = start("generate", *line, env={faults.ENV: "rank=0,step=2,kind=hang"})
    job.wait_for("injected fault")
    found = psutil.Process(job.process.pid).net_connections("all")
    job.kill()
    job.wait()
    assert not [c for c in found if c.status == psutil.CONN_LISTEN], found


# -- fault 43: paths --


@pytest.fixture
def begun(tmp_path) -> Path:
    """A run directory that can be gone on with."""
    return open_run_dir(tmp_path / "run", "generate", "dp1_pp1_tp1", resumable=True).path


def enter(path: Path | str) -> Path:
    return open_run_dir(path, "generate", "dp1_pp1_tp1", resumable=True).path


@pytest.mark.fault
@pytest.mark.parametrize("name", ["lock", "run.json", "logs", "rows/rank0-1.log", "metrics.csv"])
def test_a_link_that_leads_out_of_a_run_directory(begun, tmp_path, name):
    """Fault 43: what would be written through it is not."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = begun / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    with pytest.raises(OutputError, match=f"{name} is a symbolic link that leads out of it"):
        enter(begun)
    link.unlink()
    link.symlink_to("../victim" if link.parent == begun else "../../victim")
    with pytest.raises(OutputError, match="leads out of it"):
        enter(begun)
    assert victim.read_text() == "precious"
    for target in (begun / "claim.json", link):  # as some trackers have them; a link to itself
        link.unlink()
        link.symlink_to(target)
        assert enter(begun) == begun


@pytest.mark.fault
def test_a_link_ends_a_job_before_it_writes(model, begun, tmp_path):  # noqa: F811
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (begun / "lock").symlink_to(victim)
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    outcome = run("generate", f"model.path={model}", f"input={prompts}", f"run_dir={begun}")
    assert_refused(outcome, 73, "lock is a symbolic link", "remove it", run_dir=begun)
    assert victim.read_text() == "precious"


@pytest.mark.fault
def test_a_run_directory_that_is_a_link(begun, tmp_path):
    (tmp_path / "link").symlink_to(begun)
    with pytest.raises(OutputError, match="is a symbolic link; give the directory"):
        enter(tmp_path / "link")
    (tmp_path / "folder").symlink_to(tmp_path)  # above it, it is how sites name their disks
    assert enter(tmp_path / "folder/run") == tmp_path / "folder/run"


@pytest.mark.fault
@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "a\x1b[31m", " "])
def test_control_characters_in_paths(name):
    for key in ("run_dir", "model.path", "input"):
        overrides = ["model.path=m", "input=i", config.quote(key, name)]
        with pytest.raises(ConfigError, match="empty, or has a control character") as caught:
            config.compose(GenerateConfig, CONF, "generate", overrides)
        assert str(caught.value).isprintable()


@pytest.mark.fault
def test_a_path_is_never_read_by_a_shell(model, tmp_path):  # noqa: F811
    """Fault 43: it goes through the launcher, mpirun and the ranks as it is."""
    name = "$(touch mark) `touch mark`;touch mark|'\"&& ../x\\"
    prompts = write_rows(tmp_path / f"in {name.replace('/', '')}.jsonl", [{"prompt": "a"}])
    overrides = [f"model.path={model}", config.quote("input", str(prompts)), "parallel.pp=2"]
    run_dir = tmp_path / name.replace("/", "")
    overrides += [config.quote("run_dir", str(run_dir)), "launch=mpirun", "sampling.max_tokens=3"]
    outcome = run("generate", *overrides, cwd=tmp_path)
    assert_done(outcome, run_dir)
    assert not list(tmp_path.rglob("mark")) and {p.name for p in tmp_path.iterdir()} == {
        prompts.name,
        run_dir.name,
    }


@pytest.mark.fault
def test_names_that_lead_up_are_not_followed(model, tmp_path):  # noqa: F811
    """Fault 43: `..` is the user's to give; in a model's files it is refused."""
    path = copy_model(model, tmp_path / "model")
    shutil.move(path / "model.safetensors", tmp_path / "outside.safetensors")
    names = [*json.loads((path / "config.json").read_text())][:1]
    index = {"weight_map": dict.fromkeys([*names, "x"], "../outside.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    prompts = write_rows(tmp_path / "in.jsonl", [{"id": "../../../x", "prompt": "a"}])
    line = [f"input={prompts}", "sampling.max_tokens=3"]
    outcome = run("generate", f"model.path={path}", *line, f"run_dir={tmp_path}/bad")
    assert outcome.code in (77, 78) and "names a file outside" in outcome.err, outcome.err
    before = {p.name for p in tmp_path.iterdir()}
    # An id is never a path.
    outcome = run("generate", f"model.path={model}", *line, f"run_dir={tmp_path}/x/../run")
    assert_done(outcome, tmp_path / "run")
    assert {p.name for p in tmp_path.iterdir()} - before == {"run", "x"} - before


@pytest.mark.fault
def test_kernels_are_not_loaded_from_a_folder_of_others(tmp_path, monkeypatch):
    """MLX loads compiled kernels from TMPDIR/mlx, where on a shared host anybody may put some."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kernels = tmp_path / "mlx"
    own_kernels()
    assert stat.S_IMODE(kernels.stat().st_mode) == 0o700
    kernels.chmod(0o777)  # as a loose umask has left it
    own_kernels()
    assert stat.S_IMODE(kernels.stat().st_mode) == 0o700
    kernels.rmdir()
    kernels.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="set TMPDIR to a directory of your own"):
        own_kernels()
    if os.geteuid() == 0:
        kernels.unlink()
        kernels.mkdir()
        os.chown(kernels, 12345, -1)
        with pytest.raises(ConfigError, match="belongs to another user"):
            own_kernels()


def test_the_launchers_line_goes_to_no_shell():
    argv = mpirun.build_argv("/m", "/p", "/job.py", ["run_dir='$(x)'"], 2)
    assert argv[-1] == "run_dir='$(x)'"
    done = subprocess.run([sys.executable, "-c", "import sys; print(sys.argv[1])", argv[-1]],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "run_dir='$(x)'\n"
