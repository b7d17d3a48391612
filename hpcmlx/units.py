"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re

from hpcmlx.errors import ConfigError

_BINARY = ("KiB", "MiB", "GiB", "TiB")
_UNITS = {"": 1, "b": 1}
_UNITS |= {unit.lower(): 1024 ** (i + 1) for i, unit in enumerate(_BINARY)}
_UNITS |= {unit: 1000 ** (i + 1) for i, unit in enumerate(("kb", "mb", "gb", "tb"))}


def parse_bytes(text: str, key: str = "size") -> int:
    """A size as people write it, in bytes: binary units, decimal units, or a plain number.

    Args:
        text: as in "4GiB", "1.5 GiB", "512MB" or "1048576"; case does not matter.
        key: what the error message calls it.

    Raises:
        ConfigError: it is none of these, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.ASCII | re.IGNORECASE)
    unit = match and _UNITS.get(match[2].lower())
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ConfigError(f"{key}={text!r}: expected a size above 0, as in 4GiB, 512MB or 1048576")
    return size


def format_bytes(num_bytes: float) -> str:
    """A size for people: `512 B`, `1.5 GiB`."""
    size, unit = float(num_bytes), "B"
    for larger in _BINARY:
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.1f} {unit}"
