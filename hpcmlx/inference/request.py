"""Reads a prompt file into requests: one JSON object a line, `prompt` or `messages`.

Everything that can be wrong with a row is found here, before the model is loaded, and named by
file and line.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

from hpcmlx.errors import InputError
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams, row_seed
from hpcmlx.models.tokenizer import render_chat

_PARAMS = {field.name for field in fields(SamplingParams)}
_KEYS = _PARAMS | {"id", "prompt", "messages"}
_MIN_TEMPERATURE = 1e-5  # below it, logits divided by it leave float32


def read_requests(
    path: str | Path,
    tokenizer: Any,
    defaults: SamplingParams,
    max_context: int | None = None,
) -> list[Request]:
    """All rows of a JSONL file, tokenized. Blank lines are skipped.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper; `messages` go through its chat template.
        defaults: sampling of rows that do not say; a row may set any of its fields.
        max_context: longest prompt plus output in tokens, if the model says.

    Raises:
        InputError: the file cannot be read, or a row cannot be used; names file and line.
    """
    path = Path(path)
    try:
        # Not `splitlines`: it also splits at U+2028 and others that JSON strings may hold.
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except FileNotFoundError:
        raise InputError(f"input {path} does not exist; set input=FILE.jsonl") from None
    except OSError as error:
        raise InputError(f"input {path} cannot be read: {error}") from None
    requests: list[Request] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _parse(line, where)
        index = len(requests)
        row_id = _id(row, number, where)
        if row_id in seen:
            raise InputError(f"{where}: id '{row_id}' was used in line {seen[row_id]} already")
        seen[row_id] = number
        sampling = _sampling(row, defaults, index, where)
        tokens = tuple(_tokens(row, tokenizer, where))
        if not tokens:
            raise InputError(f"{where}: the prompt has no tokens; remove the row")
        if max_context is not None and len(tokens) + sampling.max_tokens > max_context:
            raise InputError(
                f"{where}: {len(tokens)} prompt tokens + max_tokens={sampling.max_tokens} exceed "
                f"the model's context of {max_context}; shorten the prompt or lower max_tokens"
            )
        requests.append(Request(index, row_id, tokens, sampling))
    if not requests:
        raise InputError(f"input {path} holds no rows")
    return requests


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the "
            "line); save the file as UTF-8"
        ) from None
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: half of a surrogate pair (\\ud800-\\udfff) stands alone"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not usable JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    if unknown := sorted(row.keys() - _KEYS):
        raise InputError(f"{where}: unknown key '{unknown[0]}'; known: {', '.join(sorted(_KEYS))}")
    if ("prompt" in row) == ("messages" in row):
        raise InputError(f"{where}: a row needs either 'prompt' or 'messages'")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _id(row: Mapping[str, Any], number: int, where: str) -> str:
    value = row.get("id", number)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(f"{where}: id={value!r} must be a string or a whole number")
    return str(value)


def _sampling(
    row: Mapping[str, Any], defaults: SamplingParams, index: int, where: str
) -> SamplingParams:
    own = {key: row[key] for key in _PARAMS & row.keys()}
    for key, value in own.items():
        # The class's own default: one that the caller set may be the integer 1 for 1.0.
        kind = type(getattr(SamplingParams, key))
        if key == "stop":
            if not isinstance(value, (str, list)):
                raise InputError(f"{where}: stop={value!r} must be a string or a list of strings")
            own[key] = tuple([value] if isinstance(value, str) else value)
        elif isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise InputError(f"{where}: {key}={value!r} must be of type {kind.__name__}")
    own.setdefault("seed", row_seed(defaults.seed, index))
    params = replace(defaults, **own)
    if problem := check_sampling(params):
        raise InputError(f"{where}: {problem}")
    return params


def check_sampling(p: SamplingParams) -> str | None:
    """What is wrong with the values, in words, or None."""
    if p.temperature != 0 and not _MIN_TEMPERATURE <= p.temperature < math.inf:
        return f"temperature={p.temperature} must be 0 (greedy) or at least {_MIN_TEMPERATURE}"
    if not 0 < p.top_p <= 1:
        return f"top_p={p.top_p} must be in (0, 1]"
    if not 0 <= p.min_p <= 1:
        return f"min_p={p.min_p} must be in [0, 1]"
    if p.top_k < 0:
        return f"top_k={p.top_k} must not be negative"
    if p.max_tokens < 1:
        return f"max_tokens={p.max_tokens} must be at least 1"
    if not all(isinstance(s, str) and s for s in p.stop):
        return "stop must be a string or a list of non-empty strings"
    return None


def _tokens(row: Mapping[str, Any], tokenizer: Any, where: str) -> Sequence[int]:
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise InputError(f"{where}: 'prompt' must be a string")
        return encode(tokenizer, row["prompt"])
    messages = row["messages"]
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m
            for m in messages
        )
    ):
        raise InputError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    try:
        return render_chat(tokenizer, messages)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Text to tokens, with the tokenizer's own start token unless the text brings it."""
    bos = tokenizer.bos_token
    return tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))


def max_context(config: Mapping[str, Any]) -> int | None:
    """The longest sequence a model was made for, in tokens, if its config.json says."""
    own = config.get("text_config") or {}
    return own.get("max_position_embeddings", config.get("max_position_embeddings"))
