"""What a generate job leaves behind: every row of the input once, in its order and its format."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcmlx.comm import Communicator
from hpcmlx.errors import IntegrityError, OutputError, StorageError
from hpcmlx.inference import openai
from hpcmlx.inference.engine import Stats
from hpcmlx.inference.inputs import Batch
from hpcmlx.inference.request import InputRow
from hpcmlx.inference.results import describe, plain_error, plain_line, summarize, write_results
from hpcmlx.inference.rows import RowError, RowResult, TokenLogprobs
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.tokenizer import load_tokenizer
from tests.fixtures import model  # noqa: F401 - a fixture

TEXTS = ["plain", "", "Grüße, 世界 🌍\n", "a\0b", 'quote " \\ \u2028 end', "\ufffd"]
TOKENS = [(1, 2, 3), (), (2**31 - 1,), (4, 5), (6,), (7, 8, 9, 10)]
ATTRIBUTES = {"model": "tiny", "layout": "dp1_pp1_tp1"}
NAMES = ["results.h5", "results.jsonl"]


def answer(index: int, sample: int = 0, **changes) -> RowResult:
    tokens = TOKENS[index % 6]
    values = {
        "index": index,
        "id": f"id-{index}-ä",
        "text": TEXTS[index % 6],
        "tokens": tokens,
        "finish_reason": "stop" if index % 2 else "length",
        "num_prompt_tokens": 10 + index,
        "ttft": 0.5 * index,
        "seconds": 1.5 * index + 1,
        "sample": sample,
        "num_cached_tokens": index // 2,
        "created": 1e9 + index,
        "rank": index % 3,
    }
    return RowResult(**values | changes)


def batch_of(*counts: int, openai: bool = False) -> Batch:
    """A batch whose row i wants counts[i] samples; 0: it is in error."""
    form = "chat" if openai else "plain"
    rows = [InputRow(i, f"id-{i}-ä", i + 1, form, "", n, not n) for i, n in enumerate(counts)]
    errors = [RowError(r.index, r.id, r.line, "invalid_row", "no ü") for r in rows if r.errored]
    return Batch("00", openai, [], errors, rows)


ROWS = [answer(i) for i in range(6)]


def write(path, batch=None, rows=ROWS, **more):
    return write_results(path, batch or batch_of(*[1] * 6), iter(rows), None, ATTRIBUTES, **more)


def lines_of(path) -> list[dict]:
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data[:-1].split(b"\n")]


def test_lines_are_in_input_order_and_as_they_came(tmp_path):
    written = write(tmp_path)
    lines = lines_of(tmp_path / "results.jsonl")
    rows = batch_of(*[1] * 6).rows
    assert lines == [plain_line(row, [a]) for row, a in zip(rows, ROWS, strict=True)]
    assert list(lines[0]) == ["id", "text", "finish_reason", "num_prompt_tokens", "num_tokens"]
    assert [line["text"] for line in lines] == TEXTS
    assert [line["num_tokens"] for line in lines] == list(map(len, TOKENS))
    assert "世界" in (tmp_path / "results.jsonl").read_text(encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == NAMES  # no errors.jsonl where there are no errors
    assert (written.rows, written.samples, written.errors) == (6, 6, 0)
    assert written.generated_tokens == sum(map(len, TOKENS)) and written.prompt_tokens == 75
    assert len(written.ttft) == 6 and len(written.tpot) == 3
    assert written.tpot[0] == ROWS[0].tpot == 0.5


def test_several_samples_and_log_probabilities(tmp_path):
    info = (TokenLogprobs(-0.5, ((1, -0.5), (2, -math.inf))), TokenLogprobs(-1.0))
    rows = [answer(0, i, tokens=(1, 4), text=f"t{i}", logprobs=info) for i in range(2)]
    write(tmp_path, batch_of(2, 1), [*rows, answer(1)])
    first, second = lines_of(tmp_path / "results.jsonl")
    assert [a["text"] for a in first["samples"]] == ["t0", "t1"]
    assert first["num_prompt_tokens"] == 10 and first["id"] == "id-0-ä"
    shown = first["samples"][1]
    assert shown["sample"] == 1 and shown["num_tokens"] == 2
    assert shown["logprobs"] == [
        {"token": 1, "logprob": -0.5, "top": [[1, -0.5], [2, None]]},
        {"token": 4, "logprob": -1.0, "top": []},
    ]
    assert "samples" not in second and "logprobs" not in second
    assert "Infinity" not in (tmp_path / "results.jsonl").read_text()


def test_bad_rows_have_their_own_file(tmp_path):
    batch = batch_of(1, 0, 1, 1)
    late = RowError(3, "id-3-ä", 4, "context_length_exceeded", "too long")
    written = write(tmp_path, batch, [answer(0), answer(2)], errors=[late])
    assert (written.rows, written.errors) == (2, 2)
    assert [row["id"] for row in lines_of(tmp_path / "results.jsonl")] == ["id-0-ä", "id-2-ä"]
    bad = lines_of(tmp_path / "errors.jsonl")
    assert bad == [plain_error(batch.errors[0]), plain_error(late)]
    assert bad[0] == {
        "id": "id-1-ä",
        "line": 2,
        "error": {"code": "invalid_row", "message": "no ü"},
    }
    write(tmp_path)  # no longer true
    assert sorted(os.listdir(tmp_path)) == NAMES


def test_openai_in_openai_out(tmp_path, model):  # noqa: F811
    tokenizer = load_tokenizer(model)
    info = tuple(TokenLogprobs(-0.5, ((token, -0.5),)) for token in TOKENS[2][:0] + (40, 41))
    rows = [answer(0), answer(1, tokens=(40, 41), text="ab", logprobs=info), answer(1, 1)]
    batch = batch_of(1, 2, 0, openai=True)
    write_results(tmp_path, batch, iter(rows), tokenizer, ATTRIBUTES)
    assert lines_of(tmp_path / "results.jsonl") == [
        openai.output_line(batch.rows[0], rows[:1], tokenizer, "tiny"),
        openai.output_line(batch.rows[1], rows[1:], tokenizer, "tiny"),
    ]
    assert lines_of(tmp_path / "errors.jsonl") == [openai.error_line(batch.errors[0])]
    assert lines_of(tmp_path / "errors.jsonl")[0]["custom_id"] == "id-2-ä"


# -- every row once --


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS[:5], "no answer to id-5-ä"),
        (ROWS[1:], "no answer to id-0-ä"),
        ([*ROWS[:2], *ROWS[3:]], "no answer to id-2-ä"),
        ([*ROWS, answer(6)], "nobody asked for: id-6-ä"),
        ([*ROWS[:3], answer(2, 1), *ROWS[3:]], "nobody asked for: id-2-ä"),
        ([answer(0, 1), *ROWS[1:]], "no answer to id-0-ä"),
        ([answer(0, id="other"), *ROWS[1:]], "nobody asked for: other"),
        ([], "no answer to id-0-ä, id-1-ä"),
    ],
)
def test_rows_that_are_not_those_of_the_input(tmp_path, rows, words):
    with pytest.raises(IntegrityError) as caught:
        write(tmp_path, rows=rows)
    assert words in str(caught.value) and caught.value.exit_code == 77
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        RowError(2, "other", 3, "invalid_row", ""),
        RowError(9, "id-9-ä", 10, "invalid_row", ""),
        RowError(1, "id-1-ä", 2, "invalid_row", ""),  # a second one
    ],
)
def test_errors_that_are_not_of_the_input(tmp_path, error):
    with pytest.raises(IntegrityError, match="errors that do not fit"):
        write(tmp_path, batch_of(1, 0, 1), [answer(0), answer(2)], errors=[error])
    assert os.listdir(tmp_path) == []


def test_an_answer_and_an_error_for_one_row(tmp_path):
    with pytest.raises(IntegrityError, match="nobody asked for: id-1-ä"):
        write(tmp_path, batch_of(1, 0, 1), ROWS[:3])


# -- results.h5 --


def test_columns(tmp_path):
    write(tmp_path)
    with h5py.File(tmp_path / "results.h5") as file:
        for name in ("id", "text", "finish_reason"):
            values = file[name].asstr()[:].tolist()
            # HDF5's strings end at a NUL.
            assert values == [getattr(r, name).replace("\0", "\ufffd") for r in ROWS]
        for name in ("index", "sample", "num_prompt_tokens", "num_cached_tokens", "rank"):
            assert file[name][:].tolist() == [getattr(r, name) for r in ROWS]
        for name in ("ttft", "tpot", "seconds", "created"):
            assert file[name][:].tolist() == [getattr(r, name) for r in ROWS]
            assert file[name].attrs["unit"] == "s"
        speeds = [len(r.tokens) / r.seconds for r in ROWS]
        assert file["tokens_per_sec"][:].tolist() == speeds
        offsets, tokens = file["offsets"][:], file["tokens"][:]
        for i, r in enumerate(ROWS):
            assert tuple(tokens[offsets[i] : offsets[i + 1]]) == r.tokens
        assert len(offsets) == len(ROWS) + 1 and offsets[-1] == len(tokens)
        assert dict(file.attrs) == ATTRIBUTES
        assert all(file[name].fletcher32 for name in ("tokens", "offsets", "ttft"))
        assert "logprob" not in file


def test_columns_of_log_probabilities(tmp_path):
    """Rows with and without, over more rows than are written together."""
    rows = []
    for i in range(1500):
        infos = None
        if i % 700 == 650:
            infos = tuple(TokenLogprobs(-0.1 * i - j, ((j, -0.5), (i, -1.5))[:j]) for j in range(2))
        rows.append(answer(i, tokens=(i, i + 1), logprobs=infos))
    write(tmp_path, batch_of(*[1] * 1500), rows)
    with h5py.File(tmp_path / "results.h5") as file:
        offsets, logprob = file["offsets"][:], file["logprob"][:]
        tops, ids, values = (file[n][:] for n in ("top_offsets", "top_tokens", "top_logprob"))
        assert len(logprob) == len(file["tokens"]) == 3000 and len(tops) == 3001
        for i, r in enumerate(rows):
            for j, at in enumerate(range(offsets[i], offsets[i + 1])):
                place = slice(tops[at], tops[at + 1])
                top = tuple(zip(ids[place].tolist(), values[place].tolist(), strict=True))
                if r.logprobs is None:
                    assert math.isnan(logprob[at]) and top == ()
                else:
                    assert (logprob[at], top) == (r.logprobs[j].logprob, r.logprobs[j].top)


def test_flipped_bits_are_found(tmp_path):
    """Any damage to the numbers makes reading fail instead of giving others."""
    write(tmp_path)
    path = tmp_path / "results.h5"
    data = bytearray(path.read_bytes())
    needle = np.array(TOKENS[5], "<i4").tobytes()
    data[bytes(data).index(needle)] ^= 4
    path.write_bytes(data)
    with h5py.File(path) as file, pytest.raises(OSError):
        file["tokens"][:]


@pytest.mark.parametrize(("counts", "rows"), [((0,), []), ((1,), [answer(0, tokens=(), text="")])])
def test_runs_without_answers_or_tokens(tmp_path, counts, rows):
    write(tmp_path, batch_of(*counts), rows)
    assert (tmp_path / "results.jsonl").read_text().count("\n") == len(rows)
    with h5py.File(tmp_path / "results.h5") as file:
        assert len(file["text"]) == len(rows)
        assert file["offsets"][:].tolist() == [0] * (len(rows) + 1)
        assert len(file["tokens"]) == 0


def test_many_rows_are_never_all_in_memory(tmp_path):
    rows = (answer(i, text="x" * 10_000) for i in range(2000))  # 20 MB
    tracemalloc.start()
    write(tmp_path, batch_of(*[1] * 2000), rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 512 rows of 10 kB come together, as text and as bytes.
    assert peak < 15_000_000 and (tmp_path / "results.jsonl").stat().st_size > 20_000_000


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError):
        write(tmp_path / "missing")


@pytest.mark.fault
def test_a_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a full disk cannot be made here: mounting a tmpfs needs Linux and root")
    try:
        write(tmp_path)
        before = {name: (tmp_path / name).read_bytes() for name in NAMES}
        for size in (200, 600, 2000):
            rows = (answer(i, text="x" * size) for i in range(1200))
            with pytest.raises(StorageError, match=r"no room for .*results\.(h5|jsonl)"):
                write(tmp_path, batch_of(*[1] * 1200), rows)
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# -- summary.json --


class World:
    """A world whose other ranks give what they are told to."""

    rank = 0

    def __init__(self, others):
        self.size, self.others = len(others) + 1, list(others)

    def gather(self, value):
        if isinstance(value, tuple):
            return [value, *self.others]
        return [value]


LOADED = SimpleNamespace(stage=SimpleNamespace(start=0, stop=4), num_bytes=100, bytes_read=90)


def test_the_summary(tmp_path):
    written = write(tmp_path)
    mesh = Mesh(ParallelDims(), Communicator())
    stats = Stats(
        num_rows=2,
        prompt_tokens=30,
        cached_tokens=10,
        generated_tokens=60,
        prefill_seconds=0.5,
        decode_seconds=2.0,
        idle_seconds=1.0,
        num_steps=20,
    )
    totals = summarize(mesh, tmp_path, LOADED, stats, 4.0, written)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert totals.items() <= summary.items() and summary["layout"] == "dp1_pp1_tp1"
    # Of all launches.
    assert (summary["rows"], summary["samples"], summary["errors"]) == (6, 6, 0)
    assert (summary["prompt_tokens"], summary["generated_tokens"]) == (75, 11)
    assert summary["cached_tokens"] == sum(r.num_cached_tokens for r in ROWS)
    expected = np.percentile([r.ttft for r in ROWS], [50, 90, 99]).tolist()
    assert list(summary["ttft_seconds"].items()) == [
        ("p50", expected[0]),
        ("p90", expected[1]),
        ("p99", expected[2]),
    ]
    assert summary["tpot_seconds"]["p50"] == np.median([ROWS[i].tpot for i in (0, 3, 5)])
    # Of this one.
    launch = summary["this_launch"]
    assert (launch["samples"], launch["prompt_tokens"], launch["generated_tokens"]) == (2, 30, 60)
    assert launch["tokens_per_sec"] == 15 and launch["seconds"] == 4
    assert launch["prefill_tokens_per_sec"] == 40 and launch["decode_tokens_per_sec"] == 30
    assert summary["stage_idle_percent"] == [25.0]
    [rank] = summary["ranks"]
    assert rank["idle_percent"] == 25 and rank["bytes_read"] == 90 and rank["peak_rss_bytes"] > 0
    assert describe(totals) == (
        "6 rows, 4 answers of an earlier launch; 30 prompt + 60 new tokens in 4.0 s: 15.0 tok/s "
        "(prefill 40 tok/s)"
    )


def test_the_summary_of_a_launch_that_found_everything_done(tmp_path):
    written = write(tmp_path, batch_of(0), [])
    mesh = Mesh(ParallelDims(), Communicator())
    totals = summarize(mesh, tmp_path, LOADED, Stats(), 0.0, written)
    assert totals["ttft_seconds"] == totals["tpot_seconds"] == {}
    assert describe(totals).startswith("0 rows, 1 errors; 0 prompt + 0 new tokens in 0.0 s: 0.0")


def test_speeds_and_idle_time_over_replicas_and_stages(tmp_path):
    def stats(tokens: int, idle: float, prefill: float) -> Stats:
        return Stats(
            num_rows=1,
            prompt_tokens=10,
            generated_tokens=tokens,
            prefill_seconds=prefill,
            decode_seconds=1.0,
            idle_seconds=idle,
        )

    # dp2 x pp2 x tp1; every rank of a replica counts the replica's tokens.
    others = [(1, 0, stats(5, 2.0, 9.0)), (0, 0, stats(7, 3.0, 2.0)), (1, 0, stats(7, 0.0, 1.0))]
    mesh = SimpleNamespace(dims=ParallelDims(2, 2, 1), pp=0, tp=0, world=World(others))
    written = write(tmp_path)
    totals = summarize(mesh, tmp_path, LOADED, stats(5, 1.0, 1.0), 10.0, written)
    launch = totals["this_launch"]
    assert (launch["samples"], launch["generated_tokens"], launch["prompt_tokens"]) == (2, 12, 20)
    assert launch["prefill_seconds"] == 2.0 and launch["prefill_tokens_per_sec"] == 10
    assert totals["stage_idle_percent"] == [20.0, 10.0]
