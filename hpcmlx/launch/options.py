"""What mpirun is told beyond which program to run on how many ranks: chosen from the configuration,
from what is said of the hosts and from the environment. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hpcmlx.errors import ConfigError
from hpcmlx.launch.describe import Cluster, Description, read_cluster
from hpcmlx.launch.hostfile import Host
from hpcmlx.launch.network import check_interface
from hpcmlx.launch.placement import crowded, fill
from hpcmlx.settings import LaunchConfig

_YIELD = "OMPI_MCA_mpi_yield_when_idle"

# Variables that a rank on another host needs too; mpirun passes on only its own (OMPI_, PRTE_).
_EXPORTED = re.compile(
    r"HPCMLX_\w+|MLX_\w+|HF_(HOME|HUB_CACHE|HUB_OFFLINE)|(OPENBLAS|MKL|OMP)_NUM_THREADS"
)


@dataclass(frozen=True)
class Options:
    """
    Attributes:
        interface: what messages between hosts use; None: mpirun's choice.
        oversubscribe: some host has fewer cores than ranks.
        yield_when_idle: whether waiting ranks leave their core to others; None: mpirun's choice.
    """

    interface: str | None
    oversubscribe: bool
    yield_when_idle: bool | None


def choose_options(
    launch: LaunchConfig,
    num_ranks: int,
    hosts: Sequence[Host],
    here: Collection[str],
    cores: int,
    environ: Mapping[str, str],
) -> Options:
    """The options for a launch; nothing has been started or written yet.

    Args:
        hosts: the host file's lines; empty without one.
        here: the names of this host.
        cores: of this host.

    Raises:
        ConfigError: something that `launch` or the description of the hosts says is wrong.
    """
    exported(environ, launch.export)
    cluster = read_cluster(launch.hostfile, launch.hosts)
    allocated = not hosts and "SLURM_JOB_ID" in environ
    full = not allocated and ranks_here(num_ranks, hosts, here, cores) > cores
    full = full or (cluster is not None and bool(crowded(cluster, num_ranks)))
    used = (cluster and fill(cluster, num_ranks)) or [host.name for host in hosts]
    if cluster is not None and "SLURM_JOB_ID" in environ:
        used = used or cluster.names  # some of them; which, Slurm knows
    interface = choose_interface(launch, cluster, list(dict.fromkeys(used)), environ)
    idle = launch.yield_when_idle
    if idle is None and full and _YIELD not in environ:
        idle = True
    return Options(interface, full, idle)


def ranks_here(num_ranks: int, hosts: Sequence[Host], here: Collection[str], cores: int) -> int:
    """How many ranks mpirun puts on this host: it fills the slots line by line.

    Args:
        hosts: the host file's lines; empty without one.
        here: the names of this host.
        cores: of this host; a line without `slots` has that many.
    """
    if not hosts:
        return num_ranks
    placed = 0
    for host in hosts:
        slots = host.slots or (cores if host.name in here else num_ranks)
        taken = min(slots, num_ranks)
        num_ranks -= taken
        placed += taken if host.name in here else 0
    return placed


def checked_path(hostfile: str) -> str:
    """A host file's path as mpirun is to get it.

    Raises:
        ConfigError: mpirun would read it as two.
    """
    if "," in hostfile:
        raise ConfigError(
            f"launch.hostfile={hostfile!a}: mpirun takes a comma for the end of the name; rename it"
        )
    return f"./{hostfile}" if hostfile.startswith("-") else hostfile


def choose_interface(
    launch: LaunchConfig, cluster: Cluster | None, used: Collection[str], environ: Mapping[str, str]
) -> str | None:
    """What messages between hosts are to use: `launch.interface`, else what the user's environment
    says (None: left to it), else what is said of the hosts.

    Args:
        used: names of the hosts that get ranks.

    Raises:
        ConfigError: `launch.interface` is no interface, or hosts have different ones. Open MPI
            would pass over a name that a host does not have, and then find no way to it.
    """
    if launch.interface is not None:
        return check_interface(launch.interface, "launch.interface")
    if cluster is None or len(used) < 2 or "OMPI_MCA_btl_tcp_if_include" in environ:
        return None
    said = {name: cluster.hosts.get(name, Description()).interface for name in used}
    different = set(said.values()) - {None}
    if len(different) > 1 or (len(set(said.values())) > 1 and "/" not in str(*different)):
        shown = ", ".join(f"{name}: {text or 'not said'}" for name, text in said.items())
        raise ConfigError(
            f"{cluster.source}: hosts have different interfaces ({shown}); give the network that "
            "they share, as in launch.interface=10.0.1.0/24"
        )
    return different.pop() if different else None


def exported(environ: Mapping[str, str], further: Sequence[str]) -> list[str]:
    """Names of the variables that every rank gets; their values are not on the command line.

    Args:
        further: `launch.export`.

    Raises:
        ConfigError: one of these is no name, or not set.
    """
    for name in further:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise ConfigError(f"launch.export: {name!a} is not the name of a variable")
        if name not in environ:
            raise ConfigError(f"launch.export: {name} is not set here; set it, or leave it out")
    return sorted({name for name in environ if _EXPORTED.fullmatch(name)} | set(further))
