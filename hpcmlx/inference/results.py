"""Writes what a generate job leaves behind: `results.jsonl` for people, `results.h5` for programs
and `summary.json` about the run.

Rows come in input order, and every file is whole or not there at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcmlx.files import write_atomic, write_hdf5
from hpcmlx.inference.engine import Stats
from hpcmlx.inference.rows import RowResult
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.observe.summary import write_summary


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


def gather_rows(mesh: Mesh, rows: Sequence[RowResult]) -> list[RowResult]:
    """Every replica's rows, on world rank 0 (elsewhere none). Collective."""
    mine = list(rows) if mesh.pp == 0 and mesh.tp == 0 else []
    return [row for part in mesh.world.gather(mine) or [] for row in part]


def summarize(
    mesh: Mesh, run_dir: Path, loaded: LoadedModel, stats: Stats, seconds: float
) -> dict[str, Any] | None:
    """Write `summary.json`: totals over the replicas and a line for each rank. Collective.

    Args:
        seconds: from the first prefill to the last token.

    Returns:
        The totals, on world rank 0.
    """
    replicas = mesh.world.gather(stats if mesh.pp == 0 and mesh.tp == 0 else None) or []
    parts = [part for part in replicas if part is not None]
    totals = {
        "layout": str(mesh.dims),
        "rows": sum(part.num_rows for part in parts),
        "prompt_tokens": sum(part.prompt_tokens for part in parts),
        "generated_tokens": sum(part.generated_tokens for part in parts),
        "seconds": seconds,
        "tokens_per_sec": sum(part.generated_tokens for part in parts) / seconds,
        "prefill_seconds": max((part.prefill_seconds for part in parts), default=0.0),
        "decode_seconds": max((part.decode_seconds for part in parts), default=0.0),
    }
    per_rank = {
        "place": str(mesh),
        "layers": [loaded.stage.start, loaded.stage.stop],
        "weight_bytes": loaded.num_bytes,
        "bytes_read": loaded.bytes_read,
        "steps": stats.num_steps,
    }
    write_summary(mesh.world, run_dir, totals, per_rank)
    return totals if mesh.world.rank == 0 else None


def describe(totals: Mapping[str, Any]) -> str:
    """The line that ends a run."""
    prefill = totals["prompt_tokens"] / max(totals["prefill_seconds"], 1e-9)
    return (
        f"{totals['rows']} rows, {totals['prompt_tokens']} prompt + "
        f"{totals['generated_tokens']} new tokens in {totals['seconds']:.1f} s: "
        f"{totals['tokens_per_sec']:.1f} tok/s (prefill {prefill:.0f} tok/s)"
    )


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
