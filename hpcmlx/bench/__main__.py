"""What one process, or two ranks, measure; the last line of rank 0's output is JSON.

    python -m hpcmlx.bench pair MODEL              one rank and mlx-lm, single rows, in turn
    python -m hpcmlx.bench mlx-lm MODEL            mlx-lm alone (another BLAS: HPCMLX_BLAS)
    python -m hpcmlx.bench batch|why|host MODEL    a batch of mixed rows on one rank
    python -m hpcmlx.bench curve MODEL             decode over batch size, with its roofs
    python -m hpcmlx.bench memory MODEL            resident memory over thousands of rows
    mpirun -n 2 python -m hpcmlx.bench scale MODEL one rank, tp2 and pp2, in turn
    mpirun -n 2 python -m hpcmlx.bench wide -      one rank and tp2, a model of wide layers
    mpirun -n 2 python -m hpcmlx.bench layouts MODEL         batches: one rank, pp2 and dp2
    mpirun -n 2 python -m hpcmlx.bench pipeline|shard MODEL  pp2 and tp2 against mlx-lm's own
    mpirun -n 2 python -m hpcmlx.bench load MODEL --axis tp  what loading reads and holds
    python -m hpcmlx.bench train MODEL             LoRA on one rank and in mlx-lm, in turn
    python -m hpcmlx.bench save MODEL              checkpoints of a full fine-tuning
    mpirun -n 2 python -m hpcmlx.bench train_layouts MODEL   one rank, dp2, pp2 and tp2, in turn
    mpirun -n 2 python -m hpcmlx.bench train_memory MODEL    peaks of pp2 over microbatches

`compare` runs these, each in processes of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hpcmlx import BLAS, comm
from hpcmlx.bench import batch, layouts, measure, roofs, training, training_costs, tuners
from hpcmlx.bench.memory import measure_growth
from hpcmlx.bench.random_models import random_checkpoint
from hpcmlx.bench.rows import Workload
from hpcmlx.comm import Communicator
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer


def memory(model: str, num_rows: int) -> dict[str, Any]:
    """Growth over rows of a tiny model, with the tokenizer of `model`."""
    mesh = Mesh(ParallelDims(), Communicator())
    with random_checkpoint("tiny heads8", mesh.world) as folder, TemporaryDirectory() as run_dir:
        loaded = load_model(open_checkpoint(folder), mesh)
        grown = measure_growth(
            loaded, mesh, load_tokenizer(model), Path(run_dir), num_rows=num_rows
        )
    return asdict(grown)


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m hpcmlx.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole = Workload()
    parser.add_argument("what")
    parser.add_argument("model")
    parser.add_argument("--axis", choices=("tp", "pp"), help="for load, on several ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=whole.num_rows)
    parser.add_argument("--words", type=int, nargs=2, default=whole.num_words)
    parser.add_argument("--new", type=int, nargs=2, default=whole.num_new)
    chats = tuners.Chats()
    parser.add_argument("--steps", type=int, default=chats.num_steps, help="of a run of training")
    parser.add_argument("--layers", type=int, help="for save: train the last so many")
    parser.add_argument("--microbatches", type=int, nargs="+", default=training_costs.MICROBATCHES)
    parser.add_argument("--batches", type=int, nargs="+", default=roofs.BATCHES)
    parser.add_argument("--tiny", action="store_true", help="tiny random models, to try it out")
    args = parser.parse_args()
    rounds = {"rounds": args.rounds}
    rows = rounds | {"workload": Workload(args.rows, tuple(args.words), tuple(args.new))}
    tuned = tuners.Chats(args.steps, args.rows, tuple(args.words))
    tiny = "tiny " if args.tiny else ""
    measurements: dict[str, Callable[[], Any]] = {
        "pair": partial(measure.pair, args.model, **rounds),
        "mlx-lm": partial(measure.mlx_lm_alone, args.model, **rounds),
        "scale": partial(measure.scale, args.model, **rounds),
        "wide": partial(measure.wide, args.model, **rounds),
        "load": partial(measure.load, args.model, args.axis),
        "batch": partial(batch.batch, args.model, **rows),
        "why": partial(batch.why, args.model, **rows),
        "host": partial(batch.host, args.model, **rows),
        "layouts": partial(layouts.layouts, args.model, **rows),
        "pipeline": partial(layouts.qwen2_pipeline, args.model, name=f"{tiny}qwen2", **rows),
        "shard": partial(layouts.llama_shard, f"{tiny}heads8", **rounds),
        "curve": partial(roofs.curve, args.model, batches=args.batches, **rounds),
        "memory": partial(memory, args.model, args.rows),
        "train": partial(training.train, args.model, chats=tuned, **rounds),
        "train_layouts": partial(training.train_layouts, args.model, chats=tuned, **rounds),
        "train_memory": partial(
            training_costs.train_memory, args.model, chats=tuned, counts=args.microbatches
        ),
        "save": partial(
            training_costs.save, args.model, chats=tuned, num_layers=args.layers, **rounds
        ),
    }
    if args.what not in measurements:
        parser.error(f"nothing is called {args.what!r}; there is {', '.join(measurements)}")
    result = measurements[args.what]()
    if comm.init().rank == 0:
        print(json.dumps({"result": result, "blas": str(BLAS)}), flush=True)
    comm.finalize(0)


if __name__ == "__main__":
    main()
