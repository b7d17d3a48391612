"""Fine-tune a model spread over MPI ranks: LoRA, DoRA or all of its parameters.

    mpirun -n 2 python jobs/finetune.py model=smollm2 parallel.pp=2 data.train=[chats.jsonl]
    mpirun -n 4 python jobs/finetune.py model=smollm2 parallel.dp=2 parallel.tp=2 \
        data.train=[data/] data.valid=[data/] train.eval_every=50 train.save_every=50
    python jobs/finetune.py model=smollm2 data.train=[chats.jsonl]      # one process, no MPI
    python jobs/finetune.py experiment=finetune_demo
    python jobs/finetune.py resume=runs/20261123-231417-finetune-dp1_pp2_tp1

The same command in the same `run_dir`, or `resume`, goes on after the last checkpoint, in any
layout. Leaves checkpoints, `metrics.h5`, `metrics.csv` and `curves.png`; `jobs/export.py` makes
adapters and models of a checkpoint. `--help` lists every setting.
"""

import time

from hpcmlx.config import FinetuneConfig
from hpcmlx.errors import ExitCode
from hpcmlx.job import Job, run_job
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.checksums import verify_together
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.observe.metrics import Metrics
from hpcmlx.observe.sinks import open_sinks
from hpcmlx.observe.timeline import OFF, Timeline
from hpcmlx.training import build, finetune
from hpcmlx.training.resume import identity


def main(job: Job) -> ExitCode:
    cfg, mesh = job.config, job.mesh
    build.require_packages(cfg)
    checkpoint = open_checkpoint(cfg.model.path)
    if cfg.model.verify:
        verify_together(checkpoint.path, mesh.world)
    tokenizer = load_tokenizer(checkpoint)
    data = build.open_data(cfg, mesh, tokenizer)
    steps = data.batches.num_steps
    own = identity(cfg, checkpoint, data.train.content_hash, steps)
    run = finetune.Run(cfg, mesh, job.run_dir, data, tokenizer, own)
    if run.is_done():
        return ExitCode.OK
    stages = build.load(cfg, mesh, data, run.check_room)
    job.log.info("%s; %s", stages.chunks[0].loaded, stages)
    timeline = Timeline() if cfg.timeline else OFF
    timeline.align(mesh.world)
    trainer, sums = build.build_trainer(cfg, mesh, stages, steps, timeline, job.stop.is_asked)
    first = run.go_on(trainer)
    sinks = open_sinks(cfg.train.sinks, job.run_dir, first) if job.is_root else []
    begin = time.perf_counter()
    with sums, Metrics(job.run_dir, sinks, first_step=first, enabled=job.is_root) as metrics:
        code = run.train(metrics)
    if code is ExitCode.OK:
        finetune.leave_results(run, timeline, time.perf_counter() - begin)
    return code


if __name__ == "__main__":
    run_job("finetune", FinetuneConfig, main)
