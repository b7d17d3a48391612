"""Whether a process grows while it answers thousands of short rows, stored as a generate job
stores them. `hpcmlx.bench` and a test run this.
"""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from hpcmlx.inference.engine import Engine
from hpcmlx.inference.generate import Recorder, Work
from hpcmlx.inference.rows import Request
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel

MIB = 2**20


@dataclass(frozen=True)
class Growth:
    """Memory of this process while rows are answered, in MiB.

    Resident memory is what counts, but it grows in pieces and a leak first fills the holes of the
    heap; what the C library has handed out shows the smallest leak (glibc only).

    Attributes:
        num_rows: [samples] answered when each sample was taken.
        rss: [samples] resident.
        heap: [samples] handed out, apart from MLX's buffers; empty where it is not known.
        num_cold: samples that do not count: buffers and pools reach their size.
    """

    num_rows: list[int]
    rss: list[float]
    heap: list[float]
    num_cold: int

    def slope(self, series: list[float]) -> float:
        """MiB per 1,000 rows, once warm."""
        warm = slice(self.num_cold, None)
        return float(1000 * np.polyfit(self.num_rows[warm], series[warm], 1)[0])

    def span(self, series: list[float]) -> float:
        """Highest minus lowest once warm, in MiB."""
        return max(series[self.num_cold :]) - min(series[self.num_cold :])


def short_requests(num_rows: int, vocab_size: int) -> list[Request]:
    """Prompts of 4-12 tokens, 2-4 new ones, the same every time."""
    rng = random.Random(0)
    return [
        Request(
            i,
            str(i),
            tuple(rng.randrange(vocab_size) for _ in range(rng.randint(4, 12))),
            SamplingParams(max_tokens=rng.randint(2, 4)),
        )
        for i in range(num_rows)
    ]


def measure_growth(
    loaded: LoadedModel,
    mesh: Mesh,
    tokenizer: Any,
    run_dir: Path,
    *,
    num_rows: int = 10_000,
    every: int = 500,
    warm_up: int = 2_000,
) -> Growth:
    """Answer short rows and look at the process's memory on the way.

    The samples end before the last rows do, whose caches are given back.

    Args:
        run_dir: where rows and status go, as in a job.
        every: rows between two samples.
        warm_up: rows that come first and do not count.
    """
    requests = short_requests(num_rows, loaded.vocab_size)
    engine = Engine(loaded, mesh, tokenizer, batch_size=32)
    process = psutil.Process()
    counts: list[int] = []
    rss: list[float] = []
    heap: list[float] = []
    with Recorder(Work(requests, 0), engine, mesh, run_dir) as recorder:

        def on_visit() -> None:
            recorder.on_visit()
            answered = engine.stats.num_rows
            if every * (len(counts) + 1) <= answered < num_rows:
                counts.append(answered)
                rss.append(process.memory_info().rss / MIB)
                if (handed_out := heap_bytes()) is not None:
                    heap.append(handed_out / MIB)

        engine.run(requests, recorder.on_row, on_visit)
    return Growth(counts, rss, heap, warm_up // every)


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    _fields_ = [(name, ctypes.c_size_t) for name in (*_names, "fordblks", "keepcost")]


def heap_bytes() -> int | None:
    """Bytes that the C library has handed out apart from MLX's buffers; None without glibc."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd - mx.get_active_memory() - mx.get_cache_memory()
