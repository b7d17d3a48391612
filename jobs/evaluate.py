"""Score a text, multiple-choice questions or lm-eval's tasks with a model spread over MPI ranks.

    mpirun -n 2 python jobs/evaluate.py model=smollm2 parallel.pp=2 input=README.md
    python jobs/evaluate.py model=smollm2 parallel.tp=3 launch=mpirun input=README.md
    mpirun -n 2 python jobs/evaluate.py experiment=choices
    mpirun -n 2 python jobs/evaluate.py model=smollm2 parallel.pp=2 evaluate.kind=harness \
        evaluate.tasks=[arc_easy] evaluate.limit=100

Leaves `logprobs.h5`, `choices.jsonl` and `choices.h5`, or `harness.json` in the run directory, and
`summary.json`: the same numbers on every layout. `--help` lists every setting.
"""

import time

from hpcmlx.config import EvaluateConfig
from hpcmlx.errors import ExitCode
from hpcmlx.inference.choices import ChoicesEvaluation
from hpcmlx.inference.evaluate import Evaluation, TextEvaluation
from hpcmlx.inference.harness import HarnessEvaluation
from hpcmlx.inference.request import max_context
from hpcmlx.job import Job, run_job
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.observe.summary import write_summary

KINDS: dict[str, type[Evaluation]] = {
    "text": TextEvaluation,
    "choices": ChoicesEvaluation,
    "harness": HarnessEvaluation,
}


def main(job: Job) -> ExitCode:
    cfg, mesh = job.config, job.mesh
    checkpoint = open_checkpoint(cfg.model.path)
    tokenizer = load_tokenizer(checkpoint)
    kind = KINDS[cfg.evaluate.kind]
    evaluation = kind(cfg, mesh, tokenizer, max_context(checkpoint.config))
    loaded = load_model(checkpoint, mesh, **cfg.load_options())
    job.log.info("%s", loaded)
    begin = time.perf_counter()
    verdict = mesh.world.bcast(evaluation.run(loaded, job.run_dir))
    cost = {"seconds": time.perf_counter() - begin, "num_tokens": verdict.num_tokens}
    totals = {"layout": str(mesh.dims), "kind": cfg.evaluate.kind, **verdict.totals}
    per_rank = {"place": str(mesh), "weight_bytes": loaded.num_bytes}
    write_summary(mesh.world, job.run_dir, totals, per_rank, **cost)
    if job.is_root:
        job.log.info("%s", verdict.line)
    return verdict.code


if __name__ == "__main__":
    run_job("evaluate", EvaluateConfig, main)
