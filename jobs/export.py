"""Make of a training run's checkpoint what others load (once, on one host, without mpirun):

python jobs/export.py runs/tune --to mlx-adapter adapters/mine     # mlx_lm, and model.adapter here
python jobs/export.py runs/tune --step best --to peft adapters/mine
python jobs/export.py runs/tune --to mlx --quantize 4 models/mine  # merged
python jobs/export.py runs/tune --to hf --dtype bfloat16 models/mine
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcmlx.errors import ExitCode, HpcmlxError
from hpcmlx.models.loader import DTYPES
from hpcmlx.training.export.adapters import export_mlx_adapter, export_peft
from hpcmlx.training.export.merged import export_merged
from hpcmlx.training.export.source import base_of, open_run


def main() -> int:
    """Run the command line; the result is the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path, help="the directory to write; must not exist")
    parser.add_argument("--to", required=True, choices=["mlx-adapter", "peft", "mlx", "hf"])
    parser.add_argument("--step", default="latest", help="a step, best or latest")
    parser.add_argument("--base", help="the base model, where it is not where the run had it")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of merged weights")
    parser.add_argument("--quantize", type=int, metavar="BITS", help="pack merged MLX weights")
    parser.add_argument("--group-size", type=int, default=64, help="of --quantize")
    args = parser.parse_args()
    if (args.quantize and args.to != "mlx") or (args.dtype and args.to not in ("mlx", "hf")):
        parser.error("--quantize is for --to mlx, --dtype for --to mlx and hf")
    quantize = {"bits": args.quantize, "group_size": args.group_size} if args.quantize else None
    try:
        with open_run(args.run_dir, args.step) as found:
            base = args.base or base_of(found)
            if args.to == "mlx-adapter":
                done = export_mlx_adapter(found, base, args.out)
            elif args.to == "peft":
                done = export_peft(found, base, args.out)
            else:
                form = {"format": args.to, "dtype": args.dtype, "quantize": quantize}
                done = export_merged(found, base, args.out, **form)
    except HpcmlxError as error:
        print(f"export: {error}", file=sys.stderr)
        return int(error.exit_code)
    for line in (f"{done.path} written, {done.num_bytes / 2**20:.1f} MiB", *done.notes):
        print(line)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
