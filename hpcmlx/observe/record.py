"""This launch's entry in `run.json`, the head of `summary.json`, and `report.html`.

`job.py` begins the entry once the ranks have met and ends it when all of them are through, or from
the rank that fails. The file itself is `hpcmlx/record.py`'s, which launchers need, too.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from hpcmlx import config, record, redact
from hpcmlx.comm import Communicator, hostname
from hpcmlx.errors import ExitCode
from hpcmlx.observe import energy, report, summary
from hpcmlx.probes.commands import read_command, read_text
from hpcmlx.probes.hardware import Hardware, linux_hardware, mac_hardware, parse_sysctl
from hpcmlx.record import Exit, cause_of
from hpcmlx.settings import JobConfig
from hpcmlx.versions import git_state, source_hash, versions

_log = logging.getLogger(__name__)
_MAC = ("hw.memsize", "machdep.cpu.brand_string")


class RunRecord:
    """Of this process's launch. Nothing is written before `begin`, and only by rank 0, unless
    another rank fails."""

    def __init__(self) -> None:
        self._run_dir: Path | None = None
        self._job, self._token = "", ""
        self._begin = 0.0
        self._meter: energy.Meter | None = None
        self._summary: tuple[int, int] | None = None

    def begin(
        self,
        world: Communicator,
        job: str,
        settings: JobConfig,
        run_dir: Path,
        token: str,
        layout: str,
    ) -> None:
        """Write the entry and begin to measure. Collective.

        Args:
            token: of this launch, the same on all ranks.
            layout: as in `dp1_pp2_tp2`.

        Raises:
            IntegrityError, OutputError, StorageError: as `record.begin`.
        """
        self._job, self._token, self._begin = job, token, time.monotonic()
        hosts = world.allgather(this_host(world.rank))
        if world.rank == 0:
            asked = yaml.safe_load(config.to_yaml(settings))
            launch = {
                "token": token,
                "layout": layout,
                "command": redact.command_line([sys.executable, *sys.argv]),
                "config": redact.values(asked),
                "versions": versions(),
                "source": source_hash(),
                "git": git_state(),
                "hosts": hosts,
            }
            record.begin(run_dir, job, launch)
            self._summary = _stamp(run_dir)
        self._run_dir = run_dir
        if next(h["rank"] for h in hosts if h["host"] == hostname()) == world.rank:
            self._meter = energy.open_meter()

    def end(self, world: Communicator, code: ExitCode) -> None:
        """All ranks are through. Collective.

        Raises:
            IntegrityError, OutputError, StorageError: as `record.end`.
        """
        mine = None if self._meter is None else (hostname(), self._meter.stop())
        readings = world.gather(mine)
        if readings is None or self._run_dir is None:
            return
        seconds = time.monotonic() - self._begin
        used = energy.combine(dict(filter(None, readings)), seconds)
        exit = Exit(cause_of(code), int(code))
        if _stamp(self._run_dir) != self._summary:  # this launch has written one
            used = summary.finish_summary(self._run_dir, self._job, used, str(exit.cause))
        _log.info("%s", energy.describe(used))
        more = {"seconds": round(seconds, 3), "energy": used}
        record.end(self._run_dir, self._token, exit, **more)

    def fail(self, world: Communicator, code: int, message: str) -> None:
        """This rank ends the job. Never fails, and changes nothing where another rank was first."""
        if self._run_dir is None:
            return
        lines = message.splitlines() or [""]
        text = lines[0] if len(lines) == 1 else f"{lines[0]}: {lines[-1]}"  # without traceback
        exit = Exit(cause_of(code), code, text, world.rank, hostname())
        with suppress(Exception):
            seconds = round(time.monotonic() - self._begin, 3)
            record.fail_status(self._run_dir, text)
            if record.end(self._run_dir, self._token, exit, seconds=seconds):
                self.draw()

    def draw(self) -> None:
        """`report.html`: a picture of the run is no reason to fail it."""
        try:
            assert self._run_dir is not None
            report.write(self._run_dir)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _log.warning("no %s: %s", report.REPORT, reason)


def this_host(rank: int) -> dict[str, Any]:
    """A line of the host table, within some milliseconds; None for what is not known."""
    hardware = _hardware()
    device = "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu"
    return {
        "rank": rank,
        "host": hostname(),
        "system": hardware.system,
        "chip": hardware.chip,
        "memory_bytes": hardware.memory_bytes,
        "device": device,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "pid": os.getpid(),
    }


def _hardware() -> Hardware:
    # Without system_profiler, which takes its time.
    if sys.platform == "darwin":
        lines = [read_command("sysctl", name) or "" for name in _MAC]
        return mac_hardware({}, parse_sysctl("".join(lines)), read_command("sw_vers"))
    files = [read_text(f"/proc/{name}") for name in ("cpuinfo", "meminfo")]
    return linux_hardware(read_text("/etc/os-release"), platform.release(), *files)


def _stamp(run_dir: Path) -> tuple[int, int] | None:
    """What tells one `summary.json` from another."""
    try:
        found = (run_dir / summary.SUMMARY).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
