"""Multiple choice: which of several texts a model finds likeliest after a context.

A question is a line of JSONL: {"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}. Context
and choice are joined as they are, so the space between them belongs to one of them. With `messages`
in place of `context` the choice stands where the assistant's answer would. `id` and `answer` may be
missing. A context is scored again with each of its choices; nothing is cached between them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcmlx.errors import ExitCode, InputError
from hpcmlx.files import write_atomic, write_hdf5
from hpcmlx.inference.evaluate import Verdict, source_of
from hpcmlx.inference.jsonl import json_lines
from hpcmlx.inference.request import BadRow
from hpcmlx.inference.results import ERRORS, plain_error
from hpcmlx.inference.rows import RowError
from hpcmlx.inference.scoring import Score, ScoreRow, score
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.models.tokenizer import ChatRenderer, encode
from hpcmlx.observe.progress import ProgressBar
from hpcmlx.settings import EvaluateConfig

_log = logging.getLogger(__name__)

_SHOWN = 3  # bad rows that are logged; errors.jsonl has them all
_KEYS = {"id", "context", "messages", "choices", "answer"}


@dataclass(frozen=True)
class Question:
    """One line of the input.

    Attributes:
        index: its position in the input, bad rows counted, from 0.
        id: its own id, else its line number.
        rows: one per choice: the context and the choice, scored from the choice on.
        answer: which choice is right, from 0; None where nobody says.
    """

    index: int
    id: str
    choices: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    answer: int | None


@dataclass(frozen=True)
class Answer:
    """What the model makes of a question.

    Attributes:
        scores: one per choice.
    """

    question: Question
    scores: tuple[Score, ...]

    @property
    def logprobs(self) -> list[float]:
        """log p(choice | context) of each choice, in nats."""
        return [score.total for score in self.scores]

    @property
    def logprobs_norm(self) -> list[float]:
        """The same per character of the choice, its leading space counted where it has one."""
        pairs = zip(self.logprobs, self.question.choices, strict=True)
        return [logprob / len(choice) for logprob, choice in pairs]

    @property
    def prediction(self) -> int:
        """The likeliest choice, of equals the first; lm-eval's `acc` counts these."""
        return int(np.argmax(self.logprobs))

    @property
    def prediction_norm(self) -> int:
        """The likeliest per character; lm-eval's `acc_norm` counts these."""
        return int(np.argmax(self.logprobs_norm))


class ChoicesEvaluation:
    """`evaluate.kind=choices`: a file of questions.

    Args:
        context: tokens that the model can see at once, if it says.

    Raises:
        InputError: the file as a whole cannot be used.
    """

    def __init__(self, cfg: EvaluateConfig, mesh: Mesh, tokenizer: Any, context: int | None):
        self.cfg, self.mesh = cfg, mesh
        found = None
        if mesh.world.rank == 0:
            found = read_questions(cfg.input, tokenizer, context)
            for error in found[1][:_SHOWN]:
                _log.warning("%s", error.message)
        self.questions, self.errors = mesh.world.bcast(found)

    def run(self, loaded: LoadedModel, run_dir: Path) -> Verdict | None:
        """Answer the questions and write the files; the verdict on world rank 0."""
        total = sum(len(question.rows) for question in self.questions)
        with ProgressBar(total, "choices", enabled=self.mesh.world.rank == 0) as bar:
            answers = answer_questions(
                loaded,
                self.mesh,
                self.questions,
                batch_size=self.cfg.inference.batch_size,
                on_rows=lambda rows: bar.advance(len(rows)),
            )
        if answers is None:
            return None
        write_answers(run_dir, answers, self.errors, source_of(self.cfg, self.mesh))
        totals = summarize(answers) | {"errors": len(self.errors)}
        code = ExitCode.ROW_ERRORS if self.errors else ExitCode.OK
        num_tokens = sum(len(row.tokens) for one in self.questions for row in one.rows)
        return Verdict(totals, _describe(totals), code, num_tokens)


def read_questions(
    path: str | Path, tokenizer: Any, context: int | None
) -> tuple[list[Question], list[RowError]]:
    """The good and the bad rows of a JSONL file, tokenized. Blank lines are skipped.

    Raises:
        InputError: it cannot be read, has no rows, or two rows have the same id.
    """
    path = Path(path)
    questions: list[Question] = []
    errors: list[RowError] = []
    lines: dict[str, int] = {}
    repeated: list[str] = []
    render = ChatRenderer(tokenizer)
    try:
        for number, row in json_lines(path):
            index, row_id = len(questions) + len(errors), str(number)
            try:
                if isinstance(row, BadRow):
                    raise row
                row_id = _id(row, number)
                if lines.setdefault(row_id, number) != number:
                    repeated.append(f"'{row_id:.60}' (lines {lines[row_id]} and {number})")
                questions.append(_question(row, index, row_id, tokenizer, render, context))
            except BadRow as error:
                message = f"{path}:{number}: {error}"
                errors.append(RowError(index, row_id, number, error.code, message))
    except FileNotFoundError:
        raise InputError(f"input {path} does not exist; set input=FILE.jsonl") from None
    except OSError as error:
        raise InputError(f"input {path} cannot be read: {error}") from None
    if repeated:
        more = f" and {len(repeated) - 10} more" if len(repeated) > 10 else ""
        raise InputError(
            f"input {path}: ids are used more than once: {', '.join(repeated[:10])}{more}; give "
            "each row an id of its own"
        )
    if not questions and not errors:
        raise InputError(f"input {path} holds no rows")
    return questions, errors


def _id(row: Mapping[str, Any], number: int) -> str:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRow("half of a surrogate pair (\\ud800-\\udfff) stands alone") from None
    value = row.get("id", number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"id={value!r:.60} must be a string or a whole number")
    return str(value)


def _question(
    row: Mapping[str, Any],
    index: int,
    row_id: str,
    tokenizer: Any,
    render: ChatRenderer,
    context: int | None,
) -> Question:
    """Raises BadRow: the row cannot be used."""
    if unknown := sorted(row.keys() - _KEYS):
        raise BadRow(f"unknown key '{unknown[0]:.60}'; known: {', '.join(sorted(_KEYS))}")
    if ("context" in row) == ("messages" in row):
        raise BadRow("a row needs either 'context' or 'messages'")
    choices, answer = row.get("choices"), row.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise BadRow("'choices' must be a list of two non-empty strings or more")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        raise BadRow(
            f"answer={answer!r:.60} must be from 0 to {len(choices) - 1}: a choice's place"
        )
    if "context" in row:
        if not isinstance(row["context"], str):
            raise BadRow("'context' must be a string")
        pairs = [encode_pair(tokenizer, row["context"], choice) for choice in choices]
    else:
        prompt = _prompt(row["messages"], render)
        pairs = [(prompt, tokenizer.encode(c, add_special_tokens=False)) for c in choices]
    rows = [_row(*pair, number, context) for number, pair in enumerate(pairs)]
    return Question(index, row_id, tuple(choices), tuple(rows), answer)


def _prompt(messages: Any, render: ChatRenderer) -> list[int]:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
        or not all(isinstance(m.get("content"), str) for m in messages)
    ):
        raise BadRow("'messages' must be a list of objects with 'role' and 'content', both text")
    try:
        return render(messages)
    except InputError as error:
        raise BadRow(str(error), "chat_template_error") from None


def _row(
    before: Sequence[int], choice: Sequence[int], number: int, context: int | None
) -> ScoreRow:
    if not before or not choice:
        raise BadRow(f"choice {number} adds no tokens to the context; give it more text")
    if context is not None and len(before) + len(choice) - 1 > context:
        raise BadRow(
            f"{len(before)} tokens before choice {number} and {len(choice)} in it exceed the "
            f"model's context of {context}; shorten them",
            "context_length_exceeded",
        )
    return ScoreRow((*before, *choice), len(before))


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of a context and of what follows it, cut where lm-eval cuts (`TemplateLM`).

    Spaces at the context's end go to the continuation, and the continuation's tokens are those that
    the whole has beyond the context's: most tokenizers join a word with the space before it. An
    empty context is the start token, or the end token where the tokenizer has no start.
    """
    if not context:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        tokens = tokenizer.encode(continuation, add_special_tokens=False)
        return ([first], tokens) if tokens[:1] != [first] else (tokens[:1], tokens[1:])
    whole = encode(tokenizer, context + continuation)
    before = encode(tokenizer, context.rstrip())
    return before, whole[len(before) :]


def answer_questions(
    loaded: LoadedModel,
    mesh: Mesh,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    on_rows: Callable[[Sequence[ScoreRow]], None] = lambda rows: None,
) -> list[Answer] | None:
    """Score every choice of every question; arguments as `score`. Collective.

    Returns:
        On world rank 0 an answer per question, None elsewhere.
    """
    rows = [row for question in questions for row in question.rows]
    scores = score(loaded, mesh, rows, batch_size=batch_size, on_rows=on_rows)
    if scores is None:
        return None
    left = iter(scores)
    return [Answer(q, tuple(next(left) for _ in q.rows)) for q in questions]


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts and accuracies; an accuracy is None where no question says its answer."""
    known = [answer for answer in answers if answer.question.answer is not None]
    hits = np.array([a.prediction == a.question.answer for a in known], float)
    hits_norm = np.array([a.prediction_norm == a.question.answer for a in known], float)
    return {
        "questions": len(answers),
        "with_answer": len(known),
        "accuracy": float(hits.mean()) if known else None,
        "accuracy_stderr": _stderr(hits),
        "accuracy_norm": float(hits_norm.mean()) if known else None,
        "accuracy_norm_stderr": _stderr(hits_norm),
    }


def _stderr(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _describe(totals: Mapping[str, Any]) -> str:
    line = f"{totals['questions']} questions, {totals['errors']} bad rows"
    if totals["accuracy"] is None:
        return line
    return (
        f"{line}: accuracy {totals['accuracy']:.4f}, per character {totals['accuracy_norm']:.4f} "
        f"(of {totals['with_answer']} with an answer)"
    )


def write_answers(
    run_dir: Path,
    answers: Sequence[Answer],
    errors: Sequence[RowError],
    attributes: Mapping[str, Any],
) -> None:
    """Write `choices.jsonl`, `choices.h5` and, where there are bad rows, `errors.jsonl`."""
    lines = [json.dumps(_as_json(answer), ensure_ascii=False) + "\n" for answer in answers]
    write_atomic(run_dir / "choices.jsonl", "".join(lines))
    write_hdf5(run_dir / "choices.h5", lambda file: _fill(file, answers, attributes))
    if errors:
        lines = [json.dumps(plain_error(error), ensure_ascii=False) + "\n" for error in errors]
        write_atomic(run_dir / ERRORS, "".join(lines))


def _as_json(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.question.id,
        "answer": answer.question.answer,
        "prediction": answer.prediction,
        "prediction_norm": answer.prediction_norm,
        # JSON has no infinity.
        "logprobs": [value if math.isfinite(value) else None for value in answer.logprobs],
        "is_greedy": [score.is_greedy for score in answer.scores],
    }


def _fill(file: h5py.File, answers: Sequence[Answer], attributes: Mapping[str, Any]) -> None:
    """One dataset per column; the choices of all questions in one, those of question i at
    offsets[i]:offsets[i + 1]."""
    checked: dict[str, Any] = {"fletcher32": True, "chunks": True, "maxshape": (None,)}
    ids = [a.question.id.replace("\0", "\N{REPLACEMENT CHARACTER}") for a in answers]
    file.create_dataset("id", data=ids, dtype=h5py.string_dtype("utf-8"))
    places = [-1 if a.question.answer is None else a.question.answer for a in answers]
    counts = np.array([len(a.scores) for a in answers], "i8")
    scores = [score for a in answers for score in a.scores]
    characters = [len(choice) for a in answers for choice in a.question.choices]
    columns = {
        "answer": np.array(places, "i4"),
        "prediction": np.array([a.prediction for a in answers], "i4"),
        "prediction_norm": np.array([a.prediction_norm for a in answers], "i4"),
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype("i8"),
        "logprobs": np.array([score.total for score in scores], "f8"),
        "num_tokens": np.array([len(score.logprobs) for score in scores], "i4"),
        "num_characters": np.array(characters, "i4"),
        "is_greedy": np.array([score.is_greedy for score in scores], bool),
    }
    for name, data in columns.items():
        file.create_dataset(name, data=data, **checked)
    file["logprobs"].attrs["unit"] = "nat"
    file.attrs.update(attributes)
