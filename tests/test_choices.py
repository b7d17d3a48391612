"""Multiple choice: read row by row, cut and scored as lm-eval does, the same on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcmlx.errors import InputError
from hpcmlx.inference.choices import (
    Answer,
    Question,
    answer_questions,
    encode_pair,
    read_questions,
    summarize,
)
from hpcmlx.inference.scoring import Score, ScoreRow
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer, render_chat
from tests.fixtures import ROOT, assert_refused, run, write_rows
from tests.fixtures import model as model
from tests.test_engine import MESH
from tests.twin import LOGPROB_TOLERANCE, load_twin, twin_logprobs

CONTEXT = 512
QUESTIONS = [
    {
        "id": "sky",
        "context": "The sky is",
        "choices": [" blue", " red", " pale green"],
        "answer": 0,
    },
    {"context": "Space at the end: ", "choices": ["x", "yy"], "answer": 1},
    {"id": "α", "context": "", "choices": ["from nothing", "αβγ"]},
    {
        "id": 7,
        "messages": [{"role": "user", "content": "Well?"}],
        "choices": ["Yes", "No, never"],
        "answer": 0,
    },
]
BAD = [
    ("{", "invalid_json", "not JSON"),
    ("[1]", "invalid_json", "a row is a JSON object"),
    ({"choices": ["a", "b"]}, "invalid_row", "either 'context' or 'messages'"),
    ({"context": "a", "messages": [], "choices": ["a", "b"]}, "invalid_row", "either"),
    ({"context": 1, "choices": ["a", "b"]}, "invalid_row", "'context' must be a string"),
    ({"context": "a"}, "invalid_row", "two non-empty strings"),
    ({"context": "a", "choices": ["a"]}, "invalid_row", "two non-empty strings"),
    ({"context": "a", "choices": ["a", ""]}, "invalid_row", "two non-empty strings"),
    ({"context": "a", "choices": ["a", "b"], "answer": 2}, "invalid_row", "from 0 to 1"),
    ({"context": "a", "choices": ["a", "b"], "answer": True}, "invalid_row", "from 0 to 1"),
    ({"context": "a", "choices": ["a", "b"], "anwser": 1}, "invalid_row", "unknown key 'anwser'"),
    ({"id": [], "context": "a", "choices": ["a", "b"]}, "invalid_row", "string or a whole number"),
    ('{"context": "\\ud800", "choices": ["a", "b"]}', "invalid_row", "surrogate"),
    ({"context": "a" * 600, "choices": ["a", "b"]}, "context_length_exceeded", "context of 512"),
    ({"messages": "hi", "choices": ["a", "b"]}, "invalid_row", "'messages' must be a list"),
    ({"messages": [{"role": "user"}], "choices": ["a", "b"]}, "invalid_row", "'content'"),
]


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def read(path: Path, rows, tokenizer):
    return read_questions(write_rows(path / "rows.jsonl", rows), tokenizer, CONTEXT)


def test_rows_are_read(tmp_path, tokenizer):
    questions, errors = read(tmp_path, QUESTIONS, tokenizer)
    assert not errors
    assert [q.id for q in questions] == ["sky", "2", "α", "7"]
    assert [q.answer for q in questions] == [0, 1, None, 0]
    sky, space, empty, chat = questions
    assert tokenizer.decode(list(sky.rows[2].tokens[sky.rows[2].start :])) == " pale green"
    # The space belongs to what comes after it.
    assert tokenizer.decode(list(space.rows[1].tokens[space.rows[1].start :])) == " yy"
    # Something must predict the first token.
    assert empty.rows[0].tokens[0] == tokenizer.bos_token_id and empty.rows[0].start == 1
    prompt = render_chat(tokenizer, QUESTIONS[3]["messages"])
    assert list(chat.rows[0].tokens) == prompt + tokenizer.encode("Yes", add_special_tokens=False)
    assert chat.rows[0].start == len(prompt)


@pytest.mark.parametrize(("row", "code", "words"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_an_error_of_its_own(tmp_path, tokenizer, row, code, words):
    questions, errors = read(tmp_path, [QUESTIONS[0], row, QUESTIONS[1]], tokenizer)
    assert [q.index for q in questions] == [0, 2]
    [error] = errors
    assert (error.index, error.line, error.code) == (1, 2, code)
    assert words in error.message and "rows.jsonl:2: " in error.message


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no rows"),
        ([QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], r"'sky' \(lines 1 and 3\)"),
        ([QUESTIONS[1], {**QUESTIONS[0], "id": 1}], r"'1' \(lines 1 and 2\)"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, tokenizer, rows, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, rows, tokenizer)


def test_a_missing_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"none\.jsonl does not exist"):
        read_questions(tmp_path / "none.jsonl", tokenizer, CONTEXT)


@pytest.mark.parametrize(
    ("context", "choice"),
    [
        ("The capital of France is", " Paris"),
        ("The capital of France is ", "Paris"),
        ("Two spaces  ", " x"),
        ("A line\n", "next"),
        ("x", "y"),
        ("", "Paris"),
        ("", "<|im_start|>Paris"),
        ("prefi", "x"),
        ("αβ ", "γ"),
    ],
)
def test_pairs_are_cut_where_lm_eval_cuts(context, choice):
    """With a tokenizer that joins words with the spaces before them."""
    pytest.importorskip("lm_eval", reason="NOT CHECKED: lm-eval is not installed")
    from hpcmlx.inference.harness_model import HarnessModel

    path = ROOT / "models" / "smollm2"
    if not path.exists():
        pytest.skip(f"NOT CHECKED: {path} is missing; run `make models/smollm2/config.json`")
    tokenizer = load_tokenizer(path)
    found = []

    class Watched(HarnessModel):
        def _loglikelihood_tokens(self, requests, **kwargs):
            found.extend(pair for _, *pair in requests)
            return [(0.0, False)] * len(requests)

    lm = Watched(None, tokenizer, 2048, "smollm2")
    lm.loglikelihood([SimpleNamespace(args=(context, choice))], disable_tqdm=True)
    assert list(encode_pair(tokenizer, context, choice)) == found[0]


def test_choices_cost_what_the_model_says(tmp_path, tokenizer, model):
    questions, _ = read(tmp_path, QUESTIONS, tokenizer)
    answers = answer_questions(load_model(open_checkpoint(model), MESH), MESH, questions)
    twin = load_twin(model)
    for answer in answers:
        sums = []
        for row in answer.question.rows:
            logprobs = twin_logprobs(twin, row.tokens, len(row.tokens))
            sums.append(logprobs[row.start :].sum(dtype=float))
        np.testing.assert_allclose(answer.logprobs, sums, atol=10 * LOGPROB_TOLERANCE)
        lengths = [len(choice) for choice in answer.question.choices]
        assert answer.prediction == np.argmax(sums)
        assert answer.prediction_norm == np.argmax(np.array(sums) / lengths)


def answer(logprobs: list[float], choices: list[str], right: int | None) -> Answer:
    scores = tuple(Score(np.array([x], np.float32), False) for x in logprobs)
    rows = tuple(ScoreRow([1, 2], 1) for _ in choices)
    return Answer(Question(0, "q", tuple(choices), rows, right), scores)


def test_what_the_numbers_come_to():
    answers = [
        answer([-1.0, -2.0], ["a", "b"], 0),
        answer([-1.0, -2.0], ["a", "b"], 1),
        # Per character the longer one is likelier.
        answer([-3.0, -4.0], ["ab", "abcdefgh"], 1),
        answer([-1.0, -1.0], ["a", "b"], 0),  # of equals the first
        answer([-1.0, -2.0], ["a", "b"], None),
    ]
    totals = summarize(answers)
    assert totals["questions"] == 5 and totals["with_answer"] == 4
    assert totals["accuracy"] == 0.5 and totals["accuracy_norm"] == 0.75
    assert totals["accuracy_stderr"] == pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)
    assert summarize(answers[4:])["accuracy"] is None
    assert summarize([])["accuracy"] is None


def test_the_job_answers_and_keeps_the_bad_rows(tmp_path, model):
    """On one rank and on a pipeline of two: the same files; code 64, because two rows are bad."""
    rows = [QUESTIONS[0], "{", *QUESTIONS[1:], {"context": "a", "choices": []}]
    path = write_rows(tmp_path / "questions.jsonl", rows)
    line = [f"model.path={model}", f"input={path}", "evaluate.kind=choices"]
    found = []
    for ranks, layout in ((0, []), (2, ["parallel.pp=2"])):
        run_dir = tmp_path / f"run{ranks}"
        outcome = run("evaluate", *line, *layout, f"run_dir={run_dir}", ranks=ranks)
        assert outcome.code == 64 and not outcome.messages, outcome.err
        assert json.loads((run_dir / "completed.json").read_text())["exit_code"] == 64
        lines = (run_dir / "choices.jsonl").read_text().splitlines()
        answers = [json.loads(text) for text in lines]
        assert [a["id"] for a in answers] == ["sky", "3", "α", "7"]
        errors = [json.loads(x) for x in (run_dir / "errors.jsonl").read_text().splitlines()]
        assert [(e["line"], e["error"]["code"]) for e in errors] == [
            (2, "invalid_json"),
            (6, "invalid_row"),
        ]
        with h5py.File(run_dir / "choices.h5") as file:
            offsets = file["offsets"][:]
            assert np.diff(offsets).tolist() == [3, 2, 2, 2]
            stored = np.split(file["logprobs"][:], offsets[1:-1])
            assert [v.tolist() for v in stored] == [a["logprobs"] for a in answers]
            assert file["answer"][:].tolist() == [0, 1, -1, 0]
            assert file["prediction"][:].tolist() == [a["prediction"] for a in answers]
            assert file["num_characters"][:3].tolist() == [5, 4, 11]
            assert [v.decode() for v in file["id"][:]] == [a["id"] for a in answers]
        summary = json.loads((run_dir / "summary.json").read_text())
        hits = [a["prediction"] == a["answer"] for a in answers if a["answer"] is not None]
        assert summary["accuracy"] == pytest.approx(np.mean(hits))
        assert (summary["questions"], summary["errors"]) == (4, 2)
        assert len(summary["ranks"]) == max(ranks, 1)
        found.append(answers)
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one.pop("logprobs"), two.pop("logprobs"), atol=1e-3)
        assert one == two


def test_only_bad_rows(tmp_path, model):
    path = write_rows(tmp_path / "questions.jsonl", ["{"])
    line = [f"model.path={model}", f"input={path}", "evaluate.kind=choices"]
    outcome = run("evaluate", *line, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 64, outcome.err
    assert (tmp_path / "run" / "choices.jsonl").read_text() == ""


def test_no_file_to_read_is_said_before_the_model_loads(tmp_path, model):
    line = [f"model.path={model}", "evaluate.kind=choices", f"run_dir={tmp_path / 'run'}"]
    assert_refused(run("evaluate", *line), 78, "input is not set", "questions")
    outcome = run("evaluate", *line, f"input={tmp_path / 'none.jsonl'}")
    assert_refused(outcome, 65, "none.jsonl does not exist", run_dir=tmp_path / "run")
    assert "weights from" not in outcome.err


def test_the_shipped_questions_are_good(tokenizer):
    questions, errors = read_questions(ROOT / "jobs" / "questions.jsonl", tokenizer, CONTEXT)
    assert not errors and len(questions) == 8
    assert all(question.answer is not None for question in questions)
