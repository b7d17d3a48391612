"""The text of a batch script for Slurm: a pure function of what is to run and what it asks for.

`submit.py` renders one for `launch=slurm`, `scripts.py` those of slurm/. The script starts
`launch=mpirun` inside the allocation, which has mpirun learn the nodes from Slurm, passes signals
on and judges by the completion record. The script itself only passes on Slurm's warning and puts a
job that can go on back into the queue.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from hpcmlx.errors import ConfigError, ExitCode
from hpcmlx.settings import SlurmConfig

#: Of a job that can go on: what gets a new name or another size when something is saved.
SAVED = {"finetune": "checkpoints/step-*", "generate": "rows/*"}

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}"
_CHECKED = {
    "partition": (re.compile(rf"{_NAME}(?:,{_NAME})*"), "a name, or several with commas"),
    "account": (re.compile(_NAME), "a name"),
    "qos": (re.compile(_NAME), "a name"),
    "mem": (re.compile(r"[0-9]{1,9}[KMGT]?"), "a size as in 64G"),
    "time": (
        re.compile(r"[0-9]{1,5}-[0-9]{1,2}(?::[0-9]{1,2}){0,2}|[0-9]{1,6}(?::[0-9]{1,2}){0,2}"),
        "a time as in 02:00:00 or 2-12:00:00",
    ),
    "dependency": (
        re.compile(
            r"singleton|after(?:any|ok|notok|corr)?(?::[0-9]{1,10})+"
            r"(?:,after(?:any|ok|notok|corr)?(?::[0-9]{1,10})+)*"
        ),
        "as in afterok:123 or afterany:123:124",
    ),
}
_ARRAY = re.compile(r"[0-9]{1,7}(?:-[0-9]{1,7})?(?:,[0-9]{1,7}(?:-[0-9]{1,7})?)*(?:%[0-9]{1,5})?")
_EXTRA = re.compile(r"--([a-z][a-z0-9-]{0,40})(?:=[A-Za-z0-9_.,:/+@*-]{1,200})?")
# Set here, or what would take the script another way than it goes.
_OWN = frozenset(
    ["job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "partition", "account"]
    + ["qos", "mem", "time", "signal", "output", "error", "open-mode"]
    + ["requeue", "no-requeue", "array", "dependency", "kill-on-invalid-dep", "chdir", "wrap"]
    + ["parsable", "wait", "export", "export-file", "hold", "test-only", "uid"]
    + ["gid"]
)
# What the header of a script can hold: Slurm has quotes of its own there, and replaces %.
_PATH = re.compile(r"[A-Za-z0-9_./+@:,=-]+")


class Shell(str):
    """A word that the shell is to expand. Made by this project only, never of what a user gave."""


@dataclass(frozen=True)
class Batch:
    """A batch job.

    Attributes:
        job: name of the job ("finetune").
        command: words of the line that is run; each is quoted unless it is a `Shell`.
        run_dir: of the results, the same after a requeue.
        directory: where the command runs.
        claim: what the run directory is claimed with.
        log: path of the log, in which Slurm replaces %x, %j, %A and %a.
        num_ranks: of the command; each is a task of Slurm's.
        array: indices, as in 0-3%2; "" for a single job.
        usage: comment at the top.
    """

    job: str
    command: Sequence[str]
    run_dir: str
    directory: str
    claim: str
    log: str
    num_ranks: int = 1
    options: SlurmConfig = field(default_factory=SlurmConfig)
    array: str = ""
    usage: str = ""


def check_options(options: SlurmConfig) -> None:
    """
    Raises:
        ConfigError: a value that does not stand for itself in a script or on a command line.
    """
    for key, (pattern, expected) in _CHECKED.items():
        value = getattr(options, key)
        if value is not None and not pattern.fullmatch(value):
            raise ConfigError(f"launch.slurm.{key}={value!a}: expected {expected}")
    for text in options.extra:
        match = _EXTRA.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"launch.slurm.extra: {text!a}: expected --option or --option=value, of letters, "
                "digits and _.,:/+@*-"
            )
        if match[1] in _OWN:
            near = match[1].replace("-", "_")
            hint = f"; see launch.slurm.{near}" if hasattr(options, near) else ""
            raise ConfigError(f"launch.slurm.extra: the script sets --{match[1]} itself{hint}")


def shape(num_ranks: int, options: SlurmConfig) -> tuple[int, int]:
    """(nodes, ranks of a node): one rank a node unless the options say otherwise.

    Raises:
        ConfigError: the ranks do not fit, or a node would have none.
    """
    nodes, per_node = options.nodes, options.ntasks_per_node
    if per_node is None:
        per_node = 1 if nodes is None else -(-num_ranks // nodes)
    needed = -(-num_ranks // per_node)
    if nodes not in (None, needed):
        raise ConfigError(
            f"launch.slurm: {num_ranks} ranks, {per_node} on a node, are for {needed} nodes, not "
            f"{nodes}: change nodes or ntasks_per_node, or leave one of them null"
        )
    return needed, per_node


def render(batch: Batch) -> str:
    """The script.

    Raises:
        ConfigError: an option or a path that cannot stand in it, or a layout that does not fit.
    """
    check_options(batch.options)
    if batch.array and not _ARRAY.fullmatch(batch.array):
        raise ConfigError(f"array {batch.array!a}: expected indices as in 0-3%2")
    if not _PATH.fullmatch(re.sub("%[xjAa]", "", batch.log)):
        raise ConfigError(
            f"{batch.log!a}: a batch script's log cannot have such a path; set run_dir to one of "
            "letters, digits and _./+@:,=-"
        )
    again = batch.job in SAVED and batch.options.max_requeues > 0
    usage = "".join(f"# {line}".rstrip() + "\n" for line in batch.usage.splitlines())
    header = "".join(f"#SBATCH {line}\n" for line in _header(batch, again))
    # One task of an array has the id of the whole array, too, and would requeue all of them.
    own = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if batch.array else "$SLURM_JOB_ID"
    numbers = {**_CODES, "most": batch.options.max_requeues, "own": own}
    start = _START.format(
        directory=_quoted(batch.directory),
        run_dir=_quoted(batch.run_dir),
        claim=_quoted(batch.claim),
        saved=_SAVED.format(pattern=SAVED[batch.job], **numbers) if again else "",
        command=_wrapped(batch.command),
    )
    end = _REQUEUE.format(**numbers) if again else 'exit "$code"\n'
    return f"#!/usr/bin/env bash\n{usage}{header}{start}{end}"


def _header(batch: Batch, again: bool) -> list[str]:
    options = batch.options
    nodes, per_node = shape(batch.num_ranks, options)
    lines = [f"--job-name=hpcmlx-{batch.job}", f"--nodes={nodes}", f"--ntasks-per-node={per_node}"]
    for key in ("cpus_per_task", "partition", "account", "qos", "mem", "time", "dependency"):
        if (value := getattr(options, key)) is not None:
            lines.append(f"--{key.replace('_', '-')}={value}")
    if options.dependency is not None:
        lines.append("--kill-on-invalid-dep=yes")
    if batch.array:
        lines.append(f"--array={batch.array}")
    lines += [f"--output={batch.log}", "--open-mode=append"]
    lines += ["--requeue" if again else "--no-requeue", f"--signal=B:USR1@{options.signal_seconds}"]
    return [*lines, *options.extra]


def _quoted(word: str) -> str:
    return word if isinstance(word, Shell) else shlex.quote(word)


def _wrapped(words: Sequence[str]) -> str:
    """The words, on lines of their own where they are many."""
    line = " ".join(map(_quoted, words))
    return line if len(line) < 90 else " \\\n    ".join(map(_quoted, words))


_CODES = {"lost": int(ExitCode.LOST_PEER), "preempted": int(ExitCode.PREEMPTED)}

_START = """set -uo pipefail
umask 077
cd {directory} || exit 73
run_dir={run_dir}
# What the run directory is claimed with, so that this job and no other begins in it.
export HPCMLX_CLAIM={claim}
{saved}
# In the background, because this shell runs its traps only while it waits. Slurm's warning comes to
# this shell alone (B:) and is passed on to every rank.
{command} &
pid=$!
trap 'told=1; kill -USR1 $pid' USR1
trap 'told=1; kill -TERM $pid' TERM
while true; do
    told=
    wait $pid
    code=$?
    [ -n "$told" ] || break # a signal ends `wait` too: wait on
done
"""

_SAVED = """
# Changes with everything that a later start can go on from.
saved() {{ (cd "$run_dir" && ls -d {pattern} && wc -c {pattern}) 2>/dev/null; }}
before=$(saved)
starts=${{SLURM_RESTART_COUNT:-0}}
if [ "$starts" -gt {most} ]; then # Slurm itself requeues a job whose node fails or is taken away
    echo "hpcmlx: requeued $starts times: no more (launch.slurm.max_requeues)" >&2
    exit {lost}
fi
"""

_REQUEUE = """
# {preempted}: told to end, and saved; {lost}: a host was lost. Nothing else gets better by itself.
case $code in {lost} | {preempted}) ;; *) exit "$code" ;; esac
if [ "$(saved)" = "$before" ]; then
    echo "hpcmlx: ended with $code and saved nothing new: not requeued" >&2
elif [ "$starts" -ge {most} ]; then
    echo "hpcmlx: ended with $code after $starts requeues: no more (launch.slurm.max_requeues)" >&2
else
    echo "hpcmlx: ended with $code: requeued, to go on with what is saved" >&2
    scontrol requeue "{own}"
fi
exit "$code"
"""
