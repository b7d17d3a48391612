"""The shell round every job: MPI up, one configuration, one run directory, one clean end.

`run_job` composes on rank 0 and broadcasts, compares the ranks with each other, calls the job's
main, and ends every rank: with a completion record when all went well, else with one line that
says what is wrong, on which rank and host, and the right exit code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from logging import Logger
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

import hpcmlx
from hpcmlx import comm, config, jaccl, log, orphans, redact
from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError, ExitCode, HpcmlxError, UsageError
from hpcmlx.files import remove_leftovers, write_atomic
from hpcmlx.flight import file_of, recorder
from hpcmlx.launch import mpirun, submit
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.observe.record import RunRecord
from hpcmlx.rankhosts import describe_ranks
from hpcmlx.record import COMPLETED
from hpcmlx.rundir import PRIVATE, lock_run_dir, make_run_dir, open_run_dir, own_kernels
from hpcmlx.settings import JobConfig
from hpcmlx.sweep.run import run_sweep
from hpcmlx.versions import source_hash, versions
from hpcmlx.watchdog import Watchdog

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
_LAST_RESORT = 5.0  # seconds that a rank which fails may take to note why


@dataclass
class StopSignal:
    """Whether SIGUSR1 has come, with which batch systems announce the end of the time.

    By default it would end the process, and a handler that prints may break into a print.
    """

    _asked: bool = False

    def listen(self) -> None:
        """From now on."""
        signal.signal(signal.SIGUSR1, self._note)

    def is_asked(self) -> bool:
        return self._asked

    def _note(self, *_: object) -> None:
        self._asked = True


@dataclass(frozen=True)
class Job:
    """What a job's main gets.

    Attributes:
        name: of the job ("generate").
        config: the job's dataclass.
        mesh: this rank's place among the ranks.
        run_dir: shared by all ranks of this launch and by no other.
        stop: a job that has something to save ends early where this rank is asked to; others go on.
    """

    name: str
    config: Any
    mesh: Mesh
    run_dir: Path
    log: Logger
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def is_root(self) -> bool:
        return self.mesh.world.rank == 0


@dataclass(frozen=True)
class Peer:
    """What must be equal on all ranks before they work together."""

    host: str
    hpcmlx: str
    mlx: str
    mlx_lm: str
    code: str
    config: str


def run_job(
    name: str,
    schema: type,
    main: Callable[[Job], ExitCode | None],
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run `main` as a job and end the process with its exit code.

    Args:
        name: of the job; `conf/{name}.yaml` holds its defaults.
        schema: the dataclass that the configuration is checked against.
        argv: Hydra overrides; None takes the command line.
    """
    os.umask(PRIVATE)  # prompts and answers are nobody else's business
    world: Communicator | None = None
    stop, record = StopSignal(), RunRecord()
    stop.listen()
    try:
        own_kernels()
        command = config.parse_command_line(sys.argv[1:] if argv is None else argv)
        code = None if comm.launched_by_mpi() else _without_mpi(name, schema, command)
        if code is None:
            world = comm.init()
            orphans.watch_parent()
            code = _run(name, schema, main, command, world, stop, record)
    except BaseException as error:  # noqa: BLE001  whatever ends one rank must end them all
        _fail(error, world, record)
    comm.finalize(code)


def _without_mpi(name: str, schema: type, command: config.CommandLine) -> int | None:
    """What a process that mpirun did not start does itself: print help or the configuration, or
    start mpirun (`launch=mpirun`), submit (`launch=slurm`), a sweep (`-m`). Its exit code; None
    where it is the job's only rank."""
    if command.show == "help":
        print(config.help_text(schema, CONF))
        return ExitCode.OK
    if command.multirun:
        return run_sweep(name, sys.argv[0], schema, CONF, command)
    settings: JobConfig = config.read(schema, CONF, name, command)
    redact.hide(redact.secrets(config.to_dict(settings), settings.unresolved))
    if command.show == "config":
        print(config.to_yaml(settings), end="")
        return ExitCode.OK
    if settings.launch.kind == "none":
        return None
    start = submit.submit if settings.launch.kind == "slurm" else mpirun.relaunch
    return start(name, sys.argv[0], command.arguments, settings)


def _run(
    name: str,
    schema: type,
    main: Callable[[Job], ExitCode | None],
    command: config.CommandLine,
    world: Communicator,
    stop: StopSignal,
    record: RunRecord,
) -> ExitCode:
    started = time.monotonic()
    if hpcmlx.BLAS.problem:
        raise ConfigError(hpcmlx.BLAS.problem)
    # Before the configuration: another version may not be able to read this one's.
    check_peers(world.allgather(_this_peer()))
    settings, run_dir, launch = _settings(name, schema, command, world)
    remove_leftovers(run_dir)  # by every host from its own, before any rank writes
    check_peers(world.allgather(_this_peer(settings)))
    parallel = settings.parallel
    mesh = Mesh(ParallelDims(parallel.dp, parallel.pp, parallel.tp), world)
    make_run_dir(run_dir)  # a host that shares no files with rank 0's has one of its own
    logger = log.setup(world.rank, comm.hostname(), run_dir)
    _report_host(logger, mesh, run_dir)
    recorder.open(file_of(run_dir, world.rank), world.rank, world.size)
    timeout = settings.watchdog.timeout
    watchdog = (
        None if timeout is None else Watchdog(world, run_dir, timeout, partial(record.fail, world))
    )
    record.begin(world, name, settings, run_dir, launch, str(mesh.dims))
    mesh.hosts = describe_ranks(settings.launch, world)
    mesh.tp_group = jaccl.connect(settings.comm.tensor, mesh.tp_group)
    if mx.metal.is_available():
        # Weights that are paged out between steps would make a big model crawl.
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    code = main(Job(name, settings, mesh, run_dir, logger, stop)) or ExitCode.OK
    world.barrier()  # every rank has done its part: only now may success be claimed
    record.end(world, code)
    if code is ExitCode.PREEMPTED:  # saved, not complete
        logger.info("stopped: run it again with run_dir=%s to go on", run_dir)
    elif world.rank == 0:
        completed = {
            "job": name,
            "launch": launch,
            "layout": str(mesh.dims),
            "exit_code": int(code),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 3),
            "versions": versions(),
        }
        write_atomic(run_dir / COMPLETED, json.dumps(completed, indent=2).encode() + b"\n")
        logger.info("complete: %s", run_dir)
    if world.rank == 0:
        record.draw()  # last: no time limit is to lose a run to its picture
    if watchdog is not None:
        watchdog.stop()
    return code


def _settings(
    name: str, schema: type, command: config.CommandLine, world: Communicator
) -> tuple[Any, Path, str]:
    """The configuration, the run directory and this launch's token: rank 0 decides, the others are
    told."""
    message: dict[str, Any] = {}
    if world.rank == 0:
        if command.multirun:
            raise UsageError("-m starts a job for every point itself: leave out mpirun")
        settings: JobConfig = config.read(schema, CONF, name, command)
        dims = ParallelDims(settings.parallel.dp, settings.parallel.pp, settings.parallel.tp)
        dims.check_world(world.size)
        run_dir = open_run_dir(
            settings.directory,
            name,
            str(dims),
            resumable=settings.RESUMABLE,
            resume=getattr(settings, "resume", None) is not None,
        )
        lock_run_dir(run_dir.path)
        # Not `run_dir.resumed`: the first launch may have been cut off before it came to this.
        if not (saved := run_dir.path / config.SAVED).exists():
            write_atomic(saved, config.to_yaml(settings).encode())
        values = config.to_dict(settings)
        message = {"config": values, "run_dir": str(run_dir.path), "launch": run_dir.token}
        # Of rank 0's environment; another host's may lack it, and must not say it either.
        message["secrets"] = redact.secrets(values, settings.unresolved)
    message = world.bcast(message)
    redact.hide(message["secrets"])
    settings = config.from_dict(schema, message["config"])
    return settings, Path(message["run_dir"]), message["launch"]


def _this_peer(settings: Any = None) -> Peer:
    return Peer(
        comm.hostname(),
        hpcmlx.__version__,
        metadata.version("mlx"),
        metadata.version("mlx-lm"),
        source_hash(),
        "" if settings is None else config.config_hash(settings),
    )


def check_peers(peers: Sequence[Peer]) -> None:
    """
    Raises:
        ConfigError: a rank's versions, code or configuration differ from rank 0's; names the host.
    """
    reference = asdict(peers[0])
    for rank, peer in enumerate(peers):
        for key, value in asdict(peer).items():
            if key != "host" and value != reference[key]:
                label = {"mlx_lm": "mlx-lm", "code": "hpcmlx source", "config": "configuration"}
                raise ConfigError(
                    f"host {peer.host} (rank {rank}) has {label.get(key, key)} {value}, rank 0 on "
                    f"{peers[0].host} has {reference[key]}; install the same on every host"
                )


def _report_host(logger: Logger, mesh: Mesh, run_dir: Path) -> None:
    found = versions()
    logger.info(
        "layout %s, run directory %s; %s",
        mesh.dims,
        run_dir,
        ", ".join(f"{k} {found[k]}" for k in ("hpcmlx", "mlx", "mlx-lm", "python")),
    )
    if mx.default_device() == mx.Device(mx.cpu):
        logger.info("CPU device, BLAS: %s", hpcmlx.BLAS)
        if not hpcmlx.BLAS.fast:
            logger.warning(
                "only the reference BLAS (%s): matrix products are 30-50 times slower than they "
                "could be",
                hpcmlx.BLAS.source,
            )


def _fail(error: BaseException, world: Communicator | None, record: RunRecord) -> NoReturn:
    """Print why, note it, then end every rank."""
    code, message = _describe(error)
    message = redact.scrub(message)
    where = ""
    if world is not None and world.size > 1:
        where = f"rank {world.rank} on {comm.hostname()}: "
        if world.rank:
            # Where all ranks refuse the same thing, rank 0 says it for them and ends the job.
            time.sleep(0.5)
    print(f"hpcmlx: {where}{message}", file=sys.stderr, flush=True)
    # The others end with this rank, even where the disk that it notes it on does not answer.
    last_resort = threading.Timer(_LAST_RESORT, os._exit, [code])
    last_resort.daemon = True
    last_resort.start()
    record.fail(world or Communicator(), code, message)
    (world or Communicator()).abort(code)


def _describe(error: BaseException) -> tuple[int, str]:
    if isinstance(error, HpcmlxError):
        return int(error.exit_code), str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) and error.code else ExitCode.INTERNAL
        return int(code), f"sys.exit({error.code!r}) before the job was complete"
    text = "".join(traceback.format_exception(error)).rstrip()
    return int(ExitCode.INTERNAL), f"unexpected {type(error).__name__}\n{text}"
