"""lm-eval's tasks on one rank and on two, against mlx-lm's own lm-eval model."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hpcmlx.config import EvaluateConfig, from_dict
from hpcmlx.errors import ConfigError, InputError, IntegrityError
from hpcmlx.inference import harness
from hpcmlx.inference.harness import Crew, HarnessEvaluation
from hpcmlx.inference.rows import RowResult
from hpcmlx.inference.scoring import Score
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer
from tests.fixtures import assert_done, run
from tests.fixtures import model as model
from tests.test_engine import MESH

try:
    import lm_eval.tasks
    from lm_eval.evaluator import simple_evaluate
    from mlx_lm.evaluate import MLXLM

    from hpcmlx.inference.harness_model import HarnessModel
except ImportError:
    lm_eval = None

needs_lm_eval = pytest.mark.skipif(
    lm_eval is None, reason="NOT CHECKED: lm-eval is not installed (pip install 'hpcmlx[eval]')"
)

COLORS = ["red", "green", "blue", "grey"]
DOCS = [
    {"question": f"What is the colour of thing {i}?", "label": i % 4, "text": f"Thing {i}, seen."}
    for i in range(6)
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: CHOICES
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: !function own.target
generation_kwargs: {until: [UNTIL], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
# Some answers are right: those that mlx-lm's own greedy decoding gives to every second question.
OWN = """
import evaluate  # the package, not jobs/evaluate.py

assert evaluate.load

ANSWERS = {answers!r}


def target(doc):
    return ANSWERS[doc["question"]]
"""
TASKS = ["tiny_choice", "tiny_answer", "tiny_rolling"]


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


@pytest.fixture(scope="module")
def twin(model):
    """mlx-lm's model as lm-eval sees it."""
    return MLXLM(str(model), use_chat_template=False)


@pytest.fixture(scope="module")
def crew(model, tokenizer):
    inference = {"batch_size": 3}
    cfg = from_dict(EvaluateConfig, {"model": {"path": "x"}, "input": "x", "inference": inference})
    return Crew(cfg, MESH, load_model(open_checkpoint(model), MESH), tokenizer)


@pytest.fixture(scope="module")
def ours(crew, tokenizer):
    return HarnessModel(crew, tokenizer, 512, "tiny")


def asked(*args):
    """Requests as lm-eval makes them."""
    return [SimpleNamespace(args=one, arguments=one) for one in args]


def generated(twin, contexts: list[str], until: list[str]) -> list[str]:
    # mlx-lm's model wants one stop string at least.
    options = {"until": until or ["never"], "max_gen_toks": 9, "do_sample": False}
    return twin.generate_until(asked(*((context, options) for context in contexts)))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, twin) -> Path:
    """A directory of three small tasks, of which one calls a function of its own."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    questions = [doc["question"] for doc in DOCS]
    texts = generated(twin, questions, [])
    until = texts[0][4]
    texts = [text.partition(until)[0] for text in texts]
    marks = ["?", ""] * 3
    answers = {q: t + m for q, t, m in zip(questions, texts, marks, strict=True)}
    (folder / "own.py").write_text(OWN.format(answers=answers))
    words = {"DATA": json.dumps(str(data)), "CHOICES": json.dumps(COLORS)}
    words["UNTIL"] = json.dumps(until)
    for name, text in zip(TASKS, (CHOICE, ANSWER, ROLLING), strict=True):
        text = re.sub("DATA|CHOICES|UNTIL", lambda match: words[match[0]], text)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def expected(tasks, twin, tmp_path_factory):
    """What lm-eval says of mlx-lm's model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", sys.path[:])
        manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
        # mlx-lm's model has no start token before a rolling text.
        results = simple_evaluate(twin, tasks=TASKS[:2], task_manager=manager)
    return results["results"]


def job(model, tasks, run_dir, *more):
    return [
        f"model.path={model}",
        "evaluate.kind=harness",
        f"evaluate.tasks=[{','.join(TASKS)}]",
        f"evaluate.task_path={tasks}",
        f"run_dir={run_dir}",
        *more,
    ]


@needs_lm_eval
@pytest.mark.parametrize(
    ("ranks", "layout"), [(0, []), (2, ["parallel.pp=2"]), (2, ["parallel.dp=2"])]
)
def test_every_layout_scores_as_mlx_lm_does(tmp_path, model, tasks, expected, ranks, layout):
    run_dir = tmp_path / "run"
    outcome = run("evaluate", *job(model, tasks, run_dir, *layout), ranks=ranks, timeout=120)
    assert_done(outcome, run_dir)
    assert re.search(r"\|tiny_choice *\|.*\|acc ", outcome.out)
    written = json.loads((run_dir / "harness.json").read_text())
    results = written["results"]
    assert results.keys() == set(TASKS)
    for name in TASKS[:2]:
        for metric, value in expected[name].items():
            assert results[name][metric] == value, (name, metric)
    assert 0 < results["tiny_answer"]["exact_match,none"] < 1
    assert results["tiny_rolling"]["bits_per_byte,none"] > 1
    assert written["config"]["layout"] in str(outcome.err)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["tasks"] == results and summary["kind"] == "harness"


@needs_lm_eval
def test_likelihoods_are_those_of_mlx_lm(ours, twin):
    pairs = [("The sky is", " blue"), ("The sky is", " a"), ("x", "yz"), ("Long" * 40, " tail")]
    requests = asked(*pairs)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    for (total, greedy), (value, is_greedy) in zip(
        found, twin.loglikelihood(requests), strict=True
    ):
        assert total == pytest.approx(value, abs=1e-3) and greedy == bool(is_greedy)


@needs_lm_eval
def test_answers_are_those_of_mlx_lm(ours, twin):
    """Also with stop strings, and where the rows finish out of order."""
    contexts = ["Hello", "The sky", "abc", "a much longer beginning than that", "z"]
    plain = generated(twin, contexts, [])
    until = plain[1][3:5]
    for stop in ([], [until], [until, plain[2][1]]):
        options = {"until": stop, "max_gen_toks": 9, "do_sample": False}
        found = ours.generate_until(asked(*((context, options) for context in contexts)))
        assert found == generated(twin, contexts, stop)


@needs_lm_eval
def test_rolling_likelihoods_add_up(ours, crew, tokenizer):
    """A text longer than the context is scored in windows, every token once."""
    text = "".join(chr(97 + (i * i) % 26) for i in range(70))
    [whole] = ours.loglikelihood_rolling(asked((text,)))
    [(total, _)] = ours.loglikelihood(asked(("", text)), disable_tqdm=True)
    assert whole == pytest.approx(total, abs=1e-3)
    [cut] = HarnessModel(crew, tokenizer, 32, "tiny").loglikelihood_rolling(asked((text,)))
    parts = [("", text[:32]), (text[31], text[32:64]), (text[37:64], text[64:])]
    totals = [t for t, _ in ours.loglikelihood(asked(*parts), disable_tqdm=True)]
    assert cut == pytest.approx(sum(totals), abs=1e-3) and cut != pytest.approx(whole, abs=1e-3)


@needs_lm_eval
@pytest.mark.parametrize(
    ("what", "error", "words"),
    [("why_too_large", ConfigError, "does not fit: too big"), ("run", IntegrityError, "NaN")],
)
def test_answers_that_cannot_be_had_end_the_job(ours, crew, monkeypatch, what, error, words):
    def run(requests, on_row):
        for request in requests:
            on_row(RowResult(request.index, "", "", (), "error", 1, 0.0, 0.0))

    ours.generate_until(asked(("a", {"max_gen_toks": 1})))  # builds the engine
    monkeypatch.setattr(crew._engine, what, {"run": run}.get(what, lambda request: "too big"))
    with pytest.raises(error, match=words):
        ours.generate_until(asked(("a", {"max_gen_toks": 1})))


class Recorder:
    """A crew that only looks at what it is asked."""

    def score(self, rows):
        self.rows = rows
        return [Score(np.zeros(1, np.float32), is_greedy=False) for _ in rows]

    def generate(self, requests):
        self.requests = requests
        return [SimpleNamespace(text="") for _ in requests]


@needs_lm_eval
def test_what_is_too_long_loses_its_beginning(tokenizer, caplog):
    recorder = Recorder()
    lm = HarnessModel(recorder, tokenizer, 16, "tiny")
    with caplog.at_level("WARNING"):
        lm.loglikelihood(asked(("a" * 30, "bcd"), ("a" * 14, "bcd")), disable_tqdm=True)
        lm.generate_until(asked(("x" * 20 + "y", {"until": [], "max_gen_toks": 6})))
    long, fits = recorder.rows
    assert tokenizer.decode(list(long.tokens)) == "a" * 14 + "bcd" and long.start == 14
    assert tokenizer.decode(list(fits.tokens)) == "a" * 14 + "bcd"
    assert tokenizer.decode(list(recorder.requests[0].tokens)) == "x" * 9 + "y"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("1 prompts are longer" in text for text in said)
    with pytest.raises(InputError, match="likelihood of a text of 17 tokens"):
        lm.loglikelihood(asked(("a", "b" * 17)), disable_tqdm=True)
    with pytest.raises(InputError, match="max_gen_toks=16 of the task leaves no room"):
        lm.generate_until(asked(("a", {"until": [], "max_gen_toks": 16})))


@needs_lm_eval
def test_how_a_task_wants_its_tokens_chosen(tokenizer):
    recorder = Recorder()
    lm = HarnessModel(recorder, tokenizer, 512, "tiny")
    lm.generate_until(
        asked(
            ("a", {"until": "\n"}),
            ("a", {"until": ["x", ""], "do_sample": False, "temperature": 0.7, "top_p": 0.5}),
            ("a", {"do_sample": True, "temperature": 0.7, "top_p": 0.5, "max_gen_toks": 3}),
            ("a", {"do_sample": True, "temperature": 0.7}),
        )
    )
    one, two, three, four = (request.sampling for request in recorder.requests)
    assert (one.temperature, one.stop, one.max_tokens) == (0.0, ("\n",), 256)
    assert (two.temperature, two.top_p, two.stop) == (0.0, 1.0, ("x",))
    assert (three.temperature, three.top_p, three.max_tokens) == (0.7, 0.5, 3)
    assert three.seed != four.seed  # a question that is asked twice gets two draws
    with pytest.raises(InputError, match=r"generation_kwargs \['num_beams'\]"):
        lm.generate_until(asked(("a", {"do_sample": True, "temperature": 1.0, "num_beams": 2})))
    with pytest.raises(InputError, match=r"top_p=7"):
        lm.generate_until(asked(("a", {"do_sample": True, "temperature": 1.0, "top_p": 7.0})))


@needs_lm_eval
def test_chat_templates(ours):
    history = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(history) == "<|user|>Hi\n<|assistant|>"
    begun = [*history, {"role": "assistant", "content": "Well"}]
    text = ours.apply_chat_template(begun, add_generation_prompt=False)
    assert text == "<|user|>Hi\n<|assistant|>Well"
    assert ours.tokenizer_name == "tiny" and "assistant" in ours.chat_template(True)


def settings(tasks, *names: str, **more) -> EvaluateConfig:
    own = {"kind": "harness", "tasks": list(names), "task_path": str(tasks), **more}
    return from_dict(EvaluateConfig, {"model": {"path": "tiny"}, "evaluate": own})


@needs_lm_eval
def test_chat_limit_and_examples_reach_lm_eval(tmp_path, monkeypatch, model, tasks, tokenizer):
    asked_for = []
    real = Crew.score

    def watched(self, rows):
        asked_for.extend(tokenizer.decode(list(row.tokens[: row.start])) for row in rows)
        return real(self, rows)

    monkeypatch.setattr(Crew, "score", watched)
    monkeypatch.setattr(sys, "path", sys.path[:])
    cfg = settings(tasks, "tiny_choice", limit=2, chat_template=True, num_fewshot=1)
    evaluation = HarnessEvaluation(cfg, MESH, tokenizer, 512)
    verdict = evaluation.run(load_model(open_checkpoint(model), MESH), tmp_path)
    assert verdict.totals["tasks"].keys() == {"tiny_choice"}
    assert len(asked_for) == 2 * len(COLORS)
    for i, text in enumerate(asked_for):
        assert text.count("<|user|>What is the colour of thing") == 2  # an example, the question
        assert text.endswith(f"{DOCS[i // 4]['question']}\n<|assistant|>")


@needs_lm_eval
def test_an_error_in_a_task_ends_every_rank(tmp_path, model, tasks):
    """Rank 0 fails inside lm-eval while the other waits to be told what to do."""
    (tmp_path / "broken.yaml").write_text(
        CHOICE.replace("DATA", json.dumps(str(tasks / "data.jsonl")))
        .replace("CHOICES", "!function own.choices")
        .replace("tiny_choice", "broken")
    )
    code = "def choices(doc):\n    raise RuntimeError('task is broken')\n"
    (tmp_path / "own.py").write_text(code)
    run_dir = tmp_path / "run"
    line = job(model, tmp_path, run_dir, "parallel.pp=2", "evaluate.tasks=[broken]")
    outcome = run("evaluate", *line, ranks=2, timeout=120)
    assert outcome.code == 70 and "task is broken" in outcome.err
    assert not outcome.survivors and not (run_dir / "completed.json").exists()


def test_what_does_not_fit_together_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="evaluate.tasks is empty"):
        settings(tmp_path)
    with pytest.raises(ConfigError, match="evaluate.task_path=.*control character"):
        settings("a\nb", "x")
    values = {"model": {"path": "x"}, "evaluate": {"kind": "harness", "tasks": ["x"]}}
    with pytest.raises(ConfigError, match="input is set, but evaluate.kind=harness takes none"):
        from_dict(EvaluateConfig, values | {"input": "README.md"})
    for kind in ("text", "choices"):
        with pytest.raises(ConfigError, match="input is not set"):
            from_dict(EvaluateConfig, values | {"evaluate": {"kind": kind}})
    silent = SimpleNamespace(has_chat_template=False)
    with pytest.raises(ConfigError, match="the model has no chat template"):
        HarnessEvaluation(settings(tmp_path, "x", chat_template=True), MESH, silent, 512)


@needs_lm_eval
def test_tasks_are_looked_for_where_the_user_says_first(monkeypatch, tasks):
    """lm-eval's own thousands of files are read only where a name is not there."""
    asked_for_own = []
    real = lm_eval.tasks.TaskManager

    def manager(include_path=None, include_defaults=True):
        asked_for_own.append(include_defaults)
        return real(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    _, names = harness._find_tasks(["tiny_[ac]*"], str(tasks))
    assert sorted(names) == ["tiny_answer", "tiny_choice"] and asked_for_own == [False]
    with pytest.raises(ConfigError, match=r"tiny_choise is not in lm-eval or .*`lm-eval ls tasks`"):
        harness._find_tasks(["tiny_choice", "tiny_choise"], str(tasks))
    assert asked_for_own == [False, False, True]
    with pytest.raises(ConfigError, match="evaluate.task_path=/nowhere is not a directory"):
        harness._find_tasks(["tiny_choice"], "/nowhere")
    with pytest.raises(ConfigError, match="arc_hard is not in lm-eval; "):
        harness._find_tasks(["arc_hard"], None)
    # A path is not a name: nothing but the directory is read.
    with pytest.raises(ConfigError, match="is not in lm-eval"):
        harness._find_tasks([str(tasks / "tiny_choice.yaml")], None)


def test_without_lm_eval_the_job_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hpcmlx\[eval\]'"):
        harness._prepare()


@needs_lm_eval
@pytest.mark.parametrize(("given", "offline"), [(None, True), ("1", True), ("0", False)])
def test_nothing_is_fetched_unless_the_user_says_so(monkeypatch, given, offline):
    names = ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"]
    for name in names:
        monkeypatch.setenv(name, "x")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(harness.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sys, "path", sys.path[:])
    if given is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", given)
    harness._prepare()
    assert offline == harness.hub.is_offline_mode()
    assert {harness.os.environ[name] for name in names} == {"1" if offline else "0"}
