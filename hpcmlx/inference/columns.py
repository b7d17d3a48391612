"""Finished rows as the columns of an HDF5 file, a few rows at a time.

`results.py` writes `results.h5` with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import h5py
import numpy as np

from hpcmlx.inference.logprobs import TokenLogprobs
from hpcmlx.inference.rows import RowResult

_ROWS_AT_ONCE = 512  # also the rows and
_TOKENS_AT_ONCE = 8192  # the tokens in a chunk of the file

_TEXTS = ("id", "text", "finish_reason")
_NUMBERS = {
    "index": "i8",
    "sample": "i4",
    "num_prompt_tokens": "i4",
    "num_cached_tokens": "i4",
    "ttft": "f8",
    "tpot": "f8",
    "seconds": "f8",
    "tokens_per_sec": "f8",
    "created": "f8",
    "rank": "i4",
}
_UNITS = dict.fromkeys(("ttft", "tpot", "seconds", "created"), "s") | {"tokens_per_sec": "1/s"}


def fill_columns(file: h5py.File, rows: Iterable[RowResult], attributes: Mapping[str, Any]) -> None:
    """One dataset per column; all tokens in one array, row i at offsets[i]:offsets[i + 1].

    Where some row has log-probabilities: `logprob` beside `tokens`, NaN where a row has none, and
    the likeliest tokens at position j of `tokens` at top_offsets[j]:top_offsets[j + 1] of
    `top_tokens` and `top_logprob`.
    """
    for name in _TEXTS:
        file.create_dataset(
            name, (0,), h5py.string_dtype(), maxshape=(None,), chunks=(_ROWS_AT_ONCE,)
        )
    for name, dtype in _NUMBERS.items():
        _new_column(file, name, dtype)
    _new_column(file, "offsets", "i8", 1)
    _new_column(file, "tokens", "i4", chunk=_TOKENS_AT_ONCE)
    for name, unit in _UNITS.items():
        file[name].attrs["unit"] = unit
    file.attrs.update(attributes)
    rows = iter(rows)
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        for name in _TEXTS:
            texts = [getattr(row, name) for row in some]
            # HDF5's strings end at a NUL, and are UTF-8.
            texts = [t.replace("\0", "\ufffd").encode("utf-8", "replace") for t in texts]
            _append(file, name, texts)
        for name in _NUMBERS:
            _append(file, name, [_number(row, name) for row in some])
        begin = len(file["tokens"])
        _append(file, "offsets", begin + np.cumsum([len(row.tokens) for row in some]))
        _append(file, "tokens", [token for row in some for token in row.tokens])
        if "logprob" in file or any(row.logprobs for row in some):
            _append_logprobs(file, some, begin)


def _append_logprobs(file: h5py.File, rows: Sequence[RowResult], begin: int) -> None:
    """
    Args:
        begin: how many tokens the rows before these have.
    """
    if "logprob" not in file:
        chunk = _TOKENS_AT_ONCE
        _new_column(file, "logprob", "f8", begin, math.nan, chunk)
        _new_column(file, "top_offsets", "i8", begin + 1, chunk=chunk)
        _new_column(file, "top_tokens", "i4", chunk=chunk)
        _new_column(file, "top_logprob", "f8", chunk=chunk)
        file["logprob"].attrs["unit"] = file["top_logprob"].attrs["unit"] = "nat"
    none = TokenLogprobs(math.nan)
    infos = [info for row in rows for info in row.logprobs or (none,) * len(row.tokens)]
    top = [pair for info in infos for pair in info.top]
    _append(file, "logprob", [info.logprob for info in infos])
    counts = [len(info.top) for info in infos]
    _append(file, "top_offsets", len(file["top_tokens"]) + np.cumsum(counts, dtype="i8"))
    _append(file, "top_tokens", [token for token, _ in top])
    _append(file, "top_logprob", [logprob for _, logprob in top])


def _number(row: RowResult, name: str) -> float:
    if name == "tokens_per_sec":
        return len(row.tokens) / row.seconds if row.seconds > 0 else 0.0
    return getattr(row, name)


def _new_column(
    file: h5py.File,
    name: str,
    dtype: str,
    length: int = 0,
    fillvalue: float = 0,
    chunk: int = _ROWS_AT_ONCE,
) -> None:
    file.create_dataset(
        name,
        (length,),
        dtype,
        maxshape=(None,),
        chunks=(chunk,),
        fletcher32=True,
        fillvalue=fillvalue,
    )


def _append(file: h5py.File, name: str, values: Any) -> None:
    dataset, count = file[name], len(values)
    if count:
        dataset.resize(len(dataset) + count, 0)
        dataset[-count:] = values
