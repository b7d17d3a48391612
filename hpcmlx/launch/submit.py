"""launch=slurm: submit a job from the login node and follow it to its end.

`job.py` calls `submit`. The script and the log are in `RUN_DIR.slurm`, beside the run directory;
`sbatch RUN_DIR.slurm/job.sbatch` starts the same job once more, to go on with what is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hpcmlx import record
from hpcmlx.config import JobConfig
from hpcmlx.errors import ConfigError, ExitCode, LostPeerError, UsageError
from hpcmlx.files import write_atomic
from hpcmlx.launch.mpirun import child_overrides, recorded
from hpcmlx.launch.network import check_interface
from hpcmlx.launch.slurm import SAVED, Batch, check_options, render, shape
from hpcmlx.rundir import CLAIM, RunDir, make_run_dir, open_run_dir

SCRIPT = "job.sbatch"
# States in which a job may still do something; every other one is an end, unless it is requeued.
_UNDER_WAY = frozenset(
    ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING"]
    + ["STAGE_OUT", "STOPPED", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"]
    + ["RESV_DEL_HOLD"]
)
_PATIENCE = 600.0  # seconds without an answer from Slurm
_EVERY = 2.0  # seconds from one question to the next


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Attributes:
        name: as in "RUNNING".
        reason: of its waiting, or why it ended; "" where there is none.
        code, signal: of the script, once it has ended.
    """

    name: str
    reason: str = ""
    code: int = 0
    signal: int = 0

    @property
    def is_over(self) -> bool:
        return self.name not in _UNDER_WAY

    @property
    def exit_code(self) -> int:
        """Of a job that is over and has left no completion record: never 0."""
        if self.name == "CANCELLED":
            return 128 + 15
        if self.name in ("TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "PREEMPTED"):
            return self.code or int(ExitCode.LOST_PEER)
        if self.signal:
            return 128 + self.signal
        return self.code or int(ExitCode.LOST_PEER)

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def submit(job: str, script: str, overrides: Sequence[str], settings: JobConfig) -> int:
    """Submit a job and, unless it is not to be followed, wait for its end.

    Args:
        job: its name, the same that its ranks claim the run directory for.
        script: the job's file (`sys.argv[0]`).
        overrides: its arguments.
        settings: what they compose to.

    Returns:
        The job's exit code; 0 where it is only submitted.

    Raises:
        UsageError: there is no Slurm here.
        ConfigError: an option is wrong, or Slurm refuses it.
        OutputError: the run directory is in use.
        LostPeerError: Slurm does not answer any more.
    """
    options, parallel = settings.launch.slurm, settings.parallel
    num_ranks = parallel.dp * parallel.pp * parallel.tp
    check_options(options)
    if settings.launch.interface is not None:
        check_interface(settings.launch.interface, "launch.interface")
    nodes, per_node = shape(num_ranks, options)
    if not Path(script).is_file():
        raise ConfigError(f"launch=slurm starts a script again, and {script!a} is not a file")
    require_sbatch()

    resume = getattr(settings, "resume", None)
    layout = f"dp{parallel.dp}_pp{parallel.pp}_tp{parallel.tp}"
    resumable = settings.RESUMABLE and job in SAVED
    run_dir = open_run_dir(
        settings.directory, job, layout, resumable=resumable, resume=resume is not None
    )
    folder = Path(f"{run_dir.path}.slurm")
    key = "run_dir" if resume is None else "resume"
    words = [sys.executable, str(Path(script).resolve())]
    words += child_overrides(overrides, run_dir.path, key, kind="mpirun")
    try:
        text = render(
            Batch(
                job,
                words,
                str(run_dir.path),
                str(Path.cwd()),
                run_dir.token,
                str(folder / "%j.log"),
                num_ranks,
                options,
            )
        )
        write_atomic(make_run_dir(folder) / SCRIPT, text.encode())
        job_id = sbatch(folder / SCRIPT)
    except BaseException:
        _give_back(run_dir, folder)
        raise
    print(
        f"hpcmlx: job {job_id}, {num_ranks} ranks on {nodes} nodes, {per_node} on each; run "
        f"directory {run_dir.path}, log {folder / job_id}.log",
        file=sys.stderr,
        flush=True,
    )
    if not options.follow:
        return int(ExitCode.OK)
    try:
        state = follow(job_id, folder / f"{job_id}.log", sys.stderr)
    except KeyboardInterrupt:
        print(f"hpcmlx: job {job_id} goes on; scancel {job_id} ends it", file=sys.stderr)
        return 130
    code = recorded(run_dir.path, run_dir.token)
    if code is None:
        code = state.exit_code
        exit = record.Exit(record.cause_of(code), code, f"Slurm: job {job_id}: {state}")
        record.note_death(run_dir.path, run_dir.token, exit)
        print(f"hpcmlx: job {job_id} is not complete: {state}", file=sys.stderr)
    return code


def require_sbatch() -> None:
    """
    Raises:
        UsageError: there is no Slurm here.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("launch=slurm: no sbatch in PATH; it is for a login node of a cluster")


def follow(
    job_id: str,
    log: Path,
    out: TextIO,
    ask: Callable[[str], JobState | None] | None = None,
    every: float = _EVERY,
) -> JobState:
    """Copy a job's log to `out`, with a line for each of its states, until it is over.

    Args:
        ask: what Slurm says of the job; None where it does not answer.
        every: seconds from one question to the next.

    Raises:
        LostPeerError: there is no answer for ten minutes.
    """
    ask = ask or job_state
    shown, position, answered, over = "", 0, time.monotonic(), False
    while True:
        state = ask(job_id)
        # An end counts when it is seen twice: a requeued job looks over for a moment.
        ended, over = over, state is not None and state.is_over
        ended = ended and over
        # After the question: what the log has got by the end comes out before the end is told.
        position = _copy_log(log, position, out, whole_lines=not ended)
        if state is not None:
            answered = time.monotonic()
            if str(state) != shown and over == ended:
                shown = str(state)
                print(f"hpcmlx: job {job_id}: {shown}", file=out, flush=True)
            if ended:
                return state
        elif time.monotonic() - answered > _PATIENCE:
            raise LostPeerError(
                f"Slurm has not answered about job {job_id} for {_PATIENCE:.0f} s; the job goes "
                f"on without this, see {log}"
            )
        time.sleep(every)


def _copy_log(log: Path, position: int, out: TextIO, *, whole_lines: bool) -> int:
    """Copy what is new in the log; how far it is copied."""
    try:
        with open(log, "rb") as file:
            file.seek(position)
            text = file.read()
    except FileNotFoundError:  # no node has begun yet
        return position
    if whole_lines:
        text = text[: text.rfind(b"\n") + 1]
    out.write(text.decode(errors="replace"))
    out.flush()
    return position + len(text)


def job_state(job_id: str) -> JobState | None:
    """What Slurm says of a job: its controller while it remembers the job, else its accounting.

    Returns:
        None where neither answers; a state FORGOTTEN where neither knows the job.
    """
    code, text = answer("scontrol", "--oneliner", "show", "job", job_id)
    if code == 0:
        return parse_scontrol(text)
    forgotten = "Invalid job id" in text
    # -D: a requeued job has a line for each start.
    code, text = answer("sacct", "-n", "-X", "-P", "-D", "-o", "State,ExitCode", "-j", job_id)
    state = parse_sacct(text) if code == 0 else None
    return state or (JobState("FORGOTTEN") if forgotten else None)


def parse_scontrol(text: str) -> JobState:
    """The state in a line of `scontrol --oneliner show job`."""
    found = dict(re.findall(r"(\w+)=(\S*)", text))
    code, signal = _codes(found.get("ExitCode", "0:0"))
    reason = found.get("Reason", "None")
    return JobState(found.get("JobState", ""), "" if reason == "None" else reason, code, signal)


def parse_sacct(text: str) -> JobState | None:
    """The state in the last line of `sacct -P -o State,ExitCode`; a requeued job has several."""
    lines = text.split("\n")
    state, bar, codes = next((x for x in reversed(lines) if x.strip()), "").partition("|")
    if not bar:
        return None
    return JobState(state.split()[0], "", *_codes(codes))


def _codes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def answer(*words: str) -> tuple[int, str]:
    """The exit code of a command of Slurm's and all that it prints; -1 where it does not end."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return -1, ""
    return done.returncode, done.stdout + done.stderr


def sbatch(script: Path) -> str:
    """Submit a script; the id of its job.

    Raises:
        ConfigError: Slurm refuses it.
    """
    words = ["sbatch", "--parsable", str(script)]
    env = batch_environment(os.environ)
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.replace("sbatch: error:", "").split())
        raise ConfigError(f"sbatch refuses the job: {reason} (see launch.slurm.* in --help)")
    job_id = done.stdout.strip().partition(";")[0]
    if not job_id.isdigit():
        raise ConfigError(f"sbatch printed {done.stdout!a} and no job id")
    return job_id


def batch_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that a job gets: this one, without what belongs to a job that this process
    may itself be part of, such as its count of restarts."""
    return {
        name: value
        for name, value in environ.items()
        if name in ("SLURM_CONF", "SLURM_CLUSTERS")
        or not name.startswith(("SLURM_", "HPCMLX_CLAIM", "HPCMLX_LIFELINE"))
    }


def _give_back(run_dir: RunDir, folder: Path) -> None:
    """Leave nothing of a job that was not submitted where there was nothing before."""
    if not run_dir.resumed:
        shutil.rmtree(folder, ignore_errors=True)
        (run_dir.path / CLAIM).unlink(missing_ok=True)
        if not any(run_dir.path.iterdir()):
            run_dir.path.rmdir()
