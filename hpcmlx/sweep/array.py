"""Points on Slurm: one array, of which every task is a point.

The script is that of a single job (`launch/slurm.py`), requeues included; which point a task is
stands in a file beside it, a run directory a line. All tasks get the resources of the largest.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hpcmlx.errors import LostPeerError
from hpcmlx.files import write_atomic
from hpcmlx.launch import submit
from hpcmlx.launch.slurm import Batch, Shell, check_options, render, shape
from hpcmlx.launch.submit import JobState
from hpcmlx.record import completion
from hpcmlx.settings import JobConfig
from hpcmlx.sweep.point import words
from hpcmlx.sweep.points import Point, Sweep

SCRIPT = "array.sbatch"
_EVERY = 2.0  # seconds from one question to the next
_PATIENCE = 600.0  # seconds without an answer from Slurm

Note = Callable[[Point, int, float | None], None]


def script_text(
    sweep: Sweep, script: str, listing: Path, num_tasks: int, num_ranks: int, settings: JobConfig
) -> str:
    """The batch script of an array.

    Args:
        script: the job's file.
        listing: the file with the run directory of every task.
        num_ranks: of the largest point.

    Raises:
        ConfigError: an option or the sweep's path cannot stand in a script.
    """
    line = f'"$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(listing))})"'
    limit = settings.sweep.max_parallel
    return render(
        Batch(
            sweep.job,
            [*words(sweep.job, script), Shell('"$run_dir.yaml"')],
            Shell(line),
            str(Path.cwd()),
            Shell('"slurm-$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID"'),
            str(sweep.path / "array-%A_%a.log"),
            num_ranks,
            settings.launch.slurm,
            array=f"0-{num_tasks - 1}" + (f"%{limit}" if limit else ""),
        )
    )


def run_array(
    sweep: Sweep,
    points: Sequence[Point],
    script: str,
    num_ranks: int,
    settings: JobConfig,
    write: Callable[[Point], object],
    note: Note,
) -> int:
    """Submit the points as one array and, unless it is not to be followed, wait for its end. Where
    an array of an earlier launch is still under way, that one is followed first.

    Args:
        num_ranks: of the largest point.
        write: makes a point ready, which nothing may be at work on any more.
        note: called with the exit code of every point that has ended.

    Returns:
        The signal that ended the following early, else 0; the array goes on then.

    Raises:
        UsageError: there is no Slurm here.
        ConfigError: an option is wrong, or Slurm refuses the array.
        LostPeerError: Slurm does not answer any more.
    """
    options = settings.launch.slurm
    submit.require_sbatch()
    check_options(options)
    by_name = {point.name: point for point in points}
    if sweep.array is not None and is_under_way(sweep.array):
        _say(f"array {sweep.array} of an earlier launch is still under way")
        earlier = [by_name.get(name) for name in sweep.tasks]
        if signal := _follow(sweep.array, earlier, sweep, note):
            return signal
        tried = {point.name for point in earlier if point is not None}
        points = [point for point in points if point.name not in tried]
        if not points:
            return 0
    for point in points:
        write(point)
    number = 1
    while (listing := sweep.path / f"array-{number}.txt").exists():
        number += 1
    names = [point.name for point in points]
    text = script_text(sweep, script, listing, len(points), num_ranks, settings)
    write_atomic(listing, "".join(f"{sweep.run_dir(point)}\n" for point in points))
    write_atomic(sweep.path / SCRIPT, text)
    sweep.array, sweep.tasks = submit.sbatch(sweep.path / SCRIPT), names
    sweep.save()
    for task, point in enumerate(points):
        log = sweep.file(point, "log")
        log.unlink(missing_ok=True)  # of an earlier task, whose own file stays
        log.symlink_to(f"array-{sweep.array}_{task}.log")
    nodes, per_node = shape(num_ranks, options)
    _say(
        f"array {sweep.array}: {len(points)} tasks, each of {nodes} nodes with {per_node} ranks; "
        f"logs beside the run directories in {sweep.path}"
    )
    if not options.follow:
        _say(f"not followed: the same command with sweep.dir={sweep.path} does so")
        return 0
    return _follow(sweep.array, points, sweep, note)


def _follow(array: str, points: Sequence[Point | None], sweep: Sweep, note: Note) -> int:
    """Until all tasks are over; `note` each as it ends. The signal that ended it early, or 0."""
    try:
        follow(array, points, lambda p: completion(sweep.run_dir(p)) is not None, note)
    except KeyboardInterrupt:
        _say(
            f"array {array} goes on; scancel {array} ends it, and the same command with "
            f"sweep.dir={sweep.path} follows it"
        )
        return 2
    return 0


def follow(
    array: str,
    points: Sequence[Point | None],
    complete: Callable[[Point], bool],
    note: Note,
    ask: Callable[[str], Mapping[int, JobState] | None] | None = None,
    every: float = _EVERY,
) -> None:
    """Tell of every change of a task, until all are over.

    Args:
        points: of each task; None where it is not of interest.
        complete: whether a point has its completion record.
        ask: what Slurm says of the tasks; None where it does not answer.

    Raises:
        LostPeerError: there is no answer for ten minutes.
    """
    ask = ask or array_states
    shown: dict[int, str] = {}
    over: dict[int, int] = {}  # how often in turn a task has been seen ended
    left = {task for task, point in enumerate(points) if point is not None}
    answered = time.monotonic()
    while left:
        states = ask(array)
        if states is None:
            if time.monotonic() - answered > _PATIENCE:
                raise LostPeerError(
                    f"Slurm has not answered about array {array} for {_PATIENCE:.0f} s; it goes on "
                    "without this"
                )
        else:
            answered = time.monotonic()
            for task in sorted(left):
                point = points[task]
                assert point is not None
                state = states.get(task) or _gone(shown.get(task, ""))
                over[task] = over.get(task, 0) + 1 if state.is_over else 0
                if str(state) != shown.get(task) and not state.is_over:
                    shown[task] = str(state)
                    _say(f"{point.name}: task {array}_{task}: {state}")
                # Twice: a task that is requeued looks over for a moment.
                if over[task] == 2:
                    left.discard(task)
                    code = 0 if complete(point) else state.exit_code
                    if code:
                        _say(f"{point.name}: task {array}_{task}: {state}")
                    note(point, code, None)
        if left:
            time.sleep(every)


def _gone(shown: str) -> JobState:
    """The state of a task of which Slurm says nothing: cancelled before it was one of its own, or
    forgotten since it has ended."""
    return JobState("CANCELLED" if shown.startswith("PENDING") else "FORGOTTEN")


def array_states(array: str) -> dict[int, JobState] | None:
    """What Slurm says of an array's tasks: its controller, and for those that it has forgotten its
    accounting, where there is one. None where it does not answer."""
    code, text = submit.answer("scontrol", "--oneliner", "show", "job", array)
    if code and "Invalid job id" not in text:
        return None
    columns = ("-o", "JobID,State,ExitCode")
    _, known = submit.answer("sacct", "-n", "-X", "-P", "-D", *columns, "-j", array)
    states = parse_accounting(known)
    return states | (parse_tasks(text) if code == 0 else {})


def is_under_way(array: str) -> bool:
    """Whether any task of an array may still do something.

    Raises:
        LostPeerError: Slurm does not answer.
    """
    states = array_states(array)
    if states is None:
        raise LostPeerError(
            f"Slurm does not answer about array {array} of an earlier launch, which may still be "
            f"under way: start the sweep again once `scontrol show job {array}` answers"
        )
    return not all(state.is_over for state in states.values())


def parse_tasks(text: str) -> dict[int, JobState]:
    """The states in the lines of `scontrol --oneliner show job` for an array; tasks that have not
    begun share a line, as in ArrayTaskId=2-3,5%2."""
    found = {}
    for line in text.splitlines():
        if match := re.search(r"\bArrayTaskId=(\S+)", line):
            for task in _indices(match[1]):
                found[task] = submit.parse_scontrol(line)
    return found


def parse_accounting(text: str) -> dict[int, JobState]:
    """The states in the lines of `sacct -P -o JobID,State,ExitCode`, of each task the last."""
    found = {}
    for line in text.splitlines():
        name, bar, rest = line.partition("|")
        match = re.fullmatch(r"\d+_\[?([0-9,%-]+)\]?", name)
        state = submit.parse_sacct(rest) if bar else None
        if match and state:
            found.update(dict.fromkeys(_indices(match[1]), state))
    return found


def _indices(text: str) -> list[int]:
    found: list[int] = []
    for part in text.partition("%")[0].split(","):
        low, _, high = part.partition("-")
        if low.isdigit():
            found += range(int(low), int(high or low) + 1)
    return found


def _say(text: str) -> None:
    print(f"hpcmlx: {text}", file=sys.stderr, flush=True)
