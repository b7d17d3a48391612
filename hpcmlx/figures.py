"""What the pictures have in common: colours, an empty figure, plain axes, a title, the PNG.

matplotlib is imported by what draws, not before: it is an extra.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which also colour-blind people can tell apart.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
GREY, INK = "#7A7A7A", "#222222"
_GRID = "#DDDDDD"


@contextmanager
def blank(width: float, height: float, font_size: int, **style: Any) -> Iterator[Figure]:
    """An empty figure, and the common style for what is drawn into it.

    Args:
        width, height: inches.
        style: more of matplotlib's settings, an underscore for the dot in their names.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    common: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK)
    common |= {"font.size": font_size}
    common |= {name.replace("_", "."): value for name, value in style.items()}
    with rc_context(common):
        yield Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes) -> None:
    """A faint grid behind the lines, and no frame above and at the right."""
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure, title: str, dpi: int) -> bytes:
    """The finished figure, under its title."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi, facecolor="white")
    return image.getvalue()
