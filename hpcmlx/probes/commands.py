"""The programs and files that the other probes read. Nothing is ever written or set.

A probe that finds nothing says None, so that what is not known can be told from what is not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

#: Seconds a tool may take; system_profiler needs up to a few.
TIMEOUT = 20.0
# A shell that ssh opens for a single command often has none of these in its PATH.
_FOLDERS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")


def read_command(*argv: str, timeout: float = TIMEOUT) -> str | None:
    """What a program prints; None where there is no such program, it fails or takes too long.

    Args:
        argv: its name without a folder, then its arguments. No shell reads them.
        timeout: seconds.
    """
    found = shutil.which(argv[0], path=os.pathsep.join((*_FOLDERS, os.environ.get("PATH", ""))))
    if found is None:
        return None
    # Its own language, or the words that are looked for may be translated.
    env = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [found, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            timeout=timeout,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def read_text(path: str | Path) -> str | None:
    """The text of a small file, without white space round it; None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
