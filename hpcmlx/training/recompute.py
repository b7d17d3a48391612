"""Activation checkpointing: a layer keeps its inputs only, and is run again in the backward pass.

Every layer object gets it by itself, so it holds for models whose layers are of several classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from hpcmlx.parallel.dataflow import find_layers, layer_paths
from hpcmlx.parallel.tracing import flatten, rebuild, subclass_call
from hpcmlx.training.documents import DocumentCache
from hpcmlx.training.held import Held


def recompute_layers(model: nn.Module, trained: Sequence[str]) -> None:
    """Let every layer of `model` be recomputed, in place.

    Args:
        trained: paths of the parameters that will be differentiated: through a checkpoint only its
            arguments get gradients.
    """
    layers = find_layers(model)
    for path, layer in zip(layer_paths(model, layers), layers, strict=True):
        prefix = f"{path}."
        own = tuple(n.removeprefix(prefix) for n in trained if n.startswith(prefix))
        subclass_call(layer, _recomputed(type(layer).__call__, Held(layer, own)))


def _recomputed(run: Callable[..., Any], held: Held) -> Callable[..., Any]:
    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        leaves = flatten([list(args), kwargs])
        if any(_caches(leaf) for leaf in leaves):  # generation: a cache is written once
            return run(layer, *args, **kwargs)
        places = [i for i, leaf in enumerate(leaves) if _differentiable(leaf)]
        made: list[Any] = []

        def arrays_of(values: list[mx.array], given: list[mx.array]) -> list[mx.array]:
            now = list(leaves)
            for i, array in zip(places, given, strict=True):
                now[i] = array
            new_args, new_kwargs = rebuild([list(args), kwargs], iter(now))
            with held(values):
                output = run(layer, *new_args, **new_kwargs)
            made[:] = [output]
            return [leaf for leaf in flatten(output) if isinstance(leaf, mx.array)]

        arrays = iter(_checkpoint(arrays_of, held.get(), [leaves[i] for i in places]))
        parts = [next(arrays) if isinstance(x, mx.array) else x for x in flatten(made[0])]
        return rebuild(made[0], iter(parts))

    return call


def _checkpoint(
    run: Callable[[list[mx.array], list[mx.array]], list[mx.array]],
    values: list[mx.array],
    given: list[mx.array],
) -> list[mx.array]:
    """`run(values, given)`, run again in the backward pass, and not before the gradients of its
    outputs are there.

    `mx.checkpoint` waits for the outputs alone. Then one layer's second run may come before or
    after another's backward pass, as the shape of the graph has it; and tensor-parallel ranks with
    uneven shares, whose graphs differ, would take each other's sums for their own.
    """
    count = len(values)

    def flat(*arrays: mx.array) -> list[mx.array]:
        return run(list(arrays[:count]), list(arrays[count:]))

    checkpointed = mx.custom_function(flat)

    @checkpointed.vjp
    def _(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], _outputs: object
    ) -> tuple[mx.array, ...]:
        later = mx.depends(list(primals), list(cotangents))
        return tuple(mx.vjp(flat, later, list(cotangents))[1])

    made: Any = checkpointed(*values, *given)
    outputs: list[mx.array] = made
    return outputs


def _differentiable(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _caches(value: Any) -> bool:
    return hasattr(value, "update_and_fetch") and not isinstance(value, DocumentCache)
