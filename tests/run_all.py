"""The whole suite in one verdict: single-process tests, then the MPI tests on 1, 2, 3 and 4 ranks.

    python tests/run_all.py [-n 1 2 3 4] [--workers 3] [pytest arguments]

Single-process tests are dealt to workers, file by file: many of them wait for jobs that they run.

Every part must have run at least one test on the number of ranks it was meant for.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from hpcmlx.launch.mpirun import find_mpirun

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 4200  # seconds for one part; the first takes 950 to 1100 on two cores
WORKERS = min((os.cpu_count() or 1) + 1, 8)


@dataclass
class Part:
    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""


def run_part(name: str, command: list[str], env: dict[str, str]) -> Part:
    part = Part(name)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        env = env | {"TMPDIR": folder}  # gone afterwards, even where a failing test ended its ranks
        print(f"\n===== {name} =====", flush=True)
        begin = time.monotonic()
        with subprocess.Popen([*command, f"--junitxml={report}"], cwd=ROOT, env=env) as process:
            try:
                code = process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                code, part.problem = 124, f"no end after {TIMEOUT} s"
            finally:
                process.terminate()  # mpirun takes its ranks along
        part.seconds = time.monotonic() - begin
        if report.exists():
            suite = ElementTree.parse(report).getroot().find("testsuite")
            counts = {k: int(suite.get(k, "0")) for k in ("tests", "failures", "errors", "skipped")}
            part.failed = counts["failures"] + counts["errors"]
            part.skipped = counts["skipped"]
            part.passed = counts["tests"] - part.failed - part.skipped
    if not part.problem and code:
        part.problem = f"exit code {code}"
    if not part.problem and not part.passed:
        part.problem = "no test ran"
    if part.problem and not part.failed:
        part.failed = 1
    return part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--ranks", type=int, nargs="*", default=[1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=WORKERS, help="for single-process tests")
    parser.add_argument("--no-single", action="store_true", help="only the MPI parts")
    options, pytest_args = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # mpirun gives ranks a terminal whatever its own output is.
    color = "yes" if sys.stdout.isatty() else "no"
    # Why tests were skipped is said at the end of each part.
    python = [sys.executable, "-m", "pytest", "-q", "-rs", f"--color={color}", *pytest_args]
    parts = []
    if not options.no_single:
        command = [*python, "-n", str(options.workers), "--dist=loadfile"]
        command += ["--ignore=tests/mpi", "tests"]
        parts.append(run_part("single process", command, dict(os.environ)))
    mpirun = [find_mpirun(), "--oversubscribe", "--bind-to", "none"]
    if os.geteuid() == 0:
        mpirun.append("--allow-run-as-root")
    for ranks in options.ranks:
        command = [*mpirun, "-n", str(ranks), *python, "-p", "tests.mpi_plugin", "--with-mpi"]
        env = os.environ | {"HPCMLX_TEST_RANKS": str(ranks), "PYTHONPATH": str(ROOT)}
        parts.append(run_part(f"mpirun -n {ranks}", [*command, "tests/mpi"], env))
    print("\n===== all =====")
    for part in parts:
        verdict = part.problem or "ok"
        print(
            f"{part.name:16} {part.passed:5} passed {part.failed:3} failed {part.skipped:3} skipped"
            f" {part.seconds:7.1f} s  {verdict}"
        )
    failed = sum(part.failed for part in parts)
    passed, skipped = (sum(getattr(p, k) for p in parts) for k in ("passed", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
