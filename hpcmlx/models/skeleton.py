"""The shape of a model before any weight is read.

mlx-lm's own classes build the model and its own `sanitize` renames and rearranges the checkpoint's
tensors, all on unevaluated `mx.zeros` stand-ins. What comes out says for every parameter which
tensors of the files it is made of, so that the loader can read just those, or just a part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.models.checkpoint import TensorInfo
from hpcmlx.parallel.graph import operations

WeightFormat = Literal["keep", "dequantize"]


@dataclass(frozen=True)
class Quantization:
    """How one packed weight is stored (the arguments of `mx.dequantize`)."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True)
class Origin:
    """Where the values of one sanitized tensor come from.

    Attributes:
        tensors: names of the checkpoint's tensors it depends on.
        stored: it is that one tensor, untouched; otherwise `sanitize` computes it.
    """

    tensors: tuple[str, ...]
    stored: bool


@dataclass
class Skeleton:
    """A model of unevaluated stand-ins and the way from the files to its parameters.

    Attributes:
        model: mlx-lm model; every parameter has its final shape and dtype and no memory.
        origins: sanitized tensor name -> origin. The names are the model's parameter paths, plus
            `x.scales` and `x.biases` of weights that are dequantized on load.
        packed: module path -> how its stored weight is packed, where it is dequantized on load.
        dtypes: parameter path -> dtype in memory.
    """

    model: nn.Module
    config: dict[str, Any]
    origins: dict[str, Origin]
    packed: dict[str, Quantization]
    dtypes: dict[str, mx.Dtype]
    _infos: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    def sanitized(self, read: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """`sanitize` over the tensors in `read` and stand-ins for the rest: outputs that depend on
        `read` alone are right, the others must not be used. Nothing is evaluated."""
        # `sanitize` may change its model (a tied head is dropped once), so each call gets its own.
        return _sanitize(_instantiate(self.config), {**_placeholders(self._infos), **read})


def build_skeleton(
    config: dict[str, Any],
    tensors: Mapping[str, TensorInfo],
    dtype: mx.Dtype | None,
    weights: WeightFormat,
) -> Skeleton:
    """Build the model that `config` names over stand-ins for the checkpoint's `tensors`.

    Args:
        config: the model's config.json.
        tensors: the checkpoint's tensors by name.
        dtype: cast floating-point parameters to this; None keeps what is stored.
        weights: keep quantized weights packed, or dequantize them while loading.

    Raises:
        ConfigError: unknown architecture, an unsupported quantization method, a config the
            architecture does not accept.
        IntegrityError: the checkpoint lacks tensors, has unknown ones, or of the wrong shape.
    """
    config = dict(config)
    model = _instantiate(config)
    inputs = _placeholders(tensors)
    outputs = _sanitize(model, inputs)
    origins = trace_origins(inputs, outputs)
    quantized = _quantized_modules(model, config, outputs)
    packed: dict[str, Quantization] = {}
    if weights == "keep":
        nn.quantize(
            model, class_predicate=lambda p, m: vars(quantized[p]) if p in quantized else False
        )
    else:
        packed = quantized
        for path, packing in packed.items():
            _check_packed(_module(model, path), path, packing, outputs)
            scales = outputs.pop(f"{path}.scales")
            outputs.pop(f"{path}.biases", None)
            floating = mx.issubdtype(scales.dtype, mx.floating)
            outputs[f"{path}.weight"] = mx.zeros(
                _module(model, path).weight.shape, scales.dtype if floating else mx.bfloat16
            )
    dtypes = {path: _dtype(model, dtype, path, array.dtype) for path, array in outputs.items()}
    cast = {path: mx.zeros(array.shape, dtypes[path]) for path, array in outputs.items()}
    _check_parameters(model, cast)
    model.eval()
    model.load_weights(list(cast.items()), strict=True)
    return Skeleton(model, config, origins, packed, dtypes, tensors)


def _placeholders(tensors: Mapping[str, TensorInfo]) -> dict[str, mx.array]:
    return {name: mx.zeros(info.shape, info.dtype) for name, info in tensors.items()}


def _instantiate(config: dict[str, Any]) -> nn.Module:
    try:
        model_class, args_class = mlx_lm_utils._get_classes(config)
    except (ValueError, KeyError, AttributeError, SystemExit) as error:
        # Some modules of mlx-lm leave by sys.exit where a package of theirs is missing.
        name = config.get("model_type", "none")
        raise ConfigError(
            f"model type '{name}' is not one that mlx-lm {_mlx_lm_version()} knows ({error}); "
            "upgrade mlx-lm or use another model"
        ) from None
    try:
        return model_class(args_class.from_dict(config))
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(
            f"config.json does not fit mlx-lm's {config['model_type']}: {error}"
        ) from error


def _mlx_lm_version() -> str:
    from mlx_lm import __version__

    return __version__


def _sanitize(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    if not hasattr(model, "sanitize"):
        return dict(weights)
    try:
        return dict(model.sanitize(dict(weights)))
    except KeyError as error:
        raise IntegrityError(
            f"tensor {error} is missing from the checkpoint; copy or fetch the model again"
        ) from None
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise IntegrityError(
            f"{type(model).__module__} cannot arrange the checkpoint's tensors ({reason}); "
            "config.json and weights do not belong together"
        ) from error


def trace_origins(
    inputs: Mapping[str, mx.array], outputs: Mapping[str, mx.array]
) -> dict[str, Origin]:
    """Which inputs each output is made of, from MLX's own graph of the unevaluated outputs.

    An output that is the very same object as an input is that tensor, renamed at most.
    """
    by_id = {id(array): name for name, array in inputs.items()}
    origins, derived = {}, {}
    for name, array in outputs.items():
        if (source := by_id.get(id(array))) is not None:
            origins[name] = Origin((source,), stored=True)
        else:
            derived[name] = array
    if derived:
        sources = graph_sources(inputs, derived)
        origins |= {name: Origin(tuple(sources[name]), stored=False) for name in derived}
    return origins


def graph_sources(
    inputs: Mapping[str, mx.array], outputs: Mapping[str, mx.array]
) -> dict[str, list[str]]:
    """Names of the `inputs` that each of the `outputs` depends on, by walking MLX's lazy graph."""
    named = {f"in:{k}": v for k, v in inputs.items()} | {f"out:{k}": v for k, v in outputs.items()}
    made_by, operands = operations(named)
    tensor_of = {made_by[f"in:{name}"]: name for name in inputs}
    result = {}
    for name in outputs:
        found: set[str] = set()
        seen: set[str] = set()
        todo = [made_by[f"out:{name}"]]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in tensor_of:
                found.add(tensor_of[node])
            else:
                todo.extend(operands[node])
        result[name] = sorted(found)
    return result


def _quantized_modules(
    model: nn.Module, config: dict[str, Any], weights: Mapping[str, mx.array]
) -> dict[str, Quantization]:
    """Module path -> packing of its stored weight, as mlx-lm's own loader decides it."""
    overrides = _quantization_config(config)
    result = {}
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if f"{path}.scales" not in weights or not hasattr(module, "to_quantized"):
            continue
        if f"{path}.global_scale" in weights:
            raise ConfigError(
                f"{path} has a global_scale (two-level nvfp4), which is not supported; "
                "convert the model with mlx_lm.convert to plain nvfp4, mxfp4 or affine"
            )
        chosen = overrides.get(path)
        if not isinstance(chosen, Mapping):
            try:
                chosen = mlx_lm_utils.infer_quant_config(path, module, weights)
            except ValueError as error:
                raise ConfigError(str(error)) from None
        result[path] = Quantization(
            chosen["group_size"], chosen["bits"], chosen.get("mode", "affine")
        )
    return result


_SUPPORTED_METHODS = ("mxfp4", "mxfp8", "fp8", "compressed-tensors")


def _quantization_config(config: dict[str, Any]) -> Mapping[str, Any]:
    """The per-module overrides of the config; refuses methods that rewrite weights on load."""
    if config.get("quantize_activations"):
        raise ConfigError(
            "the model asks for quantized activations (quantize_activations), which is not "
            "supported; remove the key from config.json to run it with plain ones"
        )
    if (quantization := config.get("quantization")) is not None:
        return quantization
    text = config.get("text_config") or {}
    settings = config.get("quantization_config") or text.get("quantization_config") or {}
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        try:
            mlx_lm_utils._compressed_tensors_quantization(settings)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if method is not None and method not in _SUPPORTED_METHODS:
        raise ConfigError(
            f"quantization method '{method}' is not supported here (supported: MLX's own, "
            f"{', '.join(_SUPPORTED_METHODS)}); convert the model with mlx_lm.convert first"
        )
    return {}


def _dtype(model: nn.Module, dtype: mx.Dtype | None, path: str, stored: mx.Dtype) -> mx.Dtype:
    if dtype is None or not mx.issubdtype(stored, mx.floating):
        return stored
    keep: Callable[[str], bool] | None = getattr(model, "cast_predicate", None)
    if dtype != mx.float32 and keep is not None and not keep(path):
        return stored  # e.g. a router's bias that the model's authors keep in float32
    return dtype


def _check_parameters(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(expected.keys() - weights.keys()):
        raise IntegrityError(
            f"the checkpoint lacks {_some(missing)}; copy or fetch the model again"
        )
    if unknown := sorted(weights.keys() - expected.keys()):
        raise IntegrityError(
            f"the checkpoint holds {_some(unknown)}, unknown to {type(model).__module__}; "
            "config.json and weights do not belong together"
        )
    for path, array in weights.items():
        if array.shape != expected[path].shape:
            raise IntegrityError(
                f"{path} has shape {array.shape} in the checkpoint but config.json says "
                f"{expected[path].shape}; they do not belong together"
            )


def _check_packed(
    module: nn.Module, path: str, packing: Quantization, weights: Mapping[str, mx.array]
) -> None:
    """The parts of one packed weight that is to be unpacked: all there, of the right shapes."""
    *rows, columns = module.weight.shape
    groups = (*rows, columns // packing.group_size)
    expected = {"weight": (*rows, columns * packing.bits // 32), "scales": groups}
    if packing.mode == "affine":
        expected["biases"] = groups
    for part, shape in expected.items():
        name = f"{path}.{part}"
        if name not in weights:
            raise IntegrityError(
                f"the checkpoint lacks {_some([name])}; copy or fetch the model again"
            )
        if weights[name].shape != shape:
            raise IntegrityError(
                f"{name} has shape {weights[name].shape} in the checkpoint but config.json says "
                f"{shape} ({packing.bits} bits in groups of {packing.group_size}); they do not "
                "belong together"
            )
    if packing.mode != "affine" and f"{path}.biases" in weights:
        raise IntegrityError(
            f"the checkpoint holds {_some([f'{path}.biases'])}, which {packing.mode} does not "
            "have; config.json and weights do not belong together"
        )


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:shown])}{rest}"


def _module(model: nn.Module, path: str) -> nn.Module:
    node: Any = model
    for part in path.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node
