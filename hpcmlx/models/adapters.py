"""A LoRA adapter on a model: its matrices become parameters of the modules that they adapt.

The loader attaches it to the skeleton, before anything is cut or read. From there on `lora_down`,
`lora_up` and `dora_scale` are parameters like any other: the plan cuts them with the weight beside
them, the trace gives them to the stage of their layer, and only this rank's bytes are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from hpcmlx.flight import recorder
from hpcmlx.models.adapter_files import Adapter, LowRank
from hpcmlx.models.adapter_places import find_places
from hpcmlx.models.skeleton import Skeleton
from hpcmlx.parallel import layers
from hpcmlx.parallel.partition import Cut
from hpcmlx.parallel.tensor import EMBEDDINGS, input_dims

LINEARS = (nn.Linear, nn.QuantizedLinear)
SWITCHES = (SwitchLinear, QuantizedSwitchLinear)


class LoRALinear(nn.Module):
    """Adds `lora_scale * lora_up @ lora_down @ x`. Where an adapter is only used its scale is
    already in `lora_up`; where it is trained the two have to be apart, or steps would be longer."""

    lora_scale = 1.0

    def __call__(self, x: mx.array) -> mx.array:
        y = super().__call__(x)
        return y + _low_rank(self, x).astype(y.dtype)


class DoRALinear(nn.Module):
    """Likewise, and every output but its bias times `dora_scale` (DoRA, arXiv:2402.09353)."""

    lora_scale = 1.0

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

    lora_scale = 1.0

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = super().__call__(x, indices, sorted_indices=sorted_indices)
        for factor in (self.lora_down, self.lora_up):
            x = mx.gather_mm(
                x,
                factor.swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return y + _scaled(self, x).astype(y.dtype)


class LoRALookup(nn.Module):
    """An embedding adapted where tokens are looked up, but not where it is the output head: so
    PEFT leaves a tied head alone."""

    lora_scale = 1.0

    def __call__(self, ids: mx.array) -> mx.array:
        y = super().__call__(ids)
        return y + _scaled(self, self.lora_up[ids] @ self.lora_down).astype(y.dtype)


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
    return _scaled(module, (x @ module.lora_down.T) @ module.lora_up.T)


def _scaled(module: Any, y: mx.array) -> mx.array:
    return y if module.lora_scale == 1 else module.lora_scale * y


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
                recorder.tick()
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
            adapted = whole_weight(module) + _wide(module.lora_up) @ _wide(module.lora_down)
            squares = mx.sum(mx.square(adapted), axis=-1)
            mx.eval(squares)
            if isinstance(module, layers.Rowwise):
                squares = module.tp_group.all_sum(squares)
                mx.eval(squares)  # by itself: a GPU's command buffer must not wait for a slow rank
            factor = module.dora_scale / mx.sqrt(squares)
            module.dora_scale = factor.astype(module.lora_up.dtype)
            mx.eval(module.dora_scale)

    @property
    def bytes_read(self) -> int:
        """Weight bytes read so far."""
        return self.adapter.bytes_read

    def close(self) -> None:
        """Close the adapter's files."""
        self.adapter.close()

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
        return f"adapter {self.adapter.path.absolute().name}: {', '.join(parts)}"


_OWN = (".lora_down", ".lora_up", ".dora_scale")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def whole_weight(module: Any) -> mx.array:
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
    places = find_places(skeleton, adapter)
    attached = AttachedAdapter(adapter, skeleton.model)
    default = _compute_dtype(skeleton.model)
    for path, parts in places.low_rank.items():
        _adapt(attached, path, parts, default)
    parameters = dict(tree_flatten(skeleton.model.parameters()))
    for path, tensor in places.whole.items():
        _replace(attached, path, tensor, parameters)
    return attached


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
