"""Rows of JSONL files become examples: token ids, and which of them are to be predicted.

A row is `{"text"}`, `{"prompt", "completion"}` or `{"messages"}`, the last two with `"tools"` if
need be; other keys are ignored, and files may mix all three, as in mlx-lm's `train.jsonl`.
`token_cache.py` keeps what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlx.errors import ConfigError, InputError
from hpcmlx.flight import recorder
from hpcmlx.inference.jsonl import json_lines
from hpcmlx.models.messages import BadMessages, check_messages, check_tools
from hpcmlx.models.tokenizer import ChatRenderer, encode
from hpcmlx.training.data.conversation import Span, render

TARGETS = ("assistant", "last", "all")
_SPLITS = ("train", "valid", "test")
TOO_LONG = ("truncate", "drop", "refuse")
_FORMATS = "'text', 'prompt' and 'completion', or 'messages'"


@dataclass(frozen=True)
class ExampleSettings:
    """How rows become examples.

    Attributes:
        max_length: tokens of an example, at most.
        targets: which tokens of a conversation are to be predicted: those of every "assistant"
            turn, with what ends it; of the "last" one; or "all". A completion is the only turn of
            its conversation, and a text is always predicted whole.
        too_long: what to do with an example of more than `max_length` tokens: "truncate" (its end
            is left out), "drop" or "refuse".

    Raises:
        ConfigError: a value that is none of these.
    """

    max_length: int
    targets: str = "assistant"
    too_long: str = "truncate"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(f"max_length={self.max_length} must be at least 2")
        for name, known in (("targets", TARGETS), ("too_long", TOO_LONG)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name}={value} must be one of {', '.join(known)}")


@dataclass(frozen=True)
class Sample:
    """An example.

    Attributes:
        tokens: [length] int32.
        targets: [length] bool: whether a token is to be predicted, from those before it; of the
            first always False.
    """

    tokens: np.ndarray
    targets: np.ndarray


@dataclass
class Counts:
    """What became of the rows.

    Attributes:
        rows: that were read.
        truncated: examples that were cut to `max_length`.
        dropped: rows that gave no example, being too long; with too_long=truncate those of which
            no target would be left.
    """

    rows: int = 0
    truncated: int = 0
    dropped: int = 0


def data_files(paths: Sequence[str | Path], split: str | None = None) -> tuple[Path, ...]:
    """The files that some paths stand for, in order.

    Args:
        paths: files; or directories, which stand for their *.jsonl in order of name.
        split: "train", "valid", "test": a directory with files of such names stands for that one.

    Raises:
        InputError: there is no such file or directory, or nothing in it.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found = [path]
        elif split and any((path / f"{name}.jsonl").exists() for name in _SPLITS):
            found = [path / f"{split}.jsonl"]
        else:
            found = sorted(path.glob("*.jsonl"))
        if not found:
            raise InputError(f"no *.jsonl in {path}; give the files by name")
        if missing := [file for file in found if not file.is_file()]:
            raise InputError(f"data file {missing[0]} does not exist")
        files += found
    if not files:
        raise InputError("no data files are named")
    return tuple(files)


class ExampleReader:
    """Reads examples from files.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        settings: how rows become examples.

    Attributes:
        counts: what became of the rows so far.

    Raises:
        ConfigError: the tokenizer cannot say where in a text its tokens are.
    """

    def __init__(self, tokenizer: Any, settings: ExampleSettings):
        self.counts = Counts()
        self._tokenizer, self._settings = tokenizer, settings
        self._renderer = ChatRenderer(tokenizer)
        self._backend = fast_tokenizer(tokenizer)
        self._backend.no_truncation()  # which a tokenizer.json may ask for
        self._backend.no_padding()

    def read(self, files: Sequence[Path]) -> Iterator[Sample]:
        """The examples of all rows of the files, in order.

        Raises:
            InputError: a file cannot be read or there is no example; or, at the end, rows were
                bad: the message has the first one's file and line, and how many there are.
        """
        first, num_bad, num_samples = "", 0, 0
        for file in files:
            try:
                for line, row in json_lines(file):
                    self.counts.rows += 1
                    recorder.tick()
                    try:
                        # What is wrong with a line is said by the error in the row's place.
                        sample = self.example(row) if isinstance(row, dict) else _refuse(str(row))
                    except BadMessages as error:
                        first = first or f"{file}:{line}: {error}"
                        num_bad += 1
                        continue
                    if sample is not None:
                        num_samples += 1
                        yield sample
            except OSError as error:
                raise InputError(f"data file {file} cannot be read: {error.strerror}") from None
        if num_bad:
            more = f" (and {num_bad - 1} more bad rows)" if num_bad > 1 else ""
            raise InputError(f"{first}{more}")
        if not num_samples:
            names = ", ".join(map(str, files))
            why = f", all {self.counts.dropped} being too long" if self.counts.dropped else ""
            raise InputError(f"no examples in {names}{why}")

    def example(self, row: Mapping[str, Any]) -> Sample | None:
        """The example of a row; None where it is dropped.

        Raises:
            BadMessages: it cannot be used.
        """
        tokens, targets = self._tokens(row)
        targets[:1] = False
        if not targets.any():
            raise BadMessages("nothing to predict in it: no answer, or an empty one")
        limit, length = self._settings.max_length, len(tokens)
        if length > limit:
            if self._settings.too_long == "refuse":
                raise BadMessages(f"{length} tokens, more than max_length={limit}")
            tokens, targets = tokens[:limit], targets[:limit]
            if self._settings.too_long == "drop" or not targets.any():
                self.counts.dropped += 1
                return None
            self.counts.truncated += 1
        return Sample(tokens, targets)

    def _tokens(self, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """All tokens of a row and which of them are targets."""
        given = [key for key in ("text", "prompt", "messages") if row.get(key) is not None]
        if len(given) != 1:
            raise BadMessages(f"a row needs either {_FORMATS}")
        if given == ["text"]:
            return self._text(_string(row, "text"))
        if not self._tokenizer.has_chat_template:
            raise BadMessages(f"the model has no chat template, which '{given[0]}' needs")
        if given == ["messages"]:
            messages = check_messages(row["messages"])
        else:
            messages = [
                {"role": "user", "content": _string(row, "prompt")},
                {"role": "assistant", "content": _string(row, "completion")},
            ]
        answers = {"assistant": "all", "last": "last", "all": None}[self._settings.targets]
        tools = check_tools(row.get("tools"))
        text, spans = render(self._renderer, messages, tools, answers=answers)
        return self._masked(text, spans if answers else [(0, len(text))])

    def _text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        end = self._tokenizer.eos_token_id
        ids = encode(self._tokenizer, text)
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        return np.array(ids, np.int32), np.ones(len(ids), bool)

    def _masked(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a text, with those that are inside a span as targets.

        A token that begins before a span is none: where the model is asked to speak, the prompt
        has taken its first characters already.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        starts, ends = np.maximum.accumulate(places).T
        targets = np.zeros(len(places), bool)
        for start, stop in spans:
            # Some tokenizers count spaces out of a token, so that neither says it alone.
            first = max(np.searchsorted(starts, start), np.searchsorted(ends, start, "right"))
            targets[first : np.searchsorted(ends, stop, "right")] = True
        return np.array(encoding.ids, np.int32), targets


def fast_tokenizer(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` inside. Raises ConfigError where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            "the model's tokenizer does not say where in a text its tokens are; training needs a "
            "model directory with a tokenizer.json"
        )
    return backend


def _refuse(message: str) -> Sample:
    raise BadMessages(message)


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadMessages(f"'{key}' must be a string, not {type(value).__name__}")
    return value
