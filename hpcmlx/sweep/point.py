"""A point's launcher, a process of its own: `python -m hpcmlx.sweep.point JOB SCRIPT FILE`.

It starts the mpirun of a configuration that the sweep has written, as `launch=mpirun` does for a
single job, and needs no MLX for that. The sweep starts it, or a task of an array.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcmlx import config, orphans, redact
from hpcmlx.errors import HpcmlxError
from hpcmlx.launch import mpirun
from hpcmlx.rundir import PRIVATE
from hpcmlx.settings import EvaluateConfig, GenerateConfig, JobConfig
from hpcmlx.settings_finetune import FinetuneConfig

SCHEMAS: dict[str, type[JobConfig]] = {
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "finetune": FinetuneConfig,
}


def words(job: str, script: str) -> list[str]:
    """The command line of a point, but for its file."""
    return [sys.executable, "-m", "hpcmlx.sweep.point", job, str(Path(script).resolve())]


def main(argv: Sequence[str]) -> int:
    """Run one point; its exit code."""
    job, script, path = argv
    os.umask(PRIVATE)
    orphans.watch_sweep()
    try:
        settings = config.load(SCHEMAS[job], path)
        redact.hide(redact.secrets(config.to_dict(settings), settings.unresolved))
        return mpirun.relaunch(job, script, [f"--config={path}"], settings)
    except HpcmlxError as error:
        print(f"hpcmlx: {redact.scrub(str(error))}", file=sys.stderr)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
