"""Measure hpcmlx against mlx-lm and against itself on one rank, on this host:

    python jobs/bench.py                      # `make bench`: all parts, about an hour
    python jobs/bench.py --only batch why     # some of them, a few minutes each
    python jobs/bench.py --only layouts --rounds 1 --rows 8
    python jobs/bench.py --only train train_layouts train_memory save   # fine-tuning

    mpirun -hostfile FILE python jobs/bench.py link   # the links between hosts: RUN_DIR/link.h5

Prints the tables of the README; `curve` also draws docs/throughput.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcmlx import BLAS
from hpcmlx.bench import link
from hpcmlx.bench.compare import PARTS, Plan
from hpcmlx.errors import HpcmlxError
from hpcmlx.models.convert import convert


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["link"], help="the links, not the speed")
    parser.add_argument("--run-dir", help="of link: a new one in runs/ by default")
    parser.add_argument("--seconds", type=float, default=0.3, help="of link: for each number")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64, help="of a batch")
    parser.add_argument("--picture", type=Path, default=Path("docs/throughput.png"))
    args = parser.parse_args()
    if args.what:
        link.run(args.run_dir, args.seconds)
    try:
        plain = args.model.with_name(args.model.name + "-float32")
        convert(args.model, plain, dequantize="float32")
    except HpcmlxError as error:
        print(f"bench: {error}", file=sys.stderr)
        return int(error.exit_code)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    plan = Plan(str(plain), args.rounds, args.rows, args.picture, say)
    print(f"BLAS: {BLAS}")
    for part in args.only:
        print(f"\n{PARTS[part](plan)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
