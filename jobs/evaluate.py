"""Score a text file with a model spread over MPI ranks: log-probabilities and perplexity.

    mpirun -n 2 python jobs/evaluate.py model=smollm2 parallel.pp=2 input=README.md
    python jobs/evaluate.py model=smollm2 parallel.tp=3 launch=mpirun input=README.md

Leaves `logprobs.h5` in the run directory: the same text gives the same numbers on every layout.
"""

from hpcmlx.config import EvaluateConfig
from hpcmlx.inference.evaluate import read_text, score_tokens, write_scores
from hpcmlx.job import Job, run_job
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.observe.progress import ProgressBar


def main(job: Job) -> None:
    cfg, mesh = job.config, job.mesh
    checkpoint = open_checkpoint(cfg.model.path)
    tokens = None
    if job.is_root:
        tokens = read_text(cfg.input, load_tokenizer(checkpoint), cfg.evaluate.max_tokens)
    tokens = mesh.world.bcast(tokens)
    loaded = load_model(checkpoint, mesh, **cfg.load_options())
    job.log.info("%s", loaded)
    window = min(cfg.evaluate.window, len(tokens))
    stride = min(cfg.evaluate.stride, window)
    with ProgressBar(len(tokens), "tokens", enabled=job.is_root) as bar:
        batch_size = cfg.inference.batch_size
        scores = score_tokens(loaded, mesh, tokens, window, stride, batch_size, bar.advance)
    if scores is not None:
        attributes = {"model": cfg.model.path, "layout": str(mesh.dims), "input": cfg.input}
        write_scores(job.run_dir, scores, attributes | {"window": window, "stride": stride})
        job.log.info(
            "%d tokens, perplexity %.4f (%.5f nats a token)",
            scores.num_predicted,
            scores.perplexity,
            scores.nll,
        )


if __name__ == "__main__":
    run_job("evaluate", EvaluateConfig, main)
