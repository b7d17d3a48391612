"""Which network MPI is to use: a network as in 10.0.1.0/24, or an interface by its name."""

from __future__ import annotations

import ipaddress
import re

from hpcmlx.errors import ConfigError

# Linux allows 15 characters. No comma: Open MPI takes it for the end of the name.
_INTERFACE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}\Z")


def check_interface(text: str, key: str) -> str:
    """`text`, which is a network or the name of an interface.

    Args:
        key: what the error message calls it.

    Raises:
        ConfigError: it is neither.
    """
    if "/" in text:
        try:
            return str(ipaddress.IPv4Network(text))
        except ValueError as error:
            raise ConfigError(f"{key}={text!a}: {error}; write it as in 10.0.1.0/24") from None
    if not _INTERFACE.match(text):
        raise ConfigError(
            f"{key}={text!a}: neither a network, as in 10.0.1.0/24, nor the name of an interface, "
            "as in bridge0"
        )
    return text


def interface_options(interface: str) -> list[str]:
    """What makes mpirun use one interface, for MPI's messages (`btl_tcp_if_include`) and for those
    of its daemons, which Open MPI 5 names `prte_if_include` (`oob_tcp_if_include` before)."""
    return [
        *("--mca", "btl_tcp_if_include", interface),
        *("--prtemca", "prte_if_include", interface),
    ]
