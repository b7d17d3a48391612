"""A LoRA adapter on a model: its matrices become parameters of the modules that they adapt.

The loader attaches it to the skeleton, before anything is cut or read. From there on `lora_down`,
`lora_up` and `dora_scale` are parameters like any other: the plan cuts them with the weight beside
them, the trace gives them to the stage of their layer, and only this rank's bytes are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.models.adapter_files import Adapter, LowRank
from hpcmlx.models.skeleton import Skeleton, graph_sources
from hpcmlx.parallel import layers
from hpcmlx.parallel.partition import Cut
from hpcmlx.parallel.tensor import EMBEDDINGS, input_dims

LINEARS = (nn.Linear, nn.QuantizedLinear)
SWITCHES = (SwitchLinear, QuantizedSwitchLinear)


class LoRALinear(nn.Module):
    """Adds `lora_up @ lora_down @ x`; the adapter's scale is already in `lora_up`."""

    def __call__(self, x: mx.array) -> mx.array:
        y = super().__call__(x)
        return y + _low_rank(self, x).astype(y.dtype)


class DoRALinear(nn.Module):
    """Likewise, and every output but its bias times `dora_scale` (DoRA, arXiv:2402.09353)."""

    def __call__(self, x: mx.array) -> mx.array:
        bias = self.pop("bias", None)
        try:
            y = super().__call__(x)
        finally:
            if bias is not None:
                self["bias"] = bias
        y = self.dora_scale * (y + _low_rank(self, x).astype(y.dtype))
        return y if bias is None else y + bias


class LoRASwitchLinear(nn.Module):
    """A projection per expert, each with its own factors."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = super().__call__(x, indices, sorted_indices=sorted_indices)
        for factor in (self.lora_down, self.lora_up):
            x = mx.gather_mm(
                x,
                factor.swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return y + x.astype(y.dtype)


class LoRALookup(nn.Module):
    """An embedding adapted where tokens are looked up, but not where it is the output head: so
    PEFT leaves a tied head alone."""

    def __call__(self, ids: mx.array) -> mx.array:
        y = super().__call__(ids)
        return y + (self.lora_up[ids] @ self.lora_down).astype(y.dtype)


class LoRAEmbedding(LoRALookup):
    """An embedding adapted in both its uses, as mlx-lm does."""

    def as_linear(self, x: mx.array) -> mx.array:
        y = super().as_linear(x)  # type: ignore[misc]
        return y + _low_rank(self, x).astype(y.dtype)


class DoRAEmbedding(LoRAEmbedding):
    """Likewise, and every row times its `dora_scale`."""

    def __call__(self, ids: mx.array) -> mx.array:
        return self.dora_scale[ids][..., None] * super().__call__(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.dora_scale * super().as_linear(x)


def _low_rank(module: Any, x: mx.array) -> mx.array:
    return (x @ module.lora_down.T) @ module.lora_up.T


@dataclass(frozen=True)
class _Source:
    """Where a parameter comes from: a tensor of the adapter, or one per expert to be stacked."""

    tensors: tuple[str, ...]
    scales: tuple[float, ...]
    transposed: bool = False


class AttachedAdapter:
    """An adapter whose parameters have their places in a model. Made by `attach`."""

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        self.adapter, self.model = adapter, model
        self.modules = dict(model.named_modules())
        self.sources: dict[str, _Source] = {}
        self.ranks: dict[str, int] = {}  # of every adapted module
        self.dora: list[str] = []

    def arrays(
        self, paths: Iterable[str], cuts: Mapping[str, Cut]
    ) -> Iterator[tuple[str, mx.array]]:
        """(parameter path, evaluated array) of those of `paths` that the adapter provides."""
        dtypes = {path: a.dtype for path, a in tree_flatten(self.model.parameters())}
        for path in paths:
            if path in self.sources:
                # A magnitude is not yet the factor that `settle` makes of it.
                dtype = mx.float32 if path.endswith(".dora_scale") else dtypes[path]
                array = mx.contiguous(self._read(path, cuts.get(path)).astype(dtype))
                mx.eval(array)
                yield path, array

    def _read(self, path: str, cut: Cut | None) -> mx.array:
        source = self.sources[path]
        stacked = len(source.tensors) > 1
        if cut is not None and stacked:
            cut = Cut(cut.axis - 1, cut.intervals)
        if cut is not None and source.transposed:
            cut = Cut(1 - cut.axis, cut.intervals)
        parts = []
        for tensor, scale in zip(source.tensors, source.scales, strict=True):
            array = self.adapter.read(tensor, cut)
            parts.append(array.astype(mx.float32) * scale if scale != 1 else array)
        array = mx.stack(parts) if stacked else parts[0]
        return array.T if source.transposed else array

    def settle(self, paths: Iterable[str]) -> None:
        """Turn DoRA's magnitudes into factors, once everything in `paths` is in memory: divide them
        by the norms of the adapted weight's rows.

        Collective over the tensor-parallel group: a row of a row-wise weight is spread over it.
        """
        held = set(paths)
        for path in self.dora:
            if f"{path}.dora_scale" not in held:
                continue
            module = self.modules[path]
            adapted = _weight(module) + _wide(module.lora_up) @ _wide(module.lora_down)
            squares = mx.sum(mx.square(adapted), axis=-1)
            mx.eval(squares)  # before the ranks wait for each other inside a GPU's command buffer
            if isinstance(module, layers.Rowwise):
                squares = module.tp_group.all_sum(squares)
            factor = module.dora_scale / mx.sqrt(squares)
            module.dora_scale = factor.astype(module.lora_up.dtype)
            mx.eval(module.dora_scale)

    def describe(self, paths: Iterable[str]) -> str:
        """One phrase: what of the adapter is among the parameters `paths` of this rank."""
        held = set(paths)
        ranks = [rank for path, rank in self.ranks.items() if f"{path}.lora_up" in held]
        whole = sum(path in held for path in self.sources if not path.endswith(_OWN))
        parts = []
        if self.ranks:
            low, high = min(self.ranks.values()), max(self.ranks.values())
            rank = str(low) if low == high else f"{low} to {high}"
            kind = "DoRA" if self.dora else "LoRA"
            parts.append(f"{kind} of rank {rank} on {_count(len(ranks), 'module')}")
        if whole or not parts:
            parts.append(f"{_count(whole, 'tensor')} replaced")
        return f"adapter {self.adapter.path.name}: {', '.join(parts)}"


_OWN = (".lora_down", ".lora_up", ".dora_scale")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def _weight(module: Any) -> mx.array:
    """The module's weight in float32, unpacked if need be."""
    if "scales" not in module:
        return _wide(module.weight)
    return _wide(
        mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
    )


def attach(skeleton: Skeleton, adapter: Adapter) -> AttachedAdapter:
    """Give the modules of `skeleton.model` their adapters, in place; nothing is evaluated.

    Module paths and the modules' other attributes stay what they are.

    Raises:
        ConfigError: a tensor of the adapter finds no place, or has not its shape. The model may
            then be half adapted.
    """
    for name, info in adapter.tensors.items():
        if not mx.issubdtype(info.dtype, mx.floating):
            raise adapter.refuse(f"tensor {name} is not of floating point")
    find_places = _peft_places if adapter.is_peft else _own_places
    low_rank, whole = find_places(skeleton, adapter)
    attached = AttachedAdapter(adapter, skeleton.model)
    default = _compute_dtype(skeleton.model)
    for path, parts in low_rank.items():
        _adapt(attached, path, parts, default)
    parameters = dict(tree_flatten(skeleton.model.parameters()))
    for path, tensor in whole.items():
        _replace(attached, path, tensor, parameters)
    return attached


# -- where the adapter's names are in the model --

LowRankPlaces = dict[str, tuple[LowRank, ...]]  # module path -> its factors, one or one per expert


def _own_places(skeleton: Skeleton, adapter: Adapter) -> tuple[LowRankPlaces, Mapping[str, str]]:
    """mlx-lm's adapters name mlx-lm's modules."""
    return {path: (low,) for path, low in adapter.low_rank.items()}, adapter.whole


def _peft_places(skeleton: Skeleton, adapter: Adapter) -> tuple[LowRankPlaces, dict[str, str]]:
    """PEFT's adapters name Hugging Face's modules. Where the weight of such a module goes is what
    the model's own `sanitize` does to a stand-in of it: a weight that is only renamed, or stacked
    with those of the other experts, can be adapted where it went; others are refused."""
    weights = {f"{name}.weight": low for name, low in adapter.low_rank.items()}
    stand_ins = {name: mx.zeros(adapter.tensors[t].shape) for name, t in adapter.whole.items()}
    stand_ins |= {name: mx.zeros(_weight_shape(adapter, low)) for name, low in weights.items()}
    outputs = _sanitize(skeleton, adapter, stand_ins)
    renamed = _renamed(adapter, stand_ins, outputs)
    stacked = _stacked(skeleton, adapter, stand_ins, outputs, renamed)
    found = renamed.keys() | set(chain.from_iterable(stacked.values()))
    if missing := sorted(stand_ins.keys() - found):
        raise _no_place(adapter, missing[0], f"has no place in {skeleton.model_type}")
    low_rank = {
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
    return low_rank, whole


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
    result = {}
    for path, names in graph_sources(stand_ins, rest).items():
        if not names:
            continue
        shapes = {stand_ins[name].shape for name in names}
        rows = {name: mx.array([[i, i + len(names)]]) for i, name in enumerate(names)}
        order: list[str] = []
        if len(shapes) == 1 and rest[path].shape == (len(names), *shapes.pop()):
            found = _sanitize(skeleton, adapter, {**stand_ins, **rows})[path]
            if found.shape == (len(names), 1, 2):
                order = [names[int(i)] for i in found[:, 0, 0].tolist()]
        if not order or not mx.array_equal(found, mx.stack([rows[name] for name in order])):
            raise _no_place(adapter, names[0], f"is only a part of {path}, computed from it")
        result[path] = order
    return result


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
    heads = [m for m in skeleton.model.modules() if isinstance(m, LINEARS)]
    if not any(head.weight.shape[0] == rows for head in heads):
        raise _no_place(adapter, name, "is the output head as well, which PEFT did not replace")


def _no_place(adapter: Adapter, name: str, why: str) -> ConfigError:
    low = adapter.low_rank.get(name.removesuffix(".weight"))
    tensor = low.a if low and name.endswith(".weight") else adapter.whole[name]
    return adapter.refuse(f"tensor {tensor} cannot be used: {name} {why}; merge it into the model")


# -- what is put there --


def _adapt(
    attached: AttachedAdapter, path: str, parts: tuple[LowRank, ...], default: mx.Dtype
) -> None:
    """Give one module its factors, as stand-ins, and the behaviour that uses them."""
    adapter, module = attached.adapter, attached.modules.get(path)
    behaviour = _behaviour(adapter, path, module, parts[0])
    embedding = isinstance(module, EMBEDDINGS)
    experts = module.weight.shape[:-2]
    rank = parts[0].rank
    if any(part.rank != rank for part in parts):
        raise adapter.refuse(f"the experts of {path} have adapters of different ranks")
    # Both formats see an embedding as a projection from its rows, so its factors swap roles.
    transposed = adapter.is_peft == embedding and not experts
    names = {
        "lora_down": tuple(part.b if embedding else part.a for part in parts),
        "lora_up": tuple(part.a if embedding else part.b for part in parts),
    }
    shapes = {
        "lora_down": (*experts, rank, input_dims(module)),
        "lora_up": (*experts, module.weight.shape[-2], rank),
    }
    dtype = _compute_dtype(module, default)
    for own, tensors in names.items():
        scales = tuple(part.scale if own == "lora_up" else 1.0 for part in parts)
        one = shapes[own][1:] if len(parts) > 1 else shapes[own]
        for tensor in tensors:
            _check_shape(adapter, tensor, one[::-1] if transposed else one, path)
        attached.sources[f"{path}.{own}"] = _Source(tensors, scales, transposed)
        module[own] = mx.zeros(shapes[own], dtype)
    if (magnitude := parts[0].magnitude) is not None:
        rows = module.weight.shape[-2:-1]
        _check_shape(adapter, magnitude, rows, path)
        attached.sources[f"{path}.dora_scale"] = _Source((magnitude,), (1.0,))
        attached.dora.append(path)
        module.dora_scale = mx.zeros(rows, dtype)
    attached.ranks[path] = rank
    layers.mix_in(module, behaviour)


def _behaviour(adapter: Adapter, path: str, module: Any, low: LowRank) -> type[nn.Module]:
    dora = low.magnitude is not None
    if isinstance(module, LINEARS):
        return DoRALinear if dora else LoRALinear
    if isinstance(module, SWITCHES) and not dora:
        return LoRASwitchLinear
    if isinstance(module, EMBEDDINGS):
        if not adapter.is_peft:
            return DoRAEmbedding if dora else LoRAEmbedding
        if not dora:  # PEFT's magnitudes of an embedding are of its columns
            return LoRALookup
    if module is None:
        raise adapter.refuse(f"tensor {low.a} finds no place: the model has no module {path}")
    kind = type(module).__name__
    raise adapter.refuse(
        f"tensor {low.a}: no way is known to put {'DoRA' if dora else 'LoRA'} on {path}, a {kind}"
    )


def _replace(
    attached: AttachedAdapter, path: str, tensor: str, parameters: Mapping[str, mx.array]
) -> None:
    adapter = attached.adapter
    if path not in parameters or path.endswith(_OWN):
        raise adapter.refuse(f"tensor {tensor} finds no place: the model has no parameter {path}")
    if "scales" in attached.modules.get(path.rpartition(".")[0], ()) and path.endswith(".weight"):
        raise adapter.refuse(
            f"tensor {tensor} cannot take the place of packed weights; set model.weights=dequantize"
        )
    _check_shape(adapter, tensor, parameters[path].shape, path)
    attached.sources[path] = _Source((tensor,), (1.0,))


def _check_shape(adapter: Adapter, tensor: str, shape: tuple[int, ...], path: str) -> None:
    if (found := adapter.tensors[tensor].shape) != shape:
        raise adapter.refuse(f"tensor {tensor} has shape {found}, but {path} wants {shape}")


def _compute_dtype(module: nn.Module, default: mx.Dtype = mx.float32) -> mx.Dtype:
    """The dtype that a module computes in: that of its first floating-point parameter."""
    for _, array in tree_flatten(module.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return default
