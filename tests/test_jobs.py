"""The jobs from the command line to the files they leave: the same answers whatever the layout."""

from __future__ import annotations

import csv
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import h5py
import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx_lm.tuner.utils import load_adapters

from hpcmlx import faults
from tests.fixtures import (
    ROOT,
    TIMEOUT,
    WITHOUT_TORCH,
    Outcome,
    assert_done,
    assert_refused,
    job_line,
    mpirun,
    rows_of_a_job_that_hangs,
    run,
    run_line,
    start,
    stored_rows,
    write_rows,
)
from tests.fixtures import model as model
from tests.test_adapters import save_mlx_adapter
from tests.twin import LOGPROB_TOLERANCE, load_twin, twin_logprobs

ROWS = [
    {"prompt": "Hello"},
    {"id": "chat", "messages": [{"role": "user", "content": "αβ, hi"}]},
    {"id": "short", "prompt": "The quick brown fox", "max_tokens": 3},
    {"id": "x\ty", "prompt": "z"},
    {"id": 7, "prompt": "One line\nand another"},
]
KEYS = ["id", "text", "finish_reason", "num_prompt_tokens", "num_tokens"]


def results(run_dir: Path, name: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


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
        columns = {"id", "index", "sample", "text", "finish_reason", "tokens", "offsets", "rank"}
        columns |= {"num_prompt_tokens", "num_cached_tokens", "created"}
        assert file.keys() == columns | {"ttft", "tpot", "seconds", "tokens_per_sec"}
        for key in ("id", "text", "finish_reason"):
            assert [v.decode() for v in file[key][:]] == [row[key] for row in rows]
        assert file["index"][:].tolist() == [0, 1, 2, 3, 4] and not file["rank"][:].any()
        assert file["num_prompt_tokens"][:].tolist() == [r["num_prompt_tokens"] for r in rows]
        num_tokens = np.diff(file["offsets"][:])
        assert num_tokens.tolist() == [row["num_tokens"] for row in rows]
        assert len(file["tokens"]) == file["offsets"][-1]
        seconds = file["seconds"][:]
        assert (file["ttft"][:] <= seconds).all()
        np.testing.assert_allclose(file["tokens_per_sec"][:], num_tokens / seconds)
        assert file["tokens_per_sec"].attrs["unit"] == "1/s"
        assert file.attrs["layout"] == "dp1_pp1_tp1" and file.attrs["model"] == str(model)


def test_what_a_run_leaves_behind(single):
    names = {str(p.relative_to(single)) for p in single.rglob("*") if p.is_file()}
    [part] = [name for name in names if name.startswith("rows/rank0-")]
    assert part.endswith(".h5")
    assert names - {part} == {
        "claim.json",
        "completed.json",
        "config.yaml",
        "lock",
        "flight/rank0.bin",
        "logs/rank0.log",
        "manifest.json",
        "report.html",
        "results.h5",
        "results.jsonl",
        "run.json",
        "status.json",
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
    manifest = json.loads((single / "manifest.json").read_text())
    assert manifest["settings"]["sampling.max_tokens"] == 16
    assert "layout dp1_pp1_tp1" in (single / "logs/rank0.log").read_text()


def test_a_complete_run_is_left_as_it_is(single, common):
    def now() -> dict:
        files = {p: p.stat().st_mtime_ns for p in single.rglob("*") if p.is_file()}
        about_launches = ["completed.json", "lock", "rank0.log", "rank0.bin", "run.json"]
        about_launches.append("report.html")
        return {p: when for p, when in files.items() if p.name not in about_launches}

    before = now()
    outcome = run("generate", *common, f"run_dir={single}")
    assert_done(outcome, single)
    assert f"all {len(ROWS)} answers are there already" in outcome.err
    assert "layers" not in outcome.err and now() == before


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
    line += ["parallel.tp=2", f"run_dir={run_dir}"]
    outcome = run_line(line, cwd=tmp_path, **WITHOUT_TORCH)
    assert_done(outcome, run_dir)
    assert (run_dir / "results.jsonl").read_bytes() == (single / "results.jsonl").read_bytes()


def test_a_login_node_starts_mpirun_itself(single, common, tmp_path):
    pytest.importorskip("matplotlib", reason="NOT TESTED: pipeline.png needs matplotlib")
    line = [*common, "parallel=pp2", "launch=mpirun", "timeline=true"]
    outcome = run("generate", *line, cwd=tmp_path)
    [run_dir] = (tmp_path / "runs").iterdir()
    assert_done(outcome, run_dir)
    assert re.fullmatch(r"\d{8}-\d{6}-generate-dp1_pp2_tp1", run_dir.name)
    assert (run_dir / "results.jsonl").read_bytes() == (single / "results.jsonl").read_bytes()
    assert not outcome.messages
    [line] = [text for _, text in outcome.lines if "mpirun -n 2" in text]
    assert line.startswith("hpcmlx: /") and str(run_dir) in line
    assert (run_dir / "pipeline.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with h5py.File(run_dir / "timeline.h5") as file:
        assert file["ranks/stage"][:].tolist() == [0, 1] and set(file["rank"][:]) == {0, 1}


def test_a_run_goes_on_where_it_was_cut_off(single, common, tmp_path):
    """Three launches: two are cut off, the last has another layout. What people see meanwhile."""
    run_dir = tmp_path / "run"

    def status() -> dict:
        return json.loads((run_dir / "status.json").read_text())

    line = [*common, f"run_dir={run_dir}", "inference.batch_size=2"]
    job = start("generate", *line, env={faults.ENV: "rank=0,step=10,kind=hang"})
    kept = rows_of_a_job_that_hangs(job, run_dir)
    job.kill()
    assert job.wait().code == -9
    assert 0 < len(kept) < len(ROWS)

    # As of a launch that is killed while it writes; `assert_done` finds none.
    for name in (".summary.json.0123456789ab.tmp", "rows/.0.h5.0123456789ab.tmp"):
        (run_dir / name).write_text("half")
    job = start("generate", f"resume={run_dir}", env={faults.ENV: "rank=0,step=4,kind=hang"})
    job.wait_for("injected fault")
    meanwhile = status()
    job.kill()
    job.wait()
    assert meanwhile["state"] == "running" and meanwhile["pid"] == job.process.pid
    assert meanwhile["num_resumed"] == meanwhile["num_done"] == len(kept)
    assert (meanwhile["num_total"], meanwhile["num_errors"]) == (len(ROWS), 0)
    assert meanwhile["layout"] == "dp1_pp1_tp1" and len(meanwhile["stages"]) == 1
    assert not (run_dir / "completed.json").exists() and status() == meanwhile

    outcome = run("generate", f"resume={run_dir}", "parallel.pp=2", "launch=mpirun")
    assert_done(outcome, run_dir)
    assert (run_dir / "results.jsonl").read_bytes() == (single / "results.jsonl").read_bytes()
    assert kept.items() <= stored_rows(run_dir).items()
    after = status()
    assert after["state"] == "complete" and after["layout"] == "dp1_pp2_tp1"
    assert after["num_done"] == after["num_total"] == len(ROWS) and after["num_active"] == 0
    assert len(after["stages"]) == 2 and all(0 <= s["busy"] <= 1 for s in after["stages"])
    assert after["tokens_per_sec"]["overall"] > 0 and after["error"] is None
    begin, end = (datetime.fromisoformat(after[key]) for key in ("started", "updated"))
    assert begin <= end
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["rows"] == len(ROWS)
    assert summary["this_launch"]["samples"] == len(ROWS) - after["num_resumed"]


def test_openai_in_openai_out(model, tmp_path):
    """A batch file as OpenAI takes it: answers in its order and by its ids, errors beside them."""
    chat = {"messages": [{"role": "user", "content": "αβ, hi"}], "max_completion_tokens": 5}
    bodies = {
        "z": ("/v1/chat/completions", chat | {"logprobs": True, "top_logprobs": 2}),
        "bad": ("/v1/chat/completions", chat | {"stream": True}),
        "a": ("/v1/completions", {"prompt": "Hello", "model": "mine", "max_tokens": 6}),
        "m": ("/v1/chat/completions", chat | {"n": 2, "temperature": 1.0}),
    }
    rows = [
        {"custom_id": row_id, "method": "POST", "url": url, "body": body}
        for row_id, (url, body) in bodies.items()
    ]
    path, run_dir = write_rows(tmp_path / "batch.jsonl", rows), tmp_path / "run"
    line = [f"model.path={model}", f"input={path}", f"run_dir={run_dir}", "parallel.tp=2"]
    outcome = run("generate", *line, ranks=2)
    assert outcome.code == 64 and not outcome.survivors, outcome.err
    assert json.loads((run_dir / "completed.json").read_text())["exit_code"] == 64
    found = results(run_dir)
    assert [row["custom_id"] for row in found] == ["z", "a", "m"]
    z, a, m = (row["response"]["body"] for row in found)
    types = pytest.importorskip("openai.types", reason="NOT TESTED against OpenAI's library")
    for body in (z, m):
        types.chat.ChatCompletion.model_validate(body, strict=True)
    types.Completion.model_validate(a, strict=True)
    [choice] = z["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    assert all(token["top_logprobs"][0]["token"] == token["token"] for token in tokens)  # greedy
    assert a["model"] == "mine" and z["model"] == str(model)
    assert a["usage"]["prompt_tokens"] == 5 and a["usage"]["completion_tokens"] <= 6
    texts = [choice["message"]["content"] for choice in m["choices"]]
    assert len(set(texts)) == 2 and z["choices"][0]["message"]["content"] not in texts
    [error] = results(run_dir, "errors.jsonl")
    assert (error["custom_id"], error["response"]) == ("bad", None)
    assert error["error"]["code"] == "invalid_row" and "batch.jsonl:2" in error["error"]["message"]


def test_a_table_in_and_samples_of_an_adapted_model_out(model, tmp_path):
    """CSV, an adapter, `n` samples and log-probabilities on two ranks: mlx-lm's own adapted model
    finds every sampled token as likely as the job says it is."""
    adapter = save_mlx_adapter(tmp_path / "adapter", load_twin(model))
    prompts = {"one": 'Say "a,b"', "two": "two\nlines"}
    with open(tmp_path / "in.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("note", "id", "question"), *((0, *p) for p in prompts.items())]
        )
    run_dir = tmp_path / "run"
    line = [f"model.path={model}", f"model.adapter={adapter}", f"input={tmp_path / 'in.csv'}"]
    line += ["data.prompt_column=question", "sampling.n=3", "sampling.temperature=1"]
    line += ["sampling.max_tokens=12", "sampling.logprobs=2", f"run_dir={run_dir}"]
    assert_done(run("generate", *line, "parallel.tp=2", ranks=2), run_dir)
    twin = load_adapters(load_twin(model), str(adapter)).eval()
    plain = load_twin(model)
    vocab = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    found = results(run_dir)
    assert [row["id"] for row in found] == list(prompts)
    with h5py.File(run_dir / "results.h5") as file:
        assert file["sample"][:].tolist() == [0, 1, 2] * 2
        offsets, tops = file["offsets"][:], file["top_offsets"][:]
        assert np.diff(tops).tolist() == [2] * len(file["tokens"])
        for number in range(6):
            row, sample = found[number // 3], found[number // 3]["samples"][number % 3]
            begin, end = offsets[number : number + 2]
            prompt = [vocab[character] for character in prompts[row["id"]]]
            assert row["num_prompt_tokens"] == len(prompt)
            tokens, logprobs = file["tokens"][begin:end], file["logprob"][begin:end]
            assert [t["token"] for t in sample["logprobs"]] == tokens.tolist()
            assert [t["logprob"] for t in sample["logprobs"]] == logprobs.tolist()
            sequence = [*prompt, *tokens.tolist()]
            expected = twin_logprobs(twin, sequence, len(sequence))[len(prompt) :]
            np.testing.assert_allclose(logprobs, expected, rtol=0, atol=LOGPROB_TOLERANCE)
            other = twin_logprobs(plain, sequence, len(sequence))[len(prompt) :]
            assert np.abs(other - expected).max() > 0.05  # the adapter does something
            best = mx.argmax(twin(mx.array([sequence]))[0, len(prompt) - 1 : -1], axis=-1)
            assert file["top_tokens"][tops[begin] : tops[end] : 2].tolist() == best.tolist()
        texts = [sample["text"] for row in found for sample in row["samples"]]
        assert len(set(texts)) == 6


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
        assert_done(run("evaluate", *line, ranks=ranks, env=WITHOUT_TORCH), run_dir)
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


def test_a_run_directory_of_another_job_is_refused(single, single_scores, model, folder):
    line = [f"model.path={model}", f"input={folder / 'text.txt'}"]
    before = (folder / "scores" / "logprobs.h5").stat().st_mtime_ns
    for run_dir in (folder / "scores", single):
        outcome = run("evaluate", *line, f"run_dir={run_dir}", env=WITHOUT_TORCH)
        assert_refused(outcome, 73, str(run_dir), "not empty", "give another run_dir")
    assert (folder / "scores" / "logprobs.h5").stat().st_mtime_ns == before


def test_of_two_launches_into_one_directory_one_wins(common, tmp_path):
    run_dir = tmp_path / "run"
    line = [*common, f"run_dir={run_dir}"]
    env = {faults.ENV: "rank=0,step=2,kind=hang"}  # the winner stays until the other has come
    jobs = [start("generate", *line, env=env) for _ in range(2)]
    end = time.monotonic() + TIMEOUT
    while all(job.process.poll() is None for job in jobs) and time.monotonic() < end:
        time.sleep(0.05)
    loser, winner = sorted(jobs, key=lambda job: job.process.poll() is None)
    assert_refused(loser.wait(), 73, str(run_dir))
    winner.wait_for("injected fault")
    assert winner.process.poll() is None
    winner.kill()
    winner.wait()


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
