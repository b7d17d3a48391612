"""Answer a file of prompts with a model spread over MPI ranks.

    mpirun -hostfile hostfiles/local2 python jobs/generate.py model=smollm2 parallel.tp=2
    mpirun -hostfile hostfiles/local2 python jobs/generate.py model=smollm2 parallel.pp=2
    mpirun -n 4 python jobs/generate.py model=smollm2 parallel.tp=2 parallel.pp=2
    python jobs/generate.py model=smollm2                           # one process, no MPI
    python jobs/generate.py model=smollm2 parallel.tp=2 launch=mpirun

Leaves `results.jsonl` and `results.h5` in the run directory. `--help` lists every setting.
"""

import time

from hpcmlx.config import GenerateConfig
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.request import max_context, read_requests
from hpcmlx.inference.results import describe, gather_rows, summarize, write_results
from hpcmlx.inference.rows import RowResult
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.job import Job, run_job
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.observe.progress import ProgressBar


def main(job: Job) -> None:
    cfg, mesh = job.config, job.mesh
    checkpoint = open_checkpoint(cfg.model.path)
    tokenizer = load_tokenizer(checkpoint)
    requests = None
    if job.is_root:
        defaults = SamplingParams(**vars(cfg.sampling) | {"stop": tuple(cfg.sampling.stop)})
        context = max_context(checkpoint.config)
        requests = read_requests(cfg.input, tokenizer, defaults, context)
    mine = mesh.world.bcast(requests)[mesh.dp :: mesh.dims.dp]
    loaded = load_model(checkpoint, mesh, **cfg.load_options())
    job.log.info("%s", loaded)
    engine = Engine(loaded, mesh, tokenizer, **vars(cfg.inference))
    rows: list[RowResult] = []
    with ProgressBar(len(mine), "rows", enabled=job.is_root) as bar:

        def on_row(row: RowResult) -> None:
            rows.append(row)
            bar.show(row.id, row.text)

        begin = time.perf_counter()
        stats = engine.run(mine, on_row)
        mesh.world.barrier()
        seconds = time.perf_counter() - begin
    everything = gather_rows(mesh, rows)
    if job.is_root:
        attributes = {"model": cfg.model.path, "layout": str(mesh.dims)}
        write_results(job.run_dir, everything, attributes)
    if totals := summarize(mesh, job.run_dir, loaded, stats, seconds):
        job.log.info("%s", describe(totals))


if __name__ == "__main__":
    run_job("generate", GenerateConfig, main)
