"""Memory bandwidth of Apple's chips, by the names that macOS gives them."""

from __future__ import annotations

GIB = 1 << 30

# GB/s, from the technical specifications of the Macs that have them (support.apple.com/specs):
# the unit is 1e9 bytes. Chips named Max from the M3 on come in two versions with one name; the
# smaller one is sold with the sizes of memory that are listed with it, and with no others.
_GB_PER_SECOND: dict[str, float] = {
    # MacBook Air 2020, MacBook Pro 2021, Mac Studio 2022
    "M1": 68.25, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    # MacBook Air 2022, Mac mini 2023, MacBook Pro 2023, Mac Studio 2023
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    # MacBook Pro Nov 2023, Mac Studio 2025
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819,
    # Mac mini 2024, MacBook Pro 2024, Mac Studio 2025
    "M4": 120, "M4 Pro": 273, "M4 Max": 546,
    # MacBook Pro 2025 and 2026
    "M5": 153, "M5 Pro": 307, "M5 Max": 614,
}  # fmt: skip
# Chip -> (GB/s of its smaller version, GiB of memory that this one is sold with).
_SMALLER: dict[str, tuple[float, frozenset[int]]] = {
    "M3 Max": (300, frozenset({36, 96})),
    "M4 Max": (410, frozenset({36})),
    "M5 Max": (460, frozenset({36})),
}


def chip_names() -> list[str]:
    """The chips whose bandwidth is known."""
    return list(_GB_PER_SECOND)


def bandwidth_of(chip: str, memory: int | None) -> float | None:
    """Memory bandwidth of a chip in GB/s.

    Args:
        chip: as in "Apple M3 Ultra" or "M3 Ultra".
        memory: of the host, in bytes; tells two versions of one name apart.

    Returns:
        None for a chip that is not known, or of which there are two and `memory` is None.
    """
    name = chip.removeprefix("Apple ").strip()
    if name in _SMALLER:
        if memory is None:
            return None
        bandwidth, sizes = _SMALLER[name]
        if memory // GIB in sizes:
            return bandwidth
    return _GB_PER_SECOND.get(name)
