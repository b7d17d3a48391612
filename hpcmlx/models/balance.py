"""Which layers each pipeline stage has and how wide each tensor rank is, where not asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache

from hpcmlx.errors import ConfigError
from hpcmlx.mesh import Mesh
from hpcmlx.parallel.dataflow import LOGITS, Dataflow
from hpcmlx.parallel.hostshares import (
    USABLE,
    Places,
    check_room,
    default_shares,
    find_places,
    say_layers,
    say_shares,
    stage_limits,
    stage_speeds,
)
from hpcmlx.parallel.partition import Interval, balance_layers, offsets
from hpcmlx.units import format_bytes

_log = logging.getLogger(__name__)


class Balance:
    """The layout of one model on the hosts of a mesh; equal where nothing is known of them.

    Attributes:
        tp_shares: one per tensor rank.
    """

    def __init__(
        self,
        mesh: Mesh,
        sizes: Mapping[str, int],
        tp_shares: Sequence[float] | None,
        pp_layers: Sequence[int] | None,
        *,
        speak: bool = True,
    ):
        """
        Args:
            sizes: bytes of every parameter of the whole model.
            tp_shares: those that are asked for; None: by the hosts' bandwidth.
            pp_layers: likewise.
            speak: log what is taken from the hosts' description.

        Raises:
            ConfigError: the hosts have no room for the model.
        """
        dims = mesh.dims
        self._speak, self._sizes, self._pp_layers = speak, sizes, pp_layers
        self.tp_shares = tuple(tp_shares) if tp_shares else (1.0,) * dims.tp
        self._places: Places | None = None
        if mesh.hosts is None:
            return
        places = find_places(mesh.hosts, dims.pp, dims.tp)
        if not tp_shares and not pp_layers:
            check_room(places, sum(sizes.values()))
        if (tp_shares or dims.tp == 1) and (pp_layers or dims.pp == 1):
            return  # nothing is left to choose
        self._places = places
        if places.unknown:
            unknown = ", ".join(places.unknown)
            self._say(
                f"{places.source} says no bandwidth of {unknown}: hosts count as equally fast"
            )
        if tp_shares is None and dims.tp > 1:
            self.tp_shares = tuple(default_shares(places, sum(sizes.values())))
            if len(set(self.tp_shares)) > 1:
                self._say(say_shares(places, self.tp_shares))

    def stage_layers(
        self,
        num_layers: int,
        num_stages: int,
        flow: Dataflow | None,
        work: Sequence[float] | None = None,
    ) -> list[Interval]:
        """`stage_layers`, on these hosts."""
        asked = self._pp_layers
        if self._places is None or asked is not None or num_stages == 1:
            return stage_layers(num_layers, num_stages, asked, flow, self._sizes, work)
        chunks = num_stages // len(self._places.speeds)
        ranges = stage_layers(
            num_layers,
            num_stages,
            None,
            flow,
            self._sizes,
            work,
            stage_speeds(self._places, self.tp_shares) * chunks,
            [limit / chunks for limit in stage_limits(self._places, self.tp_shares)] * chunks,
            self._places.source,
        )
        if self._places.differ:
            self._say(say_layers(self._places, [stop - start for start, stop in ranges]))
        return ranges

    def _say(self, text: str) -> None:
        if self._speak:
            _log.info("%s", text)


def stage_layers(
    num_layers: int,
    num_stages: int,
    pp_layers: Sequence[int] | None,
    flow: Dataflow | None,
    sizes: Mapping[str, int],
    work: Sequence[float] | None = None,
    speeds: Sequence[float] | None = None,
    limits: Sequence[float] | None = None,
    source: str = "",
) -> list[Interval]:
    """Layers of each stage: as asked, else so that the stage that takes longest to read what a
    token needs takes as short as possible. The head counts (a fifth of a small model); the
    embedding is a lookup, but takes room.

    Args:
        sizes: bytes of every parameter.
        work: what to multiply the bytes of each layer with, and of the head last; None is 1.
        speeds: how fast each stage reads, in any unit; None: all alike.
        limits: bytes that each stage has room for; None: no limit.
        source: of the limits, for messages.

    Raises:
        ConfigError: there are not as many layers as asked for, or stages do not have the room.
    """
    if num_stages == 1 or flow is None:
        return [(0, num_layers)]
    if pp_layers is not None:
        if sum(pp_layers) != num_layers:
            raise ConfigError(
                f"parallel.pp_layers={list(pp_layers)} adds up to {sum(pp_layers)} layers, "
                f"the model has {num_layers}"
            )
        return offsets(list(pp_layers))
    if num_stages > num_layers:
        raise ConfigError(
            f"parallel.pp={num_stages} stages but the model has {num_layers} layers; "
            f"use parallel.pp={num_layers} at most"
        )
    layer_bytes = [0] * num_layers
    for path, layer in flow.parameter_layer.items():
        if layer is not None:
            layer_bytes[layer] += sizes[path]
    outside = {path for path, layer in flow.parameter_layer.items() if layer is None}
    of_head = outside & set(flow.needs[LOGITS].parameters)
    head = sum(sizes[path] for path in of_head)
    factors = [1.0] * (num_layers + 1) if work is None else work
    costs = [round(n * factor) for n, factor in zip(layer_bytes, factors[:-1], strict=True)]
    # What each layer needs of the parameters outside, such as the embedding.
    needed: list[set[str]] = [set() for _ in range(num_layers)]
    for key, needs in flow.needs.items():
        if key != LOGITS:
            needed[key[0]] |= outside & set(needs.parameters)

    @cache
    def num_bytes(start: int, stop: int) -> int:
        extra = set().union(*needed[start:stop], of_head if stop == num_layers else ())
        return sum(layer_bytes[start:stop]) + sum(sizes[path] for path in extra)

    def fits(stage: int, start: int, stop: int) -> bool:
        return limits is None or num_bytes(start, stop) <= limits[stage]

    try:
        last = round(head * factors[-1])
        return offsets(balance_layers(costs, num_stages, last, speeds, fits))
    except ValueError:
        room = ", ".join(format_bytes(limit) for limit in limits or ())
        raise ConfigError(
            f"no cut into {num_stages} stages fits: the model's weights take "
            f"{format_bytes(num_bytes(0, num_layers))}, the stages have room for {room} "
            f"({USABLE:.0%} of the memory in {source}); use more hosts, or weights of fewer bits"
        ) from None
