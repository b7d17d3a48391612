"""What this process runs: to be compared between ranks and hosts, and to be recorded."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("hpcmlx", "mlx", "mlx-lm", "mpi4py", "numpy", "h5py")
_TIMEOUT = 5.0  # seconds for a question to git
# A look: no hook and no monitor of the checkout is started, nothing is written.
_GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")


def versions() -> dict[str, str]:
    """Of the packages that decide the results, and of Python."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return found | {"python": sys.version.split()[0]}


@cache
def source_hash() -> str:
    """Of hpcmlx's own files: two checkouts of one version may still differ."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def git_state(folder: Path | None = None) -> dict[str, str | bool | None]:
    """The commit that this code is of: "commit", whether something "dirty" lies over it, and the
    SHA-256 of that ("diff"; of tracked files). Where there is no git, "absent" says why.

    Args:
        folder: of the checkout; None: where hpcmlx is.
    """
    folder = Path(__file__).resolve().parent.parent if folder is None else folder
    if not (folder / ".git").exists():
        return {"absent": f"{folder} is no git checkout"}
    try:
        commit = _git(folder, "rev-parse", "HEAD").decode().strip()
        changes = _git(folder, "status", "--porcelain")
        diff = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "HEAD")
    except FileNotFoundError:
        return {"absent": "there is no git here"}
    except subprocess.TimeoutExpired:
        return {"absent": f"git did not answer within {_TIMEOUT:.0f} s"}
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.decode("utf-8", "replace").split())
        return {"absent": f"git: {reason}"}
    digest = hashlib.sha256(diff).hexdigest() if diff else None
    return {"commit": commit, "dirty": bool(changes.strip()), "diff": digest}


def _git(folder: Path, *words: str) -> bytes:
    # Of the variables that lead git elsewhere none counts.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        [*_GIT, "-C", str(folder), *words],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=env | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        timeout=_TIMEOUT,
        check=True,
    )
    return done.stdout
