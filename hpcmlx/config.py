"""From conf/ and the command line to a checked configuration: Hydra composes, `schema.py` checks.

Rank 0 calls `compose` and broadcasts `to_dict`; nothing here knows of MPI or MLX. A configuration
is data: nothing in it is imported or called, and `_target_` is refused wherever it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hpcmlx.errors import ConfigError, UsageError
from hpcmlx.schema import config_hash, describe, from_dict, keys, to_dict, unknown_key
from hpcmlx.settings import (
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    InferenceConfig,
    JobConfig,
    LaunchConfig,
    ModelConfig,
    ParallelConfig,
    SamplingConfig,
    ScoringConfig,
)
from hpcmlx.settings_finetune import FinetuneConfig

__all__ = [
    "CommandLine",
    "DataConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "InferenceConfig",
    "JobConfig",
    "LaunchConfig",
    "ModelConfig",
    "ParallelConfig",
    "SamplingConfig",
    "ScoringConfig",
    "checked_override",
    "compose",
    "config_hash",
    "from_dict",
    "help_text",
    "load",
    "parse_command_line",
    "quote",
    "read",
    "resolved",
    "to_dict",
    "to_yaml",
]

T = TypeVar("T", bound=JobConfig)

#: What a run directory keeps of its configuration.
SAVED = "config.yaml"


@dataclass(frozen=True)
class CommandLine:
    """What a job was called with.

    Attributes:
        overrides: `key=value` and `group=file`, in Hydra's syntax.
        show: "help" or "config" to print that and end, else "".
        multirun: the overrides describe a sweep of several points.
        file: a whole configuration that was saved, in place of conf/; "" for conf/.
    """

    overrides: tuple[str, ...]
    show: str = ""
    multirun: bool = False
    file: str = ""

    @property
    def arguments(self) -> tuple[str, ...]:
        """What a process gets that is to have the same configuration."""
        return (*([f"--config={self.file}"] if self.file else []), *self.overrides)


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Split `sys.argv[1:]` into overrides and the options `--help`, `--cfg job`, `-m`, `--config`.

    Raises:
        UsageError: anything that is neither.
    """
    overrides, show, multirun, file = [], "", False, ""
    args = iter(argv)
    for arg in args:
        if arg in ("-h", "--help"):
            show = "help"
        elif arg in ("--cfg", "--cfg=job"):
            if arg == "--cfg" and next(args, None) != "job":
                raise UsageError("--cfg prints the configuration: write --cfg job")
            show = show or "config"
        elif arg in ("-m", "--multirun"):
            multirun = True
        elif arg == "--config" or arg.startswith("--config="):
            file = arg.partition("=")[2] if "=" in arg else next(args, "")
            if not file:
                raise UsageError("--config takes a file, as in --config=runs/a/config.yaml")
        elif arg.startswith("-"):
            raise UsageError(
                f"unknown option {arg}: the options are --help, --cfg job, -m, --config FILE"
            )
        elif "=" not in arg:
            raise UsageError(f"{arg!a} is not key=value; --help lists the keys")
        else:
            overrides.append(arg)
    if multirun and file:
        raise UsageError("-m is for conf/, --config for one that is made: leave out one")
    return CommandLine(tuple(overrides), show, multirun, file)


def read(cls: type[T], config_dir: str | Path, job_name: str, command: CommandLine) -> T:
    """The configuration of one job, as its command line says.

    Raises:
        UsageError, ConfigError: as `compose` and `load`; what is for a sweep, without `-m`.
    """
    if command.file:
        return load(cls, command.file, command.overrides)
    return compose(cls, config_dir, job_name, command.overrides, single=True)


def compose(
    cls: type[T],
    config_dir: str | Path,
    job_name: str,
    overrides: Sequence[str] = (),
    *,
    single: bool = False,
) -> T:
    """The configuration of a job from `config_dir` and command-line overrides.

    `resume=RUN_DIR` among them brings that run's saved settings; what other overrides name, and
    every group that they choose, is theirs.

    Args:
        cls: the job's dataclass (`GenerateConfig`).
        config_dir: the conf/ directory.
        job_name: the root file in it, without `.yaml` ("generate").
        overrides: `key=value` or `group=file` texts.
        single: not a point of a sweep: refuse what only a sweep heeds.

    Raises:
        UsageError: an override that cannot be read as one, or is for a sweep.
        ConfigError: an unknown key or group file, a wrong value, `_target_`, a file that is not
            plain YAML.
    """
    root = Path(config_dir).resolve()
    texts = [checked_override(text, root, cls) for text in overrides]
    try:
        with initialize_config_dir(str(root), version_base="1.3"):
            composed = hydra_compose(job_name, texts, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"conf: {' '.join(str(error).split())}") from error
    with open_dict(composed):
        swept = OmegaConf.select(composed.pop("hydra"), "sweeper.params")
    if single and (swept or any(text.lstrip("+").startswith("sweep.") for text in texts)):
        raise UsageError("this is a sweep, of several runs: give -m")
    if resume := composed.get("resume"):
        _go_on_with(composed, Path(str(resume)) / SAVED, texts)
    return _checked(cls, composed)


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """A configuration that `to_yaml` has written; conf/ has no part in it.

    Args:
        overrides: `key=value` texts; groups are not known here.

    Raises:
        UsageError, ConfigError: as `compose`, or the file cannot be read.
    """
    try:
        saved = yaml.safe_load(Path(path).read_text())
        composed = OmegaConf.create(saved)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config: {path} cannot be read: {reason}") from None
    if not isinstance(composed, DictConfig):
        raise ConfigError(f"--config: {path} is not a configuration")
    parser = OverridesParser.create()
    for text in overrides:
        override = parser.parse_override(checked_override(text, None, cls))
        OmegaConf.update(composed, override.key_or_group, override.value(), force_add=True)
    return _checked(cls, composed)


def _checked(cls: type[T], composed: DictConfig) -> T:
    """The dataclasses of what is composed."""
    raw = OmegaConf.to_container(composed, resolve=False)
    for key in _leaf_keys(raw):
        _refuse_target(key)
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        # Nothing else of the message: it may quote a value that came from the environment.
        match = re.search(r"(Environment variable|Interpolation key) '[^']*' not found", str(error))
        reason = f": {match[0]}" if match else ""
        raise ConfigError(f"{error.full_key}: its ${{…}} cannot be resolved{reason}") from None
    unresolved = dict(_interpolated(raw, values, ""))
    return from_dict(cls, {**_without_missing(values), "unresolved": unresolved})


def _go_on_with(composed: DictConfig, path: Path, overrides: Sequence[str]) -> None:
    """Fill in what `path` has saved and no override speaks of."""
    parser = OverridesParser.create()
    spoken_of = {parser.parse_override(text).key_or_group for text in overrides}
    try:
        saved = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"resume: {path} cannot be read: {' '.join(str(error).split())}"
        ) from None
    spoken_of |= {"run_dir", "resume", "launch"}
    for key, value in _settings(saved):
        if not any(key == name or key.startswith(f"{name}.") for name in spoken_of):
            OmegaConf.update(composed, key, value, force_add=True)


def _settings(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a group."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _settings(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def to_yaml(cfg: JobConfig) -> str:
    """The configuration as YAML that `compose` would read; interpolations stay as written, so
    that no environment variable gets into a file."""
    values = to_dict(cfg)
    unresolved = values.pop("unresolved")
    text: str = yaml.safe_dump(
        _restore(values, unresolved, ""), sort_keys=False, allow_unicode=True
    )
    return text


def resolved(text: str) -> str:
    """A value that a file has kept as it was written, as in `${oc.env:MODELS}/llama`.

    Raises:
        ConfigError: it cannot be resolved here.
    """
    if "${oc." not in text:
        return text
    try:
        return str(OmegaConf.create({"value": text}).value)
    except OmegaConfBaseException:
        raise ConfigError(
            f"{text}: cannot be resolved here; set that environment variable"
        ) from None


def quote(key: str, value: str) -> str:
    """The override that sets `key` to exactly the text `value`."""
    literal = value.replace("${", "\\${")
    return f"{key}={QuotedString(literal, Quote.single).with_quotes()}"


def help_text(cls: type[JobConfig], config_dir: str | Path) -> str:
    """What can be set: the groups with their files, then every key with type, default, meaning."""
    lines = ["Groups (group=file):"]
    for group in sorted(p for p in Path(config_dir).iterdir() if p.is_dir()):
        lines.append(f"  {group.name:<12} {', '.join(_options(group))}")
    lines.append("\nKeys (key=value):")
    for key, kind, item in keys(cls):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        shown = "required" if default is MISSING else "null" if default is None else default
        choices = "|".join(map(str, item.metadata["choices"])) or describe(kind)
        lines.append(f"  {key} ({choices}; {shown})\n      {item.metadata['help']}")
    lines.append(
        "\nOptions: --help; --cfg job (print the configuration and end); -m (a sweep: key=a,b is a "
        "point for each value); --config FILE (a configuration that a job has saved, in place of "
        "conf/)"
    )
    return "\n".join(lines)


def _options(group: Path) -> list[str]:
    return sorted(p.stem for p in group.glob("*.yaml"))


def checked_override(
    text: str, root: Path | None, cls: type[JobConfig], *, multirun: bool = False
) -> str:
    """The override as Hydra is to get it, or the reason why it cannot be meant.

    Args:
        root: the conf/ directory; None where there are no groups.
        multirun: it may have several values.

    Raises:
        UsageError, ConfigError: as `compose`.
    """
    try:
        override: Override = OverridesParser.create().parse_override(text)
        sweep = override.is_sweep_override()
    except HydraException as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"override {text!a} cannot be read: {reason}; quote what has spaces or any of "
            "{}[]()=,: as in \"input='a=b.jsonl'\""
        ) from error
    key = override.key_or_group
    if override.is_delete() or override.package is not None:
        raise UsageError(f"override {text!a}: only key=value and group=file are understood")
    if sweep and not multirun:
        raise UsageError(
            f"override {text!a} has several values; a list is written {key}=[a,b], and a sweep "
            "over them is started with -m"
        )
    _refuse_target(key)
    if not key:
        raise UsageError(f"override {text!a} has no key; --help lists them")
    if root is not None and (root / key).is_dir() and "/" not in key:
        options = _options(root / key)
        for value in _values(override):
            if value not in [*options, None]:
                raise ConfigError(f"conf/{key} has no {value}; there are: {', '.join(options)}")
        return text.lstrip("+")
    valid = [k for k, _, _ in keys(cls)]
    if not any(k == key or k.startswith(f"{key}.") for k in valid):
        raise unknown_key(cls, key)
    # `++`: set it whether or not a file of conf/ does; the dataclass says what exists.
    return "++" + text.lstrip("+")


def _values(override: Override) -> list[Any]:
    """What is chosen of a group; in a sweep, several."""
    if not override.is_sweep_override():
        value = override.value()
        return [value if value is None else str(value)]
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP or not override.is_discrete_sweep():
        raise UsageError(f"override {override.input_line!a}: name the files, as in group=a,b")
    return list(override.sweep_string_iterator())


def _refuse_target(key: str) -> None:
    if "_target_" in re.split(r"[.\[]", key):
        raise ConfigError(f"{key}: a configuration is data and cannot name code; remove it")


def _leaf_keys(node: Any, key: str = "") -> Iterator[str]:
    """The dotted key of everything that is neither a group nor a list."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaf_keys(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _leaf_keys(value, f"{key}[{i}]")
    else:
        yield key


def _interpolated(raw: Any, value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) where the text of the file or override is not the value."""
    if isinstance(raw, dict) and isinstance(value, dict):
        for name in raw:
            yield from _interpolated(raw[name], value[name], f"{key}.{name}" if key else str(name))
    elif isinstance(raw, list) and isinstance(value, list):
        for i, item in enumerate(raw):
            yield from _interpolated(item, value[i], f"{key}[{i}]")
    elif isinstance(raw, str) and raw != value:
        yield key, raw


def _restore(node: Any, unresolved: dict[str, str], key: str) -> Any:
    """`node` with the texts of `unresolved` put back."""
    if key in unresolved:
        return unresolved[key]
    if isinstance(node, dict):
        prefix = f"{key}." if key else ""
        return {name: _restore(v, unresolved, f"{prefix}{name}") for name, v in node.items()}
    if isinstance(node, list):
        return [_restore(v, unresolved, f"{key}[{i}]") for i, v in enumerate(node)]
    return node


def _without_missing(node: Any) -> Any:
    """`node` without the keys whose value is `???`, OmegaConf's mark for "must be given"."""
    if isinstance(node, dict):
        return {name: _without_missing(v) for name, v in node.items() if v != "???"}
    return node
