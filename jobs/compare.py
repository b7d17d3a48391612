"""Compare the points of a sweep, or any runs; no model, no MPI:

    python jobs/compare.py sweeps/weather
    python jobs/compare.py runs/a runs/b --metric best_loss --plot losses.png
    python jobs/compare.py sweeps/weather --csv points.csv --json points.json

Prints which settings differ, how each run stands and its numbers, and draws `compare.png` in the
first directory: losses over steps, and the first number over what differs. A run without a
completion record is shown as such, without numbers.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpcmlx.errors import HpcmlxError
from hpcmlx.files import write_atomic
from hpcmlx.observe import compare, compare_plot


def main() -> int:
    """Run the command line; the result is the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="DIR", help="of a sweep or a run")
    parser.add_argument("--metric", action="append", default=[], help="of summary.json; repeatable")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the picture, as PNG")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the table, in full precision")
    parser.add_argument("--json", type=Path, metavar="FILE", help="likewise")
    args = parser.parse_args()
    try:
        runs = compare.read_runs(args.paths)
        keys, metrics = compare.differing(runs), compare.shown_metrics(runs, args.metric)
        header, rows = compare.table(runs, keys, metrics)
        table = Table(*header, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        width = None if sys.stdout.isatty() else 200
        Console(markup=False, highlight=False, width=width).print(table)
        for path, form in ((args.csv, compare.as_csv), (args.json, compare.as_json)):
            if path is not None:
                write_atomic(path, form(runs, keys, metrics))
        path = args.plot or args.paths[0] / compare_plot.PICTURE
        write_atomic(path, compare_plot.draw(runs, keys, next(iter(metrics), None)))
        print(f"{path} written")
    except HpcmlxError as error:
        print(f"compare: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
