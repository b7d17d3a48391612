"""Prompt files: what a row may say, and that every row that cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcmlx.errors import InputError
from hpcmlx.inference.request import check_sampling, max_context, read_requests
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams, row_seed
from hpcmlx.models.tokenizer import _load
from tests.fixtures import save_tokenizer

DEFAULTS = SamplingParams(temperature=0.5, top_p=0.9, seed=7, max_tokens=20, stop=("\n",))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return _load(path, path, 2)


@pytest.fixture
def read(tmp_path, tokenizer):
    """Requests of a file with the given content (text, bytes, or rows to be dumped)."""

    def read(content, defaults=DEFAULTS, context=None) -> list[Request]:
        if isinstance(content, list):
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        data = content.encode() if isinstance(content, str) else content
        Path(tmp_path, "rows.jsonl").write_bytes(data)
        return read_requests(tmp_path / "rows.jsonl", tokenizer, defaults, context)

    return read


def text_of(request, tokenizer):
    return tokenizer.decode(list(request.tokens))


def test_rows_get_the_defaults_and_a_seed_of_their_own(read, tokenizer):
    first, second = read([{"prompt": "Hi"}, {"prompt": "Hi", "id": "b"}])
    assert (first.index, first.id, second.index, second.id) == (0, "1", 1, "b")
    assert first.tokens == second.tokens == tuple(tokenizer.encode("Hi"))
    assert first.sampling.seed == row_seed(7, 0) != second.sampling.seed == row_seed(7, 1)
    assert (first.sampling.temperature, first.sampling.stop) == (0.5, ("\n",))


def test_rows_override_every_parameter(read):
    own = {
        "temperature": 0, "top_p": 1, "top_k": 3, "min_p": 0.25, "seed": -5, "max_tokens": 2,
        "stop": ["a", "b"],
    }  # fmt: skip
    (row,) = read([{"prompt": "x", "id": 12, **own}])
    assert row.id == "12"
    assert row.sampling == SamplingParams(**{**own, "stop": ("a", "b")})
    (row,) = read([{"prompt": "x", "stop": "end"}])
    assert row.sampling.stop == ("end",)
    (row,) = read([{"prompt": "x", "stop": []}])
    assert row.sampling.stop == ()
    # A default that is written as a whole number does not make the parameter one.
    (row,) = read([{"prompt": "x", "temperature": 0.25}], SamplingParams(temperature=1))
    assert row.sampling.temperature == 0.25


def test_bom_crlf_and_blank_lines(read):
    rows = read(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n\t\n{"prompt": "b"}\r\n')
    assert [(r.index, r.id) for r in rows] == [(0, "1"), (1, "5")]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_newlines_end_a_line(read, character):
    """str.splitlines ends a line at each of these; JSON strings may hold them."""
    line = json.dumps({"prompt": f"a{character}b", "id": f"x{character}"}, ensure_ascii=False)
    rows = read(line + "\n" + '{"prompt": "c"}')
    assert [r.id for r in rows] == [f"x{character}", "2"]
    assert len(rows[0].tokens) == 3


def test_nul_in_a_string_is_a_character_like_others(read):
    (row,) = read('{"prompt": "a\\u0000b"}')
    assert len(row.tokens) == 3
    with pytest.raises(InputError, match=r"rows\.jsonl:1: not JSON"):
        read(b'{"prompt": "a\x00b"}')


def test_a_huge_line(read):
    (row, _) = read([{"prompt": "x" * 1_000_000}, {"prompt": "y"}])
    assert len(row.tokens) == 1_000_000


def test_chat_rows_go_through_the_template(read, tokenizer):
    chat = [{"role": "user", "content": "Hi"}]
    (row,) = read([{"messages": chat}])
    ids = tokenizer.convert_tokens_to_ids(["<|user|>", "H", "i", "\n", "<|assistant|>"])
    assert list(row.tokens)[-5:] == ids


def test_a_start_token_in_the_prompt_is_not_doubled(read, tokenizer):
    (plain, brought) = read([{"prompt": "a"}, {"prompt": "<s>a"}])
    bos = tokenizer.bos_token_id
    assert list(brought.tokens).count(bos) == 1
    assert list(plain.tokens).count(bos) <= 1


BAD_ROWS = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[1]", "a row is a JSON object, not list"),
    "a number": ("3", "a row is a JSON object, not int"),
    "unknown key": ('{"prompt": "a", "temprature": 1}', "unknown key 'temprature'; known: "),
    "neither": ('{"id": "a"}', "needs either 'prompt' or 'messages'"),
    "both": ('{"prompt": "a", "messages": []}', "needs either 'prompt' or 'messages'"),
    "prompt number": ('{"prompt": 3}', "'prompt' must be a string"),
    "prompt null": ('{"prompt": null}', "'prompt' must be a string"),
    "empty prompt": ('{"prompt": ""}', "no tokens"),
    "messages text": ('{"messages": "hi"}', "'messages' must be a list"),
    "messages empty": ('{"messages": []}', "'messages' must be a list"),
    "message text": ('{"messages": ["hi"]}', "'messages' must be a list"),
    "no role": ('{"messages": [{"content": "a"}]}', "'role' and 'content'"),
    "no content": ('{"messages": [{"role": "user"}]}', "'role' and 'content'"),
    "hot": ('{"prompt": "a", "temperature": "hot"}', "temperature='hot' must be of type float"),
    "temperature true": ('{"prompt": "a", "temperature": true}', "temperature=True must be of"),
    "temperature null": ('{"prompt": "a", "temperature": null}', "temperature=None must be of"),
    "temperature < 0": ('{"prompt": "a", "temperature": -1}', "temperature=-1 must be"),
    "temperature tiny": ('{"prompt": "a", "temperature": 1e-300}', "temperature=1e-300 must be"),
    "temperature inf": ('{"prompt": "a", "temperature": 1e999}', "temperature=inf must be"),
    "temperature NaN": ('{"prompt": "a", "temperature": NaN}', "NaN is not a number"),
    "top_p 0": ('{"prompt": "a", "top_p": 0}', "top_p=0 must be in (0, 1]"),
    "top_p 1.5": ('{"prompt": "a", "top_p": 1.5}', "top_p=1.5 must be in (0, 1]"),
    "min_p": ('{"prompt": "a", "min_p": 2}', "min_p=2 must be in [0, 1]"),
    "top_k": ('{"prompt": "a", "top_k": -1}', "top_k=-1 must not be negative"),
    "top_k float": ('{"prompt": "a", "top_k": 1.0}', "top_k=1.0 must be of type int"),
    "max_tokens 0": ('{"prompt": "a", "max_tokens": 0}', "max_tokens=0 must be at least 1"),
    "max_tokens 2.5": ('{"prompt": "a", "max_tokens": 2.5}', "max_tokens=2.5 must be of type int"),
    "max_tokens true": ('{"prompt": "a", "max_tokens": true}', "max_tokens=True must be of"),
    "seed": ('{"prompt": "a", "seed": "s"}', "seed='s' must be of type int"),
    "stop number": ('{"prompt": "a", "stop": 5}', "stop=5 must be a string or a list"),
    "stop object": ('{"prompt": "a", "stop": {"a": 1}}', "must be a string or a list"),
    "stop null": ('{"prompt": "a", "stop": null}', "stop=None must be a string or a list"),
    "stop of numbers": ('{"prompt": "a", "stop": [1]}', "non-empty strings"),
    "stop empty": ('{"prompt": "a", "stop": ""}', "non-empty strings"),
    "id list": ('{"prompt": "a", "id": []}', "id=[] must be a string or a whole number"),
    "id null": ('{"prompt": "a", "id": null}', "id=None must be a string or a whole number"),
    "id true": ('{"prompt": "a", "id": true}', "id=True must be a string or a whole number"),
    "surrogate": ('{"prompt": "a", "id": "\\ud800"}', "surrogate pair"),
    "surrogate prompt": ('{"prompt": "\\udfff"}', "surrogate pair"),
    "deep": ('{"prompt": ' + "[" * 100_000, "not usable JSON"),
    "long number": ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "not usable JSON"),
    "taken id": ('{"prompt": "a", "id": "1"}', "id '1' was used in line 1 already"),
    "taken number": ('{"prompt": "a", "id": 1}', "id '1' was used in line 1 already"),
    "NULs": ("\0" * 8, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(read, case):
    line, words = BAD_ROWS[case]
    with pytest.raises(InputError) as refusal:
        read('{"prompt": "good"}\n\n' + line + "\n")
    message = str(refusal.value)
    assert "rows.jsonl:3: " in message and words in message and "\n" not in message


@pytest.mark.parametrize(
    "data", [b"\xff\xfea\x00", b'{"prompt": "\xe9"}', b'{"prompt": "\xed\xa0\x80"}']
)
def test_invalid_utf8_is_named_by_its_line(read, data):
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not UTF-8 \(byte 0x"):
        read(b'{"prompt": "a"}\n' + data + b"\n")


@pytest.mark.parametrize("data", ["", "\n\n", "\ufeff", " \r\n"])
def test_a_file_without_rows(read, data):
    with pytest.raises(InputError, match="holds no rows"):
        read(data)


def test_a_file_that_is_not_there(tmp_path, tokenizer):
    with pytest.raises(InputError, match="none.jsonl does not exist; set input="):
        read_requests(tmp_path / "none.jsonl", tokenizer, DEFAULTS)
    with pytest.raises(InputError, match="cannot be read"):
        read_requests(tmp_path, tokenizer, DEFAULTS)


def test_the_context_is_prompt_and_output(read, tokenizer):
    length = len(tokenizer.encode("abcd"))
    row = {"prompt": "abcd", "max_tokens": 6}
    assert len(read([row], context=length + 6)) == 1
    with pytest.raises(InputError, match=rf":1: {length} prompt tokens \+ max_tokens=6 exceed"):
        read([row], context=length + 5)


def test_max_context():
    assert max_context({"max_position_embeddings": 5}) == 5
    assert max_context({"text_config": {"max_position_embeddings": 6}}) == 6
    assert max_context({"text_config": None, "max_position_embeddings": 7}) == 7
    assert max_context({"text_config": {}, "max_position_embeddings": 8}) == 8
    assert max_context({}) is None


def test_chat_without_a_template(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*no chat template"):
        read_requests(tmp_path / "rows.jsonl", SimpleNamespace(has_chat_template=False), DEFAULTS)


def test_good_values_have_no_problem():
    assert check_sampling(DEFAULTS) is None
    assert "temperature=nan" in check_sampling(SamplingParams(temperature=float("nan")))
    assert "top_p=nan" in check_sampling(SamplingParams(top_p=float("nan")))
