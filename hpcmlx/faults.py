"""Makes one rank fail at one step, so that tests can see what the job makes of it.

`HPCMLX_FAULT="rank=1,step=3,kind=kill"` strikes world rank 1 when it starts its third decode step.
The engine and the trainer call `strike` once per step; without the variable that is one look-up.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time

from hpcmlx.errors import ConfigError

ENV = "HPCMLX_FAULT"
KINDS: tuple[str, ...] = ("exception", "exit", "exit0", "os_exit", "kill", "segv")
KINDS += ("hang", "busy", "stop", "skip", "slow")
#: What a step does to itself where it asks (`strikes`): a gradient that is no number, a bit of a
#: parameter that flips.
ASKED = ("nan", "flip")
_SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.1, 2.0
_last_step = 0.0
_skip_next = False
_SPEC = re.compile(rf"rank=(\d+),step=(\d+),kind=({'|'.join(KINDS + ASKED)})")


def strike(rank: int, step: int) -> None:
    """Fail here if `HPCMLX_FAULT` says so.

    Args:
        rank: this process's rank in the world.
        step: of the engine on this rank, from 1.

    Kinds: `exception` raises RuntimeError, `exit` and `exit0` call `sys.exit` with 3 and 0,
    `os_exit` ends the process with 1 past every handler, `kill` and `segv` send it the signal,
    `hang` sleeps for ever, `busy` computes for ever in Python, `stop` is SIGSTOP, `skip` leaves the
    next collective out, `slow` makes this step and all later ones take three times as long, and
    0.1 s longer at least.

    Raises:
        ConfigError: the variable is not `rank=R,step=N,kind=KIND`.
    """
    kind = _due(rank, step)
    if kind is None or kind in ASKED:
        return
    if kind == "slow":
        global _last_step
        now = time.monotonic()
        took = now - _last_step if _last_step else 0.0
        time.sleep(min(max(2 * took, _SHORTEST_SLEEP), _LONGEST_SLEEP))
        _last_step = time.monotonic()
        return
    # Not sys.stderr, which a progress bar may hold.
    print(f"injected fault: {kind} at step {step} of rank {rank}", file=sys.__stderr__, flush=True)
    if kind == "exception":
        raise RuntimeError(f"injected at step {step} of rank {rank}")
    if kind in ("exit", "exit0"):
        sys.exit(3 if kind == "exit" else 0)
    if kind == "os_exit":
        os._exit(1)
    if kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[kind])
        return  # a stopped process may be told to go on
    if kind == "skip":
        global _skip_next
        _skip_next = True
        return
    while True:
        if kind == "hang":
            time.sleep(60)


def skips() -> bool:
    """Whether the collective that asks is the one to be left out."""
    global _skip_next
    due, _skip_next = _skip_next, False
    return due


def strikes(rank: int, step: int, kind: str) -> bool:
    """Whether `HPCMLX_FAULT` says that this kind of `ASKED` fault is to happen here and now."""
    return _due(rank, step) == kind


def _due(rank: int, step: int) -> str | None:
    text = os.environ.get(ENV)
    if not text:
        return None
    match = _SPEC.fullmatch(text)
    if match is None:
        kinds = "|".join(KINDS + ASKED)
        raise ConfigError(f"{ENV}={text!a}: expected rank=R,step=N,kind={kinds}")
    due = step >= int(match[2]) if match[3] == "slow" else step == int(match[2])
    return match[3] if due and rank == int(match[1]) else None
