"""What a job's configuration consists of: one root dataclass per job, plain values only.

`hpcmlx.config` fills these classes from conf/ and the command line. A value that does not fit is
refused with its key, what it is and what would be right.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from hpcmlx.errors import ConfigError

T = TypeVar("T")

#: Keys that name a file or directory: no control characters.
PATH_KEYS = ("model.path", "model.adapter", "input", "run_dir", "launch.hostfile", "resume")


def _key(
    help: str,
    default: Any = MISSING,
    *,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A configuration key: its help text, its default and the values it accepts.

    Bounds are `low <= value <= high` and `value > above`; for a list they hold for each element.
    A list default is copied for every instance.
    """
    limits = {"choices": choices, "low": low, "above": above, "high": high}
    metadata = {"help": help, **limits}
    if isinstance(default, list):
        items = list(default)
        return field(default_factory=lambda: list(items), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, and in which number format it computes."""

    path: str = _key("model directory, .gguf file, or a hub name that was fetched before")
    dtype: str = _key(
        "compute type; auto: float32 on a CPU, the checkpoint's own on a GPU",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    weights: str = _key(
        "quantized weights; auto: dequantize on a CPU, keep on a GPU",
        "auto",
        choices=("auto", "keep", "dequantize"),
    )
    adapter: str | None = _key("directory of a LoRA adapter, mlx-lm's or PEFT's; null: none", None)
    verify: bool = _key("compare the model's files with its checksums.json, where it has one", True)


@dataclass(kw_only=True)
class ParallelConfig:
    """The layout of the ranks; dp x pp x tp is the number of ranks."""

    dp: int = _key("replicas of the model, each with its part of the input", 1, low=1)
    pp: int = _key("pipeline stages: the layers are dealt out", 1, low=1)
    tp: int = _key("tensor-parallel ranks: every layer is cut", 1, low=1)
    tp_shares: list[float] | None = _key(
        "weight of each tensor-parallel rank, as in [2,1]; null: equal", None, above=0
    )
    pp_layers: list[int] | None = _key(
        "layers of each stage, as in [17,13]; null: balanced", None, low=1
    )


@dataclass(kw_only=True)
class InferenceConfig:
    """How the rows are batched."""

    batch_size: int = _key("rows per microbatch, at most", 32, low=1)
    num_microbatches: int | None = _key(
        "microbatches in flight; null: the number of stages, one more where stages are seen idle",
        None,
        low=1,
    )
    prefill_chunk: int = _key("prompt tokens that go through a stage at once", 512, low=1)
    kv_memory: str | None = _key(
        "memory for KV caches on each rank, as in 4GiB; null: most of what is free", None
    )
    kv_bits: int | None = _key("8: keep KV caches in 8 bits; null: as computed", None, choices=(8,))
    prefix_cache: bool = _key("compute what prompts begin with in common only once", True)


@dataclass(kw_only=True)
class SamplingConfig:
    """How a token is chosen."""

    temperature: float = _key("0: the most likely token, always", 0.0, low=0)
    top_p: float = _key("keep the most likely tokens up to this probability", 1.0, above=0, high=1)
    top_k: int = _key("keep this many tokens; 0: all", 0, low=0)
    min_p: float = _key(
        "keep tokens with at least this share of the top probability", 0.0, low=0, high=1
    )
    seed: int = _key("the draws of a row depend on this and on its id only", 0, low=0)
    max_tokens: int = _key("new tokens of a row, at most", 256, low=1)
    stop: list[str] = _key("strings that end a row", [])
    repetition_penalty: float = _key(
        "above 1: less of the tokens of the prompt and the answer", 1.0, above=0
    )
    frequency_penalty: float = _key(
        "taken off a token's logit for each time the answer has it", 0.0, low=-2, high=2
    )
    presence_penalty: float = _key(
        "taken off a token's logit where the answer has it", 0.0, low=-2, high=2
    )
    logprobs: int | None = _key(
        "report the log-probability of every token and of so many likeliest; null: none",
        None,
        low=0,
        high=20,
    )
    n: int = _key("answers to each prompt", 1, low=1)


@dataclass(kw_only=True)
class DataConfig:
    """What the input file is and where its columns are."""

    format: str = _key(
        "auto: by the file's name, and for JSONL by its rows",
        "auto",
        choices=("auto", "jsonl", "openai", "csv", "parquet", "hdf5"),
    )
    prompt_column: str = _key("CSV, Parquet, HDF5: column with the prompts", "prompt")
    messages_column: str = _key(
        "likewise: column with conversations, as JSON text or nested", "messages"
    )
    id_column: str = _key("likewise: column with the ids; need not be there", "id")


@dataclass(kw_only=True)
class ScoringConfig:
    """What is evaluated, and how."""

    kind: str = _key(
        "text: perplexity of a file; choices: multiple choice; harness: tasks of lm-eval",
        "text",
        choices=("text", "choices", "harness"),
    )
    window: int = _key("text: tokens the model sees at once", 512, low=2)
    stride: int = _key(
        "text: tokens from one window to the next; at most the window. Windows overlap by the "
        "rest, and each token counts once",
        256,
        low=1,
    )
    max_tokens: int | None = _key("text: score only this many tokens of the file", None, low=2)
    tasks: list[str] = _key("harness: names of tasks or groups, * allowed, as in [arc_easy]", [])
    task_path: str | None = _key(
        "harness: directory of task files; what they call (!function) is executed", None
    )
    num_fewshot: int | None = _key(
        "harness: examples before each question; null: as the task says", None, low=0
    )
    limit: int | None = _key("harness: only so many questions of a task", None, low=1)
    chat_template: bool = _key("harness: put questions as messages of a chat", False)


@dataclass(kw_only=True)
class LaunchConfig:
    """Whether the job starts its own mpirun."""

    kind: str = _key(
        "none: this process is a rank; mpirun: start one", "none", choices=("none", "mpirun")
    )
    hostfile: str | None = _key("Open MPI hostfile; null: this host, or Slurm's allocation", None)
    num_ranks: int | None = _key("null: dp x pp x tp, the only number that fits", None, low=1)


@dataclass(kw_only=True)
class JobConfig:
    """What every job has."""

    input: str = _key("the file the job reads: prompts (JSONL) or, for evaluate, a text")
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    run_dir: str | None = _key("directory of the results; null: a new one under runs/", None)
    #: Whether a job goes on with what an earlier launch has left in its run directory.
    RESUMABLE: ClassVar[bool] = False
    #: Key -> text, for the values that were written as interpolations. Not a key of the user's.
    unresolved: dict[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> str | None:
        """The run directory that was asked for, to begin in or to go on with."""
        return getattr(self, "resume", None) or self.run_dir

    def load_options(self) -> dict[str, Any]:
        """The keyword arguments of `load_model`."""
        return {
            "dtype": self.model.dtype,
            "weights": self.model.weights,
            "adapter": self.model.adapter,
            "tp_shares": self.parallel.tp_shares,
            "pp_layers": self.parallel.pp_layers,
        }


@dataclass(kw_only=True)
class GenerateConfig(JobConfig):
    """jobs/generate.py: answers to the prompts of a JSONL file."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    resume: str | None = _key(
        "run directory to go on with, with its settings where none are given", None
    )
    timeline: bool = _key("draw pipeline.png: what each stage did when", False)
    RESUMABLE: ClassVar[bool] = True


@dataclass(kw_only=True)
class EvaluateConfig(JobConfig):
    """jobs/evaluate.py: what a text costs, which choices a model makes, how it does in tasks."""

    input: str | None = _key(  # type: ignore[assignment]
        "text: a UTF-8 file; choices: questions (JSONL); harness: none", None
    )
    evaluate: ScoringConfig = field(default_factory=ScoringConfig)


def to_dict(cfg: JobConfig) -> dict[str, Any]:
    """Plain JSON values for a broadcast; `from_dict` is the inverse.

    Interpolations are resolved in it, so it may hold an environment variable: what is saved is
    `hpcmlx.config.to_yaml`.
    """
    return asdict(cfg)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build and check the configuration `cls` from plain nested values.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type or out of range.
    """
    values = dict(values)
    unresolved = dict(values.pop("unresolved", {}))
    _refuse_unknown(cls, values, "")
    cfg = _convert(cls, values, "", unresolved)
    cfg.unresolved = unresolved
    _check_together(cfg)
    return cfg  # type: ignore[no-any-return]


def config_hash(cfg: JobConfig) -> str:
    """SHA-256 of what decides the results: everything but `run_dir` and `launch`."""
    values = to_dict(cfg)
    for key in ("run_dir", "resume", "launch", "unresolved"):
        values.pop(key, None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def keys(cls: type) -> list[tuple[str, Any, Any]]:
    """Every key of the configuration `cls` as (dotted key, its type, its dataclass field)."""
    hints = get_type_hints(cls)
    found = []
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            found += [(f"{item.name}.{k}", t, f) for k, t, f in keys(hints[item.name])]
        elif item.metadata:
            found.append((item.name, hints[item.name], item))
    return found


def unknown_key(cls: type, key: str) -> ConfigError:
    """The refusal of `key`: the nearest valid key and the valid ones beside it."""
    valid = [k for k, _, _ in keys(cls)]
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    if not near:  # `temperature` for `sampling.temperature`
        near = [k for k in valid if k.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    group = key.partition(".")[0] + "."
    beside = [k for k in valid if k.startswith(group)]
    if not beside:
        beside = list(dict.fromkeys(k.partition(".")[0] for k in valid))
    return ConfigError(f"unknown key {key}{hint} (valid: {', '.join(beside)})")


def describe(kind: Any) -> str:
    """A type as a user reads it: `int`, `list of float`, `text or null`."""
    inner = [a for a in get_args(kind) if a is not type(None)]
    if get_origin(kind) is list:
        return f"list of {describe(inner[0])}"
    if inner:
        return f"{describe(inner[0])} or null"
    return {bool: "true or false", int: "int", float: "number", str: "text"}[kind]


def _refuse_unknown(cls: type, values: Mapping[Any, Any], prefix: str) -> None:
    valid = {k for k, _, _ in keys(cls)}
    groups = {k.rpartition(".")[0] for k in valid}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in valid and key not in groups:
            raise unknown_key(cls, key)
        if key in groups and isinstance(value, Mapping):
            _refuse_unknown(cls, value, f"{key}.")


def _text(key: str, value: Any, shown: Mapping[str, str]) -> str:
    """`value` for a message; never what an interpolation has put there, which may be a secret."""
    for written, text in shown.items():
        if key == written or key.startswith((f"{written}.", f"{written}[")):
            return text
    return json.dumps(value, default=str)


def _convert(kind: Any, value: Any, key: str, shown: Mapping[str, str]) -> Any:
    """`value` as type `kind`, or a ConfigError that names `key`.

    `shown` has the text to print in place of a value that came from an interpolation.
    """
    if is_dataclass(kind):
        return _convert_group(kind, value, key, shown)
    inner = [a for a in get_args(kind) if a is not type(None)]
    optional = len(inner) < len(get_args(kind))
    if optional:
        return None if value is None else _convert(inner[0], value, key, shown)
    if get_origin(kind) is list and isinstance(value, list):
        return [_convert(inner[0], v, f"{key}[{i}]", shown) for i, v in enumerate(value)]
    if kind in (str, bool) and isinstance(value, kind):
        return value
    # Text stands for a truth value or a number where an environment variable was interpolated.
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind in (int, float) and type(value) in (int, kind, str):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            pass
    text = _text(key, value, shown)
    hint = f" (quote it: {key}=\"'...'\")" if kind is str and isinstance(value, int | float) else ""
    raise ConfigError(f"{key}={text}: expected {describe(kind)}{hint}")


def _convert_group(cls: Any, value: Any, key: str, shown: Mapping[str, str]) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={_text(key, value, shown)}: expected a group of keys")
    prefix = f"{key}." if key else ""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.name != "unresolved"}
    done = {}
    for name in value:
        done[name] = _convert(hints[name], value[name], f"{prefix}{name}", shown)
        _check_range(known[name], done[name], f"{prefix}{name}", shown)
    for name, item in known.items():
        if name in done or item.default is not MISSING or item.default_factory is not MISSING:
            continue
        if is_dataclass(hints[name]):
            done[name] = _convert(hints[name], {}, f"{prefix}{name}", shown)
        else:
            full = f"{prefix}{name}"
            raise ConfigError(f"{full} is not set; give {full}=… ({item.metadata['help']})")
    return cls(**done)


def _check_range(item: Any, value: Any, key: str, shown: Mapping[str, str]) -> None:
    """Refuse a value that its `_key` does not accept."""
    limits = item.metadata
    if not limits or value is None:
        return
    text = _text(key, value, shown)
    if limits["choices"] and value not in limits["choices"]:
        choices = [str(choice) for choice in limits["choices"]]
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={text}: expected one of {', '.join(choices)}{hint}")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, str | bool):
            continue
        low, above, high = limits["low"], limits["above"], limits["high"]
        if not math.isfinite(number):
            raise ConfigError(f"{key}={text}: expected a finite number")
        if low is not None and number < low:
            raise ConfigError(f"{key}={text}: must be at least {low}")
        if above is not None and number <= above:
            raise ConfigError(f"{key}={text}: must be greater than {above}")
        if high is not None and number > high:
            raise ConfigError(f"{key}={text}: must be at most {high}")


def _check_together(cfg: JobConfig) -> None:
    """Refuse values that are right one by one but do not fit each other."""
    parallel, launch = cfg.parallel, cfg.launch
    for name, axis in (("tp_shares", "tp"), ("pp_layers", "pp")):
        parts, count = getattr(parallel, name), getattr(parallel, axis)
        if parts is not None and len(parts) != count:
            raise ConfigError(
                f"parallel.{name} has {len(parts)} entries but parallel.{axis}={count}: "
                "give one entry per rank of that axis"
            )
    world = parallel.dp * parallel.pp * parallel.tp
    if launch.num_ranks not in (None, world):
        raise ConfigError(
            f"launch.num_ranks={launch.num_ranks} but the layout "
            f"dp{parallel.dp}_pp{parallel.pp}_tp{parallel.tp} is for {world}: leave it null"
        )
    if isinstance(cfg, EvaluateConfig):
        _check_evaluate(cfg)
    if isinstance(cfg, GenerateConfig) and "" in cfg.sampling.stop:
        raise ConfigError("sampling.stop has an empty string, which would end every row at once")
    resume = getattr(cfg, "resume", None)
    if resume is not None and cfg.run_dir is not None:
        raise ConfigError("resume and run_dir both name the run directory: give one of them")
    paths = (cfg.model.path, cfg.model.adapter, cfg.input, cfg.run_dir, launch.hostfile, resume)
    for key, path in zip(PATH_KEYS, paths, strict=True):
        if path is not None and (not path.strip() or not path.isprintable()):
            text = _text(key, path, cfg.unresolved)
            raise ConfigError(f"{key}={text}: empty, or has a control character")


def _check_evaluate(cfg: EvaluateConfig) -> None:
    own = cfg.evaluate
    if own.kind != "harness" and cfg.input is None:
        what = {"text": "text", "choices": "questions"}[own.kind]
        raise ConfigError(f"input is not set; give input=… (the file with the {what})")
    if own.kind == "harness" and not own.tasks:
        raise ConfigError("evaluate.tasks is empty; give evaluate.tasks=[…] (names of tasks)")
    if own.kind == "harness" and cfg.input is not None:
        raise ConfigError("input is set, but evaluate.kind=harness takes none; see evaluate.tasks")
    if own.kind == "text" and own.stride > own.window:
        raise ConfigError(
            f"evaluate.stride={own.stride} leaves tokens out between windows of "
            f"evaluate.window={own.window}: it must be at most the window"
        )
    if own.task_path is not None and not (own.task_path.strip() and own.task_path.isprintable()):
        text = _text("evaluate.task_path", own.task_path, cfg.unresolved)
        raise ConfigError(f"evaluate.task_path={text}: empty, or has a control character")
