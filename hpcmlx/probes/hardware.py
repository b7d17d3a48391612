"""Chip, memory, system and GPU limits of a host; the doctor's first rows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from hpcmlx.probes.commands import read_command, read_text

#: MLX uses the neural accelerators of the GPU from this macOS on.
_ACCELERATORS_MACOS = (26, 2)
_BYTES = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
_SYSCTLS = ("hw.memsize", "iogpu.wired_limit_mb", "machdep.cpu.brand_string", "hw.physicalcpu")


@dataclass(frozen=True)
class Hardware:
    """What a host is; None for what its tools do not say.

    Attributes:
        system: as in "macOS 26.2 (25C56)" or "Debian GNU/Linux 12 (bookworm), Linux 6.1.0".
        macos: version as numbers, as in (26, 2); empty on other systems.
        chip: as in "Apple M3 Ultra" or "AMD EPYC 7763 64-Core Processor".
        model: as in "Mac Studio (Mac15,14)".
        memory_bytes: of the whole host.
        wired_limit_bytes: `iogpu.wired_limit_mb`, what the GPU may keep resident; 0 where it is
            the system's own choice.
    """

    system: str | None = None
    macos: tuple[int, ...] = ()
    chip: str | None = None
    model: str | None = None
    memory_bytes: int | None = None
    wired_limit_bytes: int | None = None


def probe_hardware(platform: str) -> Hardware:
    """Ask this host.

    Args:
        platform: `sys.platform`.
    """
    if platform == "darwin":
        profile = parse_hardware(read_command("system_profiler", "SPHardwareDataType", "-json"))
        # One by one: a name that this macOS does not know fails the whole call.
        lines = [read_command("sysctl", name) or "" for name in _SYSCTLS]
        return mac_hardware(profile, parse_sysctl("".join(lines)), read_command("sw_vers"))
    return linux_hardware(
        read_text("/etc/os-release"),
        read_command("uname", "-r"),
        read_text("/proc/cpuinfo"),
        read_text("/proc/meminfo"),
    )


def mac_hardware(
    profile: dict[str, str], sysctls: dict[str, str], versions: str | None
) -> Hardware:
    """Put together what the tools of a Mac have said.

    Args:
        profile: of `parse_hardware`.
        sysctls: of `parse_sysctl`.
        versions: output of `sw_vers`.
    """
    said = dict(re.findall(r"^(\w+):\s*(.+?)\s*$", versions or "", re.MULTILINE))
    version = said.get("ProductVersion", "")
    build = f" ({said['BuildVersion']})" if "BuildVersion" in said else ""
    name, identifier = profile.get("machine_name"), profile.get("machine_model")
    memory = sysctls.get("hw.memsize", "")
    wired = sysctls.get("iogpu.wired_limit_mb", "")
    return Hardware(
        system=f"macOS {version}{build}" if version else None,
        macos=version_numbers(version),
        chip=profile.get("chip_type") or sysctls.get("machdep.cpu.brand_string"),
        model=f"{name} ({identifier})" if name and identifier else name or identifier,
        memory_bytes=int(memory) if memory.isdecimal() else _size(profile.get("physical_memory")),
        wired_limit_bytes=int(wired) << 20 if wired.isdecimal() else None,
    )


def linux_hardware(
    os_release: str | None, kernel: str | None, cpuinfo: str | None, meminfo: str | None
) -> Hardware:
    """The same from the files of a Linux host."""
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', os_release or "", re.MULTILINE)
    parts = [name[1] if name else None, f"Linux {kernel.strip()}" if kernel else None]
    chip = re.search(r"^model name\s*:\s*(.+?)\s*$", cpuinfo or "", re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", meminfo or "", re.MULTILINE)
    return Hardware(
        system=", ".join(filter(None, parts)) or None,
        chip=chip[1] if chip else None,
        memory_bytes=int(memory[1]) << 10 if memory else None,
    )


def parse_hardware(text: str | None) -> dict[str, str]:
    """The overview in `system_profiler SPHardwareDataType -json`, without the serial numbers."""
    wanted = ("chip_type", "machine_name", "machine_model", "physical_memory")
    try:
        found = json.loads(text or "")["SPHardwareDataType"][0]
        return {key: str(found[key]) for key in wanted if found.get(key)}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def parse_sysctl(text: str) -> dict[str, str]:
    """The lines `name: value` that `sysctl NAME…` prints."""
    return dict(re.findall(r"^([\w.]+): *(.*?) *$", text, re.MULTILINE))


def version_numbers(text: str) -> tuple[int, ...]:
    """`26.2.1` as (26, 2, 1); empty where it is no version."""
    return tuple(map(int, text.split("."))) if re.fullmatch(r"\d+(\.\d+)*", text) else ()


def neural_accelerators(
    architecture: str | None, macos: tuple[int, ...], in_wheel: bool | None
) -> bool | None:
    """Whether MLX's matrix products run on the neural accelerators in the GPU (M5 and later).

    MLX does not tell; these are the conditions of its `is_nax_available`: the GPU's generation,
    macOS 26.2, and kernels compiled for them.

    Args:
        architecture: of the Metal GPU, as in "applegpu_g17s"; None without one.
        macos: version as numbers.
        in_wheel: whether MLX's kernel library has them; None: not known.

    Returns:
        None where it cannot be told.
    """
    generation = re.fullmatch(r"applegpu_g(\d+)(\w)", architecture or "")
    if architecture is None:
        return False
    if generation is None or not macos:
        return None
    if int(generation[1]) < (18 if generation[2] == "p" else 17) or macos < _ACCELERATORS_MACOS:
        return False
    return in_wheel


def _size(text: str | None) -> int | None:
    """`96 GB` in bytes; the profiler's units are binary."""
    match = re.fullmatch(r"(\d+) ([KMGT]B)", text or "")
    return int(match[1]) * _BYTES[match[2]] if match else None
