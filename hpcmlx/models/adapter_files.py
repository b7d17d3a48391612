"""The files of a LoRA adapter, mlx-lm's or PEFT's: its tensors' names and what each is for.

Only the configuration and the header are read here, and nothing in them is executed. Where the
tensors go in a model is the matter of `models/adapters.py`, which is the caller.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from hpcmlx.errors import ConfigError
from hpcmlx.models.byteranges import ByteFile, TensorInfo, cut_dims, to_mlx
from hpcmlx.models.checkpoint import read_header
from hpcmlx.parallel.partition import Cut

CONFIG = "adapter_config.json"
MLX_WEIGHTS, PEFT_WEIGHTS = "adapters.safetensors", "adapter_model.safetensors"

_MLX_NAME = re.compile(r"(?P<module>.+)\.(?P<role>lora_a|lora_b|m)")
_PEFT_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<role>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.weight)?"
)
_PEFT_PREFIX = "base_model.model."
_ROLES = {
    "lora_a": "a", "A": "a", "embedding_A": "a", "lora_b": "b", "B": "b", "embedding_B": "b",
    "m": "magnitude", "magnitude_vector": "magnitude",
}  # fmt: skip
# What PEFT's configuration may say without changing what a trained adapter computes; any other key
# has to be off. Initialisations that are not here (PiSSA, LoftQ, ...) change the base as well.
_PEFT_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
_PEFT_INIT = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """The tensors of one adapted module, by name, as the file's format lays them out.

    Attributes:
        a, b: the two factors. mlx-lm: [in, rank] and [rank, out], with experts [experts, rank, in]
            and [experts, out, rank]. PEFT: [rank, in] and [out, rank]; both formats lay those of an
            embedding out as if it were a projection from the rows' dim to the rows, transposed.
        magnitude: DoRA's, one number per output; None for plain LoRA.
        rank: what the configuration says it is.
        scale: what the product of the factors is multiplied by.
    """

    a: str
    b: str
    magnitude: str | None
    rank: int
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors and what they are for. Made by `open_adapter`.

    Attributes:
        path: as it was given.
        files: configuration and weights: all that decides what the adapter does.
        is_peft: PEFT's format, where names are those of Hugging Face's model; else mlx-lm's.
        low_rank: module name -> its factors.
        whole: parameter name -> the tensor that takes its place.
        tensors: every tensor of the weight file by name.
    """

    path: Path
    files: tuple[Path, Path]
    is_peft: bool
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    _weights: ByteFile
    _header_bytes: int

    def read(self, name: str, cut: Cut | None = None) -> mx.array:
        """The tensor `name`, or the part of it that `cut` names, reading only those bytes."""
        info = self.tensors[name]
        if cut is None:
            data = self._weights.read(info.offset, info.nbytes)
            return to_mlx(data, info.shape, info.dtype)
        outer, length, inner = cut_dims(info.shape, cut.axis, info.dtype.size)
        data = self._weights.read_cut(info.offset, outer, length, inner, cut.intervals)
        return to_mlx(data, cut.shape(info.shape), info.dtype)

    @property
    def bytes_read(self) -> int:
        """Weight bytes read so far (without the header)."""
        return self._weights.bytes_read - self._header_bytes

    def close(self) -> None:
        """Close the weight file; a later read opens it again."""
        self._weights.close()

    def refuse(self, what: str) -> ConfigError:
        """The refusal of this adapter."""
        return _bad(self.path, what)


def open_adapter(path: str | Path) -> Adapter:
    """Open an adapter: a directory that mlx-lm or PEFT wrote, or one of the numbered
    `*_adapters.safetensors` that mlx-lm leaves in it while it trains.

    Raises:
        ConfigError: there is no such adapter, or it is of a kind that is not supported.
        IntegrityError: its weight file is damaged.
    """
    path = Path(path).expanduser()
    folder = path.parent if path.suffix == ".safetensors" else path
    config = _read_config(path, folder / CONFIG)
    is_peft = "peft_type" in config
    weights = path if folder != path else folder / (PEFT_WEIGHTS if is_peft else MLX_WEIGHTS)
    if not weights.is_file():
        pickles = [file.name for ending in ("*.bin", "*.pt") for file in folder.glob(ending)]
        if pickles:
            raise ConfigError(
                f"model.adapter={path}: {pickles[0]} is a pickle, which can run code and is never "
                f"opened; save the adapter as {weights.name} (save_pretrained does)"
            )
        raise ConfigError(f"model.adapter={path}: {weights.name} is missing")
    file = ByteFile(weights)
    tensors, _ = read_header(file)
    file.close()
    if not tensors:
        raise ConfigError(f"model.adapter={path}: {weights.name} has no tensors")
    low_rank, whole = (_peft if is_peft else _mlx)(path, config, tensors)
    files = (folder / CONFIG, weights)
    return Adapter(path, files, is_peft, low_rank, whole, tensors, file, file.bytes_read)


def _read_config(path: Path, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model.adapter={path}: {CONFIG} is missing, this is not an adapter of mlx-lm or PEFT"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a readable adapter configuration ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return config


def _mlx(
    path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, LowRank], dict[str, str]]:
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        return {}, {name: name for name in tensors}
    if kind not in ("lora", "dora"):
        raise _bad(path, f"fine_tune_type={kind!r} is not one of lora, dora, full")
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict):
        raise _bad(path, "lora_parameters is missing, with rank and scale")
    rank = _positive_int(path, "lora_parameters.rank", settings.get("rank"))
    scale = _number(path, "lora_parameters.scale", settings.get("scale"))
    factors = {name: _MLX_NAME.fullmatch(name) for name in tensors}
    if stray := [name for name, match in factors.items() if match is None]:
        raise _bad(path, f"tensor {stray[0]} is no part of a {kind} adapter")
    low_rank = _pair(path, factors, kind == "dora", lambda module: (rank, scale))
    return low_rank, {}


def _peft(
    path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, LowRank], dict[str, str]]:
    _check_peft_config(path, config)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)

    def settings(module: str) -> tuple[int, float]:
        own_rank = _by_pattern(path, config, "rank_pattern", module, rank)
        own_rank = _positive_int(path, f"the rank of {module}", own_rank)
        own_alpha = _by_pattern(path, config, "alpha_pattern", module, alpha)
        own_alpha = _number(path, f"lora_alpha of {module}", own_alpha)
        return own_rank, own_alpha / (math.sqrt(own_rank) if config.get("use_rslora") else own_rank)

    factors: dict[str, re.Match[str]] = {}
    whole: dict[str, str] = {}
    for name in tensors:
        if match := _PEFT_NAME.fullmatch(name):
            factors[name] = match
        elif ".lora_" in name or not name.startswith(_PEFT_PREFIX):
            raise _bad(path, f"tensor {name} is of a kind that is not supported")
        else:  # a whole parameter: modules_to_save, a bias, or the weight of an embedding
            own = name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")
            if own in whole:
                raise _bad(path, f"tensors {whole[own]} and {name} are for the same place")
            whole[own] = name
    return _pair(path, factors, bool(config.get("use_dora")), settings), whole


def _check_peft_config(path: Path, config: dict[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise _bad(path, f"peft_type={config['peft_type']!r} is not supported, only LORA")
    for key, value in config.items():
        if key not in _PEFT_KNOWN and value:
            raise _bad(path, f"{key}={json.dumps(value)} is not supported; merge it into the model")
    init = config.get("init_lora_weights", True)
    if init not in _PEFT_INIT:
        raise _bad(
            path,
            f"init_lora_weights={init!r} has changed the base model's weights as well; save the "
            "adapter with path_initial_model_for_weight_conversion, or merge it into the model",
        )


def _by_pattern(path: Path, config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """PEFT's own rule (peft.utils.get_pattern_key): the first pattern that ends the name."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise _bad(path, f"{key} is not an object")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise _bad(path, f"{key} has {pattern!r}, no regular expression ({error})") from error
    return default


def _pair(path: Path, factors: Mapping[str, Any], dora: bool, settings: Any) -> dict[str, LowRank]:
    """Put the factors of each module together; `settings` gives its (rank, scale)."""
    found: dict[str, dict[str, str]] = {}
    for name, match in factors.items():
        parts = found.setdefault(match["module"], {})
        role = _ROLES[match["role"]]
        if role in parts:
            raise _bad(path, f"tensors {parts[role]} and {name} are for the same place")
        parts[role] = name
    wanted = {"a", "b", "magnitude"} if dora else {"a", "b"}
    result = {}
    for module, parts in found.items():
        if parts.keys() != wanted:
            have = ", ".join(sorted(parts.values()))
            kind = "DoRA" if dora else "LoRA"
            raise _bad(path, f"{module} has {have}, which is not a whole {kind}")
        rank, scale = settings(module)
        result[module] = LowRank(parts["a"], parts["b"], parts.get("magnitude"), rank, scale)
    return result


def _positive_int(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _bad(path, f"{key}={value!r}: expected a whole number of at least 1")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _bad(path, f"{key}={value!r}: expected a finite number")
    return float(value)


def _bad(path: Path, what: str) -> ConfigError:
    return ConfigError(f"model.adapter={path}: {what}")
