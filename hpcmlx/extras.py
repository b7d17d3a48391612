"""Packages that only some uses need: asked for before the work begins, by the name of an extra."""

from __future__ import annotations

import importlib.util

from hpcmlx.errors import ConfigError


def require(package: str, extra: str, use: str, instead: str) -> None:
    """Refuse a use whose package is missing.

    Args:
        package: as it is imported.
        extra: of `pip install hpcmlx[extra]`.
        use: what needs it, as the beginning of a sentence.
        instead: how to do without.

    Raises:
        ConfigError: it is not installed on this host.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{use} needs {package}, which is not installed on this host: "
            f"pip install 'hpcmlx[{extra}]', or {instead}"
        )
