"""What one rank's process finds out about its host without asking anybody else."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

import hpcmlx
from hpcmlx import comm
from hpcmlx.errors import HpcmlxError
from hpcmlx.probes.commands import read_command
from hpcmlx.probes.hardware import neural_accelerators, probe_hardware
from hpcmlx.probes.interfaces import Interface, parse_hardware_ports, probe_interfaces
from hpcmlx.probes.thunderbolt import Port, Rdma, probe_rdma, probe_thunderbolt
from hpcmlx.probes.wheel import has_accelerator_kernels, has_jaccl, wheel_tags
from hpcmlx.rundir import free_bytes
from hpcmlx.versions import source_hash

PACKAGES = ("hpcmlx", "mlx", "mlx-lm", "mpi4py", "numpy", "h5py")


@dataclass
class Facts:
    """A host as the doctor sees it. None, here as everywhere, is "not known".

    Attributes:
        ranks: of this job on the host.
        cores: that its ranks may use.
        wired_limit_bytes: set with `iogpu.wired_limit_mb`; 0 where the system decides.
        gpu_bytes: what Metal recommends to keep resident.
        source: hash of hpcmlx's own files.
        mpi: the library's own name and version.
        accelerators: whether MLX uses the GPU's neural accelerators.
        links: for every other host the interfaces that this job's connections to it use; empty
            where there are none over TCP.
        sockets: for other hosts, whether this interpreter can connect to them.
        wait_share: CPU that a waiting barrier takes, 1.0 = one core.
        barrier_seconds: of one barrier of all ranks.
        skew: seconds that the wall clock is ahead of rank 0's; None where it was not compared.
        skew_error: how far off that may be, in seconds.
    """

    host: str
    ranks: int = 1
    cores: int = 1
    system: str | None = None
    macos: tuple[int, ...] = ()
    chip: str | None = None
    model: str | None = None
    memory_bytes: int | None = None
    wired_limit_bytes: int | None = None
    gpu_bytes: int | None = None
    python: str = ""
    interpreter: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    source: str = ""
    wheel: tuple[str, ...] = ()
    jaccl: bool | None = None
    device: str = ""
    accelerators: bool | None = None
    mpi: str | None = None
    libmpi: str = ""
    blas: str = ""
    fast_blas: bool = True
    free_bytes: int | None = None
    interfaces: tuple[Interface, ...] = ()
    rdma: Rdma = Rdma()
    ports: tuple[Port, ...] = ()
    links: dict[str, list[str]] = field(default_factory=dict)
    sockets: dict[str, str] = field(default_factory=dict)
    wait_share: float | None = None
    barrier_seconds: float | None = None
    skew: float | None = None
    skew_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it goes over MPI and into `doctor.json`: another version of hpcmlx on another host has
        to be able to read it."""
        return asdict(self)

    def kind_of(self, interface: str) -> str:
        """What kind of link an interface of this host is."""
        return next((i.kind for i in self.interfaces if i.name == interface), "unknown")


def from_dict(values: dict[str, Any]) -> Facts:
    """The reverse of `Facts.to_dict`, also of one that went through JSON; what another version has
    beside that is left out."""
    known = _known(Facts, values)
    known["interfaces"] = tuple(
        Interface(i["name"], i["kind"], tuple(i["addresses"])) for i in known.get("interfaces", ())
    )
    known["ports"] = tuple(Port(**_known(Port, p)) for p in known.get("ports", ()))
    rdma = _known(Rdma, known.get("rdma", {}))
    known["rdma"] = Rdma(**rdma | {"devices": tuple(rdma.get("devices", ()))})
    for key in ("macos", "wheel"):
        known[key] = tuple(known.get(key, ()))
    return Facts(**known)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}


def collect(run_dir: Path) -> Facts:
    """Ask this host and this process.

    Args:
        run_dir: whose file system's free space counts.
    """
    hardware = probe_hardware(sys.platform)
    hardware_ports: dict[str, str] = {}
    ports: tuple[Port, ...] = ()
    rdma = Rdma()
    if sys.platform == "darwin":
        hardware_ports = parse_hardware_ports(read_command("networksetup", "-listallhardwareports"))
        ports, rdma = probe_thunderbolt(hardware_ports), probe_rdma()
    metal = mx.metal.is_available()
    info = mx.device_info()
    tags = wheel_tags()
    library = comm.find_libmpi()
    return Facts(
        host=comm.hostname(),
        cores=len(cores()),
        system=hardware.system,
        macos=hardware.macos,
        chip=hardware.chip,
        model=hardware.model,
        memory_bytes=hardware.memory_bytes,
        wired_limit_bytes=hardware.wired_limit_bytes,
        gpu_bytes=int(info["max_recommended_working_set_size"]) if metal else None,
        python=platform.python_version(),
        interpreter=sys.executable,
        versions=_versions(),
        source=source_hash(),
        wheel=tags,
        jaccl=has_jaccl(tags),
        device="cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu",
        accelerators=neural_accelerators(
            str(info["architecture"]) if metal else None,
            hardware.macos,
            has_accelerator_kernels(Path(mx.__file__).parent / "lib" / "mlx.metallib"),
        ),
        mpi=mpi_version(library),
        libmpi=library,
        blas=str(hpcmlx.BLAS),
        fast_blas=hpcmlx.BLAS.fast and not hpcmlx.BLAS.problem,
        free_bytes=_free(run_dir),
        interfaces=probe_interfaces(sys.platform, hardware_ports, ports),
        rdma=rdma,
        ports=ports,
    )


def mpi_version(library: str) -> str | None:
    """What an MPI library calls itself, as in "Open MPI v5.0.11"; MPI need not be up for that.

    Args:
        library: of `comm.find_libmpi`.
    """
    text = ctypes.create_string_buffer(8192)  # the largest MPI_MAX_LIBRARY_VERSION_STRING there is
    length = ctypes.c_int()
    try:
        function = ctypes.CDLL(library).MPI_Get_library_version
    except (OSError, AttributeError):
        return None
    if function(text, ctypes.byref(length)) != 0:
        return None
    return text.value.decode("utf-8", "replace").partition(",")[0].strip() or None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _free(run_dir: Path) -> int | None:
    try:
        return free_bytes(run_dir)
    except HpcmlxError:
        return None
