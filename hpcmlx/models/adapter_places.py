"""Where the modules that an adapter names are in a model.

mlx-lm's adapters name mlx-lm's modules, PEFT's those of Hugging Face's model. Nothing is guessed
from a name: the model's own `sanitize` says where a weight goes, and what it computes with is
refused. `models/adapters.py` is the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import mlx.core as mx
from mlx import nn

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.models.adapter_files import Adapter, LowRank
from hpcmlx.models.skeleton import Skeleton, graph_sources
from hpcmlx.parallel.tensor import EMBEDDINGS


@dataclass(frozen=True)
class Places:
    """What of an adapter goes where. The paths need not be in the model: `attach` looks.

    Attributes:
        low_rank: module path -> its factors: one pair, or one per expert in their order.
        whole: parameter path -> the tensor that takes its place.
    """

    low_rank: Mapping[str, tuple[LowRank, ...]]
    whole: Mapping[str, str]


def find_places(skeleton: Skeleton, adapter: Adapter) -> Places:
    """The places of all tensors of `adapter`.

    Raises:
        ConfigError: a tensor of PEFT's has none where adding the factors' product is exact.
    """
    if adapter.is_peft:
        return _peft_places(skeleton, adapter)
    return Places({path: (low,) for path, low in adapter.low_rank.items()}, adapter.whole)


def _peft_places(skeleton: Skeleton, adapter: Adapter) -> Places:
    """Stand-ins for the named weights go through `sanitize` with all the others. One that is only
    renamed, or stacked with those of the other experts, can be adapted where it comes out."""
    weights = {f"{name}.weight": low for name, low in adapter.low_rank.items()}
    stand_ins = {name: mx.zeros(adapter.tensors[t].shape) for name, t in adapter.whole.items()}
    stand_ins |= {name: mx.zeros(_weight_shape(adapter, low)) for name, low in weights.items()}
    outputs = _sanitize(skeleton, adapter, stand_ins)
    renamed = _renamed(adapter, stand_ins, outputs)
    stacked = _stacked(skeleton, adapter, stand_ins, outputs, renamed)
    found = renamed.keys() | set(chain.from_iterable(stacked.values()))
    if missing := sorted(stand_ins.keys() - found):
        raise _no_place(adapter, missing[0], f"has no place in {skeleton.model_type}")
    low_rank: dict[str, tuple[LowRank, ...]] = {
        _module_path(adapter, renamed[name], name): (low,)
        for name, low in weights.items()
        if name in renamed
    }
    for path, names in stacked.items():
        if replaced := [name for name in names if name in adapter.whole]:
            raise _no_place(adapter, replaced[0], f"is only a part of {path}")
        low_rank[_module_path(adapter, path, names[0])] = tuple(weights[name] for name in names)
    whole = {renamed[name]: tensor for name, tensor in adapter.whole.items()}
    for name in adapter.whole:
        _check_tied(skeleton, adapter, name, renamed[name])
    return Places(low_rank, whole)


def _weight_shape(adapter: Adapter, low: LowRank) -> tuple[int, int]:
    """Shape of the weight that a pair of PEFT's factors adapts."""
    a, b = adapter.tensors[low.a].shape, adapter.tensors[low.b].shape
    if len(a) != 2 or len(b) != 2:
        raise adapter.refuse(f"tensor {low.a} is not a matrix, which is not supported")
    return (a[1], b[0]) if "lora_embedding_" in low.a else (b[0], a[1])


def _sanitize(
    skeleton: Skeleton, adapter: Adapter, stand_ins: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    try:
        return skeleton.sanitized(stand_ins)
    except IntegrityError as error:
        raise adapter.refuse(
            f"its modules cannot be found in {skeleton.model_type} ({error}); an adapter of "
            "experts has to adapt all of them"
        ) from error


def _renamed(
    adapter: Adapter, stand_ins: Mapping[str, mx.array], outputs: Mapping[str, mx.array]
) -> dict[str, str]:
    """Stand-in -> the path it comes out under, of those that come out untouched."""
    name_of = {id(array): name for name, array in stand_ins.items()}
    renamed: dict[str, str] = {}
    for path, array in outputs.items():
        if (name := name_of.get(id(array))) is not None:
            if name in renamed:
                raise _no_place(adapter, name, f"is both {renamed[name]} and {path} here")
            renamed[name] = path
    return renamed


def _stacked(
    skeleton: Skeleton,
    adapter: Adapter,
    stand_ins: Mapping[str, mx.array],
    outputs: Mapping[str, mx.array],
    renamed: Mapping[str, str],
) -> dict[str, list[str]]:
    """Path -> the stand-ins that `sanitize` stacks there, in their order.

    Whether it does that and nothing else is seen on matrices of one row, told apart by their
    values: any other rearrangement gives something else, or an error.
    """
    if renamed.keys() == stand_ins.keys():
        return {}
    rest = {path: outputs[path] for path in outputs.keys() - set(renamed.values())}
    sources = {path: names for path, names in graph_sources(stand_ins, rest).items() if names}
    for path, names in sources.items():
        shapes = {stand_ins[name].shape for name in names}
        if len(shapes) > 1 or rest[path].shape != (len(names), *shapes.pop()):
            raise _no_place(adapter, names[0], f"is only a part of {path}, computed from it")
    rows = {
        name: mx.array([[i, i + len(names)]])
        for names in sources.values()
        for i, name in enumerate(names)
    }
    found = _sanitize(skeleton, adapter, {**stand_ins, **rows})
    stacked = {}
    for path, names in sources.items():
        order = [names[int(i)] for i in found[path].reshape(-1, 2)[:, 0].tolist()]
        if not mx.array_equal(found[path], mx.stack([rows[name] for name in order])):
            raise _no_place(adapter, names[0], f"is only a part of {path}, computed from it")
        stacked[path] = order
    return stacked


def _module_path(adapter: Adapter, path: str, name: str) -> str:
    if not path.endswith(".weight"):
        raise _no_place(adapter, name, f"is {path}, which is not the weight of a module")
    return path.removesuffix(".weight")


def _check_tied(skeleton: Skeleton, adapter: Adapter, name: str, path: str) -> None:
    """PEFT's modules_to_save unties an embedding from the head, which mlx-lm's models cannot."""
    module = dict(skeleton.model.named_modules()).get(path.removesuffix(".weight"))
    if not isinstance(module, EMBEDDINGS) or ".base_layer." in adapter.whole[name]:
        return
    rows = module.weight.shape[0]
    heads = [m for m in skeleton.model.modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)]
    if not any(head.weight.shape[0] == rows for head in heads):
        raise _no_place(adapter, name, "is the output head as well, which PEFT did not replace")


def _no_place(adapter: Adapter, name: str, why: str) -> ConfigError:
    low = adapter.low_rank.get(name.removesuffix(".weight"))
    tensor = low.a if low and name.endswith(".weight") else adapter.whole[name]
    return adapter.refuse(f"tensor {tensor} cannot be used: {name} {why}; merge it into the model")
