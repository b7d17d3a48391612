"""Runs jobs as a user does, by subprocess, and checks what they leave behind.

A job here is a tiny random model with a tokenizer of single characters. Every process of a job
carries a mark in its environment, so that a test can tell whether one of them has survived.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hpcmlx.inference.rowfiles import read_log, read_part
from hpcmlx.inference.store import ROWS, recover
from hpcmlx.launch.mpirun import find_mpirun
from tests import tiny_configs
from tests.twin import save_checkpoint

# Where the tests run in the background of a script, Ctrl-C is ignored, by what they start as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 60.0  # seconds; a job of these tests takes about three
GRACE = 5.0  # seconds in which every rank must be gone after a failure
_MARK = "HPCMLX_TEST_MARK"
_PYTHON_PATH = [str(ROOT / "tests/without_torch"), os.environ.get("PYTHONPATH", "")]
#: For the environment of a job: it starts in half the time.
WITHOUT_TORCH = {"PYTHONPATH": os.pathsep.join(filter(None, _PYTHON_PATH))}

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(path: Path, vocab_size: int = 128) -> None:
    """A tokenizer with one token per character, ASCII and some Greek, and a chat template."""
    characters = ["\n", *map(chr, range(32, 127))]
    characters += map(chr, range(0x3B1, 0x3B1 + vocab_size - len(SPECIAL) - len(characters)))
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=TEMPLATE,
    ).save_pretrained(path)


def save_model(path: Path, model_type: str = "llama", **config: Any) -> Path:
    """A tiny random model of `tiny_configs`, with `config` changed, and its tokenizer."""
    settings = tiny_configs.CONFIGS[model_type] | {"eos_token_id": 2} | config
    tiny_configs.CONFIGS[str(path)] = settings
    try:
        save_checkpoint(tiny_configs.build(str(path)), settings, path)
    finally:
        del tiny_configs.CONFIGS[str(path)]
    save_tokenizer(path)
    return path


def copy_model(model: Path, to: Path, **config: Any) -> Path:
    """A copy of a model directory with some keys of its config.json changed."""
    shutil.copytree(model, to)
    settings = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(settings | config))
    return to


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama that all tests of a session share. Not to be changed: `copy_model` first."""
    path = tmp_path_factory.getbasetemp() / "llama"
    return path if path.exists() else save_model(path)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    """A prompt file; a row that is text stands in it as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class Outcome:
    """How a job ended.

    Attributes:
        code: exit code; -N when signal N ended it.
        lines: of standard error, each with the seconds from the start at which it came.
        seconds: until the started process had ended.
        survivors: command lines of processes of the job that still ran 1 s after that, or after the
            `patience` of `Running.wait`.
    """

    code: int
    out: str
    lines: list[tuple[float, str]]
    seconds: float
    survivors: list[str] = field(default_factory=list)

    @property
    def err(self) -> str:
        return "\n".join(text for _, text in self.lines)

    @property
    def messages(self) -> list[str]:
        """What hpcmlx said on standard error, but for the mpirun line of `launch=mpirun`."""
        said = [text for _, text in self.lines if text.startswith("hpcmlx: ")]
        return [text for text in said if not text.startswith(f"hpcmlx: {find_mpirun()} ")]

    def after(self, text: str) -> float:
        """Seconds from the first line with `text` to the end."""
        return self.seconds - next(at for at, line in self.lines if text in line)


class Running:
    """A job under way. `wait` for its end; a job that does not end is killed and fails the test."""

    def __init__(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str]):
        self.mark = uuid.uuid4().hex
        self._begin = time.monotonic()
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**os.environ, **env, _MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._out: list[tuple[float, str]] = []
        self.lines: list[tuple[float, str]] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in (
                (self.process.stdout, self._out),
                (self.process.stderr, self.lines),
            )
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], lines: list[tuple[float, str]]) -> None:
        for line in stream:
            text = line.rstrip("\n")
            if stream is self.process.stderr:
                text = text.lstrip("\0 ")  # mpirun ends its own texts with them, not with a newline
            lines.append((time.monotonic() - self._begin, text))

    def until(
        self, condition: Callable[[], Any], timeout: float = 2 * TIMEOUT, pause: float = 0.02
    ) -> Any:
        """What the condition gives, once it gives something; the job must be at work until then.

        Args:
            pause: seconds between two looks; 0 where a moment is to be hit.
        """
        end = time.monotonic() + timeout
        while not (found := condition()):
            if time.monotonic() > end or self.process.poll() is not None:
                self.kill()
                pytest.fail(f"it has not come to this:\n{self._text()}")
            time.sleep(pause)
        return found

    def wait_for(self, text: str, timeout: float = TIMEOUT) -> None:
        """Until a line of standard error has `text` in it."""
        self.until(lambda: any(text in line for _, line in list(self.lines)), timeout)

    def wait(self, timeout: float = TIMEOUT, patience: float = 1.0) -> Outcome:
        """How it ended.

        Args:
            patience: seconds that its processes may outlive the one that was started.
        """
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"no end after {timeout:g} s:\n{self._text()}")
        except BaseException:  # the time of the test itself is up, or Ctrl-C
            self.kill()
            raise
        seconds = time.monotonic() - self._begin
        survivors = self._survivors(patience)
        self.kill()
        for reader in self._readers:
            reader.join(5)
        out = "\n".join(text for _, text in self._out)
        return Outcome(code, out, self.lines, seconds, list(survivors.values()))

    def kill(self) -> None:
        """End every process of the job, and none else."""
        for pid in self._survivors(0.0):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _survivors(self, patience: float) -> dict[int, str]:
        end = time.monotonic() + patience
        while found := _marked(f"{_MARK}={self.mark}"):
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
        return found

    def _text(self) -> str:
        return "\n".join(line for _, line in self.lines)


def _marked(mark: str) -> dict[int, str]:
    """Command lines of the running processes with `mark` in their environment, by process id."""
    if not Path("/proc/self/environ").exists():
        listing = subprocess.run(
            ["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=True
        ).stdout
        words = [line.split(None, 1) for line in listing.splitlines() if mark in line]
        return {int(pid): command.partition(mark)[0] for pid, command in words}
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = command.strip()
        except OSError:
            continue  # ended meanwhile, a zombie, or somebody else's
    return found


def stopped_rank(job: Running) -> int:
    """The rank that an injected fault of kind `stop` has stopped, so that a test meets a moment of
    the job however fast this host is."""
    if not Path("/proc/self/status").exists():
        pytest.skip("NOT TESTED: stopped ranks are found by /proc")
    mark = f"{_MARK}={job.mark}"
    return job.until(lambda: next(filter(_is_stopped, _marked(mark)), None))


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False  # ended meanwhile


def stop_early(job: Running, stopped: int) -> None:
    """Ask the job to stop, by SIGUSR1, and let its stopped rank go on once that has come to it."""
    job.process.send_signal(signal.SIGUSR1)
    status, bit = Path(f"/proc/{stopped}/status"), 1 << (signal.SIGUSR1 - 1)
    pending = re.compile(r"ShdPnd:\s*(\w+)")
    job.until(lambda: int(pending.search(status.read_text())[1], 16) & bit)
    os.kill(stopped, signal.SIGCONT)


def mpirun(*options: str) -> list[str]:
    """The beginning of an mpirun line that works on a small host and as root."""
    line = [find_mpirun(), "--oversubscribe", "--bind-to", "none", *options]
    return [*line, "--allow-run-as-root"] if os.geteuid() == 0 else line


def job_line(job: str, *overrides: str) -> list[str]:
    """`python jobs/JOB.py` with its arguments."""
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *overrides]


def start(
    job: str,
    *overrides: str,
    ranks: int = 0,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> Running:
    """Start a job: without mpirun where `ranks` is 0."""
    line = job_line(job, *overrides)
    if ranks:
        line = [*mpirun("-n", str(ranks)), *line]
    # lm-eval, which evaluate may run, has its own use for torch.
    quick = WITHOUT_TORCH if job == "generate" else {}
    return Running(line, cwd, {**quick, **(env or {})})


def run(job: str, *overrides: str, timeout: float = TIMEOUT, **how: Any) -> Outcome:
    """Run a job to its end; arguments as `start`."""
    return start(job, *overrides, **how).wait(timeout)


def run_line(
    argv: Sequence[str], cwd: Path = ROOT, timeout: float = TIMEOUT, **env: str
) -> Outcome:
    """Run any command line the same way."""
    return Running(argv, cwd, env).wait(timeout)


def assert_done(outcome: Outcome, run_dir: Path) -> None:
    """The job succeeded and left nothing running and nothing half-written."""
    assert outcome.code == 0, outcome.err
    assert not outcome.survivors
    record = json.loads((run_dir / "completed.json").read_text())
    assert record["exit_code"] == 0
    assert not list(run_dir.rglob("*.tmp"))


def assert_refused(
    outcome: Outcome, code: int, *words: str, run_dir: Path | None = None, traceback: bool = False
) -> str:
    """The job failed as it should: its code, one message with `words` in it (several ranks may say
    it where all refuse the same), everybody gone in time, no results. Gives the message."""
    assert outcome.code == code, outcome.err
    said = {re.sub(r"rank \d+ on \S+: ", "", text) for text in outcome.messages}
    assert len(said) == 1, outcome.err
    message = outcome.messages[0]
    for word in words:
        assert word in message, message
    assert ("Traceback" in outcome.err) == traceback, outcome.err
    assert outcome.after(message) < GRACE
    assert_nothing_left(outcome, run_dir)
    return message


def assert_marked(
    faults: Mapping[int, Sequence[str]], here: str, plain: Collection[int] = ()
) -> None:
    """The tests that a table names are there, and are marked as faults.

    Args:
        faults: number of the fault -> tests of module `here`, and of others as module.test.
        plain: numbers whose tests need no mark.
    """
    for number, names in faults.items():
        for name in names:
            module, _, function = name.rpartition(".")
            home = importlib.import_module(f"tests.{module or here}")
            marks = [getattr(place, "pytestmark", []) for place in (home, getattr(home, function))]
            found = {m.name for mark in marks for m in (mark if isinstance(mark, list) else [mark])}
            assert number in plain or "fault" in found, f"{name} is not marked"


def assert_nothing_left(outcome: Outcome, run_dir: Path | None) -> None:
    """No process, no completion record, no results, no temporary file."""
    assert not outcome.survivors
    if run_dir is not None and run_dir.is_dir():
        left = {path.name for path in run_dir.rglob("*") if path.is_file()}
        assert not left & {"completed.json", "results.jsonl", "results.h5", "logprobs.h5"}
        assert not [name for name in left if name.endswith(".tmp")]


def stored_rows(run_dir: Path) -> dict[tuple[int, int], bytes]:
    """The stored line of every committed row by (index, sample). No row may be there twice: that
    would be one that was computed again."""
    found = recover(run_dir / ROWS)
    tables = [
        read_part(path, path.read_bytes())
        if path.suffix == ".h5"
        else read_log(path, path.read_bytes())
        for path in found.files
        if path.suffix == ".h5" or path.with_suffix(".h5") not in found.files
    ]
    # These may hold more rows than were found, where the job is at work.
    keys = [place for table in tables for place in table[["index", "sample"]].tolist()]
    assert len(set(keys)) == len(keys), f"rows were computed twice: {found.files}"
    places = map(tuple, found.places[["index", "sample"]].tolist())
    return dict(zip(places, found.lines(0, len(found)), strict=True))


def rows_of_a_job_that_hangs(job: Running, run_dir: Path) -> dict[tuple[int, int], bytes]:
    """`stored_rows` once it has come to its injected fault and no more of them are committed: the
    disk is waited for beside the model."""
    job.wait_for("injected fault")
    kept: dict[tuple[int, int], bytes] = {}

    def settled() -> bool:
        nonlocal kept
        before, kept = kept, stored_rows(run_dir)
        return len(kept) == len(before) > 0

    job.until(settled, pause=0.5)
    return kept


@dataclass(frozen=True)
class Disk:
    """A file system of its own that only processes which go through `path` see."""

    path: Path
    _keeper: int
    _mounted: Path

    def resize(self, size: str) -> None:
        line = ["nsenter", "-t", str(self._keeper), "-m", "mount", "-o", f"remount,size={size}"]
        subprocess.run([*line, str(self._mounted)], check=True)


@contextmanager
def small_disk(mount_point: Path, size: str, *options: str) -> Iterator[Disk]:
    """A tmpfs of `size` ("1m"), mounted in the namespace of a process that ends with this one: so
    nothing stays mounted, whatever ends a test."""
    mount_point.mkdir()
    script = 'mount -t tmpfs -o "$1" tmpfs "$0" && echo mounted && read end'
    line = ["unshare", "--mount", "sh", "-c", script, str(mount_point)]
    if sys.platform != "linux":
        pytest.skip("NOT TESTED: a small disk needs Linux")
    with subprocess.Popen(
        [*line, ",".join((f"size={size}", *options))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as keeper:
        if keeper.stdout.readline() != "mounted\n":
            pytest.skip("NOT TESTED: mounting a small disk needs root")
        path = Path(f"/proc/{keeper.pid}/root{mount_point}")
        try:
            yield Disk(path, keeper.pid, mount_point)
        finally:
            keeper.kill()
