"""What a run draws from the wall, as far as its hosts can say: joules, in all and per token.

One rank of each host measures: RAPL's counters in /sys/class/powercap on Linux, zeus's Apple
silicon library on a Mac (`pip install 'hpcmlx[energy]'`). Where a host cannot say, why not is
recorded; nothing is estimated. `observe/record.py` starts and stops the meter.

zeus itself reads RAPL too, but through a process of its own for each counter, which outlives a rank
that ends with `os._exit`, and with packages of several hundred megabytes.

The parsing is tested on recorded trees and a stand-in of zeus's monitor; not verified on hardware.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
# No package of a processor draws more; a counter must be read twice before it can have wrapped.
_MOST_WATTS = 1000.0
_PERIOD = 30.0  # seconds from one reading to the next, at most
_PARTS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")


@dataclass(frozen=True)
class Reading:
    """What a host has used.

    Attributes:
        joules: None where it was not measured.
        parts: joules by part of the host, as in "package-0" and "dram" or "gpu".
        source: "RAPL" or "zeus".
        reason: why it was not measured.
    """

    joules: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    source: str = ""
    reason: str = ""


class Meter(Protocol):
    """Measures a host, from its making on."""

    def stop(self) -> Reading:
        """What the host has used since; the meter is over."""


class NoMeter:
    """Of a host that cannot say, or of a rank that does not measure."""

    def __init__(self, reason: str):
        self._reason = reason

    def stop(self) -> Reading:
        return Reading(reason=self._reason)


def open_meter(platform: str = sys.platform, powercap: Path = POWERCAP) -> Meter:
    """Begin to measure this host. Never fails: a host that cannot say gets a `NoMeter`.

    Args:
        platform: as `sys.platform`.
        powercap: the directory of RAPL's counters.
    """
    try:
        return AppleMeter() if platform == "darwin" else RaplMeter(powercap)
    except NotMeasuredError as error:
        return NoMeter(str(error))


class NotMeasuredError(Exception):
    """Why a host cannot say what it uses."""


class RaplMeter:
    """Intel's and AMD's counters: of every package, and of its memory where that has one.

    They wrap around every few minutes to hours: a thread reads them often enough to see each time.
    """

    def __init__(self, root: Path = POWERCAP, period: float | None = None):
        """
        Args:
            root: of the zones.
            period: seconds from one reading to the next; None: so that no counter wraps twice.

        Raises:
            NotMeasuredError: there are no counters here, or they cannot be read.
        """
        zones = find_zones(root)
        if not zones:
            raise NotMeasuredError(f"no RAPL on this host ({root} is empty or not readable)")
        self._counters = [_Counter(name, folder) for name, folder in zones.items()]
        shortest = min(counter.range for counter in self._counters) / _MOST_WATTS / 2
        self._period = min(_PERIOD, shortest) if period is None else period
        self._lock, self._over = threading.Lock(), threading.Event()
        self._problem = ""
        threading.Thread(target=self._watch, name="energy", daemon=True).start()

    def stop(self) -> Reading:
        self._over.set()
        self._read()
        if self._problem:
            return Reading(reason=self._problem)
        parts = {counter.name: counter.joules for counter in self._counters}
        return Reading(sum(parts.values()), parts, "RAPL")

    def _watch(self) -> None:
        while not self._over.wait(self._period):
            self._read()

    def _read(self) -> None:
        with self._lock:
            try:
                for counter in self._counters:
                    counter.read()
            except NotMeasuredError as error:  # it may wrap around unseen until it is read again
                self._problem = str(error)


class _Counter:
    """One `energy_uj`.

    Attributes:
        range: joules after which it begins at 0 again.
        joules: since it was made.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self._folder = name, folder
        self.range = _number(folder / "max_energy_range_uj") / 1e6
        self._last = self._now()
        self.joules = 0.0

    def read(self) -> None:
        now = self._now()
        self.joules += now - self._last + (self.range if now < self._last else 0.0)
        self._last = now

    def _now(self) -> float:
        return _number(self._folder / "energy_uj") / 1e6


def find_zones(root: Path) -> dict[str, Path]:
    """The zones that together are a host's processors and memory, each of them once: packages and,
    below them, "dram". Cores are part of their package; so is the package's second entry, under
    "intel-rapl-mmio".

    Returns:
        Name, as in "package-0" or "package-0 dram", to directory.
    """
    found = {}
    try:
        folders = sorted(root.iterdir())
    except OSError:
        return {}
    for folder in folders:
        match = re.fullmatch(r"intel-rapl:(\d+)(?::\d+)?", folder.name)
        name = _text(folder / "name") if match else None
        if match is None or name is None:
            continue
        if name.startswith("package") and folder.name.count(":") == 1:
            found[name] = folder
        elif name == "dram" and folder.name.count(":") == 2:
            package = _text(root / f"intel-rapl:{match[1]}" / "name")
            found[f"{package or match[1]} dram"] = folder
    return found


class AppleMeter:
    """The energy model of Apple's chips, through zeus-apple-silicon: CPU, GPU, memory and neural
    engine. Not verified on hardware."""

    def __init__(self, library: Any = None):
        """
        Args:
            library: a stand-in for the module, in tests.

        Raises:
            NotMeasuredError: the library is not installed, or finds nothing to read.
        """
        if library is None:
            try:
                library = importlib.import_module("zeus_apple_silicon")
            except ImportError:
                raise NotMeasuredError(
                    "needs zeus-apple-silicon: pip install 'hpcmlx[energy]'"
                ) from None
        try:
            self._monitor = library.AppleEnergyMonitor()
            self._monitor.begin_window("run")
        except Exception as error:  # whatever that library raises
            raise NotMeasuredError(f"zeus cannot read this chip: {_one_line(error)}") from None

    def stop(self) -> Reading:
        try:
            used = self._monitor.end_window("run")
        except Exception as error:
            return Reading(reason=f"zeus cannot read this chip: {_one_line(error)}")
        parts = {
            name.removesuffix("_mj").removesuffix("_total"): value / 1000
            for name in _PARTS
            if (value := getattr(used, name, None)) is not None
        }
        if not parts:
            return Reading(reason="zeus knows no part of this chip")
        return Reading(sum(parts.values()), parts, "zeus")


def combine(readings: Mapping[str, Reading], seconds: float) -> dict[str, Any]:
    """What a run has used, from one reading of each of its hosts.

    Args:
        readings: by host.
        seconds: that were measured.

    Returns:
        "joules" (None where no host was measured), "seconds", "hosts" with the reading of each and
        "not_measured", host -> why. Where that is not empty the joules are those of the others.
    """
    measured = {host: r for host, r in readings.items() if r.joules is not None}
    joules = sum(r.joules or 0.0 for r in measured.values())
    return {
        "joules": round(joules, 3) if measured else None,
        "seconds": round(seconds, 3),
        "hosts": {
            host: {k: v for k, v in asdict(r).items() if k != "reason"}
            for host, r in measured.items()
        },
        "not_measured": {host: r.reason for host, r in readings.items() if r.joules is None},
    }


def per_token(energy: Mapping[str, Any], num_tokens: int | None) -> float | None:
    """Joules per token; None unless all hosts were measured and tokens were counted."""
    if energy["joules"] is None or energy["not_measured"] or not num_tokens:
        return None
    return round(float(energy["joules"]) / num_tokens, 6)


def describe(energy: Mapping[str, Any]) -> str:
    """The line for people.

    Args:
        energy: of `combine`, with "joules_per_token" where that is known.
    """
    missing = energy["not_measured"]
    reasons = "; ".join(sorted(set(missing.values())))
    if energy["joules"] is None:
        return f"energy: not measured: {reasons}"
    text = f"energy: {energy['joules']:,.0f} J in {energy['seconds']:.1f} s"
    if energy.get("joules_per_token") is not None:
        text += f", {energy['joules_per_token']:.3g} J a token"
    if missing:
        text += f"; without {', '.join(sorted(missing))}: {reasons}"
    return text


def _number(path: Path) -> float:
    try:
        return float(path.read_text())
    except OSError as error:
        hint = "; only root may read it" if os.geteuid() and error.errno == 13 else ""
        raise NotMeasuredError(f"RAPL: {path}: {error.strerror}{hint}") from None
    except ValueError:
        raise NotMeasuredError(f"RAPL: {path}: not a number") from None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
