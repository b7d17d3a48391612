"""The jobs from the command line to the files they leave: the same answers whatever the layout."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from tests.fixtures import (
    ROOT,
    Outcome,
    assert_done,
    assert_refused,
    job_line,
    mpirun,
    run,
    run_line,
    start,
    write_rows,
)
from tests.fixtures import model as model

ROWS = [
    {"prompt": "Hello"},
    {"id": "chat", "messages": [{"role": "user", "content": "αβ, hi"}]},
    {"id": "short", "prompt": "The quick brown fox", "max_tokens": 3},
    {"id": "x\ty", "prompt": "z"},
    {"id": 7, "prompt": "One line\nand another"},
]
KEYS = ["id", "text", "finish_reason", "num_prompt_tokens", "num_tokens"]


def results(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def common(model, folder) -> list[str]:
    """Overrides that all generate jobs here share."""
    prompts = write_rows(folder / "prompts.jsonl", ROWS)
    return [f"model.path={model}", f"input={prompts}", "sampling.max_tokens=16"]


@pytest.fixture(scope="module")
def single(common, folder) -> Path:
    """The run directory of the greedy job in one process."""
    run_dir = folder / "single"
    assert_done(run("generate", *common, f"run_dir={run_dir}"), run_dir)
    return run_dir


# -- generate --


def test_one_process_needs_no_mpi(single):
    rows = results(single)
    assert [list(row) for row in rows] == [KEYS] * len(ROWS)
    assert [row["id"] for row in rows] == ["1", "chat", "short", "x\ty", "7"]
    assert [row["num_prompt_tokens"] for row in rows] == [5, 9, 19, 1, 20]
    for row in rows:
        assert row["finish_reason"] in ("stop", "length")
        if row["finish_reason"] == "length":
            assert row["num_tokens"] == (3 if row["id"] == "short" else 16)
    assert (single.stat().st_mode & 0o777) == 0o700


def test_the_hdf5_file_says_the_same(single, model):
    rows = results(single)
    with h5py.File(single / "results.h5") as file:
        for key in ("id", "text", "finish_reason"):
            assert [v.decode() for v in file[key][:]] == [row[key] for row in rows]
        assert file["num_prompt_tokens"][:].tolist() == [r["num_prompt_tokens"] for r in rows]
        assert np.diff(file["offsets"][:]).tolist() == [row["num_tokens"] for row in rows]
        assert len(file["tokens"]) == file["offsets"][-1]
        assert (file["ttft"][:] <= file["seconds"][:]).all()
        assert file.attrs["layout"] == "dp1_pp1_tp1" and file.attrs["model"] == str(model)


def test_what_a_run_leaves_behind(single):
    names = {str(p.relative_to(single)) for p in single.rglob("*") if p.is_file()}
    assert names == {
        "claim.json",
        "completed.json",
        "config.yaml",
        "logs/rank0.log",
        "results.h5",
        "results.jsonl",
        "summary.json",
    }
    completed = json.loads((single / "completed.json").read_text())
    assert completed["job"] == "generate" and completed["layout"] == "dp1_pp1_tp1"
    summary = json.loads((single / "summary.json").read_text())
    assert summary["rows"] == len(ROWS)
    assert summary["generated_tokens"] == sum(row["num_tokens"] for row in results(single))
    [rank] = summary["ranks"]
    assert rank["layers"] == [0, 4] and rank["bytes_read"] == rank["weight_bytes"] > 0
    settings = yaml.safe_load((single / "config.yaml").read_text())
    assert settings["sampling"]["max_tokens"] == 16 and settings["run_dir"] == str(single)
    assert "layout dp1_pp1_tp1" in (single / "logs/rank0.log").read_text()


# Two more layouts come with the next two tests.
@pytest.mark.parametrize(
    "layout", [["parallel.dp=2"], ["parallel.pp=2", "parallel.tp=2"]], ids="-".join
)
def test_every_layout_gives_the_same_bytes(single, common, tmp_path, layout):
    run_dir, ranks = tmp_path / "run", 2 ** len(layout)
    assert_done(run("generate", *common, *layout, f"run_dir={run_dir}", ranks=ranks), run_dir)
    assert (run_dir / "results.jsonl").read_bytes() == (single / "results.jsonl").read_bytes()
    assert len(list((run_dir / "logs").iterdir())) == ranks
    assert len(json.loads((run_dir / "summary.json").read_text())["ranks"]) == ranks


def test_the_shipped_host_file(single, common, tmp_path):
    run_dir = tmp_path / "run"
    # Any directory will do, and mpirun's own spelling of the option.
    line = [*mpirun("-hostfile", str(ROOT / "hostfiles/local2")), *job_line("generate", *common)]
    outcome = run_line([*line, "parallel.tp=2", f"run_dir={run_dir}"], cwd=tmp_path)
    assert_done(outcome, run_dir)
    assert (run_dir / "results.jsonl").read_bytes() == (single / "results.jsonl").read_bytes()


def test_a_login_node_starts_mpirun_itself(single, common, tmp_path):
    outcome = run("generate", *common, "parallel=pp2", "launch=mpirun", cwd=tmp_path)
    [run_dir] = (tmp_path / "runs").iterdir()
    assert_done(outcome, run_dir)
    assert re.fullmatch(r"\d{8}-\d{6}-generate-dp1_pp2_tp1", run_dir.name)
    assert (run_dir / "results.jsonl").read_bytes() == (single / "results.jsonl").read_bytes()
    assert not outcome.messages
    [line] = [text for _, text in outcome.lines if "mpirun -n 2" in text]
    assert line.startswith("hpcmlx: /") and str(run_dir) in line


def test_sampling_stop_strings_and_rows_of_their_own(model, tmp_path):
    rows = [
        {"id": "default", "prompt": "abc"},
        {"id": "same", "prompt": "abc", "seed": 5},
        {"id": "again", "prompt": "abc", "seed": 5},
        {"id": "greedy", "prompt": "abc", "temperature": 0},
        {"id": "short", "prompt": "abc", "seed": 5, "max_tokens": 4},
        {"id": "narrow", "prompt": "abc", "seed": 6, "top_k": 1},
    ]
    settings = [f"model.path={model}", "sampling.temperature=1.0", "sampling.max_tokens=24"]

    def go(name: str, rows: list[dict], *more: str, **how) -> dict[str, dict]:
        prompts = write_rows(tmp_path / f"{name}.jsonl", rows)
        run_dir = tmp_path / name
        line = [*settings, f"input={prompts}", f"run_dir={run_dir}", *more]
        assert_done(run("generate", *line, **how), run_dir)
        return {row["id"]: row for row in results(run_dir)}

    first = go("first", rows)
    text = {name: row["text"] for name, row in first.items()}
    assert text["same"] == text["again"] != text["default"]
    assert text["short"] == text["same"][:4] and first["short"]["finish_reason"] == "length"
    assert text["narrow"] == text["greedy"] != text["same"]
    # A stop string that spans two tokens of a row's own answer ends it before it.
    stop = text["same"][6:8]
    stopped = [dict(row, stop=stop) if row["id"] == "same" else row for row in rows]
    everywhere = text["greedy"][4:6]
    second = go(
        "second", stopped, f"sampling.stop=[{json.dumps(everywhere)}]", "parallel.tp=2", ranks=2
    )
    assert second["same"]["finish_reason"] == "stop"
    assert second["same"]["text"] == text["same"][: text["same"].index(stop)]
    assert second["greedy"]["text"] == text["greedy"][: text["greedy"].index(everywhere)]
    # The draws of the other rows depend neither on the layout nor on what their neighbours do.
    assert second["default"]["text"] == text["default"].partition(everywhere)[0]


# -- evaluate --


@pytest.fixture(scope="module")
def scores(model, folder):
    """Runs evaluate on a text of 300 characters and reads what it wrote."""
    text = folder / "text.txt"
    text.write_text("".join(chr(32 + (7 * i * i + 3 * i) % 95) for i in range(300)))

    def go(name: str, *overrides: str, ranks: int = 0) -> tuple[np.ndarray, dict]:
        run_dir = folder / name
        line = [f"model.path={model}", f"input={text}", f"run_dir={run_dir}", *overrides]
        assert_done(run("evaluate", *line, ranks=ranks), run_dir)
        with h5py.File(run_dir / "logprobs.h5") as file:
            assert file["tokens"].shape == (300,)
            return file["logprobs"][:], dict(file.attrs)

    return go


@pytest.fixture(scope="module")
def single_scores(scores):
    return scores("scores", "evaluate.window=128", "evaluate.stride=64")


def test_perplexity_follows_from_the_stored_numbers(single_scores):
    logprobs, attributes = single_scores
    assert np.isnan(logprobs[0]) and np.isfinite(logprobs[1:]).all()
    assert attributes["num_predicted"] == 299
    assert attributes["perplexity"] == pytest.approx(np.exp(-logprobs[1:].mean(dtype=float)))
    assert (attributes["window"], attributes["stride"]) == (128, 64)


@pytest.mark.parametrize(("axis", "ranks"), [("tp", 2), ("pp", 3)])
def test_every_layout_gives_the_same_scores(scores, single_scores, axis, ranks):
    layout = [f"parallel.{axis}={ranks}"]
    options = ["evaluate.window=128", "evaluate.stride=64", "inference.batch_size=2"]
    logprobs, _ = scores(f"scores-{axis}", *options, *layout, ranks=ranks)
    np.testing.assert_allclose(logprobs, single_scores[0], atol=1e-4)


def test_window_and_stride(scores, single_scores):
    # Windows that do not overlap predict everything but their first tokens.
    logprobs, attributes = scores("apart", "evaluate.window=64", "evaluate.stride=64")
    assert np.isnan(logprobs[[0, 64, 128, 192, 256]]).all()
    assert attributes["num_predicted"] == 295
    np.testing.assert_allclose(logprobs[1:64], single_scores[0][1:64], atol=1e-4)
    assert not np.allclose(logprobs[65:128], single_scores[0][65:128], atol=1e-4)
    # One window over the whole text, and only a part of the text.
    logprobs, attributes = scores("part", "evaluate.max_tokens=null", "evaluate.window=1000")
    assert attributes["num_predicted"] == 299 and attributes["window"] == 300
    np.testing.assert_allclose(logprobs[:128], single_scores[0][:128], atol=1e-4)


# -- run directories --


def test_eight_launches_at_once_get_eight_directories(common, tmp_path):
    line = [*common, "sampling.max_tokens=1"]
    jobs = [start("generate", *line, cwd=tmp_path) for _ in range(8)]
    outcomes = [job.wait(120) for job in jobs]
    directories = list((tmp_path / "runs").iterdir())
    assert len(directories) == 8
    for run_dir in directories:
        assert (run_dir / "completed.json").exists() and len(results(run_dir)) == len(ROWS)
    assert [outcome.code for outcome in outcomes] == [0] * 8


def test_a_run_directory_is_used_once(single, common):
    before = (single / "results.jsonl").stat()
    outcome = run("generate", *common, f"run_dir={single}")
    assert_refused(outcome, 73, str(single), "not empty", "give another run_dir")
    assert (single / "results.jsonl").stat() == before


def test_of_two_launches_into_one_directory_one_wins(common, tmp_path):
    run_dir = tmp_path / "run"
    jobs = [start("generate", *common, f"run_dir={run_dir}") for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        outcomes = sorted(pool.map(lambda job: job.wait(), jobs), key=lambda o: o.code)
    assert [outcome.code for outcome in outcomes] == [0, 73], [o.err for o in outcomes]
    assert_done(outcomes[0], run_dir)
    assert_refused(outcomes[1], 73, str(run_dir))


# -- the command line --

COMMANDS = {
    "help": ["--help"],
    "config": ["--cfg", "job", "parallel.tp=2"],
    "unknown key": ["sampling.temprature=1"],
    "target": ["model._target_=os.system"],
    "no equals": ["launch"],
    "bad syntax": ["input=[a"],
}


@pytest.fixture(scope="module")
def commands(common, tmp_path_factory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("commands")
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(
            lambda more: run("generate", *common, *more, cwd=folder), COMMANDS.values()
        )
        found = dict(zip(COMMANDS, outcomes, strict=True))
    assert not (folder / "runs").exists()
    return found


def test_help_lists_every_key(commands):
    outcome = commands["help"]
    assert outcome.code == 0 and not outcome.messages
    for key in ("parallel.tp", "model.path", "sampling.stop", "run_dir", "launch.hostfile"):
        assert f"  {key} (" in outcome.out


def test_cfg_job_prints_the_configuration(commands, model):
    outcome = commands["config"]
    assert outcome.code == 0 and not outcome.messages
    settings = yaml.safe_load(outcome.out)
    assert settings["parallel"]["tp"] == 2 and settings["model"]["path"] == str(model)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("unknown key", 78, ["sampling.temprature", "did you mean sampling.temperature", "top_p"]),
        ("target", 78, ["model._target_", "cannot name code"]),
        ("no equals", 2, ["'launch' is not key=value"]),
        ("bad syntax", 2, ["input=[a"]),
    ],
)
def test_what_cannot_be_meant_is_refused(commands, name, code, words):
    assert_refused(commands[name], code, *words)
