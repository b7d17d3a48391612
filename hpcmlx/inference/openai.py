"""OpenAI's batch dialect: its rows translated into plain ones, and answers written as it has them.

`inputs.py` calls `to_plain` for every row of such a file, `results.py` calls `output_line` and
`error_line`. The format is that of https://platform.openai.com/docs/guides/batch, with the
sampling parameters that vLLM and mlx-lm add.

Where a body is silent, the job's configuration rules: OpenAI's own defaults (temperature 1, 16
tokens for a completion) are not applied.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hpcmlx.inference.logprobs import TokenLogprobs
from hpcmlx.inference.request import BadRow, InputRow
from hpcmlx.inference.rows import RowError, RowResult

URLS = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}

#: Keys of a body that do not bear on the answer.
IGNORED = frozenset(
    {
        "model",  # the job has one model; the name comes back in the answer
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
#: Keys that are accepted where they ask for what happens anyway; null always does.
NEUTRAL: dict[str, Any] = {
    "stream": False,
    "echo": False,
    "best_of": 1,
    "suffix": "",
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
_SAME = frozenset(  # mean the same in a plain row
    {
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "stop",
        "seed",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
    }
)
_CHAT = {"messages", "tools", "chat_template_kwargs"}
#: What a body may say, by the kind of row.
BODY_KEYS = {
    "chat": _SAME | _CHAT | {"max_completion_tokens", "logprobs", "top_logprobs"},
    "completion": _SAME | {"prompt", "logprobs"},
}
_LOWEST = -9999.0  # what OpenAI reports for a token of no probability; JSON has no infinity


def row_format(row: Mapping[str, Any]) -> str:
    """By the row's url "chat" or "completion"; "chat" where it is neither."""
    url = row.get("url")
    return URLS.get(url, "chat") if isinstance(url, str) else "chat"


def row_model(row: Mapping[str, Any]) -> str:
    """The model that the row names, "" where it names none."""
    body = row.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    return model if isinstance(model, str) else ""


def to_plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an OpenAI batch file as a plain one (`request.ROW_KEYS`).

    `tools` are handed to the chat template; calls of them come back as the text that the model
    wrote, not as `tool_calls`.

    Args:
        row: `{"method", "url", "body"}`, without its `custom_id`.

    Raises:
        BadRow: something in it is unknown, or asks for what is not supported.
    """
    if unknown := sorted(row.keys() - {"method", "url", "body"}):
        raise BadRow(f"unknown key '{unknown[0]}'; known: body, custom_id, method, url")
    if (method := row.get("method")) != "POST":
        raise BadRow(f"method={method!r:.60} must be 'POST'")
    url, body = row.get("url"), row.get("body")
    if not isinstance(url, str) or url not in URLS:
        raise BadRow(f"url={url!r:.60} is not supported; supported: {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise BadRow("'body' must be an object")
    body = {key: value for key, value in body.items() if value is not None}
    if not isinstance(body.get("model", ""), str):
        raise BadRow("'model' must be a string")
    kind = URLS[url]
    for key in sorted(body.keys() - BODY_KEYS[kind] - IGNORED):
        if key not in NEUTRAL:
            raise BadRow(f"'{key:.60}' in the body of {url} is not supported")
        # A number or a list may equal another type's value: `stream: 0`.
        if type(body[key]) is not type(NEUTRAL[key]) or body[key] != NEUTRAL[key]:
            text = f"{key}={json.dumps(body[key]):.60} is not supported"
            raise BadRow(f"{text}; leave it out or set it to {json.dumps(NEUTRAL[key])}")
    plain = {key: body[key] for key in (_SAME | _CHAT) & body.keys()}
    if kind == "chat":
        return {**plain, **_chat_limit(body), **_chat_logprobs(body)}
    if "prompt" in body:
        plain["prompt"] = _single(body["prompt"])
    if "logprobs" in body:
        plain["logprobs"] = body["logprobs"]
    return plain


def output_line(
    row: InputRow, samples: Sequence[RowResult], tokenizer: Any, model: str = ""
) -> dict[str, Any]:
    """The answer to a row, as a line of OpenAI's batch output file.

    Ids are hashes of `custom_id` and position, so the same rows give the same line every time.
    Log-probabilities leave out the end token, which has no place in the text; `completion_tokens`
    counts it.

    Args:
        row: of format "chat" or "completion".
        samples: all samples of the row, in any order; at least one.
        tokenizer: mlx-lm's TokenizerWrapper.
        model: the name to report where the row names no model.
    """
    samples = sorted(samples, key=lambda sample: sample.sample)
    token_bytes = _token_bytes(tokenizer)
    choices = []
    for sample in samples:
        choice: dict[str, Any] = {"index": sample.sample, "finish_reason": sample.finish_reason}
        shown = _shown_logprobs(sample, tokenizer.eos_token_ids)
        if row.format == "chat":
            message = {"role": "assistant", "content": sample.text, "refusal": None}
            choice["message"], make = message, _chat_logprobs_out
        else:
            choice["text"], make = sample.text, _completion_logprobs_out
        choice["logprobs"] = None if shown is None else make(shown, sample, token_bytes)
        choices.append(choice)
    prompt_tokens = samples[0].num_prompt_tokens
    completion_tokens = sum(len(sample.tokens) for sample in samples)
    key = _key(row.id, row.index)
    prefix, kind = ("chatcmpl", "chat.completion") if row.format == "chat" else ("cmpl", None)
    body = {
        "id": f"{prefix}-{key}",
        "object": kind or "text_completion",
        "created": int(max(sample.created for sample in samples)),
        "model": row.model or model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            # The samples share one prompt: what the first of them to run had to compute counts.
            "prompt_tokens_details": {
                "cached_tokens": min(sample.num_cached_tokens for sample in samples)
            },
        },
    }
    return {
        "id": f"batch_req_{key}",
        "custom_id": row.id,
        "response": {"status_code": 200, "request_id": f"req_{key}", "body": body},
        "error": None,
    }


def error_line(error: RowError) -> dict[str, Any]:
    """A row that cannot be answered, as a line of OpenAI's batch error file.

    `custom_id` is null where the line is no JSON, so that nobody knows its id.
    """
    known = error.code != "invalid_json"
    return {
        "id": f"batch_req_{_key(error.id, error.index)}",
        "custom_id": error.id if known else None,
        "response": None,
        "error": {"code": error.code, "message": error.message, "line": error.line},
    }


def _key(custom_id: str, index: int) -> str:
    return hashlib.sha256(f"{index}:{custom_id}".encode()).hexdigest()[:24]


def _chat_limit(body: Mapping[str, Any]) -> dict[str, Any]:
    limits = [body[key] for key in ("max_tokens", "max_completion_tokens") if key in body]
    if len(limits) == 2 and limits[0] != limits[1]:
        raise BadRow("max_tokens and max_completion_tokens differ; leave one out")
    return {"max_tokens": limits[0]} if limits else {}


def _chat_logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise BadRow(f"logprobs={wanted!r:.60} must be true or false; give top_logprobs the number")
    if top is not None and not wanted:
        raise BadRow("top_logprobs needs logprobs=true")
    if wanted is None:
        return {}
    return {"logprobs": (0 if top is None else top) if wanted else None}


def _single(prompt: Any) -> Any:
    """A prompt out of a list of one; OpenAI takes lists of prompts, a batch has a row for each."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise BadRow(f"{len(prompt)} prompts in one row; give each a row of its own")
        return prompt[0]
    return prompt


def _shown_logprobs(
    sample: RowResult, ends: set[int]
) -> Iterator[tuple[int, TokenLogprobs]] | None:
    """The tokens to report with their log-probabilities, or None."""
    if sample.logprobs is None:
        return None
    tokens = sample.tokens
    if sample.finish_reason == "stop" and tokens and tokens[-1] in ends:
        tokens = tokens[:-1]
    return zip(tokens, sample.logprobs, strict=False)


def _chat_logprobs_out(
    shown: Iterator[tuple[int, TokenLogprobs]],
    sample: RowResult,
    token_bytes: Callable[[int], bytes],
) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(data)}

    content = [
        {**entry(token, info.logprob), "top_logprobs": [entry(*pair) for pair in info.top]}
        for token, info in shown
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs_out(
    shown: Iterator[tuple[int, TokenLogprobs]],
    sample: RowResult,
    token_bytes: Callable[[int], bytes],
) -> dict[str, Any]:
    tokens, logprobs, tops, offsets = [], [], [], []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offset = 0
    for token, info in shown:
        tokens.append(token_bytes(token).decode("utf-8", "replace"))
        logprobs.append(max(info.logprob, _LOWEST))
        top: dict[str, float] = {}
        # The sampled token belongs to them; pieces of characters may look alike: the likelier.
        for candidate, logprob in sorted([*info.top, (token, info.logprob)], key=lambda p: -p[1]):
            text = token_bytes(candidate).decode("utf-8", "replace")
            top.setdefault(text, max(logprob, _LOWEST))
        tops.append(top)
        offsets.append(min(offset, len(sample.text)))
        offset += len(decoder.decode(token_bytes(token)))
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _token_bytes(tokenizer: Any) -> Callable[[int], bytes]:
    """What a token adds to the text, in bytes: `decode` cannot say it of a part of a character."""
    detokenizer = tokenizer.detokenizer
    if isinstance(detokenizer, SPMStreamingDetokenizer):
        pieces = detokenizer.tokenmap
        space = "\N{LOWER ONE EIGHTH BLOCK}".encode()
        return lambda i: pieces[i].replace(space, b" ") if i < len(pieces) else b""
    if isinstance(detokenizer, BPEStreamingDetokenizer):
        texts = detokenizer.tokenmap
        return lambda i: _from_byte_letters(texts[i]) if i < len(texts) else b""
    return lambda i: tokenizer.decode([i]).encode()


_BYTES = {letter: bytes([value]) for value, letter in bytes_to_unicode().items()}


def _from_byte_letters(piece: str) -> bytes:
    """A token of a byte-level vocabulary; letters outside its alphabet stand for themselves."""
    return b"".join(_BYTES.get(letter) or letter.encode() for letter in piece)
