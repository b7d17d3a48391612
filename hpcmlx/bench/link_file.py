"""What the links between hosts can do, as the link bench has measured it and keeps it: `link.h5`.

`link.py` writes it under mpirun; `jobs/plan.py links` reads it, without MPI or MLX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from hpcmlx.errors import InputError, IntegrityError
from hpcmlx.files import write_hdf5

FILE = "link.h5"
_FORMAT = 1
_PAIRS = {
    "latency": ("s", "one way, of 8 bytes: half the median round trip"),
    "latency_best": ("s", "half the fastest round trip"),
    "bandwidth": ("B/s", "from the row's host to the column's, median over large messages"),
}
_QUARTILES = {name: _PAIRS[name] for name in ("latency", "bandwidth")}


@dataclass(frozen=True)
class Links:
    """Hosts in the order of their ranks, and what lies between them.

    Attributes:
        hosts: their names, [hosts].
        ranks: how many ranks each had, [hosts].
        kinds: of the link each host's messages take ("Thunderbolt 5"); "" where not known, [hosts].
        latency: seconds one way, [hosts, hosts]; the diagonal is between two ranks of the host, NaN
            where it had one.
        latency_best: of the fastest round trip: busy hosts only add to what a link takes, so links
            are compared by it.
        bandwidth: bytes per second from the row's host to the column's, likewise.
        latency_quartiles: lower and upper, [hosts, hosts, 2].
        bandwidth_quartiles: likewise.
        sizes: bytes that each rank gives to a collective, [sizes].
        curves: of collectives over all ranks, as in "all_reduce mpi4py": lower quartile, median
            and upper quartile in seconds, [sizes, 3]; NaN where it was left out.
        about: date, versions, what was left out and why.
    """

    hosts: tuple[str, ...]
    ranks: tuple[int, ...]
    kinds: tuple[str, ...]
    latency: np.ndarray
    latency_best: np.ndarray
    bandwidth: np.ndarray
    latency_quartiles: np.ndarray
    bandwidth_quartiles: np.ndarray
    sizes: np.ndarray
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


def write_links(path: str | Path, links: Links) -> None:
    """Keep it; every array has its unit with it.

    Raises:
        OutputError, StorageError: it cannot be written.
    """

    def fill(file: h5py.File) -> None:
        file.attrs["format"] = _FORMAT
        file.attrs["about"] = json.dumps(links.about)
        text = h5py.string_dtype()
        for name in ("hosts", "kinds"):
            file.create_dataset(name, data=np.array(getattr(links, name), object), dtype=text)
        _array(file, "ranks", np.array(links.ranks), "1", "ranks on each host")
        for name, (unit, meaning) in _PAIRS.items():
            _array(file, f"pairs/{name}", getattr(links, name), unit, meaning)
        for name, (unit, _) in _QUARTILES.items():
            quartiles = getattr(links, f"{name}_quartiles")
            _array(file, f"pairs/{name}_quartiles", quartiles, unit, "lower and upper quartile")
        _array(file, "sizes", links.sizes, "B", "bytes that each rank gives to a collective")
        for name, curve in links.curves.items():
            meaning = "of one call, the slowest rank's: lower quartile, median, upper quartile"
            _array(file, f"curves/{name}", curve, "s", meaning)

    write_hdf5(path, fill)


def read_links(path: str | Path) -> Links:
    """What `write_links` has kept.

    Raises:
        InputError: the file is not there or is something else.
        IntegrityError: it is damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is not there: measure it with jobs/bench.py link, under mpirun")
    try:
        with h5py.File(path) as file:
            if file.attrs.get("format") != _FORMAT or "pairs" not in file:
                raise InputError(f"{path} was not written by this version of jobs/bench.py link")
            curves = file.get("curves", {})
            return Links(
                hosts=tuple(file["hosts"].asstr()[()]),
                ranks=tuple(int(n) for n in file["ranks"][()]),
                kinds=tuple(file["kinds"].asstr()[()]),
                latency=file["pairs/latency"][()],
                latency_best=file["pairs/latency_best"][()],
                bandwidth=file["pairs/bandwidth"][()],
                latency_quartiles=file["pairs/latency_quartiles"][()],
                bandwidth_quartiles=file["pairs/bandwidth_quartiles"][()],
                sizes=file["sizes"][()],
                curves={name: curves[name][()] for name in curves},
                about=json.loads(file.attrs["about"]),
            )
    except (OSError, KeyError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged ({error}): measure again") from error


def _array(file: h5py.File, name: str, values: np.ndarray, unit: str, meaning: str) -> None:
    dataset = file.create_dataset(name, data=values, chunks=values.shape, fletcher32=True)
    dataset.attrs["units"] = unit
    dataset.attrs["meaning"] = meaning
