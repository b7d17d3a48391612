"""What the ranks of a job were doing when it stood still, or was killed in whatever way.

    python jobs/autopsy.py runs/20261123-231417-generate-dp1_pp1_tp2
    python jobs/autopsy.py RUN_DIR --tail 64          # more operations of each rank

Reads the flight recorders (`flight/rankN.bin`), the stacks beside them and `autopsy.json`; needs no
MPI. On hosts that share no files each has the files of its own ranks.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from hpcmlx.autopsy.report import print_run
from hpcmlx.errors import HpcmlxError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--tail", type=int, default=16, help="operations of each rank to list")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True)
    try:
        print_run(args.run_dir, console, args.tail)
    except HpcmlxError as error:
        print(f"hpcmlx: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
