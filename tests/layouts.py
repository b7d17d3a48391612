"""The layout matrix as data: what is tested on how many ranks."""

from __future__ import annotations

from dataclasses import dataclass

from hpcmlx.mesh import ParallelDims


@dataclass(frozen=True)
class Layout:
    """A mesh with its shares; prints as a test id."""

    dp: int = 1
    pp: int = 1
    tp: int = 1
    tp_shares: tuple[float, ...] | None = None
    pp_layers: tuple[int, ...] | None = None  # 0 stands for all the rest

    def layers(self, num_layers: int) -> list[int] | None:
        """`parallel.pp_layers` for a model of `num_layers`."""
        if self.pp_layers is None:
            return None
        rest = num_layers - sum(self.pp_layers)
        return [n or rest for n in self.pp_layers]

    @property
    def dims(self) -> ParallelDims:
        return ParallelDims(self.dp, self.pp, self.tp)

    def __str__(self) -> str:
        shares = "" if self.tp_shares is None else "_shares" + "-".join(map(str, self.tp_shares))
        layers = "" if self.pp_layers is None else "_layers" + "-".join(map(str, self.pp_layers))
        return f"{self.dims}{shares}{layers}"


# Any model with at least four layers and two query heads per rank or so.
TINY = {
    1: [Layout()],
    2: [Layout(tp=2), Layout(pp=2), Layout(tp=2, tp_shares=(2, 1)), Layout(pp=2, pp_layers=(0, 1))],
    3: [Layout(tp=3), Layout(pp=3)],
    4: [Layout(pp=2, tp=2), Layout(dp=2, pp=2), Layout(dp=2, tp=2)],
}

# SmolLM2-135M: 30 layers, 9 heads, 3 key-value heads.
SMOLLM2 = {
    1: [Layout()],
    2: [
        Layout(tp=2),
        Layout(pp=2),
        Layout(tp=2, tp_shares=(2, 1)),
        Layout(pp=2, pp_layers=(11, 19)),
        Layout(dp=2),
    ],
    3: [Layout(tp=3), Layout(pp=3), Layout(tp=3, tp_shares=(3, 1, 2))],
    4: [Layout(tp=4), Layout(pp=2, tp=2), Layout(pp=2, tp=2, tp_shares=(1, 2), pp_layers=(20, 10))],
}


def cases(table: dict[int, list[Layout]], size: int) -> list[Layout]:
    """The layouts for a world of `size` ranks; all of a suite's sizes are in the table."""
    return table[size]
