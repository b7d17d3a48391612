"""One row: its prompt, its sampling, its samples, and that whatever cannot be used is named."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
from mlx_lm.server import process_message_content

from hpcmlx.inference.request import (
    BadRow,
    RequestBuilder,
    check_sampling,
    encode,
    max_context,
    sample_seed,
)
from hpcmlx.inference.sampling import SamplingParams, row_seed
from hpcmlx.models.tokenizer import load_tokenizer
from tests.fixtures import TEMPLATE, model  # noqa: F401 - a fixture

DEFAULTS = SamplingParams(temperature=0.5, top_p=0.9, seed=7, max_tokens=20, stop=("\n",))
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer(model):  # noqa: F811
    return load_tokenizer(model)


@pytest.fixture
def build(tokenizer):
    def build(row, index=0, defaults=DEFAULTS, **settings):
        return RequestBuilder(tokenizer, defaults, **settings).build(row, index, "id")

    return build


def test_rows_get_the_defaults_and_a_seed_of_their_own(build, tokenizer):
    (first,), (second,) = build({"prompt": "Hi"}), build({"prompt": "Hi"}, 1)
    assert (first.index, second.index, first.id, first.sample) == (0, 1, "id", 0)
    assert list(first.tokens) == list(second.tokens) == tokenizer.encode("Hi")
    assert first.sampling.seed == row_seed(7, 0) != second.sampling.seed == row_seed(7, 1)
    assert (first.sampling.temperature, first.sampling.stop) == (0.5, ("\n",))


def test_rows_override_every_parameter(build):
    own = {
        "temperature": 0, "top_p": 1, "top_k": 3, "min_p": 0.25, "seed": -5, "max_tokens": 2,
        "repetition_penalty": 1.5, "frequency_penalty": -2, "presence_penalty": 2, "logprobs": 0,
    }  # fmt: skip
    row = {"prompt": "x", **own, "stop": ["a", "b"], "logit_bias": {"12": -100, "7": 1.5}}
    (request,) = build(row)
    assert request.sampling == SamplingParams(
        **own, stop=("a", "b"), logit_bias=((7, 1.5), (12, -100))
    )
    assert build({"prompt": "x", "stop": "end"})[0].sampling.stop == ("end",)
    assert build({"prompt": "x", "stop": []})[0].sampling.stop == ()
    wordy = SamplingParams(logprobs=3)
    assert build({"prompt": "x"}, defaults=wordy)[0].sampling.logprobs == 3
    assert build({"prompt": "x", "logprobs": None}, defaults=wordy)[0].sampling.logprobs is None
    # A default that is written as a whole number does not make the parameter one.
    (request,) = build({"prompt": "x", "temperature": 0.25}, defaults=SamplingParams(temperature=1))
    assert request.sampling.temperature == 0.25


def test_samples_differ_in_their_seed_only(build):
    requests = build({"prompt": "x"}, 5, n=3)
    assert [r.sample for r in requests] == [0, 1, 2]
    assert [r.sampling.seed for r in requests] == [sample_seed(row_seed(7, 5), j) for j in range(3)]
    assert requests[0].sampling.seed == row_seed(7, 5)  # as if it were the only one
    assert len({r.sampling.seed for r in requests}) == 3
    own = build({"prompt": "x", "seed": 11, "n": 2}, n=3)
    assert [r.sampling.seed for r in own] == [11, sample_seed(11, 1)]
    # Not the seed of another row, of a job whose seed is the row's.
    assert sample_seed(11, 1) not in {row_seed(11, i) for i in range(100)}


def test_tokens_are_held_once_and_small(build):
    requests = build({"prompt": "x" * 10_000}, n=50)
    assert all(r.tokens is requests[0].tokens for r in requests)
    data = pickle.dumps(requests)
    assert len(data) < 4 * 10_000 + 50 * 400
    assert pickle.loads(data) == requests


def test_chat_rows_go_through_the_template(build, tokenizer):
    (request,) = build({"messages": HI})
    ids = tokenizer.convert_tokens_to_ids(["<|user|>", "H", "i", "\n", "<|assistant|>"])
    assert list(request.tokens) == ids
    options = {"add_generation_prompt": False}
    (request,) = build({"messages": HI, "chat_template_kwargs": options})
    assert list(request.tokens) == ids[:-1]


CONVERSATIONS = {
    "text": HI,
    "parts": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}],
    "no parts": [{"role": "user", "content": []}],
    "a call": [
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"b": 2}}},
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_messages_reach_the_template_as_mlx_lms_server_gives_them(kind):
    seen = []
    spy = SimpleNamespace(
        has_chat_template=True,
        apply_chat_template=lambda messages, **options: seen.append(messages) or "x",
        encode=lambda text, **options: [1],
    )
    twin = copy.deepcopy(CONVERSATIONS[kind])
    process_message_content(twin)
    RequestBuilder(_Sized(spy), DEFAULTS).build({"messages": CONVERSATIONS[kind]}, 0, "a")
    assert seen == [twin]


class _Sized:
    """`inner` with a vocabulary of two."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return 2


def test_tools_are_given_to_the_template(build, tokenizer, monkeypatch):
    template = TEMPLATE + "{% for t in tools or [] %}{{ t.name }}{% endfor %}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    (request,) = build({"messages": HI, "tools": [{"name": "f"}, {"name": "g"}]})
    assert tokenizer.decode(list(request.tokens)[-2:]) == "fg"
    assert build({"messages": HI, "tools": []})[0].tokens == build({"messages": HI})[0].tokens


def test_a_start_token_in_the_prompt_is_not_doubled(build, tokenizer):
    (plain,), (brought,) = build({"prompt": "a"}), build({"prompt": "<s>a"})
    bos = tokenizer.bos_token_id
    assert list(brought.tokens).count(bos) == 1
    assert list(plain.tokens).count(bos) <= 1
    assert list(plain.tokens) == encode(tokenizer, "a")


def test_a_prompt_may_be_tokens(build):
    (request,) = build({"prompt": [5, 0, 127]})
    assert list(request.tokens) == [5, 0, 127]


BAD_ROWS = {
    "unknown key": ({"prompt": "a", "temprature": 1}, "unknown key 'temprature'; known: "),
    "neither": ({}, "needs either 'prompt' or 'messages'"),
    "both": ({"prompt": "a", "messages": []}, "needs either 'prompt' or 'messages'"),
    "prompt number": ({"prompt": 3}, "'prompt' must be a string or a list of token ids"),
    "prompt null": ({"prompt": None}, "'prompt' must be a string"),
    "prompt texts": ({"prompt": ["a"]}, "'prompt' must be a string"),
    "prompt booleans": ({"prompt": [True]}, "'prompt' must be a string"),
    "prompt too high": ({"prompt": [128]}, "token 128 of the prompt is not in the vocabulary of 1"),
    "prompt negative": ({"prompt": [1, -1]}, "token -1 of the prompt"),
    "empty prompt": ({"prompt": ""}, "no tokens"),
    "no tokens": ({"prompt": []}, "no tokens"),
    "prompt with tools": ({"prompt": "a", "tools": []}, "'tools' goes with 'messages'"),
    "messages text": ({"messages": "hi"}, "'messages' must be a list"),
    "messages empty": ({"messages": []}, "'messages' must be a list"),
    "message text": ({"messages": ["hi"]}, "'role' and 'content'"),
    "no role": ({"messages": [{"content": "a"}]}, "'role' and 'content'"),
    "no content": ({"messages": [{"role": "user"}]}, "has no 'content'"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "has no 'content'"),
    "content number": ({"messages": [{"role": "user", "content": 1}]}, "must be text, not 'int'"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "a content part of type 'image_url' cannot be used",
    ),
    "part": ({"messages": [{"role": "user", "content": ["a"]}]}, "part of type 'str'"),
    "no text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs a 'text'"),
    "calls": ({"messages": [{"role": "a", "tool_calls": "f"}]}, "'tool_calls' must be a list"),
    "arguments": (
        {"messages": [{"role": "a", "tool_calls": [{"function": {"arguments": "{"}}]}]},
        "the arguments of a tool call are not JSON",
    ),
    "tools": ({"messages": HI, "tools": {}}, "'tools' must be a list of objects"),
    "tool": ({"messages": HI, "tools": ["f"]}, "'tools' must be a list of objects"),
    "kwargs": ({"messages": HI, "chat_template_kwargs": 1}, "must be an object"),
    "own template": (
        {"messages": HI, "chat_template_kwargs": {"chat_template": "{{ 9**9**9 }}"}},
        "must not set 'chat_template'",
    ),
    "tensors": (
        {"messages": HI, "chat_template_kwargs": {"return_tensors": "np"}},
        "must not set 'return_tensors'",
    ),
    "hot": ({"temperature": "hot"}, "temperature='hot' must be of type float"),
    "temperature true": ({"temperature": True}, "temperature=True must be of"),
    "temperature null": ({"temperature": None}, "temperature=None must be of"),
    "temperature < 0": ({"temperature": -1}, "temperature=-1 must be"),
    "temperature tiny": ({"temperature": 1e-300}, "temperature=1e-300 must be"),
    "temperature inf": ({"temperature": float("inf")}, "temperature=inf must be"),
    "temperature huge": ({"temperature": 10**400}, "has more than 64 bits"),
    "top_p 0": ({"top_p": 0}, "top_p=0 must be in (0, 1]"),
    "top_p 1.5": ({"top_p": 1.5}, "top_p=1.5 must be in (0, 1]"),
    "min_p": ({"min_p": 2}, "min_p=2 must be in [0, 1]"),
    "top_k": ({"top_k": -1}, "top_k=-1 must not be negative"),
    "top_k float": ({"top_k": 1.0}, "top_k=1.0 must be of type int"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    "max_tokens 2.5": ({"max_tokens": 2.5}, "max_tokens=2.5 must be of type int"),
    "max_tokens true": ({"max_tokens": True}, "max_tokens=True must be of"),
    "seed": ({"seed": "s"}, "seed='s' must be of type int"),
    "seed long": ({"seed": 10**5000}, "seed=a int has more than 64 bits"),
    "stop number": ({"stop": 5}, "stop=5 must be a string or a list"),
    "stop object": ({"stop": {"a": 1}}, "must be a string or a list"),
    "stop null": ({"stop": None}, "stop=None must be a string or a list"),
    "stop of numbers": ({"stop": [1]}, "non-empty strings"),
    "stop empty": ({"stop": ""}, "non-empty strings"),
    "repetition": ({"repetition_penalty": 0}, "repetition_penalty=0 must be above 0"),
    "frequency": ({"frequency_penalty": 2.5}, "frequency_penalty=2.5 must be in [-2, 2]"),
    "presence": ({"presence_penalty": -3}, "presence_penalty=-3 must be in [-2, 2]"),
    "logprobs": ({"logprobs": 21}, "logprobs=21 must be in [0, 20]"),
    "logprobs true": ({"logprobs": True}, "logprobs=True must be of type int"),
    "bias list": ({"logit_bias": [1]}, "logit_bias=[1] must be an object"),
    "bias word": ({"logit_bias": {"the": 1}}, "logit_bias: 'the' is not a token id"),
    "bias zeros": ({"logit_bias": {"01": 1}}, "logit_bias: '01' is not a token id"),
    "bias long": ({"logit_bias": {"1" * 5000: 1}}, "is not a token id"),
    "bias other digits": ({"logit_bias": {"\u0663": 1}}, "is not a token id"),
    "bias text": ({"logit_bias": {"1": "a"}}, "logit_bias: 'a' for token 1 is not a number"),
    "bias high": ({"logit_bias": {"1": 101}}, "logit_bias: 101 for token 1 must be in [-100, 100]"),
    "bias unknown": ({"logit_bias": {"128": 1}}, "token 128 is not in the vocabulary of 128"),
    "n 0": ({"n": 0}, "n=0 must be a whole number from 1 to 10000"),
    "n huge": ({"n": 10**9}, "n=1000000000 must be a whole number"),
    "n float": ({"n": 2.0}, "n=2.0 must be a whole number"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(build, case):
    row, words = BAD_ROWS[case]
    if row and not row.keys() & {"prompt", "messages"}:
        row = {"prompt": "a", **row}
    with pytest.raises(BadRow) as refusal:
        build(row)
    message = str(refusal.value)
    assert words in message and "\n" not in message and len(message) < 300
    assert refusal.value.code == "invalid_row"


@pytest.mark.fault
def test_the_context_is_prompt_and_output(build, tokenizer):
    """Fault 35: the row is refused before anything is computed for it."""
    length = len(tokenizer.encode("abcd"))
    row = {"prompt": "abcd", "max_tokens": 6}
    assert len(build(row, max_context=length + 6)) == 1
    with pytest.raises(BadRow, match=rf"^{length} prompt tokens \+ max_tokens=6 exceed") as refusal:
        build(row, max_context=length + 5)
    assert refusal.value.code == "context_length_exceeded"


def test_max_context():
    assert max_context({"max_position_embeddings": 5}) == 5
    assert max_context({"text_config": {"max_position_embeddings": 6}}) == 6
    assert max_context({"text_config": None, "max_position_embeddings": 7}) == 7
    assert max_context({"text_config": {}, "max_position_embeddings": 8}) == 8
    assert max_context({}) is None


def test_good_values_have_no_problem():
    assert check_sampling(DEFAULTS) is None
    assert check_sampling(SamplingParams(logit_bias=((5, 1.0),)), 6) is None
    for key in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"):
        assert f"{key}=nan" in check_sampling(SamplingParams(**{key: float("nan")}))
    assert "nan for token 5" in check_sampling(SamplingParams(logit_bias=((5, float("nan")),)))
