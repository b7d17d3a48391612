"""Writes what a generate job leaves behind: `results.jsonl` for people, `results.h5` for programs.

Both in input order, both whole or not there at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcmlx.files import write_atomic, write_hdf5
from hpcmlx.inference.engine import RowResult


def write_results(
    run_dir: Path, results: Sequence[RowResult], attributes: Mapping[str, Any]
) -> None:
    """Write `results.jsonl` and `results.h5` into the run directory.

    Args:
        results: one per row, in any order.
        attributes: what produced them (model, layout), stored as HDF5 attributes.

    Raises:
        StorageError: the disk is full or failing.
    """
    rows = sorted(results, key=lambda row: row.index)
    lines = (json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows)
    write_atomic(run_dir / "results.jsonl", "".join(lines).encode())
    write_hdf5(run_dir / "results.h5", lambda file: _fill(file, rows, attributes))


def as_json(row: RowResult) -> dict[str, Any]:
    """A row of `results.jsonl`."""
    return {
        "id": row.id,
        "text": row.text,
        "finish_reason": row.finish_reason,
        "num_prompt_tokens": row.num_prompt_tokens,
        "num_tokens": len(row.tokens),
    }


def _fill(file: h5py.File, rows: Sequence[RowResult], attributes: Mapping[str, Any]) -> None:
    """One dataset per column; all tokens in one array, row i at offsets[i]:offsets[i + 1]."""
    text = h5py.string_dtype("utf-8")
    checked: dict[str, Any] = {"fletcher32": True, "chunks": True}
    for name in ("id", "text", "finish_reason"):
        values = [getattr(row, name).replace("\0", "\N{REPLACEMENT CHARACTER}") for row in rows]
        file.create_dataset(name, data=values, dtype=text)
    for name, dtype in (("num_prompt_tokens", "i4"), ("ttft", "f8"), ("seconds", "f8")):
        data = np.array([getattr(row, name) for row in rows], dtype)
        file.create_dataset(name, data=data, **checked)
    lengths = np.array([len(row.tokens) for row in rows], "i8")
    file.create_dataset("offsets", data=np.concatenate([[0], np.cumsum(lengths)]), **checked)
    tokens = np.fromiter((t for row in rows for t in row.tokens), "i4", int(lengths.sum()))
    file.create_dataset("tokens", data=tokens, **checked)
    file["ttft"].attrs["unit"] = file["seconds"].attrs["unit"] = "s"
    file.attrs.update(attributes)
