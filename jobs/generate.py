"""Answer a file of prompts with a model spread over MPI ranks.

    mpirun -hostfile hostfiles/local2 python jobs/generate.py model=smollm2 parallel.tp=2
    mpirun -hostfile hostfiles/local2 python jobs/generate.py model=smollm2 parallel.pp=2
    mpirun -n 4 python jobs/generate.py model=smollm2 parallel.tp=2 parallel.pp=2
    python jobs/generate.py model=smollm2                           # one process, no MPI
    python jobs/generate.py model=smollm2 parallel.tp=2 launch=mpirun
    python jobs/generate.py resume=runs/20261123-231417-generate-dp1_pp1_tp2

Every row is on the disk when it is done; the same command in the same `run_dir`, or `resume`, goes
on with what is missing. SIGUSR1 ends a launch early, with 76. Leaves `results.jsonl`, `results.h5`
and, for rows that could not be answered, `errors.jsonl` in the run directory. `--help` lists every
setting.
"""

from pathlib import Path

from hpcmlx.config import GenerateConfig
from hpcmlx.errors import ExitCode
from hpcmlx.inference.generate import answer, build_engine, find_work, put_together
from hpcmlx.job import Job, run_job
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.checksums import verify_together
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.observe.gantt import require_matplotlib
from hpcmlx.observe.timeline import OFF, Timeline


def main(job: Job) -> ExitCode:
    cfg, mesh = job.config, job.mesh
    if cfg.timeline:
        require_matplotlib()
    checkpoint = open_checkpoint(cfg.model.path)
    if cfg.model.verify:
        for path in filter(None, (checkpoint.path, cfg.model.adapter)):
            verify_together(Path(path), mesh.world)
    tokenizer = load_tokenizer(checkpoint)
    work = find_work(cfg, mesh, job.run_dir, checkpoint, tokenizer)
    if work.complete is not None:
        job.log.info("all %d answers are there already", work.num_done)
        return work.complete
    if work.num_done:
        job.log.info("%d answers are there, %d to go", work.num_done, len(work.requests))
    loaded = load_model(checkpoint, mesh, **cfg.load_options())
    job.log.info("%s", loaded)
    timeline = Timeline() if cfg.timeline else OFF
    engine = build_engine(cfg, mesh, loaded, tokenizer, timeline)
    stats, seconds = answer(work, engine, mesh, job.run_dir, timeline, job.stop.is_asked)
    if stats.stopped:
        return ExitCode.PREEMPTED
    return put_together(cfg, work, mesh, job.run_dir, tokenizer, loaded, stats, seconds)


if __name__ == "__main__":
    run_job("generate", GenerateConfig, main)
