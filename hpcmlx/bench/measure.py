"""What one process, or two ranks, measure; the last line of rank 0's output is JSON.

    python -m hpcmlx.bench.measure pair MODEL              one rank and mlx-lm, in turn
    python -m hpcmlx.bench.measure mlx-lm MODEL            mlx-lm alone (another BLAS: HPCMLX_BLAS)
    mpirun -n 2 python -m hpcmlx.bench.measure scale MODEL one rank, tp2 and pp2, in turn
    mpirun -n 2 python -m hpcmlx.bench.measure wide -      one rank and tp2, a model of wide layers
    mpirun -n 2 python -m hpcmlx.bench.measure load MODEL tp   what loading reads and holds

What is compared runs in turn in the same processes, so that a machine whose speed drifts slows both
sides alike. Random prompts, no end token, greedy, float32. `compare` runs these.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.utils import load_model as mlx_lm_load

from hpcmlx import BLAS, comm
from hpcmlx.comm import Communicator
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.rows import Request, RowResult
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import LoadedModel, load_model
from hpcmlx.observe.summary import peak_rss

SHORT, LONG, NUM_NEW = 16, 256, 25  # tokens of a short and a long prompt, and new ones
Series = dict[str, list[float]]


def prompt(length: int, row: int = 0) -> tuple[int, ...]:
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


class Runner:
    """One layout of the model under test."""

    def __init__(self, model: str, mesh: Mesh):
        self.mesh = mesh
        self.loaded: LoadedModel = load_model(open_checkpoint(model), mesh)

    def _run(self, num_rows: int, length: int, num_new: int, batch: int) -> list[RowResult]:
        engine = Engine(self.loaded, self.mesh, _NoText(), batch_size=batch, prefill_chunk=2048)
        sampling = SamplingParams(max_tokens=num_new)
        rows: list[RowResult] = []
        requests = [Request(i, str(i), prompt(length, i), sampling) for i in range(num_rows)]
        engine.run(requests, rows.append)
        return rows

    def decode(self, batch: int) -> float:
        """Tokens per second over all rows, from the first row's first token to the last row's last:
        `batch` rows in every microbatch, a microbatch for every stage."""
        # A longer run with several slots: the first tokens come while later slots still fill.
        num_new = NUM_NEW if batch == 1 else 2 * NUM_NEW
        rows = self._run(batch * self.mesh.dims.pp, SHORT, num_new, batch)
        begin = min(row.created - row.seconds + row.ttft for row in rows)
        return len(rows) * (num_new - 1) / (max(row.created for row in rows) - begin)

    def prefill(self) -> float:
        """Prompt tokens per second, up to the first new token."""
        return LONG / self._run(1, LONG, 1, 1)[0].ttft


class MlxLm:
    """mlx-lm's own `generate_step` on a model."""

    def __init__(self, model: Any):
        self.model = model

    def _times(self, length: int, num_new: int) -> list[float]:
        begin = time.perf_counter()
        steps = generate_step(mx.array(prompt(length)), self.model, max_tokens=num_new)
        return [time.perf_counter() - begin for _ in steps]

    def decode(self) -> float:
        """Tokens per second of one row, prefill excluded."""
        at = self._times(SHORT, NUM_NEW)
        return (NUM_NEW - 1) / (at[-1] - at[0])

    def prefill(self) -> float:
        """Prompt tokens per second, up to the first new token."""
        return LONG / self._times(LONG, 1)[0]


def in_turn(rounds: int, measurements: dict[str, Callable[[], float]]) -> Series:
    """Every measurement once per round, after one that does not count."""
    series: Series = {name: [] for name in measurements}
    for number in range(rounds + 1):
        for name, measure in measurements.items():
            value = measure()
            if number:
                series[name].append(value)
    return series


def pair(model: str, rounds: int) -> Series:
    """One rank of hpcmlx and mlx-lm, in one process and on the same weights in memory."""
    ours = Runner(model, Mesh(ParallelDims(), Communicator()))
    theirs = MlxLm(ours.loaded.stage.model)
    return in_turn(
        rounds,
        {
            "decode": lambda: ours.decode(1),
            "decode mlx-lm": theirs.decode,
            "prefill": ours.prefill,
            "prefill mlx-lm": theirs.prefill,
        },
    )


def mlx_lm_alone(model: str, rounds: int) -> Series:
    """mlx-lm as its user runs it."""
    theirs = MlxLm(mlx_lm_load(Path(model))[0])
    return in_turn(rounds, {"decode": theirs.decode, "prefill": theirs.prefill})


def scale(model: str, rounds: int) -> Series:
    """On two ranks: rank 0 alone (the other sleeps), tp2 and pp2."""
    world = comm.init()
    tp2 = Runner(model, Mesh(ParallelDims(tp=2), world))
    pp2 = Runner(model, Mesh(ParallelDims(pp=2), world))
    one = Runner(model, Mesh(ParallelDims(), Communicator())) if world.rank == 0 else None
    alone = partial(on_rank_0, world)
    return in_turn(
        rounds,
        {
            "one": lambda: alone(lambda: one.decode(1)),
            "tp2": lambda: tp2.decode(1),
            "one 8": lambda: alone(lambda: one.decode(8)),
            "tp2 8": lambda: tp2.decode(8),
            "pp2 8": lambda: pp2.decode(8),
            "one prefill": lambda: alone(lambda: one.prefill()),
            "tp2 prefill": tp2.prefill,
        },
    )


def wide(_: str, rounds: int) -> Series:
    """One rank and tp2 on a random model with layers as wide as those of a 1B one: what remains of
    tp2 when the work that cannot be split is small beside the rest."""
    world = comm.init()
    folder = world.bcast(tempfile.mkdtemp(prefix="hpcmlx-bench-") if world.rank == 0 else None)
    try:
        if world.rank == 0:
            save_random_llama(Path(folder))
        world.barrier()
        tp2 = Runner(folder, Mesh(ParallelDims(tp=2), world))
        one = Runner(folder, Mesh(ParallelDims(), Communicator())) if world.rank == 0 else None
    finally:
        world.barrier()
        if world.rank == 0:
            shutil.rmtree(folder)
    alone = partial(on_rank_0, world)
    return in_turn(
        rounds,
        {"one wide": lambda: alone(lambda: one.decode(1)), "tp2 wide": lambda: tp2.decode(1)},
    )


def save_random_llama(folder: Path) -> None:
    """Six layers of hidden size 2048, 16 heads, 8 key-value heads; 1.5 GB of float32."""
    config = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))


def on_rank_0(world: Communicator, measure: Callable[[], float]) -> float:
    """Measure on rank 0 while rank 1 sleeps, which leaves rank 0 what it would have alone."""
    if world.rank == 0:
        value = measure()
        world.isend(mx.array([1], mx.int32), 1, 1).wait()
        return value
    done = world.irecv((1,), mx.int32, 0, 1)
    while not done.done():
        time.sleep(0.01)
    return 0.0


def load(model: str, dims: ParallelDims) -> list[dict[str, int]] | None:
    """What loading reads and holds on each rank, in bytes."""
    mesh = Mesh(dims, comm.init())
    base = peak_rss()
    checkpoint = open_checkpoint(model)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    loaded = load_model(checkpoint, mesh)
    mine = {
        "shard": loaded.num_bytes,
        "read": loaded.bytes_read,
        "peak_rss": peak_rss(),
        "bound": loaded.num_bytes + largest + base,
    }
    return mesh.world.gather(mine)


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pair", "mlx-lm", "scale", "wide", "load"))
    parser.add_argument("model")
    parser.add_argument("axis", nargs="?", choices=("tp", "pp"), help="for load, on several ranks")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    result: Any
    if args.what == "load":
        size = comm.init().size
        result = load(
            args.model, ParallelDims(**{args.axis: size}) if args.axis else ParallelDims()
        )
    else:
        run = {"pair": pair, "mlx-lm": mlx_lm_alone, "scale": scale, "wide": wide}[args.what]
        result = run(args.model, args.rounds)
    if comm.init().rank == 0:
        print(json.dumps({"result": result, "blas": str(BLAS)}), flush=True)
    comm.finalize(0)


if __name__ == "__main__":
    main()
