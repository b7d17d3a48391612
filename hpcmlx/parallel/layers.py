"""What mlx-lm's modules do differently under tensor parallelism, mixed into their classes in place.

A **block** (an attention, an MLP, a mixture of experts) is where the ranks part and meet: its input
is the same on every rank, its last projections give partial sums, and one all_sum of its output
makes that whole again. Modules inside a block need not know of ranks, except that a bias behind a
partial sum must be added once. `tensor.apply_plan` is the caller.

In the backward pass the gradient of a block's input is summed over the ranks. A replicated
parameter inside a block therefore holds this rank's part of its gradient; the whole is the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn

from hpcmlx.flight import recorder


class Group(Protocol):
    """The ranks of one tensor-parallel group."""

    @property
    def rank(self) -> int:
        """This rank's place in the group."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def all_sum(self, x: mx.array) -> mx.array:
        """Sum over the ranks, in the lazy graph; its gradient is the identity."""


def mix_in(module: nn.Module, behaviour: type) -> None:
    """Put `behaviour` before the class of `module` in its MRO, in place: paths, attributes and
    `isinstance` stay what they are."""
    module.__class__ = _derived(behaviour, type(module))


def become(module: nn.Module, behaviour: type, group: Group, **attributes: Any) -> None:
    """Give `module` the `behaviour` of one of the classes below, on top of its own class.

    The object stays the same, so parameter paths, frozen parameters and other references to it
    stay valid.
    """
    mix_in(module, behaviour)
    module.tp_group = group
    module.tp_enter = _sum_gradients(group)
    for name, value in attributes.items():
        setattr(module, name, value)


@cache
def _derived(behaviour: type, base: type) -> type:
    return type(f"{behaviour.__name__}{base.__name__}", (behaviour, base), {})


def _sum_gradients(group: Group) -> Callable[[mx.array], Any]:
    """The identity, whose gradient is summed over the ranks (Megatron-LM's *f* operator,
    arXiv:1909.08053, section 3)."""

    @mx.custom_function
    def enter(x: mx.array) -> mx.array:
        return x

    @enter.vjp
    def enter_vjp(_x: mx.array, cotangent: mx.array, _y: mx.array) -> mx.array:
        return group.all_sum(cotangent)

    return enter


class _Parallel(nn.Module):
    """What `become` sets. Being a Module, it comes before the module's own class in the MRO."""

    tp_group: Group
    tp_enter: Callable[[mx.array], Any]


class Block(_Parallel):
    """Whole in, whole out; partial sums inside."""

    tp_layer: int

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        y = super().__call__(self.tp_enter(x), *args, **kwargs)
        recorder.layer = self.tp_layer  # of the next planned operation only
        return self.tp_group.all_sum(y)


class Rowwise(_Parallel):
    """A projection whose input is cut: its output is a partial sum, its bias rank 0's to add."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        bias = self.pop("bias", None) if self.tp_group.rank else None
        try:
            return super().__call__(x, *args, **kwargs)
        finally:
            if bias is not None:
                self["bias"] = bias


class _Vocab(_Parallel):
    """Holds the vocabulary rows `tp_rows` only."""

    tp_rows: range


class VocabHead(_Vocab):
    """An output head that gives the logits of its own rows: `[..., rows]`."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(self.tp_enter(x))


class VocabEmbedding(_Vocab):
    """An embedding that sums over the ranks; as a tied head, the logits of its own rows."""

    def __call__(self, ids: mx.array) -> mx.array:
        first = self.tp_rows.start
        held = (ids >= first) & (ids < self.tp_rows.stop)
        rows = super().__call__(mx.where(held, ids - first, 0))
        return self.tp_group.all_sum(mx.where(held[..., None], rows, 0))

    def as_linear(self, x: mx.array) -> mx.array:
        return super().as_linear(self.tp_enter(x))  # type: ignore[misc]
