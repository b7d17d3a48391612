"""What a generate job leaves behind: rows in input order, the same in both files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcmlx.comm import Communicator
from hpcmlx.errors import OutputError
from hpcmlx.inference.engine import Stats
from hpcmlx.inference.results import as_json, describe, gather_rows, summarize, write_results
from hpcmlx.inference.rows import RowResult
from hpcmlx.mesh import Mesh, ParallelDims

TEXTS = ["plain", "", "Grüße, 世界 🌍\n", "a\0b", 'quote " \\ \u2028 end', "\ufffd"]
TOKENS = [(1, 2, 3), (), (2**31 - 1,), (4, 5), (6,), (7, 8, 9, 10)]


def row(index: int, text: str, tokens: tuple[int, ...]) -> RowResult:
    reason = "stop" if index % 2 else "length"
    return RowResult(
        index, f"id-{index}-ä", text, tokens, reason, 10 + index, 0.5 * index, index, 0.0
    )


ROWS = [row(i, text, tokens) for i, (text, tokens) in enumerate(zip(TEXTS, TOKENS, strict=True))]


@pytest.fixture
def written(tmp_path):
    write_results(tmp_path, ROWS[::-1], {"model": "tiny", "layout": "dp1_pp1_tp1"})
    return tmp_path


def test_lines_are_in_input_order_and_as_they_came(written):
    data = (written / "results.jsonl").read_bytes()
    assert data.endswith(b"\n")
    lines = [json.loads(line) for line in data[:-1].split(b"\n")]
    assert lines == [as_json(r) for r in ROWS]
    assert list(lines[0]) == ["id", "text", "finish_reason", "num_prompt_tokens", "num_tokens"]
    assert [line["text"] for line in lines] == TEXTS
    assert "世界" in data.decode()


def test_columns(written):
    with h5py.File(written / "results.h5") as file:
        for name in ("id", "text", "finish_reason"):
            values = file[name].asstr()[:].tolist()
            # HDF5's strings end at a NUL.
            assert values == [getattr(r, name).replace("\0", "\ufffd") for r in ROWS]
        assert file["num_prompt_tokens"][:].tolist() == [r.num_prompt_tokens for r in ROWS]
        assert file["ttft"][:].tolist() == [r.ttft for r in ROWS]
        assert file["seconds"][:].tolist() == [r.seconds for r in ROWS]
        assert file["ttft"].attrs["unit"] == file["seconds"].attrs["unit"] == "s"
        offsets, tokens = file["offsets"][:], file["tokens"][:]
        for i, r in enumerate(ROWS):
            assert tuple(tokens[offsets[i] : offsets[i + 1]]) == r.tokens
        assert len(offsets) == len(ROWS) + 1 and offsets[-1] == len(tokens)
        assert dict(file.attrs) == {"model": "tiny", "layout": "dp1_pp1_tp1"}
        assert all(file[name].fletcher32 for name in ("tokens", "offsets", "ttft"))


def test_flipped_bits_are_found(written):
    """Any damage to the numbers makes reading fail instead of giving others."""
    path = written / "results.h5"
    data = bytearray(path.read_bytes())
    needle = np.array(TOKENS[5], "<i4").tobytes()
    at = bytes(data).index(needle)
    data[at] ^= 4
    path.write_bytes(data)
    with h5py.File(path) as file, pytest.raises(OSError):
        file["tokens"][:]


@pytest.mark.parametrize("rows", [[], [row(0, "", ())]])
def test_runs_without_rows_or_tokens(tmp_path, rows):
    write_results(tmp_path, rows, {})
    assert (tmp_path / "results.jsonl").read_text().count("\n") == len(rows)
    with h5py.File(tmp_path / "results.h5") as file:
        assert len(file["text"]) == len(rows)
        assert file["offsets"][:].tolist() == [0] * (len(rows) + 1)
        assert len(file["tokens"]) == 0


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError):
        write_results(tmp_path / "missing", ROWS, {})


class World:
    """A world whose other ranks give what they are told to."""

    rank, size = 0, 2

    def __init__(self, others):
        self.others = others

    def gather(self, value):
        return [value, *self.others]


def test_rows_come_from_one_rank_of_each_replica():
    alone = Mesh(ParallelDims(), Communicator())
    assert gather_rows(alone, ROWS) == ROWS
    first = SimpleNamespace(pp=0, tp=0, world=World([ROWS[2:]]))
    assert gather_rows(first, ROWS[:2]) == ROWS
    for pp, tp in ((1, 0), (0, 1)):
        partner = SimpleNamespace(pp=pp, tp=tp, world=World([ROWS]))
        assert gather_rows(partner, ROWS) == ROWS  # its own are not counted again
    elsewhere = SimpleNamespace(pp=0, tp=0, world=SimpleNamespace(gather=lambda value: None))
    assert gather_rows(elsewhere, ROWS) == []


def test_the_summary(tmp_path):
    mesh = Mesh(ParallelDims(), Communicator())
    loaded = SimpleNamespace(stage=SimpleNamespace(start=0, stop=4), num_bytes=100, bytes_read=90)
    stats = Stats(3, 30, 60, 0.5, 2.0, 20)
    totals = summarize(mesh, tmp_path, loaded, stats, 4.0)
    assert totals["tokens_per_sec"] == 15 and totals["layout"] == "dp1_pp1_tp1"
    assert (totals["rows"], totals["prompt_tokens"], totals["generated_tokens"]) == (3, 30, 60)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert totals.items() <= written.items()
    assert '"bytes_read": 90' in json.dumps(written)
    line = describe(totals)
    assert line == "3 rows, 30 prompt + 60 new tokens in 4.0 s: 15.0 tok/s (prefill 60 tok/s)"
    assert "prefill" in describe(totals | {"prefill_seconds": 0.0})
