"""The link bench: the slow link is named whatever the others are, what was measured is read again,
and a plan follows from it."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from hpcmlx.bench import link_plan
from hpcmlx.bench.link_cost import Costs, Shape
from hpcmlx.bench.link_file import Links, read_links, write_links
from hpcmlx.bench.link_table import verdict
from hpcmlx.bench.link_verdict import describe, slow_links
from hpcmlx.errors import ConfigError, InputError, IntegrityError, UsageError
from tests.fixtures import ROOT, mpirun, run_line

MB, US = 1e6, 1e-6


def matrix(num_hosts: int, usual: float, changes: dict[tuple[int, ...], float]) -> np.ndarray:
    """[hosts, hosts] of `usual`; a change is of all links of a host, of a pair, or, with a third
    entry, of one direction."""
    values = np.full((num_hosts, num_hosts), usual)
    for place, value in changes.items():
        if len(place) == 1:
            values[place[0], :] = values[:, place[0]] = value
        else:
            values[place[:2]] = value
            if len(place) == 2:
                values[place[::-1]] = value
    np.fill_diagonal(values, np.nan)
    return values


def links(bandwidth: np.ndarray, latency: np.ndarray | None = None, **other: object) -> Links:
    num_hosts = len(bandwidth)
    latency = matrix(num_hosts, 50 * US, {}) if latency is None else latency
    values = {
        "hosts": tuple(f"host{i}" for i in range(num_hosts)),
        "ranks": (1,) * num_hosts,
        "kinds": ("Ethernet",) * num_hosts,
        "latency_best": latency,
        "latency_quartiles": np.stack([latency, latency], -1),
        "bandwidth_quartiles": np.stack([bandwidth, bandwidth], -1),
        "sizes": np.array([8, 4096, 1 << 20]),
        "curves": {"all_reduce mlx": np.array([[1, 2, 3], [2, 4, 6], [np.nan] * 3]) * 1e-4},
        "about": {"date": "2026-01-02", "jaccl": "no"},
    }
    return Links(bandwidth=bandwidth, latency=latency, **(values | other))


@pytest.mark.parametrize("num_hosts", [3, 4, 5, 8])
@pytest.mark.parametrize("slow", [0, 1, -1])
def test_a_slow_host_is_named(num_hosts, slow):
    slow %= num_hosts
    bandwidth = matrix(num_hosts, 118 * MB, {(slow,): 11.8 * MB})
    noise = np.random.default_rng(num_hosts).uniform(0.8, 1.25, bandwidth.shape)
    found = slow_links(matrix(num_hosts, 50 * US, {}), bandwidth * noise)
    assert [s.host for s in found] == [slow]
    assert found[0].peers == tuple(i for i in range(num_hosts) if i != slow)
    assert found[0].value < 20 * MB < 80 * MB < found[0].usual


@pytest.mark.parametrize("num_hosts", [3, 4, 6])
def test_a_slow_pair_is_not_a_slow_host(num_hosts):
    found = slow_links(
        matrix(num_hosts, 50 * US, {}), matrix(num_hosts, 6000 * MB, {(0, 2): 3e8, (2, 0): 3e8})
    )
    assert [(s.host, s.peers, s.what) for s in found] == [(0, (2,), "bandwidth")]


def test_two_slow_hosts_of_four_and_a_pair():
    bandwidth = matrix(5, 118 * MB, {(1,): 11 * MB, (3,): 12 * MB, (0, 2): 30 * MB})
    found = slow_links(matrix(5, 50 * US, {}), bandwidth)
    assert [(s.host, len(s.peers)) for s in found] == [(1, 4), (3, 4), (0, 1)]


def test_one_fast_cable_makes_nobody_slow():
    assert slow_links(matrix(6, 50 * US, {}), matrix(6, 118 * MB, {(0, 1): 6e9})) == []


def test_hosts_that_differ_a_little_are_not_slow():
    noise = np.random.default_rng(0).uniform(0.7, 1.3, (8, 8))
    assert slow_links(matrix(8, 50 * US, {}) * noise, matrix(8, 118 * MB, {}) * noise) == []
    assert slow_links(matrix(4, 50 * US, {(1,): 200 * US}), matrix(4, 118 * MB, {})) == []


def test_of_two_hosts_none_is_slow():
    assert slow_links(matrix(2, 50 * US, {}), matrix(2, 118 * MB, {})) == []
    assert "2 hosts" in verdict(links(matrix(2, 118 * MB, {})))[0]


def test_only_one_direction_is_slow():
    bandwidth = matrix(4, 118 * MB, {(2, i, 0): 11 * MB for i in (0, 1, 3)})
    found = slow_links(matrix(4, 50 * US, {}), bandwidth)
    assert [(s.host, s.way) for s in found] == [(2, "sending")]
    assert "is slow in sending: 11 MB/s to a, b and d" in describe(found[0], "abcd", [""] * 4)
    found = slow_links(matrix(4, 50 * US, {}), bandwidth.T)
    assert [(s.host, s.way) for s in found] == [(2, "receiving")]


def test_a_late_host_is_named_once():
    late = matrix(4, 10 * US, {(3,): 300 * US})
    found = slow_links(late, matrix(4, 6e9, {}))
    assert [(s.host, s.what) for s in found] == [(3, "latency")]
    said = describe(found[0], "abcd", ["Thunderbolt 5"] * 3 + ["Ethernet"])
    assert "d is late: 300 µs to a, b and c, the others have 10 µs (30 times that)" in said
    assert "on Ethernet, the others on Thunderbolt 5" in said
    slow = slow_links(late, matrix(4, 6e9, {(3,): 1e8}))
    assert [(s.host, s.what) for s in slow] == [(3, "bandwidth")]


def test_busy_hosts_make_no_link_late():
    """Medians say how busy the hosts were, the fastest message what the link can do."""
    noise = matrix(4, 17 * US, {(0, 3): 777 * US})
    busy = links(matrix(4, 118 * MB, {}), noise, latency_best=matrix(4, 15 * US, {}))
    assert verdict(busy) == ["no link is slow beside the others"]
    assert Costs(busy, Shape(1, 1)).send(0, 3, 0) == pytest.approx(15 * US)
    late = links(matrix(4, 118 * MB, {}), noise)
    assert "the link host0 - host3 is late: 777 µs, others have 17 µs" in verdict(late)[0]


def test_what_is_said():
    bandwidth = matrix(3, 118 * MB, {(2,): 11.5 * MB})
    assert verdict(links(bandwidth)) == [
        "host2 is slow: 12 MB/s to host0 and host1, the others have 118 MB/s (a tenth): "
        "look at its cable, port and switch; see jobs/doctor.py"
    ]
    macs = matrix(4, 6.2e9, {(1,): 2.9e9})
    kinds = ("Thunderbolt 5", "Thunderbolt 4", "Thunderbolt 5", "Thunderbolt 5")
    assert verdict(links(macs, kinds=kinds)) == [
        "host1 is slow: 2.9 GB/s to host0, host2 and host3, the others have 6.2 GB/s (half): it is "
        "on Thunderbolt 4, the others on Thunderbolt 5: use a Thunderbolt 5 cable and port"
    ]
    cable = links(matrix(4, 6.2e9, {(1, 3): 1e9}), kinds=("Thunderbolt 5",) * 4)
    assert verdict(cable) == [
        "the link host1 - host3 is slow: 1.0 GB/s, others have 6.2 GB/s (1/6.2): a Thunderbolt 4 "
        "cable in between? see jobs/doctor.py"
    ]
    wifi = verdict(links(macs, kinds=("Ethernet", "Wi-Fi", "Ethernet", "Ethernet")))
    assert "it is on Wi-Fi: plug in a cable" in wifi[0]
    assert verdict(links(matrix(4, 6e9, {}))) == ["no link is slow beside the others"]


def test_links_are_kept(tmp_path):
    kept = links(matrix(3, 118 * MB, {(2,): 11 * MB}))
    write_links(tmp_path / "link.h5", kept)
    found = read_links(tmp_path / "link.h5")
    for name in ("hosts", "ranks", "kinds", "about"):
        assert getattr(found, name) == getattr(kept, name)
    for name in (
        "latency",
        "latency_best",
        "bandwidth",
        "latency_quartiles",
        "bandwidth_quartiles",
        "sizes",
    ):
        np.testing.assert_array_equal(getattr(found, name), getattr(kept, name))
    np.testing.assert_array_equal(found.curves["all_reduce mlx"], kept.curves["all_reduce mlx"])


def test_what_is_no_link_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="bench.py link"):
        read_links(tmp_path / "link.h5")
    write_links(tmp_path / "link.h5", links(matrix(3, MB, {})))
    data = bytearray((tmp_path / "link.h5").read_bytes())
    (tmp_path / "short.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match="damaged"):
        read_links(tmp_path / "short.h5")


def test_cost_of_a_token():
    """30 layers, 2,000 bytes: by hand."""
    plain = links(matrix(4, 100 * MB, {}), curves={})
    costs = Costs(plain, Shape(30, 1000, 2))
    one = 50 * US + 2000 / (100 * MB)
    assert costs.layout(4).all_reduces == 0
    assert costs.layout(4).activations == pytest.approx(3 * one + 50 * US + 4 / (100 * MB))
    assert costs.layout(1).all_reduces == pytest.approx(60 * 2 * one)  # two rounds of doubling
    assert costs.layout(2).all_reduces == pytest.approx(60 * one)
    assert costs.layout(2).activations == pytest.approx(one + 50 * US + 4 / (100 * MB))
    with pytest.raises(UsageError, match="4 hosts do not make 3"):
        costs.layout(3)


def test_what_was_measured_counts():
    """The curve has 400 µs at 4,096 bytes; at the middle between two sizes the mean."""
    costs = Costs(links(matrix(4, 100 * MB, {})), Shape(10, 2048, 2))
    assert costs.layout(1).all_reduces == pytest.approx(20 * 400 * US)
    middle = Costs(links(matrix(4, 100 * MB, {})), Shape(10, (8 + 4096) // 4, 2))
    assert middle.measured == pytest.approx(300 * US)
    # Beyond what was measured there is only the model.
    assert Costs(links(matrix(4, 100 * MB, {})), Shape(10, 1 << 19, 2)).measured is None


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_the_best_order_is_the_cheapest_of_all(pp):
    changes = {(1,): 10 * MB, (0, 3): 20 * MB}
    costs = Costs(links(matrix(4, 100 * MB, changes)), Shape(8, 4096, 2))
    best = costs.best(pp)
    every = [costs.layout(pp, order) for order in itertools.permutations(range(4))]
    assert best.total <= 1.03 * min(cost.total for cost in every)
    if pp == 4:
        assert 1 in (best.order[0], best.order[-1])  # one slow hop instead of two


def test_the_report(tmp_path):
    write_links(tmp_path / "link.h5", links(matrix(4, 100 * MB, {(1,): 10 * MB})))
    line = [sys.executable, str(ROOT / "jobs/plan.py"), "links", str(tmp_path / "link.h5")]
    line += ["--layers", "8", "--hidden", "4096"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    assert "host1 is slow: 10 MB/s to host0, host2 and host3" in done.stdout
    assert [text.split()[0] for text in done.stdout.splitlines() if text.startswith("pp")] == [
        *("pp1_tp4", "pp2_tp2", "pp4_tp1"),
        "pp4_tp1:",
    ]
    order = next(text for text in done.stdout.splitlines() if text.startswith("pp4_tp1:"))
    assert "host0, host2, host3, host1" in order
    loaded = "import sys, hpcmlx.bench.link_plan as p; print('mlx.core' in sys.modules)"
    light = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert light.stdout == "False\n", light.stderr


def test_the_report_needs_a_model(tmp_path):
    write_links(tmp_path / "link.h5", links(matrix(3, MB, {})))
    with pytest.raises(UsageError, match="--layers"):
        link_plan.report(tmp_path / "link.h5", None, 0, 0, 2)
    with pytest.raises(ConfigError, match=r"config\.json"):
        link_plan.report(tmp_path / "link.h5", tmp_path, 0, 0, 2)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2, "hidden_size": 64}')
    assert "2 layers of 64" in link_plan.report(tmp_path / "link.h5", tmp_path, 0, 0, 2)


def test_two_ranks_of_one_host(tmp_path):
    """One host has a link, too, between two ranks of it; alone there is none."""
    line = [sys.executable, str(ROOT / "jobs/bench.py"), "link", "--seconds", "0.02"]
    line += ["--run-dir", str(tmp_path / "run")]
    outcome = run_line([*mpirun("-n", "2"), *line], timeout=120)
    assert outcome.code == 0, outcome.err
    found = read_links(tmp_path / "run/link.h5")
    assert found.ranks == (2,)
    assert found.bandwidth[0, 0] > 10 * MB and 0 < found.latency[0, 0] < 0.1
    names = {f"{what} {by}" for what in ("all_reduce", "all_gather") for by in ("mpi4py", "mlx")}
    assert set(found.curves) == names
    assert all(
        np.isfinite(curve[0]).all() and (curve[0] > 0).all() for curve in found.curves.values()
    )
    assert "JACCL: " in outcome.out and "no other link to compare with" in outcome.out
    assert (tmp_path / "run/link.png").read_bytes().startswith(b"\x89PNG")
    planned = link_plan.report(tmp_path / "run/link.h5", None, 8, 64, 2)
    assert "pp1_tp1" in planned and "-" in planned.split("pp1_tp1")[1]
    alone = run_line(line)
    assert alone.code == 2 and "mpirun" in alone.err
