"""The typed configuration of a job: one root dataclass per job, and nothing but plain values in it.

`hpcmlx.compose` fills these classes from conf/ and the command line; below `job.py` only the values
travel. What is wrong is refused with the key, the value and what would be right.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hpcmlx.errors import ConfigError

T = TypeVar("T")


def _key(
    help: str,
    default: Any = MISSING,
    *,
    choices: tuple[str, ...] = (),
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


@dataclass
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


@dataclass
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


@dataclass
class InferenceConfig:
    """How the rows are batched."""

    batch_size: int = _key("rows per microbatch", 8, low=1)
    num_microbatches: int | None = _key(
        "microbatches in flight; null: the number of stages", None, low=1
    )
    prefill_chunk: int = _key("prompt tokens that go through a stage at once", 512, low=1)


@dataclass
class SamplingConfig:
    """How a token is chosen."""

    temperature: float = _key("0: the most likely token, always", 0.0, low=0)
    top_p: float = _key("keep the most likely tokens up to this probability", 1.0, above=0, high=1)
    top_k: int = _key("keep this many tokens; 0: all", 0, low=0)
    min_p: float = _key("keep tokens at least this times as likely as the first", 0.0, low=0, high=1)
    seed: int = _key("the draws of a row depend on this and on its id only", 0, low=0)
    max_tokens: int = _key("new tokens of a row, at most", 256, low=1)
    stop: list[str] = _key("strings that end a row", [])


@dataclass
class ScoringConfig:
    """How a text is scored: windows that overlap, each token counted once."""

    window: int = _key("tokens the model sees at once", 512, low=2)
    stride: int = _key("tokens from one window to the next; at most the window", 256, low=1)
    max_tokens: int | None = _key("score only this many tokens of the text", None, low=2)


@dataclass
class LaunchConfig:
    """Whether the job starts its own mpirun."""

    kind: str = _key(
        "none: this process is a rank; mpirun: start one", "none", choices=("none", "mpirun")
    )
    hostfile: str | None = _key("Open MPI hostfile; null: this host, or Slurm's allocation", None)
    num_ranks: int | None = _key("null: dp x pp x tp, the only number that fits", None, low=1)


@dataclass
class JobConfig:
    """What every job has."""

    input: str = _key("the file the job reads")
    model: ModelConfig = field(default_factory=ModelConfig)  # type: ignore[call-arg]
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    run_dir: str | None = _key("directory of the results; null: a new one under runs/", None)


@dataclass
class GenerateConfig(JobConfig):
    """jobs/generate.py: answers to the prompts of a JSONL file."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class EvaluateConfig(JobConfig):
    """jobs/evaluate.py: the log-probability of every token of a text."""

    evaluate: ScoringConfig = field(default_factory=ScoringConfig)


def to_dict(cfg: JobConfig) -> dict[str, Any]:
    """Plain JSON values, for a broadcast; `from_dict` is its inverse. Interpolations are resolved
    in it, so an environment variable may be in it: save `hpcmlx.compose.to_yaml` instead."""
    return asdict(cfg)
