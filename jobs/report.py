"""Write report.html of a run directory: a page with how it went and how it ended; no network:

    python jobs/report.py runs/tonight
    python jobs/report.py runs/tonight --to tonight.html

A job writes it itself when it ends. This does it again, also for a run that was killed, while one
is under way, or after the files were copied to another machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcmlx.errors import ExitCode, HpcmlxError
from hpcmlx.observe import report
from hpcmlx.record import RECORD


def main() -> int:
    """Run the command line; the result is the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help=f"instead of RUN_DIR/{report.REPORT}"
    )
    args = parser.parse_args()
    try:
        print(report.write(args.run_dir, args.to))
    except FileNotFoundError:
        print(f"report: {args.run_dir} is no run directory: no {RECORD} in it", file=sys.stderr)
        return int(ExitCode.CONFIG)
    except HpcmlxError as error:
        print(f"report: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
