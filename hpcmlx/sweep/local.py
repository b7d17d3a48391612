"""Points through mpirun: a launcher for each, as many at once as there are slots.

A point's launcher is the job's own `launch=mpirun`, in a process that writes to the point's log. It
passes signals on to mpirun and judges by the completion record, as it does for a single job.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from hpcmlx import orphans
from hpcmlx.blas import THREADS
from hpcmlx.errors import ExitCode
from hpcmlx.rundir import CLAIM_ENV
from hpcmlx.sweep.slots import Slots

_EVERY = 0.1  # seconds from one look at the processes to the next
# Without it the first rank of every mpirun would be bound to the same core.
_UNBOUND = "PRTE_MCA_hwloc_default_binding_policy"


@dataclass
class Task:
    """A point that is to be run.

    Attributes:
        argv: the launcher's command line.
        num_ranks: of its layout.
        log: what the launcher and its ranks print is appended there.
        hostfile: where its share of the hosts is written; None without hosts.
    """

    name: str
    argv: Sequence[str]
    num_ranks: int
    log: Path
    hostfile: Path | None = None


@dataclass
class _Child:
    task: Task
    taken: Mapping[int, int]
    begin: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = field(default_factory=list)

    def send(self, number: int) -> None:
        if self.process is None:
            self.early.append(number)
        else:
            self.process.send_signal(number)


class Signals:
    """Passes signals on to every launcher that runs; a context manager.

    Attributes:
        ended_by: the signal that asked for the end; then nothing new is started.
    """

    def __init__(self) -> None:
        self.ended_by = 0
        self.children: list[_Child] = []
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._pass_on) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self.children:  # only where an exception came in between
            child.send(signal.SIGTERM)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        # SIGUSR1 announces the end of the time: what runs saves, and nothing else is to begin.
        if number != signal.SIGUSR2:
            self.ended_by = number
        for child in self.children:
            child.send(number)


def run_tasks(
    tasks: Sequence[Task],
    slots: Slots,
    limit: int | None,
    done: Callable[[Task, int, float], None],
    started: Callable[[Task], None] = lambda task: None,
) -> int:
    """Run all tasks, each as soon as there is room for it; one that fails stops no other.

    Args:
        limit: tasks at once, at most; None: what fits.
        done: called with a task's exit code and its seconds.

    Returns:
        The signal that ended it early, else 0.
    """
    waiting = list(tasks)
    with Signals() as signals, orphans.lifeline() as lifeline:
        env = {k: v for k, v in os.environ.items() if k not in (CLAIM_ENV, orphans.LIFELINE_ENV)}
        env[orphans.SWEEP_ENV] = lifeline
        if len(tasks) > 1 and limit != 1:
            env.setdefault(_UNBOUND, "none")
            # A core a rank: each would start a thread for every core, and they would spin.
            env.setdefault(THREADS, "1")
        while waiting or signals.children:
            for task in list(waiting):
                if signals.ended_by or (limit and len(signals.children) >= limit):
                    break
                taken = slots.take(task.num_ranks)
                if taken is not None:
                    waiting.remove(task)
                    if task.hostfile is not None:
                        task.hostfile.write_text(slots.hostfile(taken))
                    started(task)
                    _start(task, taken, env, signals)
            if signals.ended_by:
                waiting = []
            for child in list(signals.children):
                code = child.process.poll() if child.process else None
                if code is not None:
                    signals.children.remove(child)
                    slots.give_back(child.taken)
                    code = 128 - code if code < 0 else code
                    done(child.task, code, time.monotonic() - child.begin)
            time.sleep(_EVERY)
        return signals.ended_by


def _start(task: Task, taken: Mapping[int, int], env: Mapping[str, str], signals: Signals) -> None:
    child = _Child(task, taken)
    signals.children.append(child)  # first: a signal that comes now is kept for it
    with open(task.log, "ab", opener=_private) as log:
        child.process = subprocess.Popen(
            task.argv,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # of its own: else Ctrl-C would reach it twice
        )
    for number in child.early:
        child.process.send_signal(number)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def reason(log: Path) -> str:
    """Why a point has failed: the last thing its job said of itself in the log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    said = [line[8:] for line in lines if line.startswith("hpcmlx: ")]
    # Neither the line that mpirun was started with, nor that it was killed: ranks know why.
    own = [line for line in said if not re.match(r"\S.*/mpirun'? -n \d|mpirun was killed", line)]
    return own[-1] if own else ""


def lost(code: int) -> int:
    """The exit code of a point that has left no completion record: never that of success."""
    return code or int(ExitCode.LOST_PEER)
