"""How many bytes a rank may take for its KV caches.

The engine asks once the weights are loaded. What counts is the smallest of what the host has free,
what its container or Slurm job may still take, the process's own limit (`ulimit -v`) and, on Metal,
what the GPU can keep resident.
"""

from __future__ import annotations

import resource
from pathlib import Path

import mlx.core as mx
import psutil

#: Of what is free, caches get this much; the rest is for activations and for the host.
KV_SHARE = 0.7


def default_kv_budget(num_ranks_on_host: int) -> int:
    """Bytes of KV cache for this rank where the configuration names none; may be 0.

    Args:
        num_ranks_on_host: ranks that share this host. All of them should have loaded their
            weights when they ask, or the first will count memory that the last still needs.
    """
    return int(KV_SHARE * available_bytes(num_ranks_on_host))


def available_bytes(num_ranks_on_host: int = 1) -> int:
    """Bytes that this rank can still take when its host's are shared equally; may be 0."""
    shared = psutil.virtual_memory().available
    headroom = cgroup_headroom(_read(Path("/proc/self/cgroup")) or "", Path("/sys/fs/cgroup"))
    if headroom is not None:
        shared = min(shared, headroom)
    bounds = [shared // num_ranks_on_host]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        bounds.append(limit - psutil.Process().memory_info().vms)
    if mx.metal.is_available() and mx.default_device() != mx.Device(mx.cpu):
        # Ranks on one host share one GPU, and a rank sees only its own part of what is in use.
        resident = int(mx.device_info()["max_recommended_working_set_size"])
        bounds.append(resident // num_ranks_on_host - mx.get_active_memory())
    return max(0, min(bounds))


def cgroup_headroom(membership: str, root: Path) -> int | None:
    """Bytes left below the tightest memory limit on a process's control groups, v1 or v2.

    Limits of all groups above a process hold for it. File pages that the kernel would drop first
    (`inactive_file`, such as the checkpoint just read) count as free.

    Args:
        membership: the text of `/proc/PID/cgroup`.
        root: where control groups are mounted, `/sys/fs/cgroup`.

    Returns:
        None where nothing limits it (or the system has no control groups); may be negative.
    """
    left: list[int] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A group outside this container's view shows as `/..`: only the mount can be seen. With v1
        # a container may also see the path its host knows it by; its own group is the mount.
        parts = [] if ".." in path.split("/") else path.strip("/").split("/")
        for depth in range(len(parts) + 1):
            left += _headroom(mount.joinpath(*parts[:depth]), *names)
    return min(left, default=None)


def _headroom(group: Path, limit_file: str, usage_file: str, reclaimable: str) -> list[int]:
    """Limit - usage of one group; empty where it has no limit, or there is no such group."""
    limit, usage = _read(group / limit_file), _read(group / usage_file)
    # v1 writes "no limit" as the largest multiple of a page in 63 bits.
    if limit is None or usage is None or limit == "max" or int(limit) >= 1 << 62:
        return []
    stat = dict(line.split() for line in (_read(group / "memory.stat") or "").splitlines())
    return [int(limit) - int(usage) + int(stat.get(reclaimable, 0))]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
