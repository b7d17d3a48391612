"""A pipeline schedule as a chart, before anything runs: in a terminal, or as a PNG.

One line per rank, time to the right: forwards blue, backwards orange, lighter for each further
chunk, the microbatch's number in every cell that has room for it. `jobs/plan.py` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from string import ascii_lowercase
from typing import Any

from rich.console import Console
from rich.text import Text

from hpcmlx.extras import require
from hpcmlx.figures import BLUE, INK, ORANGE, blank, png
from hpcmlx.parallel.schedule import Action, Kind, Schedule, Simulation, schedule, simulate

Seconds = float | Sequence[float]
Color = tuple[int, int, int]

_BASE = {Kind.FORWARD: BLUE, Kind.BACKWARD: ORANGE}
_LIGHTEST = 0.65  # of the last chunk, on the way to white
_FILL = {Kind.FORWARD: ">", Kind.BACKWARD: "<"}  # where there are no colours
_IDLE = "."
_WIDEST = 400  # columns that a terminal may have


def chart(
    name: str,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int = 1,
    forward_time: Seconds = 1.0,
    backward_time: Seconds = 2.0,
    *,
    console: Console | None = None,
) -> str:
    """A schedule as text, its lanes no wider than the console.

    Args:
        name, num_stages, num_microbatches, num_chunks: as `schedule` takes them.
        forward_time, backward_time: as `simulate` takes them; any unit will do.
        console: whose width and colours count; standard output if None.

    Returns:
        Lines that end in a newline, with escape codes where the console has colours.

    Raises:
        ConfigError: as `schedule`.
    """
    actions = schedule(name, num_stages, num_microbatches, num_chunks)
    result = simulate(actions, forward_time, backward_time)
    console = console or Console()
    colours = bool(console.color_system)
    heads = [f"rank {rank} " for rank in range(num_stages)]
    margin = max(map(len, heads))
    longest = max(len(_label(action, num_chunks)) for own in actions for action in own)
    shortest = min(end - begin for own in result.spans for begin, end in own)
    room = console.width - margin
    scale = _columns_per_second(shortest, result.seconds, longest + 2, room)
    lines = [Text(_title(name, actions, num_microbatches, num_chunks, result), "bold")]
    for rank, head in enumerate(heads):
        lane = _lane(actions[rank], result, rank, scale, num_chunks, colours)
        lines.append(Text(head.rjust(margin)) + lane)
    lines += [Text(_per_rank(result, num_chunks)), _legend(num_chunks, colours)]
    needed = margin + ceil((longest + 1) * result.seconds / shortest) if shortest > 0 else 0
    if console.width < needed <= _WIDEST:
        lines.append(Text(f"a terminal of {needed} columns has room for all numbers", "dim"))
    with console.capture() as capture:
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False)
    return capture.get()


def draw(
    name: str,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int = 1,
    forward_time: Seconds = 1.0,
    backward_time: Seconds = 2.0,
) -> bytes:
    """The same chart as PNG.

    Raises:
        ConfigError: as `schedule`, or matplotlib is not installed here.
    """
    actions = schedule(name, num_stages, num_microbatches, num_chunks)
    result = simulate(actions, forward_time, backward_time)
    require("matplotlib", "plot", "a schedule's picture", "leave it out")
    from matplotlib.patches import Patch

    with blank(12, 1.9 + 0.55 * num_stages, font_size=11) as figure:
        axes: Any = figure.subplots()
        for rank, (own, spans) in enumerate(zip(actions, result.spans, strict=True)):
            axes.broken_barh(
                [(begin, end - begin) for begin, end in spans],
                (rank - 0.42, 0.84),
                facecolor=[_hex(_color(a.kind, a.chunk, num_chunks)) for a in own],
                edgecolor="white",
                linewidth=0.6,
            )
            for action, (begin, end) in zip(own, spans, strict=True):
                if end - begin > result.seconds / 90:
                    color = _ink_on(_color(action.kind, action.chunk, num_chunks))
                    place = {"ha": "center", "va": "center_baseline"}
                    number = str(action.microbatch)
                    axes.text((begin + end) / 2, rank, number, color=color, fontsize=10, **place)
            said = f"{result.idle[rank]:.0%} idle\n{_held(result, rank, num_chunks)} in flight"
            side = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(said, (1, rank), (6, 0), va="center", **side)
        axes.set_xlim(0, result.seconds)
        axes.set_ylim(num_stages - 0.4, -0.6)
        axes.set_yticks(range(num_stages), [f"rank {rank}" for rank in range(num_stages)])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel("time")
        patches = [
            Patch(facecolor=_hex(_color(kind, chunk, num_chunks)), label=label)
            for kind, chunk, label in _kinds(num_chunks)
        ]
        patches.append(Patch(facecolor="white", edgecolor=INK, linewidth=0.6, label="idle"))
        columns = -(-len(patches) // -(-len(patches) // 7))
        figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False)
        title = _title(name, actions, num_microbatches, num_chunks, result)
        return png(figure, title, dpi=200)


# -- what both say --


def _title(
    name: str, actions: Schedule, num_microbatches: int, num_chunks: int, result: Simulation
) -> str:
    stages = _count(len(actions), "stage")
    chunks = f" of {num_chunks} chunks" if num_chunks > 1 else ""
    idle = sum(result.idle) / len(result.idle)
    return f"{name}, {stages}{chunks}, {_count(num_microbatches, 'microbatch')}: {idle:.0%} idle"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def _held(result: Simulation, rank: int, num_chunks: int) -> str:
    """In microbatches of a whole rank, of which a chunk keeps its part."""
    return f"{result.in_flight[rank] / num_chunks:.3g}"


def _kinds(num_chunks: int) -> list[tuple[Kind, int, str]]:
    """(kind, chunk, what to call it) of everything that has a colour of its own."""
    return [
        (kind, chunk, f"{kind}, chunk {chunk}" if num_chunks > 1 else str(kind))
        for kind in Kind
        for chunk in range(num_chunks)
    ]


def _color(kind: Kind, chunk: int, num_chunks: int) -> Color:
    white = _LIGHTEST * chunk / max(num_chunks - 1, 1)
    base = bytes.fromhex(_BASE[kind].removeprefix("#"))
    red, green, blue = (round(c + white * (255 - c)) for c in base)
    return red, green, blue


def _hex(color: Color) -> str:
    return "#{:02X}{:02X}{:02X}".format(*color)


def _ink_on(color: Color) -> str:
    red, green, blue = color
    return "#FFFFFF" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else INK


# -- the terminal --


def _per_rank(result: Simulation, num_chunks: int) -> str:
    last = len(result.idle) - 1
    idle = " ".join(f"{share:.0%}" for share in result.idle)
    held = " ".join(_held(result, rank, num_chunks) for rank in range(last + 1))
    return f"rank 0{f' to {last}' * (last > 0)}: idle {idle}; microbatches in flight {held}"


def _legend(num_chunks: int, colours: bool) -> Text:
    if not colours:
        parts = [f"{_FILL[kind]} {kind}" for kind in Kind] + [f"{_IDLE} idle"]
        parts += ["letters: chunks"] if num_chunks > 1 else []
        return Text("  ".join(parts))
    legend = Text()
    for kind, chunk, label in _kinds(num_chunks):
        legend.append("  ", _style(_color(kind, chunk, num_chunks))).append(f" {label}  ")
    return legend.append(_IDLE * 2, "dim").append(" idle")


def _columns_per_second(shortest: float, seconds: float, wished: int, room: int) -> float:
    """`wished` columns for the shortest cell where there is room, else a whole number of them, so
    that cells of one length look the same; where not even one fits, what fits.

    Args:
        shortest, seconds: lengths of the shortest cell and of the chart.
        room: columns for the chart.
    """
    limit = max(room, 1) / seconds
    columns = min(wished, int(limit * shortest + 1e-9))
    return columns / shortest if columns else limit


def _lane(
    own: Sequence[Action],
    result: Simulation,
    rank: int,
    scale: float,
    num_chunks: int,
    colours: bool,
) -> Text:
    lane, at = Text(), 0
    for action, (begin, end) in zip(own, result.spans[rank], strict=True):
        left, right = round(begin * scale), round(end * scale)
        lane.append(_IDLE * (left - at), "dim")
        if colours:
            color = _color(action.kind, action.chunk, num_chunks)
            lane.append(_colored_cell(str(action.microbatch), right - left), _style(color))
        else:
            lane.append(_plain_cell(action, right - left, num_chunks))
        at = right
    return lane.append(_IDLE * (round(result.seconds * scale) - at), "dim")


def _plain_cell(action: Action, width: int, num_chunks: int) -> str:
    label, fill = _label(action, num_chunks), _FILL[action.kind]
    return label.center(width, fill) if len(label) < width else fill * width


def _colored_cell(number: str, width: int) -> str:
    """It begins with a thin line: cells of one colour may touch."""
    if width < 2:
        return " " * width
    room = width - 1
    return "\N{LEFT ONE EIGHTH BLOCK}" + (number if len(number) <= room else "").center(room)


def _label(action: Action, num_chunks: int) -> str:
    letter = ascii_lowercase[action.chunk % 26] if num_chunks > 1 else ""
    return f"{action.microbatch}{letter}"


def _style(color: Color) -> str:
    return f"{_ink_on(color)} on {_hex(color)}"
