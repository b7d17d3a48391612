"""What one process, or one rank of several, measures; prints a line of JSON on rank 0.

    python -m hpcmlx.bench.measure mlx-lm models/smollm2-float32
    mpirun -n 2 python -m hpcmlx.bench.measure hpcmlx models/smollm2-float32 --tp 2 --batch 8

The same random prompts and lengths for both, no end token, greedy, float32. `compare` runs these.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model as mlx_lm_load

from hpcmlx import BLAS, comm
from hpcmlx.inference.engine import Engine, RowResult
from hpcmlx.inference.request import Request
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from hpcmlx.observe.summary import peak_rss

SHORT, LONG, NUM_NEW = 16, 256, 33


def prompt(length: int, row: int) -> tuple[int, ...]:
    """A prompt of `length` token ids, the same on every run."""
    return tuple((row * 7919 + i * 104729) % 40000 + 100 for i in range(length))


class _NoText:
    """A tokenizer that never ends a row and makes no text."""

    eos_token_ids: set[int] = set()
    text = ""

    @property
    def detokenizer(self) -> _NoText:
        return self

    def add_token(self, token: int) -> None: ...

    def finalize(self) -> None: ...


def measure_hpcmlx(path: str, dims: ParallelDims, batch: int, prefill: bool) -> dict[str, Any]:
    """Decode and prefill tokens per second of the engine, and what loading cost each rank.

    Args:
        batch: rows per microbatch; every stage has one microbatch.
        prefill: also time a long prompt.
    """
    mesh = Mesh(dims, comm.init())
    base = peak_rss()
    begin = time.perf_counter()
    checkpoint = open_checkpoint(path)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    loaded = load_model(checkpoint, mesh)
    load_seconds = time.perf_counter() - begin
    memory = {
        "base_rss": base,
        "peak_rss": peak_rss(),
        "shard": loaded.num_bytes,
        "bytes_read": loaded.bytes_read,
        "largest_tensor": largest,
    }

    def run(num_rows: int, length: int, num_new: int) -> tuple[Engine, list[RowResult], float]:
        engine = Engine(loaded, mesh, _NoText(), batch_size=batch, prefill_chunk=2048)
        sampling = SamplingParams(max_tokens=num_new)
        requests = [Request(i, str(i), prompt(length, i), sampling) for i in range(num_rows)]
        rows: list[RowResult] = []
        mesh.world.barrier()
        start = time.perf_counter()
        engine.run(requests, rows.append)
        return engine, rows, time.perf_counter() - start

    num_rows = batch * dims.pp
    run(num_rows, SHORT, 4)  # warm up
    engine, rows, seconds = run(num_rows, SHORT, NUM_NEW)
    if num_rows == 1:
        decode = (NUM_NEW - 1) / (rows[0].seconds - rows[0].ttft)
    else:
        decode = num_rows * NUM_NEW / (seconds - engine.stats.prefill_seconds)
    result = {"decode": decode, "load_seconds": load_seconds}
    if prefill:
        result["prefill"] = LONG / run(1, LONG, 1)[1][0].ttft
    ranks = mesh.world.gather(memory)
    return result | {"blas": str(BLAS), "ranks": ranks}


def measure_mlx_lm(path: str, prefill: bool) -> dict[str, Any]:
    """The same work done by mlx-lm's own `generate_step`, one row at a time."""
    model, _ = mlx_lm_load(Path(path))

    def times(length: int, num_new: int) -> list[float]:
        begin = time.perf_counter()
        steps = generate_step(mx.array(prompt(length, 0)), model, max_tokens=num_new)
        return [time.perf_counter() - begin for _ in steps]

    times(SHORT, 4)
    at = times(SHORT, NUM_NEW)
    result: dict[str, Any] = {"decode": (NUM_NEW - 1) / (at[-1] - at[0])}
    if prefill:
        result["prefill"] = LONG / times(LONG, 1)[0]
    return result | {"blas": str(BLAS)}


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=("hpcmlx", "mlx-lm"))
    parser.add_argument("model")
    for axis in ("dp", "pp", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--no-prefill", action="store_true")
    args = parser.parse_args()
    if args.engine == "mlx-lm":
        result = measure_mlx_lm(args.model, not args.no_prefill)
    else:
        dims = ParallelDims(args.dp, args.pp, args.tp)
        result = measure_hpcmlx(args.model, dims, args.batch, not args.no_prefill)
    if comm.init().rank == 0:
        print(json.dumps(result), flush=True)
    comm.finalize(0)


if __name__ == "__main__":
    main()
