"""Look at a run before it starts; no model, no MPI:

    python jobs/plan.py schedule --name 1f1b --pp 4 --microbatches 8
    python jobs/plan.py schedule --name interleaved_1f1b --pp 4 --microbatches 8 --chunks 2
    python jobs/plan.py schedule --name gpipe --pp 4 --microbatches 8 --picture gpipe.png

`schedule` shows which microbatch every pipeline rank works on when, how long ranks are idle, and
for how many microbatches each keeps activations.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcmlx.errors import HpcmlxError
from hpcmlx.files import write_atomic
from hpcmlx.parallel import schedule_chart
from hpcmlx.parallel.schedule import SCHEDULES


def schedule(args: argparse.Namespace) -> None:
    """Print a pipeline schedule as a chart, and draw it if a picture is wanted."""
    what = (args.name, args.pp, args.microbatches, args.chunks, args.forward, args.backward)
    print(schedule_chart.chart(*what), end="")
    if args.picture:
        write_atomic(args.picture, schedule_chart.draw(*what))


def main() -> int:
    """Run the command line; the result is the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("schedule", help="a pipeline schedule as a chart")
    command.add_argument("--name", choices=SCHEDULES, default="1f1b")
    command.add_argument("--pp", type=int, required=True, help="pipeline ranks")
    command.add_argument("--microbatches", type=int, required=True, help="of a step of a replica")
    command.add_argument("--chunks", type=int, default=1, help="of layers that each rank holds")
    command.add_argument("--forward", type=float, default=1.0, help="time, in any unit")
    command.add_argument("--backward", type=float, default=2.0, help="time, in the same unit")
    command.add_argument("--picture", type=Path, metavar="FILE", help="draw it as PNG, too")
    command.set_defaults(run=schedule)
    args = parser.parse_args()
    try:
        args.run(args)
    except HpcmlxError as error:
        print(f"plan: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
