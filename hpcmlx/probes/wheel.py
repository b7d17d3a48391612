"""What the installed MLX was built with, as far as its files say."""

from __future__ import annotations

import mmap
import re
from importlib import metadata
from pathlib import Path

#: Only the wheel for this macOS and later is built with RDMA over Thunderbolt.
_JACCL_MACOS = 26


def wheel_tags(package: str = "mlx") -> tuple[str, ...]:
    """The tags of the wheel that a package was installed from, as in
    "cp312-cp312-macosx_26_0_arm64"; empty where it does not say."""
    try:
        text = metadata.distribution(package).read_text("WHEEL")
    except metadata.PackageNotFoundError:
        return ()
    return parse_wheel_tags(text)


def parse_wheel_tags(text: str | None) -> tuple[str, ...]:
    """The tags in the file WHEEL of an installed package."""
    return tuple(re.findall(r"^Tag: (\S+)", text or "", re.MULTILINE))


def has_jaccl(tags: tuple[str, ...]) -> bool | None:
    """Whether MLX's wheel has its RDMA back end; None where the wheel's tags are not known."""
    if not tags:
        return None
    return any(int(v) >= _JACCL_MACOS for tag in tags for v in re.findall(r"macosx_(\d+)_", tag))


def has_accelerator_kernels(library: Path) -> bool | None:
    """Whether MLX's kernel library has kernels for the GPU's neural accelerators; their names have
    `_nax`. None where it cannot be read.

    Args:
        library: `mlx.metallib` of the installed MLX.
    """
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return m.find(b"_nax") >= 0
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
