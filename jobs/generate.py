"""Answer a file of prompts with a model spread over MPI ranks.

    mpirun -hostfile hostfiles/local2 python jobs/generate.py model=smollm2 parallel.tp=2
    mpirun -hostfile hostfiles/local2 python jobs/generate.py model=smollm2 parallel.pp=2
    mpirun -n 4 python jobs/generate.py model=smollm2 parallel.tp=2 parallel.pp=2
    python jobs/generate.py model=smollm2                  # one process, no MPI
    python jobs/generate.py model=smollm2 parallel.tp=2 launch=mpirun

Leaves `results.jsonl` and `results.h5` in the run directory. `--help` lists every setting.
"""

from hpcmlx.config import GenerateConfig
from hpcmlx.inference.batch import generate
from hpcmlx.job import Job, run_job
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer


def main(job: Job) -> None:
    cfg = job.config
    tokenizer = load_tokenizer(cfg.model.path)
    requests = read(job, tokenizer)
    loaded = load_model(
        cfg.model.path,
        job.mesh,
        dtype=cfg.model.dtype,
        weights=cfg.model.weights,
        tp_shares=cfg.parallel.tp_shares,
        pp_layers=cfg.parallel.pp_layers,
    )
    generate(job, loaded, tokenizer, requests)


if __name__ == "__main__":
    run_job("generate", GenerateConfig, main)
