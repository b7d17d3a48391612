"""Look at a run before it starts; no model, no MPI:

    python jobs/plan.py schedule --name 1f1b --pp 4 --microbatches 8
    python jobs/plan.py schedule --name interleaved_1f1b --pp 4 --microbatches 8 --chunks 2
    python jobs/plan.py schedule --name gpipe --pp 4 --microbatches 8 --picture gpipe.png
    python jobs/plan.py links runs/…/link.h5 --model models/smollm2

`schedule` shows which microbatch every pipeline rank works on when, how long ranks are idle and how
much they keep; `links` what a token waits for on links that jobs/bench.py has measured.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from hpcmlx.bench.link_plan import report
from hpcmlx.errors import HpcmlxError
from hpcmlx.files import write_atomic
from hpcmlx.parallel import schedule_chart
from hpcmlx.parallel.schedule import SCHEDULES


def schedule(args: Namespace) -> str:
    """A pipeline schedule as a chart; drawn, too, if a picture is wanted."""
    what = (args.name, args.pp, args.microbatches, args.chunks, args.forward, args.backward)
    if args.picture:
        write_atomic(args.picture, schedule_chart.draw(*what))
    return schedule_chart.chart(*what)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("schedule", help="a pipeline schedule as a chart")
    command.add_argument("--name", choices=SCHEDULES, default="1f1b")
    command.add_argument("--pp", type=int, required=True, help="pipeline ranks")
    command.add_argument("--microbatches", type=int, required=True, help="of a step of a replica")
    command.add_argument("--chunks", type=int, default=1, help="of layers that each rank holds")
    for name, default in (("--forward", 1.0), ("--backward", 2.0)):
        command.add_argument(name, type=float, default=default, help="time, in any unit")
    command.add_argument("--picture", type=Path, metavar="FILE", help="draw it as PNG, too")
    command.set_defaults(run=schedule)
    command = commands.add_parser("links", help="what measured links cost a token")
    command.add_argument("file", type=Path, help="link.h5, of jobs/bench.py link")
    command.add_argument("--model", type=Path, metavar="DIR", help="or --layers, --hidden")
    for name, default in {"--layers": 0, "--hidden": 0, "--itemsize": 2}.items():
        command.add_argument(name, type=int, default=default)
    command.set_defaults(run=lambda a: report(a.file, a.model, a.layers, a.hidden, a.itemsize))
    try:
        args = parser.parse_args()
        print(args.run(args), end="")
    except HpcmlxError as error:
        print(f"plan: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
