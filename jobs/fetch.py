"""Fetch a model from the Hugging Face hub into the local cache, before the job that uses it:

    python jobs/fetch.py mlx-community/SmolLM2-135M-Instruct

Jobs themselves never use the network. Only data is fetched: safetensors, JSON, tokenizer files. Its
checksums are compared with the hub's and kept beside it, so that jobs notice a damaged file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from hpcmlx.errors import ExitCode, HpcmlxError
from hpcmlx.models.checkpoint import FETCH_PATTERNS
from hpcmlx.models.checksums import write_checksums


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
        write_checksums(Path(path))
    except HpcmlxError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return int(error.exit_code)
    except (OSError, ValueError) as error:
        print(f"fetch: {args.repo}: {str(error).splitlines()[0]}", file=sys.stderr)
        return int(ExitCode.IO)
    print(path)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
