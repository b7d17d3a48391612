"""`report.html`: a run on one page, which needs no network and no script.

Rank 0 writes it when a launch ends; `jobs/report.py` for any run directory, also of a launch that
was killed. It is made of what lies in the run directory only. Prompts, ids and answers are other
people's text: the template escapes everything, and the page forbids the browser to run or fetch
anything.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import jinja2
import numpy as np
import yaml

from hpcmlx import record
from hpcmlx.errors import HpcmlxError
from hpcmlx.files import write_atomic
from hpcmlx.observe import energy
from hpcmlx.observe.chart import Chart, chart
from hpcmlx.observe.gantt import PICTURE
from hpcmlx.observe.metrics import read_metrics
from hpcmlx.observe.summary import SUMMARY
from hpcmlx.record import Exit

REPORT = "report.html"
#: Files of rows whose first lines are shown, with what they are.
ROWS = {
    "errors.jsonl": "rows that could not be answered",
    "results.jsonl": "answers",
    "samples.jsonl": "answers while training",
    "choices.jsonl": "choices",
}
_SHOWN = 5  # rows of each file
_LONGEST = 700  # characters of a row
# Of the summary, what the page has in another place.
_ELSEWHERE = frozenset(
    ["ranks", "energy", "job", "layout", "exit", "tokens", "tokens_per_sec", "joules_per_token"]
)
_PIECES = 60  # of the time of a run, for its throughput


def write(run_dir: str | Path, to: str | Path | None = None) -> Path:
    """Write the page of a run directory; its path.

    Args:
        to: in place of `REPORT` in the run directory.

    Raises:
        FileNotFoundError, IntegrityError: there is no run record, or it is damaged.
        OutputError, StorageError: the page cannot be written.
    """
    path = Path(run_dir) / REPORT if to is None else Path(to)
    write_atomic(path, page(run_dir).encode("utf-8", "replace"))
    return path


def page(run_dir: str | Path) -> str:
    """The page as text. Raises FileNotFoundError, IntegrityError, StorageError."""
    run_dir = Path(run_dir).absolute()
    found = record.read(run_dir)
    launch, summary = found["launches"][-1], _json(run_dir / SUMMARY)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ranks = summary.get("ranks")
    return environment.get_template("report.html.jinja").render(
        name=run_dir.name,
        job=found["job"],
        launch=launch,
        exit=(exit := record.how_it_ended(run_dir)),
        mood=_mood(exit),
        facts=list(_facts(launch, summary, exit)),
        launches=[_line(one) for one in found["launches"]],
        hosts=_table(launch.get("hosts")),
        ranks=_table(ranks),
        numbers=list(_flat({k: v for k, v in summary.items() if k not in _ELSEWHERE})),
        charts=list(_charts(run_dir)),
        pictures=list(_pictures(run_dir)),
        rows=list(_rows(run_dir)),
        command=" ".join(map(str, launch.get("command", ()))),
        config=yaml.safe_dump(launch.get("config"), sort_keys=False, allow_unicode=True),
    )


def _mood(exit: Exit | None) -> str:
    """The colour of how it ended."""
    if exit is None:
        return "running"
    if exit.cause is record.Cause.PREEMPTED:
        return "running"
    good = (record.Cause.COMPLETE, record.Cause.ROW_ERRORS)
    return "good" if exit.cause in good else "bad"


def _facts(
    launch: Mapping[str, Any], summary: Mapping[str, Any], exit: Exit | None
) -> Iterator[tuple[str, str]]:
    """What the page begins with: (what, text)."""
    yield "started", _time(launch.get("started"))
    if launch.get("ended"):
        yield "ended", _time(launch["ended"])
    if launch.get("seconds") is not None:
        yield "took", _duration(launch["seconds"])
    if summary.get("tokens") is not None:
        yield "tokens", f"{summary['tokens']:,}"
    if summary.get("tokens_per_sec") is not None:
        yield "throughput", f"{summary['tokens_per_sec']:,.1f} tok/s"
    if (used := summary.get("energy") or launch.get("energy")) is not None:
        one = summary.get("joules_per_token")
        yield "energy", energy.describe(used | {"joules_per_token": one}).partition(": ")[2]
    versions, git = launch.get("versions") or {}, launch.get("git") or {}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if git.get("commit"):
        dirty = f", with changes {str(git.get('diff') or '(untracked)')[:12]}"
        yield "commit", str(git["commit"])[:12] + (dirty if git.get("dirty") else "")
    else:
        yield "commit", f"not known: {git.get('absent', 'not recorded')}"
    if exit is not None and exit.code is not None:
        yield "exit code", str(exit.code)


def _line(launch: Mapping[str, Any]) -> list[str]:
    """A launch among several of one run."""
    ended = launch.get("exit") or {}
    seconds = launch.get("seconds")
    return [
        _time(launch.get("started")),
        str(launch.get("layout", "")),
        "" if seconds is None else _duration(seconds),
        str(ended.get("cause", "not recorded")),
        str(ended.get("message", "")),
    ]


def _table(rows: Any) -> tuple[list[str], list[list[str]]] | None:
    """Head and lines of a list of mappings."""
    if not isinstance(rows, list) or not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [_name(n) for n in names], [[_value(n, row.get(n)) for n in names] for row in rows]


def _flat(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of every number of a summary."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{name} {key}".strip())
    elif node is not None:
        yield _name(name), _value(name, node)


def _charts(run_dir: Path) -> Iterator[Chart]:
    """Of whatever the run has measured over time."""
    try:
        metrics = read_metrics(run_dir)
    except HpcmlxError:  # damaged: the job itself says so when it goes on
        metrics = {}
    train = metrics.get("train", {})
    lines = [
        (label, columns["step"], columns["loss"])
        for label, columns in (("training", train), ("evaluation", metrics.get("eval", {})))
        if "loss" in columns
    ]
    found = [chart("loss", "optimizer steps", lines)]
    if "tokens_per_sec" in train:
        speed = [("training", train["step"], train["tokens_per_sec"])]
        found.append(chart("tokens per second", "optimizer steps", speed))
    found.append(_throughput(run_dir / "results.h5"))
    yield from filter(None, found)


def _throughput(path: Path) -> Chart | None:
    """New tokens per second while a generate job ran, from when its rows ended."""
    try:
        with h5py.File(path, "r") as file:
            created, offsets = file["created"][:], file["offsets"][:]
            took = file["seconds"][:]
    except (OSError, KeyError):
        return None
    counts = np.diff(offsets)
    good = (created > 0) & (took > 0)
    if good.sum() < 2:
        return None
    ends, took, counts = created[good], took[good], counts[good]
    begins, rates = ends - took, counts / took
    edges = np.linspace(begins.min(), ends.max(), _PIECES + 1)
    # A row's tokens are spread evenly over its time.
    total = [(rates * np.clip(edge - begins, 0, took)).sum() for edge in edges]
    middles = (edges[:-1] + edges[1:]) / 2 - edges[0]
    speed = np.diff(total) / np.diff(edges)
    return chart("new tokens per second", "seconds", [("generated", middles, speed)])


def _pictures(run_dir: Path) -> Iterator[tuple[str, str]]:
    """(caption, data URI) of the pictures that the run has drawn."""
    for name, caption in ((PICTURE, "what every stage did when"),):
        try:
            data = (run_dir / name).read_bytes()
        except OSError:
            continue
        yield caption, f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _rows(run_dir: Path) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """(file, what it has, its first rows as (id, text))."""
    for name, caption in ROWS.items():
        try:
            with open(run_dir / name, encoding="utf-8", errors="replace") as file:
                lines = [line[: 1 << 20] for line in islice(file, _SHOWN)]
        except OSError:
            continue
        if lines:
            yield name, caption, [_row(line) for line in lines]


def _row(line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        name = next((str(row[k]) for k in ("custom_id", "id", "step") if k in row), "")
        text = _answer(row)
    except (ValueError, TypeError, LookupError, AttributeError):
        name, text = "", line
    return name[:120], text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _answer(row: Mapping[str, Any]) -> str:
    """What is worth reading of a row: its text, or all of it."""
    error = row.get("error")
    if isinstance(error, Mapping) and "message" in error:
        return str(error["message"])
    if "prompt" in row and "answer" in row:
        return f"{row['prompt']}\n→ {row['answer']}"
    if isinstance(row.get("text"), str):
        return str(row["text"])
    response = row.get("response")
    if isinstance(response, Mapping):
        choice = response["body"]["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    return json.dumps(row, ensure_ascii=False)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _name(name: str) -> str:
    return name.replace("_", " ")


def _value(name: str, value: Any) -> str:
    """A number as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if name.endswith("bytes"):
        return f"{value / 2**30:,.2f} GiB" if value >= 2**29 else f"{value / 2**20:,.1f} MiB"
    if isinstance(value, int):
        return str(value) if name.endswith("pid") else f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    if not minutes:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:.0f} s"


def _time(text: Any) -> str:
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return "not recorded"
