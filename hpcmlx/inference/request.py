"""What one row of the input asks for: its prompt as tokens, its sampling, its samples.

`inputs.py` hands over every row as a mapping, one in OpenAI's dialect translated by `openai.py`.
What is wrong with a row is a `BadRow`, found here before the model is loaded.
"""

from __future__ import annotations

import inspect
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any

from transformers import PreTrainedTokenizerBase

from hpcmlx.errors import InputError
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams, row_seed
from hpcmlx.models.messages import BadMessages, check_messages, check_tools
from hpcmlx.models.tokenizer import ChatRenderer, encode

SAMPLING_KEYS = frozenset(field.name for field in fields(SamplingParams))
#: What a row may say, beside its id.
ROW_KEYS = SAMPLING_KEYS | {"prompt", "messages", "n", "tools", "chat_template_kwargs"}
#: The types of those that are numbers.
NUMBER_KINDS: dict[str, type] = {
    **{key: type(getattr(SamplingParams, key)) for key in SAMPLING_KEYS - {"stop", "logit_bias"}},
    "logprobs": int,
    "n": int,
}

_MIN_TEMPERATURE = 1e-5  # below it, logits divided by it leave float32
_MAX_SAMPLES = 10_000  # of a row: each is held in memory
_MAX_LOGPROBS = 20
# What the renderer sets itself, or what would let a row bring its own template.
_NOT_FOR_ROWS = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
) - {"add_generation_prompt", "continue_final_message", "documents"}


class BadRow(Exception):
    """A row that cannot be used, in words; the job goes on with the others.

    Attributes:
        code: as `RowError.code`.
    """

    def __init__(self, message: str, code: str = "invalid_row"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class InputRow:
    """What is kept of an input row to write its answer in the format it came in.

    Attributes:
        index: its position in the input, good and bad rows counted, from 0.
        id: its own id (OpenAI: `custom_id`), else its line number.
        line: where it begins in the input file, from 1; None where the file has no lines.
        format: "plain", or of an OpenAI row "chat" or "completion".
        model: the model that an OpenAI row names; "" where it names none.
        n: how many samples it wants; 0 where it is errored.
        errored: whether it has a `RowError` instead of requests.
    """

    index: int
    id: str
    line: int | None
    format: str = "plain"
    model: str = ""
    n: int = 0
    errored: bool = False


class RequestBuilder:
    """Builds the requests of one row after the other.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper; `messages` go through its chat template.
        defaults: sampling of rows that do not say; a row may set any of its fields.
        n: samples of rows that do not say.
        max_context: longest prompt plus output in tokens, if the model says.
    """

    def __init__(
        self,
        tokenizer: Any,
        defaults: SamplingParams,
        n: int = 1,
        max_context: int | None = None,
    ):
        self._tokenizer, self._defaults, self._n = tokenizer, defaults, n
        self._max_context = max_context
        self._render = ChatRenderer(tokenizer)

    def build(self, row: Mapping[str, Any], index: int, row_id: str) -> list[Request]:
        """The requests of a row, one per sample. All share one array of tokens.

        Raises:
            BadRow: the row cannot be used.
        """
        if unknown := sorted(row.keys() - ROW_KEYS):
            known = ", ".join(sorted(ROW_KEYS | {"id"}))
            raise BadRow(f"unknown key '{unknown[0]}'; known: {known}")
        if ("prompt" in row) == ("messages" in row):
            raise BadRow("a row needs either 'prompt' or 'messages'")
        n = _num_samples(row.get("n", self._n))
        sampling = _sampling(row, self._defaults, index)
        if problem := check_sampling(sampling, len(self._tokenizer)):
            raise BadRow(problem)
        tokens = array("i", self._tokens(row))
        if not tokens:
            raise BadRow("the prompt has no tokens; remove the row")
        if self._max_context is not None and len(tokens) + sampling.max_tokens > self._max_context:
            raise BadRow(
                f"{len(tokens)} prompt tokens + max_tokens={sampling.max_tokens} exceed the "
                f"model's context of {self._max_context}; shorten the prompt or lower max_tokens",
                "context_length_exceeded",
            )
        params = (replace(sampling, seed=sample_seed(sampling.seed, j)) for j in range(n))
        return [Request(index, row_id, tokens, p, sample) for sample, p in enumerate(params)]

    def _tokens(self, row: Mapping[str, Any]) -> Sequence[int]:
        if "messages" not in row:
            if unfit := row.keys() & {"tools", "chat_template_kwargs"}:
                raise BadRow(f"'{min(unfit)}' goes with 'messages', not with 'prompt'")
            return self._prompt(row["prompt"])
        options = _template_options(row)
        try:
            return self._render(check_messages(row["messages"]), **options)
        except BadMessages as error:
            raise BadRow(str(error)) from None
        except InputError as error:
            raise BadRow(str(error), "chat_template_error") from None

    def _prompt(self, prompt: Any) -> Sequence[int]:
        if isinstance(prompt, str):
            return encode(self._tokenizer, prompt)
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise BadRow("'prompt' must be a string or a list of token ids")
        size = len(self._tokenizer)
        if unknown := [token for token in prompt if not 0 <= token < size]:
            raise BadRow(f"token {unknown[0]} of the prompt is not in the vocabulary of {size}")
        return prompt


def sample_seed(seed: int, sample: int) -> int:
    """The seed of a row's sample: the row's own for the first, a hash of both for the others."""
    if sample == 0:
        return seed
    # Marked, so that it is not `row_seed` of another row.
    digest = blake2b(f"{seed}/{sample}".encode(), digest_size=8, person=b"sample").digest()
    return int.from_bytes(digest, "big")


def check_sampling(p: SamplingParams, vocab_size: int | None = None) -> str | None:
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
    if not 0 < p.repetition_penalty < math.inf:
        return f"repetition_penalty={p.repetition_penalty} must be above 0; 1 is none"
    for key in ("frequency_penalty", "presence_penalty"):
        if not -2 <= getattr(p, key) <= 2:
            return f"{key}={getattr(p, key)} must be in [-2, 2]"
    for token, bias in p.logit_bias:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            return f"logit_bias: token {token} is not in the vocabulary of {vocab_size}"
        if not -100 <= bias <= 100:
            return f"logit_bias: {bias} for token {token} must be in [-100, 100]"
    if p.logprobs is not None and not 0 <= p.logprobs <= _MAX_LOGPROBS:
        return f"logprobs={p.logprobs} must be in [0, {_MAX_LOGPROBS}]"
    return None


def max_context(config: Mapping[str, Any]) -> int | None:
    """The longest sequence a model was made for, in tokens, if its config.json says."""
    own = config.get("text_config") or {}
    return own.get("max_position_embeddings", config.get("max_position_embeddings"))


def _num_samples(n: Any) -> int:
    if type(n) is not int or not 1 <= n <= _MAX_SAMPLES:
        raise BadRow(f"n={_shown(n)} must be a whole number from 1 to {_MAX_SAMPLES}")
    return n


def _sampling(row: Mapping[str, Any], defaults: SamplingParams, index: int) -> SamplingParams:
    own = {key: _value(key, row[key]) for key in sorted(SAMPLING_KEYS & row.keys())}
    own.setdefault("seed", row_seed(defaults.seed, index))
    return replace(defaults, **own)


def _value(key: str, value: Any) -> Any:
    """A sampling parameter of a row as `SamplingParams` has it."""
    if key == "stop":
        if not isinstance(value, str | list):
            raise BadRow(f"stop={_shown(value)} must be a string or a list of strings")
        return tuple([value] if isinstance(value, str) else value)
    if key == "logit_bias":
        return _logit_bias(value)
    if key == "logprobs" and value is None:
        return None
    kind = NUMBER_KINDS[key]
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise BadRow(f"{key}={_shown(value)} must be of type {kind.__name__}")
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise BadRow(f"{key}={_shown(value)} has more than 64 bits")
    return value


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise BadRow(f"logit_bias={_shown(value)} must be an object of token ids and numbers")
    pairs = []
    for token, bias in value.items():
        if (
            not (token.isascii() and token.isdecimal())
            or len(token) > 9
            or str(int(token)) != token
        ):
            raise BadRow(f"logit_bias: {_shown(token)} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise BadRow(f"logit_bias: {_shown(bias)} for token {token} is not a number")
        pairs.append((int(token), bias))
    return tuple(sorted(pairs))


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    options = row.get("chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise BadRow("'chat_template_kwargs' must be an object")
    if refused := sorted(options.keys() & _NOT_FOR_ROWS):
        raise BadRow(f"'chat_template_kwargs' must not set '{refused[0]}'")
    try:
        tools = check_tools(row.get("tools"))
    except BadMessages as error:
        raise BadRow(str(error)) from None
    return {**options, **({"tools": tools} if tools else {})}


def _shown(value: Any) -> str:
    """A value for a message, which stays short whatever the row holds."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits; nested too deep
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
