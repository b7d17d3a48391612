"""What a job that stood still or was killed leaves, written and read: `autopsy.json`, the stacks,
the flight files; and all that as a table. jobs/autopsy.py prints it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcmlx import flight
from hpcmlx.autopsy.verdict import Sighting, Verdict, judge
from hpcmlx.errors import InputError
from hpcmlx.files import write_atomic

AUTOPSY = "autopsy.json"
_TAIL = 16
# A rank that was seen alive so many seconds before the others ended before them.
_LAPSE = 5.0


def stacks_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes the stacks of its threads."""
    return run_dir / flight.FOLDER / f"rank{rank}.stacks"


def write_autopsy(
    path: Path,
    verdict: Verdict,
    sightings: Mapping[int, Sighting],
    reporter: int,
    timeout: float,
) -> None:
    """Write `autopsy.json`.

    Raises:
        OutputError, StorageError: it cannot be written.
    """
    content = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **asdict(verdict),
        "timeout": timeout,
        "reported_by": reporter,
        "ranks": [_entry(seen) for _, seen in sorted(sightings.items())],
    }
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def _entry(seen: Sighting) -> dict[str, Any]:
    own = seen.flight
    return {
        "rank": own.rank,
        "host": own.host,
        "pid": own.pid,
        "silent_seconds": None if seen.silent is None else round(seen.silent, 3),
        "still_seconds": round(seen.still, 3),
        "step": own.step,
        "in": None if own.waits_in is None else str(own.waits_in),
        "at": seen.place,
        "groups": [
            {"name": name, "members": members, "collectives": counts[0], "planned": counts[1]}
            for (name, members), counts in own.counts.items()
        ],
        "last": [_line(record, own.now) for record in own.records[-_TAIL:]],
    }


def _line(record: flight.Record, now: float) -> str:
    ago = f"{record.begin - now:+.3f} s"
    if record.is_planned:
        return f"{ago} planned {record}"
    took = "not done" if record.end is None else f"{1000 * (record.end - record.begin):.3f} ms"
    return f"{ago} {record}: {took}"


def read_run(run_dir: Path) -> dict[int, Sighting]:
    """The ranks as their files show them; for the verdict. An earlier launch's of more ranks may
    have left files, too.

    Raises:
        InputError: there is no flight file, or one is damaged.
    """
    flights = []
    for path in sorted((run_dir / flight.FOLDER).glob("rank*.bin")):
        try:
            flights.append(flight.read(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    if not flights:
        raise InputError(
            f"{run_dir} has no {flight.FOLDER}/rank*.bin: give the run directory of a job, on a "
            "host where it ran"
        )
    newest = max(flights, key=lambda own: own.wall)
    found = {}
    for own in flights:
        if own.rank >= newest.size:
            continue
        lapse = newest.wall - own.wall
        found[own.rank] = Sighting(own, lapse if lapse > _LAPSE else None, 0.0)
    return dict(sorted(found.items()))


def print_run(run_dir: Path, console: Console, tail: int) -> None:
    """What was going on, for people.

    Args:
        tail: operations of every rank that are listed.

    Raises:
        InputError: as `read_run`.
    """
    sightings = read_run(run_dir)
    table = Table(title=f"{run_dir}: what each rank did last", title_justify="left")
    for name in ("rank", "host", "pid", "last alive", "step", "in", "for"):
        table.add_column(name)
    for rank, seen in sightings.items():
        own, record = seen.flight, seen.flight.waits_in
        since = "" if record is None else f"{own.now - (record.waiting or own.now):.1f} s"
        table.add_row(
            str(rank), own.host, str(own.pid),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(own.wall)), str(own.step),
            "no operation" if record is None else str(record), since,
        )  # fmt: skip
    console.print(table)
    size = next(iter(sightings.values())).flight.size
    if missing := sorted(set(range(size)) - set(sightings)):
        console.print(Text(f"no file of rank {', '.join(map(str, missing))}: on another host?"))
    told = run_dir / AUTOPSY
    if told.exists():
        console.print(Text(f"the watchdog said: {json.loads(told.read_text())['line']}"))
    console.print(Text(f"the files say: {judge(sightings).line}"))
    for rank, seen in sightings.items():
        own = seen.flight
        console.print(Text(f"\nrank {rank} on {own.host}, its last operations:", "bold"))
        for record in own.records[-tail:]:
            console.print(Text(f"  {_line(record, own.now)}"))
        stacks = stacks_file(run_dir, rank)
        if stacks.exists() and (text := stacks.read_text().strip()):
            console.print(Text(f"its stacks ({stacks}):\n{text}"))
