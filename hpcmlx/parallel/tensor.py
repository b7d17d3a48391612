"""Uneven tensor parallelism: cut a model in place, by a plan, before any weight is read.

`models/plans.py` says which module is cut how; the loader calls `apply_plan` and reads exactly what
the returned cuts name. Heads are dealt out by the group of query heads that share a KV head, hidden
dims by quantization group, the vocabulary by row, all in proportion to the ranks' shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, lcm
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from hpcmlx.errors import ConfigError
from hpcmlx.parallel import layers
from hpcmlx.parallel.layers import Group
from hpcmlx.parallel.partition import Cut, HeadShare, Interval, merge, split_aligned, split_heads
from hpcmlx.parallel.rules import (
    Attention,
    Block,
    Colwise,
    Dim,
    PerHead,
    Plan,
    Rowwise,
    Rule,
    VocabEmbedding,
    VocabHead,
    parent,
)

PROJECTIONS = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
PER_HEAD = (MultiLinear, QuantizedMultiLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Shares:
    """How much of the work each rank of a tensor-parallel group takes, in any unit."""

    weights: tuple[float, ...]

    @classmethod
    def even(cls, size: int) -> Shares:
        """The same share for each of `size` ranks."""
        return cls((1.0,) * size)


def apply_plan(
    model: nn.Module,
    plan: Plan,
    group: Group,
    shares: Shares | None = None,
    *,
    quantum: Mapping[str, int] | None = None,
) -> dict[str, Cut]:
    """Cut `model` in place down to what this rank holds. Nothing is evaluated.

    Cut parameters become lazy zeros of the local shape, head counts the local ones; blocks,
    row-wise projections, the embedding and the head get their parallel behaviour. Parameter paths
    stay the same. A group of one rank leaves the model as it is.

    Args:
        model: an mlx-lm model, quantized as it will run, whose weights were not read yet.
        plan: which module is cut how (`models.plans.plan_for`).
        group: the tensor-parallel group.
        shares: one weight per rank; equal ones by default.
        quantum: module path to the number of input positions that the checkpoint keeps together
            (the block of a format that the loader dequantizes). A module that is itself quantized
            needs no entry.

    Returns:
        For every cut parameter (its path as in `tree_flatten`), the part of the whole tensor that
        this rank holds; in packed words for quantized weights, in groups for their scales.

    Raises:
        ConfigError: the plan does not fit the model, the shares do not fit the group, or there are
            more ranks than a dim has units.
    """
    if group.size == 1:
        return {}
    weights = (shares or Shares.even(group.size)).weights
    if len(weights) != group.size or any(w <= 0 for w in weights):
        raise ConfigError(
            f"parallel.tp_shares={list(weights)} must be {group.size} positive numbers, "
            "one per tensor-parallel rank"
        )
    return _Cutter(model, plan, group, weights, quantum or {}).run()


def vocab_interval(model: nn.Module) -> Interval | None:
    """Half-open interval of vocabulary rows that the last axis of this rank's logits stands for;
    None when the head is not cut, so the logits are whole."""
    modules = [m for _, m in model.named_modules()]
    for kind in (layers.VocabHead, layers.VocabEmbedding):
        for module in modules:
            if isinstance(module, kind):
                return module.tp_rows.start, module.tp_rows.stop
    return None


@dataclass(frozen=True)
class _Heads:
    """The heads of one attention and this rank's share of them."""

    num_query: int
    num_key_value: int
    share: HeadShare

    def positions(self, dim: Dim, length: int) -> list[Interval]:
        """The positions held of a dim that is `length` long in the whole model."""
        num_heads = {
            "query": self.num_query,
            "key_value": self.num_key_value,
            "query_key_value": self.num_query + 2 * self.num_key_value,
        }[dim]
        width, rest = divmod(length, num_heads)
        if rest:
            raise ConfigError(f"a dim of {length} is not a whole number of {num_heads} heads")
        query = [self.share.query]
        held = [(kv, kv + 1) for kv in self.share.key_value]
        keys = self.num_query
        values = keys + self.num_key_value
        fused = query + _shift(held, keys) + _shift(held, values)
        heads = {"query": query, "key_value": held, "query_key_value": fused}[dim]
        return [(start * width, stop * width) for start, stop in heads]


@dataclass(frozen=True)
class _Hidden:
    """The hidden dim of one MLP or of its experts and this rank's share of it."""

    length: int
    held: Interval

    def positions(self, dim: Dim, length: int) -> list[Interval]:
        """The positions held of a dim that is `length` long in the whole model."""
        parts = {"hidden": 1, "gate_up": 2}[dim]
        if length != parts * self.length:
            raise ConfigError(f"a dim of {length} does not match a hidden dim of {self.length}")
        return [interval for i in range(parts) for interval in _shift([self.held], i * self.length)]


class _Cutter:
    """One application of a plan to a model."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        group: Group,
        weights: tuple[float, ...],
        quantum: Mapping[str, int],
    ):
        self.plan, self.group, self.weights, self.quantum = plan, group, weights, quantum
        self.rules = plan.match(model)
        self.modules = dict(model.named_modules())
        self.cuts: dict[str, Cut] = {}

    def run(self) -> dict[str, Cut]:
        # All dims are dealt out before anything is cut: a refusal leaves the model as it was, and
        # the lengths read from the modules are those of the whole model.
        dealt: dict[str, _Heads | _Hidden] = {}
        for path, rule in self.rules.items():
            if isinstance(rule, Rowwise):
                dealt[parent(path)] = (
                    self._deal_hidden(path) if rule.dim == "hidden" else self._deal_heads(path)
                )
        for path, rule in self.rules.items():
            self._apply(path, rule, dealt.get(parent(path)), dealt.get(path))
        return self.cuts

    def _apply(
        self, path: str, rule: Rule, around: _Heads | _Hidden | None, own: _Heads | _Hidden | None
    ) -> None:
        """Cut one module; `around` is how its parent's dim is dealt, `own` its own."""
        match rule:
            case Colwise() if around:
                module = self._module(path, PROJECTIONS)
                self._cut_output(path, around.positions(rule.dim, module.weight.shape[-2]))
            case Rowwise() if around:
                module = self._module(path, PROJECTIONS)
                self._cut_input(path, around.positions(rule.dim, input_dims(module)))
                self._become(path, layers.Rowwise)
            case PerHead() if isinstance(around, _Heads):
                self._cut_heads(path, around)
            case Attention() if isinstance(own, _Heads):
                self._set_head_counts(path, rule, own.share)
                self._become(path, layers.Block, tp_layer=_layer_of(path))
            case Block():
                self._become(path, layers.Block, tp_layer=_layer_of(path))
            case VocabEmbedding() | VocabHead():
                self._cut_vocabulary(path, rule)
            case Colwise() | Rowwise() | PerHead() | Attention():
                raise self._refuse(f"{path} stands beside no row-wise projection")

    # Dealing out

    def _deal_heads(self, path: str) -> _Heads:
        """Deal out the heads of the attention whose output projection is at `path`."""
        attention, rule = self.modules[parent(path)], self.rules.get(parent(path))
        if not isinstance(rule, Attention):
            raise self._refuse(f"{parent(path)} is not an attention")
        num_query = getattr(attention, rule.query)
        num_key_value = getattr(attention, rule.key_value) if rule.key_value else num_query
        width = input_dims(self._module(path, PROJECTIONS)) // num_query
        group_size = self._quantum(path)
        together = group_size // gcd(group_size, width)
        most = -(-num_query // together)
        if most < self.group.size:
            why = (
                f" that stay together by {together}, because {path} is quantized in groups of "
                f"{group_size} and a head is {width} wide (a checkpoint with smaller groups or "
                "without quantization can be cut further)"
                if together > 1
                else ""
            )
            raise self._too_many(f"{parent(path)} has {num_query} query heads{why}", most)
        shares = split_heads(num_query, num_key_value, self.weights, together)
        return _Heads(num_query, num_key_value, shares[self.group.rank])

    def _deal_hidden(self, path: str) -> _Hidden:
        """Deal out the hidden dim that is the input of the projection at `path`."""
        length, unit = input_dims(self._module(path, PROJECTIONS)), self._quantum(path)
        most = -(-length // unit)
        if most < self.group.size:
            what = f"{path} has {length} inputs in {most} quantization groups of {unit}"
            raise self._too_many(what, most)
        return _Hidden(length, split_aligned(length, unit, self.weights)[self.group.rank])

    def _quantum(self, path: str) -> int:
        """How many inputs of the projection at `path` cannot be taken apart."""
        module = self.modules[path]
        own = module.group_size if "scales" in module else 1
        return lcm(own, self.quantum.get(path, 1))

    # Cutting

    def _cut_output(self, path: str, intervals: list[Interval]) -> None:
        for name, array in _arrays(self.modules[path]).items():
            if name in ("weight", "scales", "biases", "lora_up"):
                self._cut(path, name, Cut(array.ndim - 2, merge(intervals)))
            elif name in ("bias", "dora_scale", "dora_magnitude"):
                self._cut(path, name, Cut(array.ndim - 1, merge(intervals)))
            else:
                self._keep_whole(path, name)

    def _cut_input(self, path: str, intervals: list[Interval]) -> None:
        length = input_dims(self.modules[path])
        for name, array in _arrays(self.modules[path]).items():
            if name in ("weight", "scales", "biases", "lora_down"):
                cut = Cut(array.ndim - 1, merge(intervals))
                self._cut(path, name, cut.scaled(array.shape[-1], length))
            elif name != "bias":
                self._keep_whole(path, name)

    def _cut_heads(self, path: str, heads: _Heads) -> None:
        cut = Cut(0, (heads.share.query,))
        if path in self.modules:
            for name in _arrays(self._module(path, PER_HEAD)):
                self._cut(path, name, cut)
        else:
            self._cut(parent(path), path.rpartition(".")[2], cut)

    def _cut_vocabulary(self, path: str, rule: VocabEmbedding | VocabHead) -> None:
        embedding = isinstance(rule, VocabEmbedding)
        rows = self._module(path, EMBEDDINGS if embedding else PROJECTIONS).weight.shape[0]
        if rows < self.group.size:
            raise self._too_many(f"{path} has {rows} rows", rows)
        start, stop = split_aligned(rows, 1, self.weights)[self.group.rank]
        self._cut_output(path, [(start, stop)])
        behaviour = layers.VocabEmbedding if embedding else layers.VocabHead
        self._become(path, behaviour, tp_rows=range(start, stop))

    def _set_head_counts(self, path: str, rule: Attention, share: HeadShare) -> None:
        attention = self.modules[path]
        num_key_value = len(share.key_value)
        setattr(attention, rule.query, share.num_query)
        if rule.key_value:
            setattr(attention, rule.key_value, num_key_value)
        if rule.per_key_value:
            setattr(attention, rule.per_key_value, share.num_query // num_key_value)

    def _cut(self, path: str, name: str, cut: Cut) -> None:
        module = self.modules[path]
        module[name] = mx.zeros(cut.shape(module[name].shape), module[name].dtype)
        self.cuts[f"{path}.{name}"] = cut

    def _keep_whole(self, path: str, name: str) -> None:
        # nvfp4's scale of a whole expert and what of an adapter lies along the other axis; anything
        # else is a parameter nobody thought of.
        known = ("global_scale", "lora_down", "lora_up", "dora_scale", "dora_magnitude")
        if name not in known:
            raise self._refuse(f"no way is known to cut {path}.{name}")

    def _become(self, path: str, behaviour: type[nn.Module], **attributes: Any) -> None:
        layers.become(self.modules[path], behaviour, self.group, **attributes)

    # Refusing

    def _module(self, path: str, kinds: tuple[type, ...]) -> Any:
        module = self.modules.get(path)
        if not isinstance(module, kinds):
            raise self._refuse(f"no way is known to cut {path}, a {type(module).__name__}")
        return module

    def _refuse(self, what: str) -> ConfigError:
        return ConfigError(
            f"tensor parallelism of {self.plan.name}: {what}; set parallel.tp=1 and use parallel.pp"
        )

    def _too_many(self, what: str, most: int) -> ConfigError:
        return ConfigError(
            f"parallel.tp={self.group.size} is too many for {self.plan.name}: {what}; "
            f"the largest possible is parallel.tp={most}, use parallel.pp for more ranks"
        )


def _arrays(module: nn.Module) -> dict[str, mx.array]:
    """The module's own parameters by name."""
    return {name: a for name, a in module.parameters().items() if isinstance(a, mx.array)}


def input_dims(module: nn.Module) -> int:
    """Inputs of a projection, whatever its weight is packed in."""
    if "scales" in module:
        return module.scales.shape[-1] * module.group_size
    return module.weight.shape[-1]


def _layer_of(path: str) -> int:
    """The first number in a module's path; -1 without one."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def _shift(intervals: list[Interval], by: int) -> list[Interval]:
    return [(start + by, stop + by) for start, stop in intervals]
