"""A generate job and what may happen to it: every row comes out once, whatever ends a launch, and
nothing is begun that cannot end well.

The truth is a run in one process that nothing happened to. `FAULTS` says which test shows what
becomes of each fault of the project's table; the numbers are the table's.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from itertools import cycle, islice
from pathlib import Path

import pytest

from hpcmlx import faults
from hpcmlx.inference.store import ROWS, RowStore, recover
from tests.fixtures import (
    GRACE,
    assert_done,
    assert_marked,
    assert_nothing_left,
    assert_refused,
    copy_model,
    rows_of_a_job_that_hangs,
    run,
    small_disk,
    start,
    stop_early,
    stopped_rank,
    stored_rows,
    write_rows,
)
from tests.fixtures import model as model

pytestmark = pytest.mark.fault

# Of each fault: tests of this module, and of others as module.test.
_ENDS = "test_a_launch_that_fails_loses_no_row"
FAULTS = {
    1: ["test_faults.test_a_rank_that_raises_ends_the_job", _ENDS],
    3: ["test_faults.test_a_rank_that_raises_ends_the_job", _ENDS],
    4: ["test_twenty_kills_lose_no_row"],
    5: ["test_faults.test_a_rank_that_dies_ends_the_job", _ENDS],
    7: ["test_orphans.test_ranks_end_when_mpirun_is_killed", "test_mpirun_is_ended"],
    16: ["test_a_signal_ends_a_launch_early"],
    17: ["test_a_signal_ends_a_launch_early"],
    18: ["test_mpirun_is_ended"],
    21: ["test_a_run_that_is_under_way_is_left_alone"],
    23: ["test_a_full_disk"],
    24: ["test_too_little_room_is_seen_before_the_model_loads"],
    29: ["test_a_read_only_output"],
    30: ["test_eight_launches_in_one_second"],
    32: [
        "test_store.test_a_torn_commit_at_the_end_is_dropped",
        "test_a_torn_and_a_damaged_log",
    ],
    33: [
        "test_inputs.test_a_bad_line_is_an_error_of_its_row",
        "test_inputs.test_bom_crlf_and_blank_lines",
        "test_inputs.test_a_line_of_10_mb",
        "test_inputs.test_a_file_without_rows",
        "test_bad_rows_take_nothing_with_them",
    ],
    34: ["test_ids_are_checked_before_the_model_loads"],
    35: ["test_bad_rows_take_nothing_with_them"],
    36: ["test_manifest.test_an_input_that_has_changed", "test_a_run_that_was_begun_differently"],
    37: ["test_manifest.test_a_setting_that_has_changed", "test_a_run_that_was_begun_differently"],
    40: [
        "test_faults_models.test_a_malformed_safetensors_file",
        "test_faults_models.test_a_flipped_weight_ends_the_job_before_it_loads",
    ],
    41: [
        "test_faults.test_a_model_that_cannot_be_used",
        "test_faults_models.test_what_lies_beside_a_model_is_not_run",
        "test_configuration_is_data",
    ],
    42: ["test_inputs.test_a_hostile_template_spoils_only_chat_rows", "test_a_hostile_template"],
}
MUST_HOLD = {1, 3, 4, 5, 7, 16, 17, 18, 21, 23, 24, 29, 30, *range(32, 38), *range(40, 43)}

LAYOUTS = {
    "alone": (0, []),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, ["parallel.dp=2"]),
}
NUM_KILLS = 20
ROWS_IN = [
    {"id": f"row-{i}", "prompt": "The quick brown fox"[i : 9 + i], "max_tokens": 4 + i * 5 % 7}
    for i in range(12)
]
MANY_STEPS = 12  # of any launch that has all rows before it


def test_every_fault_has_its_test():
    assert FAULTS.keys() == MUST_HOLD
    assert_marked(FAULTS, "test_faults_generate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults-generate")


@pytest.fixture(scope="module")
def common(model, folder) -> list[str]:
    prompts = write_rows(folder / "prompts.jsonl", ROWS_IN)
    return [f"model.path={model}", f"input={prompts}", "inference.batch_size=2"]


@pytest.fixture(scope="module")
def truth(common, folder) -> Path:
    """The run directory of a run that nothing happened to."""
    run_dir = folder / "truth"
    assert_done(run("generate", *common, f"run_dir={run_dir}"), run_dir)
    assert [row["id"] for row in answers(run_dir)] == [row["id"] for row in ROWS_IN]
    return run_dir


def answers(run_dir: Path, name: str = "results.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def begun(truth: Path, run_dir: Path, num_rows: int) -> Path:
    """A run that was cut off after `num_rows` rows, each committed alone; gives their log."""
    shutil.copytree(truth, run_dir, ignore=shutil.ignore_patterns("completed*", "results*", ROWS))
    store = RowStore(run_dir / ROWS, 0)
    for row in islice(recover(truth / ROWS), num_rows):
        store.commit([row])
    [log] = (run_dir / ROWS).iterdir()
    return log


def assert_kept(run_dir: Path, before: dict) -> dict:
    """What was committed is there, byte for byte, and no row twice. Gives what is there now."""
    now = stored_rows(run_dir)
    assert before.items() <= now.items()
    return now


def assert_like_the_truth(
    run_dir: Path, truth: Path, before: dict, num_rows: int = len(ROWS_IN)
) -> None:
    assert len(assert_kept(run_dir, before)) == num_rows
    assert (run_dir / "results.jsonl").read_bytes() == (truth / "results.jsonl").read_bytes()


# -- ranks, mpirun and launches that end --


@pytest.mark.timeout(600)  # a minute and a half where nothing else runs
def test_twenty_kills_lose_no_row(common, truth, tmp_path):
    """Fault 4: ranks are killed at random steps, and other layouts go on."""
    rng = random.Random(7)
    layouts = cycle(rng.sample(sorted(LAYOUTS), len(LAYOUTS)))
    num_kills, num_kept = 0, 0
    while num_kills < NUM_KILLS:
        run_dir, kept, code = tmp_path / f"after-{num_kills}-kills", {}, -1
        for number in range(11):
            ranks, layout = LAYOUTS[next(layouts)]
            spec = f"rank={rng.randrange(max(1, ranks))},step={rng.randint(2, 9)},kind=kill"
            env = {faults.ENV: spec} if number < 10 and num_kills < NUM_KILLS else {}
            line = [*common, *layout, f"run_dir={run_dir}"]
            outcome = run("generate", *line, ranks=ranks, env=env)
            code = outcome.code
            if code == 0:  # there were not that many steps left, or there was no fault
                break
            num_kills += 1
            assert "injected fault: kill" in outcome.err and not outcome.survivors, outcome.err
            kept = assert_kept(run_dir, kept)
            assert json.loads((run_dir / "status.json").read_text())["num_done"] <= len(kept)
            assert not (run_dir / "completed.json").exists()
        assert code == 0
        num_kept += len(kept)
        assert_done(outcome, run_dir)
        assert_like_the_truth(run_dir, truth, kept)
    assert num_kept >= len(ROWS_IN)


def test_a_launch_that_fails_loses_no_row(common, truth, tmp_path):
    """Faults 1, 3, 5, one after the other in one run directory. That each ends in time and says
    why is in test_faults.py."""
    run_dir, kept = tmp_path / "run", {}
    ends = [("exception", "pp2", 1), ("exit", "tp2", 0), ("os_exit", "dp2", 0), ("segv", "pp2", 0)]
    for kind, name, rank in ends:
        ranks, layout = LAYOUTS[name]
        env = {faults.ENV: f"rank={rank},step=5,kind={kind}"}
        outcome = run("generate", *common, *layout, f"run_dir={run_dir}", ranks=ranks, env=env)
        assert outcome.code not in (0, 64), outcome.err
        assert outcome.after("injected fault") < GRACE
        assert_nothing_left(outcome, run_dir)
        kept = assert_kept(run_dir, kept)
    assert_done(run("generate", *common, f"run_dir={run_dir}"), run_dir)
    assert_like_the_truth(run_dir, truth, kept)


def test_a_damaged_completion_record(common, truth, tmp_path):
    """Refused where nothing is left to do; where rows are missing, it counts for nothing."""
    run_dir = tmp_path / "run"
    line = [*common, "parallel.pp=2", f"run_dir={run_dir}"]
    assert_done(run("generate", *line, ranks=2), run_dir)
    (run_dir / "completed.json").write_text("{")
    outcome = run("generate", *line, ranks=2)
    assert outcome.code == 77 and len(outcome.messages) == 1, outcome.err
    assert "completed.json cannot be read" in outcome.messages[0]
    assert "delete it and start the job again" in outcome.messages[0]
    shutil.rmtree(run_dir / ROWS)
    assert_done(run("generate", *line, ranks=2), run_dir)
    assert_like_the_truth(run_dir, truth, {})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_mpirun_is_ended(common, truth, tmp_path, number):
    """Faults 7 and 18: no rank stays behind, what was committed is safe, and the run goes on."""
    run_dir = tmp_path / "run"
    line = [*common, "parallel.pp=2", f"run_dir={run_dir}"]
    env = {faults.ENV: f"rank=1,step={MANY_STEPS},kind=hang"}
    job = start("generate", *line, ranks=2, env=env)
    kept = rows_of_a_job_that_hangs(job, run_dir)
    assert 0 < len(kept) < len(ROWS_IN)
    job.process.send_signal(number)
    outcome = job.wait(patience=GRACE)
    assert outcome.code != 0
    assert_nothing_left(outcome, run_dir)
    kept = assert_kept(run_dir, kept)
    assert_done(run("generate", *line, ranks=2), run_dir)
    assert_like_the_truth(run_dir, truth, kept)


def test_a_signal_ends_a_launch_early(common, folder, tmp_path):
    """Faults 16 and 17: SIGUSR1 to mpirun, while the other ranks wait in MPI for one that has
    stopped, and to the only process; what is done is kept, and one launch after the other goes on.
    """
    rows = [{"id": str(i), "prompt": "The quick"[: 2 + i % 8], "max_tokens": 40} for i in range(96)]
    line = [*common, f"input={write_rows(folder / 'many.jsonl', rows)}"]
    assert_done(run("generate", *line, f"run_dir={tmp_path / 'truth'}"), tmp_path / "truth")
    run_dir, kept = tmp_path / "run", {}
    both = (4, ["parallel.dp=2", "parallel.pp=2"])
    for ranks, layout in (LAYOUTS["alone"], LAYOUTS["tp2"], both):
        env = {faults.ENV: f"rank={min(1, ranks)},step=200,kind=stop"}
        job = start("generate", *line, *layout, f"run_dir={run_dir}", ranks=ranks, env=env)
        late = stopped_rank(job)
        time.sleep(0.2)  # the others get to where they wait for it
        stop_early(job, late)
        outcome = job.wait(patience=GRACE)
        assert outcome.code == 76, outcome.err
        assert "asked to stop: " in outcome.err and not outcome.survivors, outcome.err
        assert not (run_dir / "completed.json").exists()
        assert len(assert_kept(run_dir, kept)) > len(kept)
        kept = stored_rows(run_dir)
        status = json.loads((run_dir / "status.json").read_text())
        assert (status["state"], status["num_done"]) == ("stopped", len(kept))
    assert len(kept) < len(rows)
    assert_done(run("generate", *line, f"run_dir={run_dir}"), run_dir)
    assert_like_the_truth(run_dir, tmp_path / "truth", kept, len(rows))


def test_a_run_that_is_under_way_is_left_alone(common, truth, tmp_path):
    """Fault 21: a second launch is told who is at work, and changes nothing."""
    run_dir = tmp_path / "run"
    line = [*common, f"run_dir={run_dir}"]
    job = start("generate", *line, env={faults.ENV: f"rank=0,step={MANY_STEPS},kind=hang"})
    kept = rows_of_a_job_that_hangs(job, run_dir)
    assert 0 < len(kept) < len(ROWS_IN)
    second = run("generate", *line)
    words = [f"run directory {run_dir} is in use by pid {job.process.pid} on host ", "wait for"]
    assert_refused(second, 73, *words)
    assert job.process.poll() is None and stored_rows(run_dir) == kept
    job.kill()
    job.wait()
    assert_done(run("generate", *line), run_dir)  # the lock died with the first launch
    assert_like_the_truth(run_dir, truth, kept)


def test_eight_launches_in_one_second(common, tmp_path):
    """Fault 30: each gets a run directory of its own."""
    begin = time.monotonic()
    jobs = [start("generate", *common, "sampling.max_tokens=1", cwd=tmp_path) for _ in range(8)]
    assert time.monotonic() - begin < 5  # a busy host
    outcomes = [job.wait(120) for job in jobs]
    assert [outcome.code for outcome in outcomes] == [0] * 8
    run_dirs = list((tmp_path / "runs").iterdir())
    assert len(run_dirs) == 8
    for run_dir in run_dirs:
        assert (run_dir / "completed.json").exists() and len(answers(run_dir)) == len(ROWS_IN)


# -- disks --


@pytest.mark.parametrize("share", [1.5, 0.4], ids=["at rows", "at results"])
def test_a_full_disk(common, tmp_path, share):
    """Fault 23: one line, rows intact, no half results; with more room the run goes on."""
    ids = [f"{i:02}" + "x" * int(share * 2**20 / 20) for i in range(20)]
    path = write_rows(tmp_path / "in.jsonl", [{"id": i, "prompt": "a"} for i in ids])
    with small_disk(tmp_path / "disk", "1m") as disk:
        run_dir = disk.path / "run"
        line = [*common, f"input={path}", f"run_dir={run_dir}", "sampling.max_tokens=1"]
        outcome = run("generate", *line)
        name = f"{ROWS}/rank0-" if share > 1 else "results.h5"
        words = [f"no room for {run_dir}/{name}", "free some space"]
        assert_refused(outcome, 74, *words, run_dir=run_dir)
        kept = stored_rows(run_dir)
        assert 0 < len(kept) < len(ids) if share > 1 else len(kept) == len(ids)
        disk.resize("16m")
        assert_done(run("generate", *line), run_dir)
        assert len(assert_kept(run_dir, kept)) == len(ids)
        assert [row["id"] for row in answers(run_dir)] == ids


def test_too_little_room_is_seen_before_the_model_loads(common, tmp_path):
    """Fault 24."""
    rows = [dict(row, max_tokens=400) for row in ROWS_IN]
    path = write_rows(tmp_path / "in.jsonl", rows)
    with small_disk(tmp_path / "disk", "64k") as disk:
        run_dir = disk.path / "run"
        outcome = run("generate", *common, f"input={path}", f"run_dir={run_dir}")
        words = [f"not enough room in {run_dir}: the results of 12 rows may need ", "free some"]
        assert_refused(outcome, 73, *words, run_dir=run_dir)
        assert "layers" not in outcome.err


def test_a_read_only_output(common, tmp_path):
    """Fault 29."""
    with small_disk(tmp_path / "disk", "1m", "ro") as disk:
        outcome = run("generate", *common, f"run_dir={disk.path}/run")
        words = [f"cannot create {disk.path}/run: Read-only file system", "writable place"]
        assert_refused(outcome, 73, *words)


def test_a_torn_and_a_damaged_log(common, truth, tmp_path):
    """Fault 32: the torn end of a log is computed again, other damage is refused."""
    torn, damaged = tmp_path / "torn", tmp_path / "damaged"
    log = begun(truth, torn, 8)
    log.write_bytes(log.read_bytes()[:-5])
    outcome = run("generate", *common, f"run_dir={torn}")
    assert_done(outcome, torn)
    assert "7 answers are there, 5 to go" in outcome.err
    assert_like_the_truth(torn, truth, {})

    log = begun(truth, damaged, 8)
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    outcome = run("generate", *common, f"run_dir={damaged}")
    assert_refused(outcome, 77, f"{log}, line ", "damaged; restore it", run_dir=damaged)
    assert "layers" not in outcome.err and log.read_bytes() == data


# -- input --


def test_bad_rows_take_nothing_with_them(common, truth, tmp_path):
    """Faults 33 and 35: errors.jsonl names each by its line; the rest is done, once."""
    good = [json.dumps(row).encode() for row in ROWS_IN]
    lines = [
        b"\xef\xbb\xbf" + good[0] + b"\r",
        b'{"id": "cut", "prompt": ',
        b"",
        b'{"id": "latin", "prompt": "caf\xe9"}',
        b"\0\0\0\0",
        *good[1:6],
        b'{"id": "10 MB", "prompt": "' + b"x" * 10_000_000,
        b'{"id": "long", "prompt": "' + b"x" * 600 + b'"}',
        *good[6:],
    ]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    run_dir = tmp_path / "run"
    line = [*common, f"input={path}", f"run_dir={run_dir}"]
    outcome = run("generate", *line, "parallel.tp=2", ranks=2)
    assert outcome.code == 64 and not outcome.survivors, outcome.err
    found = [(e["id"], e["line"], e["error"]["code"]) for e in answers(run_dir, "errors.jsonl")]
    assert found == [
        ("2", 2, "invalid_json"),
        ("4", 4, "invalid_json"),
        ("5", 5, "invalid_json"),
        ("11", 11, "invalid_json"),
        ("long", 12, "context_length_exceeded"),
    ]
    assert (run_dir / "results.jsonl").read_bytes() == (truth / "results.jsonl").read_bytes()
    before = (run_dir / "results.jsonl").stat().st_mtime_ns, stored_rows(run_dir)
    again = run("generate", *line)
    assert again.code == 64 and "all 12 answers are there already" in again.err
    assert ((run_dir / "results.jsonl").stat().st_mtime_ns, stored_rows(run_dir)) == before


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "b", "a"], "ids used more than once: 'a' (lines 1, 3)"),
        (["a", None, None], "rows without a custom_id: lines 2, 3"),
    ],
    ids=["duplicate", "missing"],
)
def test_ids_are_checked_before_the_model_loads(common, tmp_path, ids, words):
    """Fault 34."""
    row = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}
    rows = [row | ({} if i is None else {"custom_id": i}) for i in ids]
    path = write_rows(tmp_path / "in.jsonl", rows)
    outcome = run("generate", *common, f"input={path}", f"run_dir={tmp_path / 'run'}")
    assert_refused(outcome, 65, str(path), words, run_dir=tmp_path / "run")
    assert "layers" not in outcome.err


def test_a_run_that_was_begun_differently(common, truth, tmp_path):
    """Faults 36 and 37: the difference is said, and the rows are left as they are."""
    run_dir = tmp_path / "run"
    begun(truth, run_dir, 5)
    kept = stored_rows(run_dir)
    path = write_rows(tmp_path / "in.jsonl", [*ROWS_IN[:-1], ROWS_IN[-1] | {"prompt": "other"}])
    for name in ("run_dir", "resume"):
        line = [*common, f"{name}={run_dir}"]
        edited = [f"input={path}"] if name == "run_dir" else ["sampling.temperature=0.5"]
        words = {
            "run_dir": [f"input {path} has changed (sha256 "],
            "resume": ["sampling.temperature was 0.0, is 0.5"],
        }
        outcome = run("generate", *line, *edited)
        begin = f"run directory {run_dir} was begun differently: "
        assert_refused(outcome, 78, begin, *words[name], "set it back", run_dir=run_dir)
        assert "layers" not in outcome.err and stored_rows(run_dir) == kept


def test_configuration_is_data(truth, tmp_path):
    """Fault 41: what a run directory brings along is not executed."""
    run_dir, mark = tmp_path / "run", tmp_path / "mark"
    begun(truth, run_dir, 1)
    with open(run_dir / "config.yaml", "a") as file:
        file.write(f"timeline: !!python/object/apply:os.system ['touch {mark}']\n")
    outcome = run("generate", f"resume={run_dir}")
    assert_refused(outcome, 78, "config.yaml cannot be read", "python/object", run_dir=run_dir)
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3],
    ids=["escape", "loop"],
)
def test_a_hostile_template(model, common, truth, tmp_path, template):
    """Fault 42: rows that go through it are errors within its time limit, prompts are answered."""
    path = copy_model(model, tmp_path / "model")
    (path / "chat_template.jinja").write_text(template)
    chat = [{"id": f"chat-{i}", "messages": [{"role": "user", "content": "a"}]} for i in range(3)]
    rows = write_rows(tmp_path / "in.jsonl", [chat[0], *ROWS_IN[:2], *chat[1:]])
    run_dir = tmp_path / "run"
    outcome = run("generate", *common, f"model.path={path}", f"input={rows}", f"run_dir={run_dir}")
    assert outcome.code == 64 and not outcome.survivors, outcome.err
    errors = answers(run_dir, "errors.jsonl")
    assert [error["id"] for error in errors] == [row["id"] for row in chat]
    assert {error["error"]["code"] for error in errors} == {"chat_template_error"}
    assert answers(run_dir) == answers(truth)[:2]
