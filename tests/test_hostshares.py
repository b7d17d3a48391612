"""Default shares and stages on hosts that differ, and what does not fit."""

from __future__ import annotations

from itertools import product
from math import inf
from random import Random
from types import SimpleNamespace

import pytest

from hpcmlx.errors import ConfigError
from hpcmlx.launch.chips import GIB
from hpcmlx.launch.placement import RankHost, RankHosts
from hpcmlx.models.balance import Balance, stage_layers
from hpcmlx.parallel.dataflow import LOGITS
from hpcmlx.parallel.hostshares import (
    default_shares,
    find_places,
    say_layers,
    say_shares,
    stage_limits,
    stage_speeds,
)
from hpcmlx.parallel.partition import balance_layers, capped_shares, split_heads
from hpcmlx.parallel.tracing import Needs


def hosts(*ranks: tuple[str, float | None, float | None]) -> RankHosts:
    """From (name, GB/s, GiB) of each rank."""
    made = [RankHost(name, speed, gib and gib * GIB) for name, speed, gib in ranks]
    return RankHosts("macs.yaml", tuple(made))


def test_shares_follow_bandwidth():
    places = find_places(hosts(("a", 819, 96), ("b", 410, 36)), pp=1, tp=2)
    shares = default_shares(places, 8 * GIB)
    assert shares == [2.0, 1.0]
    assert say_shares(places, shares) == "tp shares 2.0:1.0 from macs.yaml: 819 and 410 GB/s"
    # What is logged can be given by hand: the same heads on the same ranks.
    assert [h.num_query for h in split_heads(9, 3, shares)] == [6, 3]


def test_stages_follow_bandwidth():
    places = find_places(hosts(("a", 600, None), ("b", 200, None)), pp=2, tp=1)
    speeds = stage_speeds(places, (1.0,))
    assert speeds == [600, 200] and stage_limits(places, (1.0,)) == [inf, inf]
    assert balance_layers([1.0] * 12, 2, speeds=speeds) == [9, 3]
    assert balance_layers([1.0] * 12, 2, last_cost=2, speeds=speeds) == [11, 1]
    assert say_layers(places, [9, 3]) == "pp layers 9+3 from macs.yaml: 600 and 200 GB/s"
    assert places.differ


def test_a_place_counts_for_the_weakest_rank_that_has_it():
    ranks = hosts(
        *[("a", 800.0, 100), ("b", 400.0, 100), ("c", 400.0, 100), ("d", 400.0, 100)],
        *[("e", 600.0, 100), ("f", 500.0, 40), ("g", 300.0, 100), ("h", 500.0, 100)],
    )
    places = find_places(ranks, pp=2, tp=2)  # two replicas
    assert places.speeds == ((600, 400), (300, 400))
    assert places.limits == ((75 * GIB, 30 * GIB), (75 * GIB, 75 * GIB))
    shares = default_shares(places, 10 * GIB)
    assert shares == [1.12, 1.0]  # 900 : 800
    parts = [1.12 / 2.12, 1 / 2.12]
    slowest = [min(600 / parts[0], 400 / parts[1]), min(300 / parts[0], 400 / parts[1])]
    assert stage_speeds(places, shares) == pytest.approx(slowest)
    assert say_shares(places, shares).endswith(": 600+300 and 400+400 GB/s")


def test_memory_bounds_shares_and_what_one_cannot_take_the_other_does():
    places = find_places(hosts(("a", 800, 8), ("b", 100, 64)), pp=1, tp=2)
    assert default_shares(places, 4 * GIB) == [8.0, 1.0]
    shares = default_shares(places, 24 * GIB)  # a has room for 6 of them
    assert shares == [1.0, 3.0]
    assert say_shares(places, shares) == (
        "tp shares 1.0:3.0 from macs.yaml: 800 and 100 GB/s, within memory for 6.0 GiB, 48.0 GiB of"
        " weights"
    )
    with pytest.raises(ConfigError) as caught:
        default_shares(places, 55 * GIB)
    assert str(caught.value) == (
        "the model's weights take 55.0 GiB, but a, b have room for 54.0 GiB (75% of the memory in "
        "macs.yaml): use more hosts, or weights of fewer bits"
    )


def test_without_a_bandwidth_all_are_alike_but_memory_counts():
    places = find_places(hosts(("a", 800, 8), ("b", None, 64), ("c", None, None)), pp=1, tp=3)
    assert places.unknown == ("b", "c") and not places.differ
    assert default_shares(places, 9 * GIB) == [1.0, 1.0, 1.0]
    assert default_shares(places, 36 * GIB) == [1.0, 2.5, 2.5]


@pytest.mark.parametrize("seed", range(50))
def test_capped_shares_by_their_definition(seed):
    random = Random(seed)
    size = random.randint(1, 5)
    weights = [random.uniform(0.1, 9) for _ in range(size)]
    limits = [random.choice([inf, random.uniform(0.05, 1)]) for _ in range(size)]
    if sum(limits) < 1:
        with pytest.raises(ValueError, match="has room"):
            capped_shares(weights, limits)
        return
    shares = capped_shares(weights, limits)
    assert sum(shares) == pytest.approx(1)
    rates = [s / w for s, w in zip(shares, weights, strict=True)]
    for share, limit, rate in zip(shares, limits, rates, strict=True):
        assert share <= limit * (1 + 1e-12)
        if share < limit * (1 - 1e-9):  # who has room has no less for its weight than anybody
            assert rate == pytest.approx(max(rates))


@pytest.mark.parametrize("seed", range(30))
def test_the_slowest_stage_is_as_fast_as_it_can_be(seed):
    random = Random(seed)
    num_layers, stages = random.randint(3, 8), random.randint(2, 3)
    costs = [random.randint(1, 9) for _ in range(num_layers)]
    head, speeds = random.randint(0, 9), [random.choice([1, 2, 5]) for _ in range(stages)]
    limits = [random.randint(4, 40) for _ in range(stages)]

    def load(start: int, stop: int) -> int:
        return sum(costs[start:stop])

    def cuts():
        for counts in product(range(1, num_layers), repeat=stages):
            if sum(counts) == num_layers:
                starts = [sum(counts[:i]) for i in range(stages)]
                yield counts, [load(a, a + n) for a, n in zip(starts, counts, strict=True)]

    def slowest(loads: list[int]) -> float:
        loads = [*loads[:-1], loads[-1] + head]
        return max(n / speed for n, speed in zip(loads, speeds, strict=True))

    fitting = {c: slowest(ns) for c, ns in cuts() if all(map(int.__le__, ns, limits))}

    def fits(stage: int, start: int, stop: int) -> bool:
        return load(start, stop) <= limits[stage]

    if not fitting:
        with pytest.raises(ValueError, match="no cut"):
            balance_layers(costs, stages, head, speeds, fits)
        return
    found = tuple(balance_layers(costs, stages, head, speeds, fits))
    assert fitting[found] == pytest.approx(min(fitting.values()))


def flow_of(num_layers: int, tied: bool) -> tuple[SimpleNamespace, dict[str, int]]:
    """A stand-in for the dataflow of a model with layers of 10 bytes, embedding and head of 20."""
    layers = {f"layers.{i}.w": i for i in range(num_layers)}
    head = "embed" if tied else "head"
    needs = {(i, 0): Needs(parameters={name}) for name, i in layers.items()}
    needs[(0, 0)].parameters.add("embed")
    needs[LOGITS] = Needs(parameters={head})
    sizes = dict.fromkeys(layers, 10) | {"embed": 20, head: 20}
    places = {**layers, "embed": None, head: None}
    return SimpleNamespace(parameter_layer=places, needs=needs), sizes


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_must_fit_its_host_with_embedding_and_head(tied):
    flow, sizes = flow_of(8, tied)

    def layers(*limits: float) -> list[int]:
        ranges = stage_layers(8, 2, None, flow, sizes, None, (9, 1), limits, "macs.yaml")
        return [stop - start for start, stop in ranges]

    assert layers(inf, inf) == [7, 1]
    assert layers(90, inf) == [7, 1]
    assert layers(89, inf) == [6, 2]  # the embedding takes 20
    assert layers(50, 70) == [3, 5]  # the head, too, also where it is the embedding again
    with pytest.raises(ConfigError) as caught:
        layers(49, 69)
    total = "100 B" if tied else "120 B"
    assert f"take {total}, the stages have room for 49 B, 69 B (75% of" in str(caught.value)


def balance(pp: int, *ranks: tuple[str, float | None, float | None], **given) -> Balance:
    """Of the model of `flow_of`, on hosts of (name, GB/s, bytes)."""
    made = tuple(RankHost(*rank) for rank in ranks)
    mesh = SimpleNamespace(
        dims=SimpleNamespace(pp=pp, tp=1, dp=1), hosts=RankHosts("macs.yaml", made)
    )
    return Balance(mesh, flow_of(8, tied=False)[1], given.get("shares"), given.get("layers"))


def test_the_memory_of_hosts_bounds_their_stages():
    flow, _ = flow_of(8, tied=False)

    def layers(chunks: int, *bounds: float) -> list[int]:
        ranks = [
            (name, speed, n / 0.75) for name, speed, n in zip("ab", (9, 1), bounds, strict=True)
        ]
        ranges = balance(2, *ranks).stage_layers(8, 2 * chunks, flow)
        return [stop - start for start, stop in ranges]

    assert layers(1, 1000, 1000) == [7, 1]
    assert layers(1, 50, 71) == [3, 5]
    # A host with two chunks has half of its room for each: 40 are two layers and the embedding.
    assert layers(2, 1000, 1000) == [3, 1, 3, 1]
    assert layers(2, 80, 1000)[0] == 2
    with pytest.raises(ConfigError, match=r"no cut into 2 stages fits.*room for 66 B, 56 B"):
        layers(1, 65.6, 55.6)


def test_a_model_that_does_not_fit_is_refused_where_nothing_is_left_to_choose():
    with pytest.raises(ConfigError, match=r"take 120 B, but a have room for 90 B"):
        balance(1, ("a", 100, 120))
    balance(1, ("a", 100, 160))
    balance(1, ("a", 100, 120), shares=[1.0])  # whoever gives shares knows best
