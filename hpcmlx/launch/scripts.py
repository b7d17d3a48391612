"""The files of slurm/, for those who would rather submit by hand.

They are renderings of `slurm.py`, and a test keeps them equal: after a change there or here,
`python -m hpcmlx.launch.scripts slurm` writes them anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcmlx.launch.slurm import Batch, Shell, render
from hpcmlx.settings import SlurmConfig

_RUN_DIR = Shell('"${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}"')
_TASKS = Shell('parallel.pp="$SLURM_NTASKS"')
_ARGUMENTS = Shell('"$@"')
_PYTHON = ".venv/bin/python"


def _shipped(job: str, usage: str, words: Sequence[str], nodes: int, time: str) -> str:
    return render(
        Batch(
            job,
            [_PYTHON, f"jobs/{job}.py", *words],
            _RUN_DIR,
            Shell('"$SLURM_SUBMIT_DIR"'),
            Shell("slurm-$SLURM_JOB_ID"),
            "%x-%j.log",
            num_ranks=nodes,
            options=SlurmConfig(time=time),
            usage=usage,
        )
    )


def shipped() -> Mapping[str, str]:
    """Name -> text of the files in slurm/."""
    where = (
        "\nSubmit from the repository, which all nodes see at the same path, as they do .venv. The "
        "job's\narguments follow the script's name; RUN_DIR=runs/mine names the run directory, and "
        "options of\nsbatch before the script's name go before those here. The same without this "
        "file:\n"
    )
    run = [_TASKS, _ARGUMENTS, "launch.kind=mpirun", Shell('run_dir="$run_dir"')]
    return {
        "generate.sbatch": _shipped(
            "generate",
            "sbatch slurm/generate.sbatch model.path=/shared/llama input=/shared/prompts.jsonl\n\n"
            "A pipeline stage on each of four nodes. Before the time is up, or where a node is "
            "lost, it is\nrequeued and answers what is missing."
            + where
            + "python jobs/generate.py launch=slurm parallel.pp=4 ...",
            run,
            4,
            "02:00:00",
        ),
        "finetune.sbatch": _shipped(
            "finetune",
            "sbatch slurm/finetune.sbatch model.path=/shared/llama data.train=[/shared/chats.jsonl]"
            "\n\nA pipeline stage on each of four nodes. Before the time is up it saves and is "
            "requeued, and goes on\nwith the next step; where a node is lost, after the last "
            "checkpoint." + where + "python jobs/finetune.py launch=slurm parallel.pp=4 ...",
            run,
            4,
            "12:00:00",
        ),
        "evaluate.sbatch": _shipped(
            "evaluate",
            "sbatch slurm/evaluate.sbatch model.path=/shared/llama input=/shared/text.txt\n\n"
            "A pipeline stage on each of four nodes. It begins anew each time, so it is never "
            "requeued." + where + "python jobs/evaluate.py launch=slurm parallel.pp=4 ...",
            run,
            4,
            "02:00:00",
        ),
        "export.sbatch": _shipped(
            "export",
            "RUN_DIR=runs/tune sbatch slurm/export.sbatch --to mlx-adapter runs/tune.adapter\n\n"
            "Makes of a training run's checkpoint what others load, on one node. Submit from the "
            "repository.",
            [Shell('"$run_dir"'), _ARGUMENTS],
            1,
            "00:30:00",
        ),
    }


def main(folder: str) -> None:
    """Write the files of slurm/."""
    for name, text in shipped().items():
        Path(folder, name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
