"""The README's commands and claims are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hpcmlx.config import EvaluateConfig, FinetuneConfig, GenerateConfig, compose
from hpcmlx.errors import ExitCode
from hpcmlx.launch.hostfile import parse_hostfile, total_slots
from hpcmlx.models.plans import PLANS, plan_for

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split(" #")[0].removeprefix("$ ").strip()
    for line in README.splitlines()
    if re.match(r"(\$ )?(mpirun .*)?python jobs/(generate|evaluate|finetune)\.py", line)
    and "resume=" not in line  # of a run that there is not
]
SWEPT = re.compile(r"^hydra/|=.*(,|interval)")
SCHEMAS = {
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "finetune": FinetuneConfig,
}


def test_there_are_commands():
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_command_fits_its_hosts_and_its_layout(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith("jobs/"))
    job = Path(words[at]).stem
    assert (ROOT / words[at]).exists()
    overrides = words[at + 1 :]
    if overrides == ["--help"]:
        return
    if "-m" in overrides:  # of a sweep, what its points have in common
        overrides = [o for o in overrides if "=" in o and not SWEPT.search(o)]
    settings = compose(SCHEMAS[job], ROOT / "conf", job, overrides)
    needed = settings.parallel.dp * settings.parallel.pp * settings.parallel.tp
    if "-hostfile" in words:
        started = total_slots(parse_hostfile(ROOT / words[words.index("-hostfile") + 1]))
    elif "-n" in words:
        started = int(words[words.index("-n") + 1])
    else:
        started = 1 if settings.launch.kind == "none" else needed
    assert started == needed
    read = settings.data.train if job == "finetune" else [settings.input]
    assert all((ROOT / path).exists() for path in read)


def test_plans_are_all_named():
    sentence = re.search(r"`tp` has plans for (.*?);", README, re.DOTALL).group(1)
    named = set(re.findall(r"[a-z0-9_]+", sentence)) - {"and"}
    assert named >= set(PLANS)
    for name in named:
        plan_for(name)


def test_architectures_are_counted():
    right, total = re.search(
        r"(\d+) of (\d+) are right", (ROOT / "docs/architectures.md").read_text()
    ).groups()
    assert f"{right} of mlx-lm's {total} architectures" in README


def test_exit_codes_are_those_of_the_code():
    line = re.search(r"Exit codes: (.*?)\n\n", README, re.DOTALL).group(1)
    codes = {int(code) for code in re.findall(r"(?:^|· ?\n?)(\d+) ", line)}
    assert codes == {int(code) for code in ExitCode}
