"""`jobs/plan.py links`: what the measured links mean for a model, as text. No MPI, no MLX."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hpcmlx.bench.link_cost import MAX_ORDERED, Cost, Costs, Shape
from hpcmlx.bench.link_file import Links, read_links
from hpcmlx.bench.link_table import format_seconds, verdict
from hpcmlx.errors import ConfigError, UsageError

#: Links are not measured finer: an order that gains less is not worth a change.
_WORTH = 0.95


def report(links_file: Path, model: Path | None, layers: int, hidden: int, itemsize: int) -> str:
    """What a token waits for in each layout of the measured hosts, and in which order of hosts
    that is least.

    Args:
        model: a directory with config.json, from which layers and hidden size are taken.
        layers, hidden: of the model where no directory is given.
        itemsize: bytes of a number: 2 on a GPU, 4 on a CPU.

    Raises:
        UsageError: neither a model nor layers and hidden size.
        ConfigError: the model's config.json does not say them.
        InputError, IntegrityError: of `read_links`.
    """
    if model is not None:
        layers, hidden = _read_shape(model)
    if layers < 1 or hidden < 1 or itemsize < 1:
        raise UsageError("give --model DIR, or --layers and --hidden of the model")
    links = read_links(links_file)
    costs = Costs(links, Shape(layers, hidden, itemsize))
    num_hosts = len(links.hosts)
    sizes = [pp for pp in range(1, num_hosts + 1) if num_hosts % pp == 0]
    now = [costs.layout(pp) for pp in sizes]
    lines = [
        f"{num_hosts} hosts ({', '.join(links.hosts)}), measured {links.about.get('date', '')}",
        *verdict(links),
        "",
        f"{layers} layers of {hidden} numbers of {itemsize} bytes; one rank a host. "
        "What a token of a row waits for:",
        *_table(now),
        "",
        *_orders(links, costs, now),
    ]
    return "\n".join(lines) + "\n"


def _table(costs: Sequence[Cost]) -> list[str]:
    rows = [("layout", "all-reduces", "activations", "together")]
    for cost in costs:
        times = (cost.all_reduces, cost.activations, cost.total)
        a, b, c = (format_seconds(seconds) if seconds else "-" for seconds in times)
        rows.append((cost.layout, a, b, c))
    return [f"{a:10}{b:>13}{c:>13}{d:>13}" for a, b, c, d in rows]


def _orders(links: Links, costs: Costs, now: Sequence[Cost]) -> list[str]:
    """For each layout the order in which the host file should name the hosts."""
    if len(links.hosts) > MAX_ORDERED:
        return [f"other orders of the hosts are tried for up to {MAX_ORDERED}"]
    lines = []
    for cost in now:
        best = costs.best(cost.pp)
        if best.total < _WORTH * cost.total:
            names = ", ".join(links.hosts[host] for host in best.order)
            gain = f"{format_seconds(best.total)} instead of {format_seconds(cost.total)}"
            lines.append(f"{cost.layout}: name the hosts in the order {names}: {gain}")
    return lines or ["no other order of the hosts in the host file is better"]


def _read_shape(model: Path) -> tuple[int, int]:
    path = model / "config.json"
    try:
        config = json.loads(path.read_text())
        config = config.get("text_config", config)
        return int(config["num_hidden_layers"]), int(config["hidden_size"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} does not say num_hidden_layers and hidden_size ({error!r}): give --layers "
            "and --hidden"
        ) from error
