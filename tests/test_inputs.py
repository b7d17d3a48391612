"""Input files of every format: the same rows, and bad ones that do not end the job."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcmlx.errors import ConfigError, InputError
from hpcmlx.inference import inputs, jsonl
from hpcmlx.inference.inputs import read_batch
from hpcmlx.inference.request import InputRow
from hpcmlx.inference.sampling import SamplingParams, row_seed
from hpcmlx.models import tokenizer as tokenizer_module
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.settings import DataConfig
from tests.fixtures import model, save_tokenizer  # noqa: F401 - a fixture

DEFAULTS = SamplingParams(temperature=0.5, seed=7, max_tokens=20)
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer(model):  # noqa: F811
    return load_tokenizer(model)


@pytest.fixture
def read(tmp_path, tokenizer):
    """The batch of a file of the given content: text, bytes, rows to be dumped; None: as it is."""

    def read(content, name="rows.jsonl", tokenizer=tokenizer, data=None, **settings):
        if isinstance(content, list):
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        path = Path(tmp_path, name)
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_batch(path, tokenizer, DEFAULTS, data or DataConfig(), **settings)

    return read


def openai_row(custom_id, url="/v1/chat/completions", **body):
    prompt = {} if body.keys() & {"prompt", "messages"} else {"messages": CHAT}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**prompt, **body}}


def table(path: Path, columns: dict[str, list]) -> Path:
    """The columns as a file of the format that the suffix names."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow", reason="NOT TESTED: Parquet needs pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.table(columns), path)
    else:
        with h5py.File(path, "w") as file:
            for name, values in columns.items():
                file[name] = values
    return path


def test_plain_rows(read):
    batch = read([{"prompt": "a"}, {"messages": CHAT, "id": "b", "n": 3}, {"prompt": "c", "id": 9}])
    assert batch.rows == [
        InputRow(0, "1", 1, n=1),
        InputRow(1, "b", 2, n=3),
        InputRow(2, "9", 3, n=1),
    ]
    keys = [(r.index, r.id, r.sample) for r in batch.requests]
    assert keys == [(0, "1", 0), (1, "b", 0), (1, "b", 1), (1, "b", 2), (2, "9", 0)]
    assert batch.requests[-1].sampling.seed == row_seed(7, 2)
    assert not batch.errors and not batch.is_openai
    assert [r.n for r in read([{"prompt": "a"}, {"prompt": "b", "n": 1}], n=4).rows] == [4, 1]


def test_the_hash_is_of_the_bytes(read, tmp_path):
    batch = read('\ufeff{"prompt": "a"}\r\n')
    assert batch.sha256 == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()


def test_openai_rows(read, tokenizer):
    batch = read(
        [
            openai_row("one", model="m", max_tokens=3),
            openai_row("two", "/v1/completions", prompt="abc", n=2),
        ]
    )
    assert batch.is_openai and not batch.errors
    assert batch.rows == [
        InputRow(0, "one", 1, "chat", "m", 1),
        InputRow(1, "two", 2, "completion", "", 2),
    ]
    assert batch.requests[0].sampling.max_tokens == 3
    assert list(batch.requests[1].tokens) == tokenizer.encode("abc")


def test_a_files_kind_is_that_of_its_first_object(read):
    rows = read("{\n[1]\n" + json.dumps(openai_row("a")) + "\n")
    assert rows.is_openai and [r.id for r in rows.requests] == ["a"]
    plain = read([{"prompt": "a"}, openai_row("b")])
    assert not plain.is_openai
    assert "OpenAI's format in a file of plain rows" in plain.errors[0].message
    assert plain.errors[0].id == "2"
    with pytest.raises(InputError, match=r"rows without a custom_id: lines 1; give"):
        read([{"prompt": "a"}, openai_row("b")], data=DataConfig(format="openai"))


@pytest.mark.fault
def test_bom_crlf_and_blank_lines(read):
    """Fault 33: what editors leave in files is no error."""
    batch = read(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n\t\n{"prompt": "b"}\r\n')
    assert [(r.index, r.id) for r in batch.requests] == [(0, "1"), (1, "5")]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_newlines_end_a_line(read, character):
    """str.splitlines ends a line at each of these; JSON strings may hold them."""
    line = json.dumps({"prompt": f"a{character}b", "id": f"x{character}"}, ensure_ascii=False)
    batch = read(line + "\n" + '{"prompt": "c"}')
    assert [r.id for r in batch.requests] == [f"x{character}", "2"]
    assert len(batch.requests[0].tokens) == 3


def test_an_escaped_nul_is_a_character_like_others(read):
    assert len(read('{"prompt": "a\\u0000b"}').requests[0].tokens) == 3


BAD_LINES = {
    "cut off": (b'{"prompt": "a"', "invalid_json", "3", "not JSON (Expecting ',' delimiter"),
    "NULs": (b"\0" * 8, "invalid_json", "3", "not JSON"),
    "NUL": (b'{"prompt": "a\0b"}', "invalid_json", "3", "not JSON (Invalid control character"),
    "UTF-16": (b"\xff\xfea\x00", "invalid_json", "3", "not UTF-8 (byte 0xff at byte 1 of"),
    "Latin 1": (b'{"prompt": "\xe9"}', "invalid_json", "3", "not UTF-8 (byte 0xe9 at byte 13"),
    "surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80"}', "invalid_json", "3", "not UTF-8"),
    "surrogate": (b'{"id": "x", "prompt": "\\udfff"}', "invalid_row", "x", "surrogate pair"),
    "surrogate id": (b'{"prompt": "a", "id": "\\ud800"}', "invalid_json", "3", "surrogate pair"),
    "surrogate key": (b'{"prompt": "a", "\\ud800": 1}', "invalid_row", "3", "surrogate pair"),
    "a list": (b"[1]", "invalid_json", "3", "a row is a JSON object, not list"),
    "a number": (b"3", "invalid_json", "3", "a row is a JSON object, not int"),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', "invalid_json", "3", "NaN is not a number"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, "invalid_json", "3", "not usable JSON"),
    "deep but whole": (
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "invalid_row", "3", "",
    ),
    "long number": (b'{"seed": ' + b"1" * 5000 + b"}", "invalid_json", "3", "not usable JSON"),
    "id list": (b'{"prompt": "a", "id": []}', "invalid_row", "3", "id=[] must be a string or a"),
    "id null": (b'{"prompt": "a", "id": null}', "invalid_row", "3", "id=None must be a string"),
    "id true": (b'{"prompt": "a", "id": true}', "invalid_row", "3", "id=True must be a string"),
    "a wrong value": (b'{"id": "x", "prompt": 3}', "invalid_row", "x", "'prompt' must be a str"),
    "empty": (b'{"id": "x", "prompt": ""}', "invalid_row", "x", "no tokens; remove the row"),
    "too long": (b'{"id": "x", "prompt": "' + b"a" * 999 + b'"}', "context_length_exceeded", "x",
                 "999 prompt tokens + max_tokens=20 exceed the model's context of 512"),
}  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_an_error_of_its_row(read, case):
    """Faults 33 and 35: the row is named by file and line, the rest is done."""
    line, code, row_id, words = BAD_LINES[case]
    batch = read(b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b", "id": "3"}', max_context=512)
    assert [(r.index, r.id) for r in batch.requests] == [(0, "1"), (2, "3")]
    (error,) = batch.errors
    assert (error.index, error.id, error.line, error.code) == (1, row_id, 3, code)
    assert "rows.jsonl:3: " in error.message and words in error.message
    assert "\n" not in error.message and len(error.message) < 400
    error.message.encode()
    assert [r.errored for r in batch.rows] == [False, True, False] and batch.rows[1].n == 0


@pytest.mark.fault
def test_a_line_of_10_mb(read, monkeypatch):
    """Fault 33: it is a row like others, or too long, but never a crash."""
    rows = [{"prompt": "x" * 10_000_000}, {"prompt": "y"}]
    batch = read(rows, tokenizer=_Counting(), max_context=1000)
    assert [e.code for e in batch.errors] == ["context_length_exceeded"]
    assert [r.id for r in batch.requests] == ["2"]
    monkeypatch.setattr(jsonl, "MAX_LINE", 5 << 20)
    batch = read([*rows, rows[0]])
    assert [(e.line, e.code) for e in batch.errors] == [(1, "invalid_json"), (3, "invalid_json")]
    assert "rows.jsonl:1: longer than 5 MiB" in batch.errors[0].message
    assert [r.id for r in batch.requests] == ["2"]


class _Counting:
    """A tokenizer of one token per character, quicker than a real one."""

    bos_token = None

    def encode(self, text, add_special_tokens):
        return [1] * len(text)

    def __len__(self):
        return 2


def test_the_file_is_not_held_in_memory(tmp_path):
    """5,000 rows of 500 tokens are 10 MB of requests, whatever the text weighs."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(5000):
            file.write(json.dumps({"prompt": "x" * 500}) + " " * 20_000 + "\n")
    assert path.stat().st_size > 100_000_000
    tracemalloc.start()
    batch = read_batch(path, _Counting(), DEFAULTS, DataConfig())
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(sys.getsizeof(r.tokens) for r in batch.requests) < 10.5e6
    assert held < 20e6 and peak < 24e6


@pytest.mark.fault
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
@pytest.mark.parametrize("data", ["", "\n\n", "\ufeff", "\r\n"])
def test_a_file_without_rows(read, name, data):
    """Fault 33: an empty file is refused."""
    with pytest.raises(InputError, match="holds no rows"):
        read(data, name)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "h5"])
def test_a_file_that_is_not_there(tmp_path, tokenizer, suffix):
    with pytest.raises(InputError, match=f"none.{suffix} does not exist; set input="):
        read_batch(tmp_path / f"none.{suffix}", tokenizer, DEFAULTS, DataConfig())
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_batch(tmp_path / f"folder.{suffix}", tokenizer, DEFAULTS, DataConfig())


@pytest.mark.fault
def test_duplicate_ids_are_refused(read):
    """Fault 34: before the model is loaded, with ids and lines; ten of them at most."""
    rows = [openai_row(i) for i in ("a", "b", "a", "c", "b", "a")]
    with pytest.raises(InputError) as refusal:
        read(rows)
    words = ": ids used more than once: 'a' (lines 1, 3, 6), 'b' (lines 2, 5); give each"
    assert words in str(refusal.value)
    with pytest.raises(InputError, match=r"'9' \(lines 10, 22\) and 2 more; give each"):
        read([{"prompt": "a", "id": str(i % 12)} for i in range(24)])
    with pytest.raises(InputError, match=r"'2' \(lines 1, 2\)"):  # a line number is an id, too
        read([{"prompt": "a", "id": 2}, {"prompt": "b"}])
    # A row that cannot be answered still has its id.
    with pytest.raises(InputError, match=r"'a' \(lines 1, 2\)"):
        read([{"prompt": "a", "id": "a"}, {"id": "a"}])


@pytest.mark.fault
def test_a_missing_custom_id_is_refused(read):
    """Fault 34: an answer nobody can find is not worth computing."""
    rows = [openai_row("a"), openai_row("b"), openai_row("c"), openai_row("d"), {}]
    del rows[1]["custom_id"]
    rows[2]["custom_id"], rows[3]["custom_id"] = 3, ""
    with pytest.raises(InputError, match=r"rows without a custom_id: lines 2, 3, 4, 5; give"):
        read(rows)


@pytest.mark.fault
def test_a_hostile_template_spoils_only_chat_rows(tmp_path, read, monkeypatch):
    """Fault 42: the sandbox's error is one of the row; rows with a prompt are done."""
    save_tokenizer(tmp_path)
    tokenizer = tokenizer_module._load(tmp_path, tmp_path, 2)
    rows = [{"messages": CHAT}, {"prompt": "a"}] * 3
    tokenizer.chat_template = "{{ ''.__class__.__mro__ }}"
    batch = read(rows, tokenizer=tokenizer)
    assert [e.code for e in batch.errors] == ["chat_template_error"] * 3
    assert "rows.jsonl:1: the model's chat template is refused: " in batch.errors[0].message
    assert [r.index for r in batch.requests] == [1, 3, 5]
    tokenizer.chat_template = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    monkeypatch.setattr(tokenizer_module, "TEMPLATE_SECONDS", 0.2)
    begin = time.monotonic()
    batch = read(rows * 50, tokenizer=tokenizer)
    assert time.monotonic() - begin < 5  # two tries, not 150
    assert len(batch.errors) == len(batch.requests) == 150
    assert len({e.message.partition(": ")[2] for e in batch.errors}) == 1


def test_chat_without_a_template(read):
    plain = SimpleNamespace(has_chat_template=False)
    sized = type("Tokenizer", (_Counting,), vars(plain))()
    (error,) = read([{"messages": CHAT}], tokenizer=sized).errors
    assert error.code == "chat_template_error" and "no chat template" in error.message


SUFFIXES = ["csv", "parquet", "h5"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_are_the_same_rows_as_jsonl(read, tmp_path, suffix):
    rows = [
        {"id": "a", "prompt": "one, \"two\"\nthree", "temperature": 0.25, "max_tokens": 3, "n": 2,
         "seed": 5, "stop": ["x", "y"], "logit_bias": {"7": 1.5}},
        {"id": "b", "prompt": "α", "temperature": 0.0, "max_tokens": 9, "n": 1, "seed": 6,
         "stop": ["z"], "logit_bias": {"7": -2}},
    ]  # fmt: skip
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns |= {key: [json.dumps(v) for v in columns[key]] for key in ("stop", "logit_bias")}
    path = table(tmp_path / f"rows.{suffix}", {**columns, "unknown": [1, 2]})
    batch = read(None, path.name)
    assert not batch.errors and batch.requests == read(rows).requests
    assert batch.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_columns_of_conversations(read, tmp_path, suffix):
    texts = [json.dumps(CHAT), json.dumps([{"role": "user", "content": "b"}])]
    path = table(tmp_path / f"rows.{suffix}", {"talk": texts, "key": [4, 5], "prompt": ["", ""]})
    batch = read(None, path.name, data=DataConfig(messages_column="talk", id_column="key"))
    assert [r.id for r in batch.requests] == ["4", "5"]
    assert batch.requests[0].tokens == read([{"messages": CHAT}]).requests[0].tokens
    assert [r.line for r in batch.rows] == ([2, 3] if suffix == "csv" else [None, None])


def test_nested_columns(read, tmp_path):
    talk = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
    ]
    path = table(
        tmp_path / "rows.parquet",
        {"messages": talk, "stop": [["a"], None], "max_tokens": [2.0, None], "id": [b"x", None]},
    )
    batch = read(None, path.name)
    assert not batch.errors
    assert batch.requests[0].tokens == read([{"messages": CHAT}]).requests[0].tokens
    assert [r.id for r in batch.requests] == ["x", "2"]
    assert [r.sampling.stop for r in batch.requests] == [("a",), ()]
    assert [r.sampling.max_tokens for r in batch.requests] == [2, 20]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bad_cells_are_errors_of_their_rows(read, tmp_path, suffix):
    path = table(
        tmp_path / f"rows.{suffix}",
        {
            "id": ["a", "b", "c", "d", "e", "f"],
            "prompt": ["one", "", "", "", "", "six"],
            "messages": ["", "", "{", json.dumps([1]), json.dumps(CHAT), ""],
            "top_k": ["1", "", "", "", "1.5", "2"],
        },
    )
    batch = read(None, path.name)
    assert [r.id for r in batch.requests] == ["a", "f"]
    assert [r.sampling.top_k for r in batch.requests] == [1, 2]
    assert [(e.id, e.code) for e in batch.errors] == [(i, "invalid_row") for i in "bcde"]
    words = ["no tokens", "column 'messages': not JSON", "'messages' must be a list", "top_k='1.5'"]
    for error, word, number in zip(batch.errors, words, (2, 3, 4, 5), strict=True):
        place = f"{path}:{number + 1}: " if suffix == "csv" else f"{path}, row {number}: "
        assert error.message.startswith(place) and word in error.message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_the_columns(read, tmp_path, suffix):
    path = table(tmp_path / f"rows.{suffix}", {"question": ["a"], "x": ["b"]})
    with pytest.raises(InputError, match="no column 'prompt' or 'messages', but question, x; set"):
        read(None, path.name)
    batch = read(None, path.name, data=DataConfig(prompt_column="question"))
    assert [r.id for r in batch.requests] == ["2" if suffix == "csv" else "1"]
    with pytest.raises(ConfigError, match="id, x, x: they must be three columns|three columns"):
        read(None, path.name, data=DataConfig(prompt_column="x", messages_column="x"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_without_rows(read, tmp_path, suffix):
    empty = np.array([], h5py.string_dtype()) if suffix == "h5" else []
    path = table(tmp_path / f"rows.{suffix}", {"prompt": empty})
    with pytest.raises(InputError, match="holds no rows"):
        read(None, path.name)


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("content", [b"", b"not at all", b"PAR1" * 9, b"\x89HDF\r\n\x1a\n" * 9])
def test_a_damaged_file(read, suffix, content):
    with pytest.raises(InputError, match="cannot be read"):
        read(content, f"rows.{suffix}")


@pytest.mark.fault
def test_csv_of_all_sorts(read):
    """Fault 33, in CSV: every bad line is its own error."""
    lines = [
        b"\xef\xbb\xbfid,prompt,seed\r",
        b"a,good,1\r",
        b"",
        b"b,too,many,cells\r",
        b"c,Latin \xe9,1\r",
        b'd,"stray" quote,1\r',
        b'e,"two',
        b'lines",1\r',
        b"f,a\0b,1\r",
        b"g," + b"x" * 200_000 + b",1\r",
        b"\xe9,id is not UTF-8,1\r",
        b'h,"never closed,1\r',
        b"i,swallowed,1\r",
    ]
    batch = read(b"\n".join(lines), "rows.csv")
    assert [r.id for r in batch.requests] == ["a", "e", "f", "g"]
    assert [len(r.tokens) for r in batch.requests] == [4, 9, 3, 200_000]
    assert [(e.id, e.line) for e in batch.errors] == [
        ("4", 4), ("c", 5), ("6", 6), ("11", 11), ("12", 12),
    ]  # fmt: skip
    words = ["4 cells under 3 columns", "not UTF-8 (byte 0xe9)", "not CSV", "not UTF-8", "not CSV"]
    for error, word in zip(batch.errors, words, strict=True):
        assert word in error.message


def test_a_csv_field_may_be_long_and_too_long(read, monkeypatch):
    limit = csv.field_size_limit()
    monkeypatch.setattr(inputs, "MAX_LINE", 1000)
    batch = read("prompt\n" + "x" * 1001 + "\ny\n", "rows.csv")
    assert [r.id for r in batch.requests] == ["3"] and [e.line for e in batch.errors] == [2]
    assert csv.field_size_limit() == limit


def test_a_column_of_a_name_twice(read):
    with pytest.raises(InputError, match="two columns of the same name: prompt, prompt"):
        read("prompt,prompt\na,b\n", "rows.csv")


def test_hdf5_strings_that_are_not_utf8(read, tmp_path):
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["prompt"] = np.array([b"good", b"\xe9", b"fine"], "S8")
    batch = read(None, "rows.h5")
    assert [r.id for r in batch.requests] == ["1", "3"]
    (error,) = batch.errors
    assert error.line is None and ", row 2: not UTF-8 (byte 0xe9)" in error.message


def test_hdf5_columns_must_lie_in_the_file(read, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["prompt"] = ["a", "b"]
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["prompt"] = h5py.ExternalLink("other.h5", "prompt")
    layout = h5py.VirtualLayout((2,), h5py.string_dtype())
    layout[:] = h5py.VirtualSource("other.h5", "prompt", (2,), h5py.string_dtype())
    with h5py.File(tmp_path / "virtual.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("prompt", layout)
    for name in ("link.h5", "virtual.h5"):
        with pytest.raises(InputError, match="'prompt' lies in another file"):
            read(None, name)


def test_hdf5_columns_of_one_shape(read, tmp_path):
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["prompt"], file["seed"] = ["a", "b"], [1]
    with pytest.raises(InputError, match=r"different lengths \[1, 2\]"):
        read(None, "rows.h5")
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file["prompt"] = [["a"], ["b"]]
    with pytest.raises(InputError, match="not a one-dimensional dataset"):
        read(None, "rows.h5")


def test_hdf5_is_read_in_chunks(read, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_CHUNK", 3)
    table(tmp_path / "rows.h5", {"prompt": [str(i) * (i + 1) for i in range(8)]})
    assert [len(r.tokens) for r in read(None, "rows.h5").requests] == list(range(1, 9))


def test_parquet_without_pyarrow(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'hpcmlx\[parquet\]'"):
        read(b"PAR1", "rows.parquet")


def test_a_format_can_be_said(read):
    batch = read("prompt\na\n", "rows.txt", data=DataConfig(format="csv"))
    assert [r.id for r in batch.requests] == ["2"]
    assert read('{"prompt": "a"}', "prompts").requests
