"""Measure hpcmlx against mlx-lm and against itself on one rank, on this host:

    python jobs/bench.py                    # `make bench`: five rounds, about eight minutes
    python jobs/bench.py --rounds 1

Prints the tables of the README.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcmlx.bench.compare import compare
from hpcmlx.errors import HpcmlxError
from hpcmlx.models.convert import convert


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    try:
        plain = args.model.with_name(args.model.name + "-float32")
        convert(args.model, plain, dequantize="float32")
    except HpcmlxError as error:
        print(f"bench: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(compare(str(plain), args.rounds, lambda line: print(line, file=sys.stderr, flush=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
