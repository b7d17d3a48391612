"""Fetch a model from the Hugging Face hub into the local cache, before the job that uses it:

    python jobs/fetch.py mlx-community/SmolLM2-135M-Instruct

Jobs themselves never use the network. Only data is fetched: safetensors, JSON, tokenizer files.
"""

from __future__ import annotations

import argparse
import sys

from huggingface_hub import snapshot_download

from hpcmlx.errors import ExitCode
from hpcmlx.models.checkpoint import FETCH_PATTERNS


def main() -> int:
    """Run the command line; the result is the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repo", help="org/name")
    parser.add_argument("--revision", help="a branch, tag or commit")
    args = parser.parse_args()
    try:
        path = snapshot_download(
            args.repo, revision=args.revision, allow_patterns=list(FETCH_PATTERNS)
        )
    except (OSError, ValueError) as error:
        print(f"fetch: {args.repo}: {str(error).splitlines()[0]}", file=sys.stderr)
        return int(ExitCode.IO)
    print(path)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
