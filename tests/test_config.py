"""Composing, checking and saving configurations; every file of conf/."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hpcmlx import config
from hpcmlx.config import EvaluateConfig, FinetuneConfig, GenerateConfig, config_hash
from hpcmlx.errors import ConfigError, UsageError

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
JOBS = {"generate": GenerateConfig, "evaluate": EvaluateConfig, "finetune": FinetuneConfig}


def generate(*overrides: str) -> GenerateConfig:
    return config.compose(GenerateConfig, CONF, "generate", ["model=smollm2", *overrides])


def refusal(*overrides: str, error=ConfigError) -> str:
    """The one-line message with which the overrides are refused."""
    with pytest.raises(error) as caught:
        generate(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_groups_files_and_command_line():
    cfg = generate(
        "sampling=chat", "sampling.top_p=0.5", "parallel.tp=2", "parallel.tp_shares=[2,1]"
    )
    assert cfg.model.path == "models/smollm2"
    assert (cfg.sampling.temperature, cfg.sampling.top_p) == (0.7, 0.5)
    assert cfg.parallel.tp_shares == [2.0, 1.0] and isinstance(cfg.parallel.tp_shares[0], float)
    assert generate("launch=mpirun").launch.kind == "mpirun"
    assert generate("sampling.stop=[END, 'a, b']").sampling.stop == ["END", "a, b"]
    assert generate("inference.num_microbatches=null").inference.num_microbatches is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.temprature=1", ["sampling.temprature", "did you mean sampling.temperature?"]),
        ("temperature=1", ["unknown key temperature", "did you mean sampling.temperature?"]),
        ("modle=smollm2", ["unknown key modle", "valid: model, parallel"]),
        ("+sampling.beams=4", ["sampling.beams", "sampling.top_k, sampling.min_p"]),
        ("evaluate.window=4", ["unknown key evaluate.window"]),
        ("hydra.run.dir=x", ["unknown key hydra.run.dir"]),
        ("unresolved={a:1}", ["unknown key unresolved"]),
        ("model=smol", ["conf/model has no smol", "path, smollm2"]),
        ("model=../model/path", ["conf/model has no ../model/path"]),
        ("model={path:x}", ["conf/model has no"]),
        ("parallel.tp=two", ['parallel.tp="two"', "expected int"]),
        ("parallel.tp=2.0", ["parallel.tp=2.0", "expected int"]),
        ("parallel.tp=true", ["parallel.tp=true", "expected int"]),
        ("parallel.tp=null", ["parallel.tp=null", "expected int"]),
        ("parallel.tp=0", ["parallel.tp=0", "at least 1"]),
        ("parallel.tp_shares=[a]", ["parallel.tp_shares[0]", "expected number"]),
        ("parallel.tp_shares=3", ["parallel.tp_shares=3", "expected list of number"]),
        ("parallel.tp_shares=[0]", ["parallel.tp_shares", "greater than 0"]),
        ("parallel.tp_shares=[2,1]", ["tp_shares has 2 entries but parallel.tp=1"]),
        ("parallel.pp_layers=[9,9]", ["pp_layers has 2 entries but parallel.pp=1"]),
        ("sampling.top_p=1.5", ["sampling.top_p=1.5", "at most 1"]),
        ("sampling.temperature=nan", ["finite"]),
        ("sampling.temperature=-1", ["at least 0"]),
        ("sampling.stop=[{a:1}]", ["sampling.stop[0]", "expected text"]),
        ("sampling.stop=['']", ["sampling.stop", "empty"]),
        ("model.dtype=float31", ["float32, bfloat16, float16", "did you mean float32?"]),
        ("launch.num_ranks=3", ["launch.num_ranks=3", "dp1_pp1_tp1", "for 1"]),
        ("run_dir=2026", ["run_dir=2026", "quote it"]),
        ("run_dir='a\nb'", ["run_dir", "control character"]),
        ("input=''", ["input", "empty"]),
        ("input=???", ["input is not set"]),
        ("+model._target_=os.system", ["model._target_", "cannot name code"]),
        ("model.path={_target_:os.system}", ["model.path._target_", "cannot name code"]),
        ("sampling.stop=[{_target_:os.system}]", ["sampling.stop[0]._target_"]),
    ],
)
def test_a_wrong_value_is_named(override, words):
    message = refusal(override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "override",
    ["input=a=b", "parallel.tp_shares=[2,", "~model", "=3", "parallel.tp=1,2", "model@x=smollm2"],
)
def test_a_wrong_override_is_a_usage_error(override):
    assert repr(override) in refusal(override, error=UsageError)


def test_a_missing_key_says_how_to_give_it():
    with pytest.raises(ConfigError, match=r"model\.path is not set; give model\.path="):
        config.compose(GenerateConfig, CONF, "generate", [])
    with pytest.raises(ConfigError, match=r"input is not set; give input="):
        config.compose(EvaluateConfig, CONF, "evaluate", ["model=smollm2"])


def test_windows_must_overlap():
    overrides = ["model=smollm2", "input=x", "evaluate.window=64", "evaluate.stride=65"]
    with pytest.raises(ConfigError, match=r"evaluate\.stride=65"):
        config.compose(EvaluateConfig, CONF, "evaluate", overrides)


def write_conf(folder: Path, text: str) -> Path:
    (folder / "generate.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: !!python/object/apply:os.system ['touch x']", ["python/object/apply", "line 1"]),
        ("model: {path: x, _target_: os.system}", ["model._target_"]),
        ("sampling: {stop: [{deep: {_target_: os.system}}]}", ["sampling.stop[0].deep._target_"]),
        ("model: {path: x, dytpe: auto}", ["unknown key model.dytpe", "did you mean model.dtype?"]),
        ("model: 3", ["model=3", "group of keys"]),
        ("model: {path: x}\nmodel: {path: y}", ["duplicate key"]),
        ("model: [", ["generate.yaml"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        config.compose(GenerateConfig, write_conf(tmp_path, text), "generate", [])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_environment_variable_gets_into_no_file_and_no_message(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.setenv("RANKS", "2")
    cfg = generate("input=${oc.env:SECRET}", "parallel.tp=${oc.env:RANKS}")
    assert (cfg.input, cfg.parallel.tp) == ("hunter2", 2)
    text = config.to_yaml(cfg)
    assert "hunter2" not in text
    assert yaml.safe_load(text)["input"] == "${oc.env:SECRET}"
    assert yaml.safe_load(text)["parallel"]["tp"] == "${oc.env:RANKS}"
    assert "hunter2" not in refusal("parallel.tp=${oc.env:SECRET}")
    assert "hunter2" not in refusal("model.dtype=${oc.env:SECRET}")
    assert "'NOPE' not found" in refusal("input=${oc.env:NOPE}")


def test_what_is_saved_composes_to_the_same(tmp_path):
    awkward = config.quote("run_dir", "/a b/c's \\d ${x} $HOME,[=")
    cfg = generate("input='a=b.jsonl'", "parallel.pp=2", "parallel.pp_layers=[17,13]", awkward)
    assert cfg.run_dir == "/a b/c's \\d ${x} $HOME,[="
    conf = write_conf(tmp_path, config.to_yaml(cfg))
    assert config.compose(GenerateConfig, conf, "generate", []) == cfg


def test_a_broadcast_keeps_everything():
    cfg = generate("parallel.tp=2", "parallel.tp_shares=[2,1]", "sampling.stop=[a]")
    plain = json.loads(json.dumps(config.to_dict(cfg)))
    assert config.from_dict(GenerateConfig, plain) == cfg


def test_the_hash_covers_what_decides_the_results():
    base = config_hash(generate())
    assert config_hash(generate("run_dir=/elsewhere", "launch=mpirun")) == base
    assert config_hash(generate("sampling.seed=1")) != base
    assert config_hash(generate("parallel.tp=2")) != base


def test_command_line():
    parse = config.parse_command_line
    assert parse(["a=1", "b=2"]).overrides == ("a=1", "b=2")
    assert parse(["a=1", "-h"]).show == "help"
    assert parse(["--cfg", "job", "a=1"]) == config.CommandLine(("a=1",), "config")
    assert parse(["-m", "a=1,2"]) == config.CommandLine(("a=1,2",), multirun=True)
    saved = parse(["--config", "a.yaml", "b=1"])
    assert (saved.file, saved.arguments) == ("a.yaml", ("--config=a.yaml", "b=1"))
    assert parse(list(saved.arguments)) == saved
    for wrong in (["-x", "a=1"], ["--cfg"], ["a"], ["--config"], ["--config=a", "-m"]):
        with pytest.raises(UsageError):
            parse(wrong)


def test_help_lists_every_group_and_key():
    text = config.help_text(EvaluateConfig, CONF)
    for word in (
        "smollm2",
        "perplexity",
        "model.path (text; required)",
        "evaluate.stride",
        "bfloat16",
    ):
        assert word in text
    assert "sampling.seed" not in text and "unresolved" not in text


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}"
)
def test_every_group_file_composes(path):
    group = path.parent.name
    if group == "experiment":
        return  # below, with its own command
    cfg = config.compose(GenerateConfig, CONF, "generate", ["model.path=x", f"{group}={path.stem}"])
    for key, value in (yaml.safe_load(path.read_text()) or {}).items():
        expected = "x" if (group, key) == ("model", "path") else value
        assert getattr(getattr(cfg, group), key) == expected


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_opens_with_its_command(path):
    command = path.read_text().splitlines()[1]
    match = re.fullmatch(r"# (mpirun -n (\d+) .*)?python jobs/(\w+)\.py (-m )?(.*)", command)
    assert match, command
    job, overrides = match[3], shlex.split(match[5])
    assert f"experiment={path.stem}" in overrides
    swept = yaml.safe_load(path.read_text()).get("hydra", {}).get("sweeper", {}).get("params", {})
    assert bool(swept) == bool(match[4])
    overrides += [f"{key}={str(values).split(',')[0]}" for key, values in swept.items()]
    cfg = config.compose(JOBS[job], CONF, job, overrides)
    ranks = cfg.parallel.dp * cfg.parallel.pp * cfg.parallel.tp
    assert (int(match[2]) if match[2] else ranks) == ranks
    assert (cfg.launch.kind == "none") == (match[1] is not None)


FINETUNE = ["model=smollm2", "data.train=[x]"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=smollm2"], "data.train is not set"),
        (["model=smollm2", "data.train=[]"], "data.train is empty"),
        ([*FINETUNE, "model.adapter=a"], "model.adapter is for inference"),
        ([*FINETUNE, "train.num_chunks=2"], "interleaved_1f1b is for 2 chunks or more"),
        ([*FINETUNE, "train.schedule=interleaved_1f1b"], "interleaved_1f1b is for 2 chunks"),
        (
            [*FINETUNE, "train.schedule=interleaved_1f1b", "train.num_chunks=2"],
            "train.num_chunks is for a pipeline",
        ),
        ([*FINETUNE, "optim.zero1=true"], "parallel.dp=1"),
        ([*FINETUNE, "optim.betas=[0.9]"], "expected two numbers"),
        ([*FINETUNE, "train.patience=2"], "train.patience needs data.valid"),
        ([*FINETUNE, "parallel.pp=2", "parallel.pp_layers=[30]"], "pp_layers has 1 entries"),
        ([*FINETUNE, "optim.name=adamx"], "did you mean adam"),
        ([*FINETUNE, "input=x"], "unknown key input"),
    ],
)
def test_what_does_not_fit_in_fine_tuning_is_named(overrides, words):
    with pytest.raises(ConfigError) as refused:
        config.compose(FinetuneConfig, CONF, "finetune", overrides)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_the_shipped_prompts_are_rows():
    rows = [json.loads(x) for x in (ROOT / "jobs/prompts.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) >= 6
    assert all(("prompt" in row) != ("messages" in row) for row in rows)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
def test_true_and_false_from_an_environment_variable(monkeypatch, text, value):
    monkeypatch.setenv("DRAW", text)
    assert generate("timeline=${oc.env:DRAW}").timeline is value
    monkeypatch.setenv("DRAW", "hunter2")
    assert refusal("timeline=${oc.env:DRAW}") == ("timeline=${oc.env:DRAW}: expected true or false")


def test_resume_takes_the_saved_settings_and_the_command_line_what_it_names(tmp_path):
    first = generate(
        "model=smollm2",
        "sampling.stop=['a b',\"\\n\"]",
        "sampling.temperature=0.5",
        "parallel.tp=2",
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml(first))
    again = generate(f"resume={tmp_path}", "parallel=pp2", "sampling.top_k=3")
    assert again.model.path == first.model.path and again.sampling.stop == first.sampling.stop
    assert again.sampling.temperature == 0.5 and again.sampling.top_k == 3
    # A group that is chosen is all the command line's.
    assert (again.parallel.pp, again.parallel.tp) == (2, 1)
    assert again.directory == str(tmp_path) and again.run_dir is None
    assert "config.yaml cannot be read" in refusal(f"resume={tmp_path}/absent")
    assert "give one of them" in refusal(f"resume={tmp_path}", "run_dir=x")
