"""One forward pass of a model on tracers, and what MLX's graph says its products are made of.

`dataflow` runs these over a few sizes and puts the results together. Nothing here is evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn

from hpcmlx.parallel.graph import operations

Key = tuple[int, int]  # (layer, index of the leaf in the layer's flattened output)
LOGITS: Key = (-1, 0)


@dataclass
class Needs:
    """What one product (a leaf or the logits) is directly made of."""

    leaves: set[Key] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    caches: set[int] = field(default_factory=set)

    def add(self, other: Needs) -> None:
        self.leaves |= other.leaves
        self.parameters |= other.parameters
        self.caches |= other.caches


def subclass_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Give one module its own `__call__` while everything else about it stays.

    A Python object may change to a subclass of its class; parameters, attributes and `isinstance`
    are untouched, which a wrapper around the module could not offer.
    """
    base = type(module)
    module.__class__ = type(
        base.__name__, (base,), {"__call__": call, "__module__": base.__module__}
    )


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
    """The hidden state of a layer's call: its first argument, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def flatten(tree: Any) -> list[Any]:
    """Leaves of nested tuples, lists, dicts and mlx-lm's own records, in a fixed order."""
    parts = _parts(tree)
    return [tree] if parts is None else [leaf for part in parts for leaf in flatten(part)]


def rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """A copy of `tree` with its leaves replaced, in `flatten`'s order."""
    parts = _parts(tree)
    if parts is None:
        return next(leaves)
    items = [rebuild(part, leaves) for part in parts]
    if isinstance(tree, dict):
        return dict(zip(tree, items, strict=True))
    if isinstance(tree, (tuple, list)):
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    record = copy.copy(tree)
    vars(record).update(zip(vars(tree), items, strict=True))
    return record


def _parts(tree: Any) -> list[Any] | None:
    if isinstance(tree, (tuple, list)):
        return list(tree)
    if isinstance(tree, dict):
        return list(tree.values())
    if type(tree).__module__.startswith("mlx_lm.") and hasattr(tree, "__dict__"):
        return list(vars(tree).values())
    return None


def signature(cache: Any) -> Any:
    """Type and settings of a fresh cache entry; offsets and masks of equals are equal."""
    if isinstance(cache, (bool, int, float, str, type(None))):
        return cache
    if isinstance(cache, (tuple, list)):
        return tuple(signature(item) for item in cache)
    if isinstance(cache, mx.array):
        return ("array", *cache.shape)
    settings = sorted(vars(cache).items()) if hasattr(cache, "__dict__") else ()
    return (type(cache).__qualname__, *((name, signature(value)) for name, value in settings))


def _swap_arrays(thing: Any, swap: Callable[[mx.array], mx.array]) -> Any:
    """Replace every array inside a cache entry, in place where it can be."""
    if isinstance(thing, mx.array):
        return swap(thing)
    if isinstance(thing, list):
        thing[:] = [_swap_arrays(item, swap) for item in thing]
    elif isinstance(thing, tuple):
        return tuple(_swap_arrays(item, swap) for item in thing)
    elif isinstance(thing, dict):
        for name in thing:
            thing[name] = _swap_arrays(thing[name], swap)
    elif type(thing).__module__.startswith("mlx_lm."):
        for name, value in vars(thing).items():
            vars(thing)[name] = _swap_arrays(value, swap)
    return thing


class Forward:
    """One traced forward pass: names for everything of interest in MLX's graph, and its edges."""

    def __init__(self, caches: list[Any] | None, seed: mx.array) -> None:
        self.seed = seed
        self.graph: list[tuple[Any, Needs]] = []
        self.named: dict[str, mx.array] = {}
        self.meaning: dict[str, tuple[str, Any]] = {}
        self.calls: dict[int, list[tuple[Any, tuple[int, ...]]]] = {}
        self.used: dict[int, set[int]] = {}
        self.caches = caches or []
        self.entry_of: dict[int, int] = {}
        for entry, cache in enumerate(self.caches):
            for part in (cache, *getattr(cache, "caches", ())):
                self.entry_of[id(part)] = entry

    def name(self, array: mx.array, kind: str, what: Any) -> None:
        name = f"{kind}{len(self.named)}"
        self.named[name] = array
        self.meaning[name] = (kind, what)

    def product(self, array: mx.array, what: Any) -> None:
        # Its own node: an array that a layer hands through already has a name.
        self.name(mx.stop_gradient(array), "made", what)

    def placeholder(self, like: mx.array, kind: str, what: Any) -> mx.array:
        """A fresh tracer of the same shape; the graph of its users ends at its name."""
        # stop_gradient always makes a node; the others hand a scalar through.
        fresh = mx.stop_gradient(mx.broadcast_to(self.seed.astype(like.dtype), like.shape))
        self.name(fresh, kind, what)
        # A second node: in-place updates rebind the array that is handed out.
        return mx.stop_gradient(fresh)

    def layer_call(self, index: int, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        for entry in self._entries([args, kwargs]):
            self.used.setdefault(index, set()).add(entry)
        hidden = first_argument(args, kwargs)
        first = tuple(hidden.shape)
        try:
            output = call(*args, **kwargs)
        except ValueError as exc:
            if "[eval]" not in str(exc):
                raise
            # The layer reads values (experts chosen in Python). Take it for what layers are: one
            # array like its input, made of its arguments and its own parameters and caches.
            others = [a for a in flatten([args, kwargs]) if isinstance(a, mx.array)]
            output = hidden + sum(mx.sum(a.astype(hidden.dtype)) for a in others)
        leaves = flatten(output)
        self.calls.setdefault(index, []).append((output, first))
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, mx.array):
                self.product(leaf, (index, position))
                leaves[position] = self.placeholder(leaf, "leaf", (index, position))
        return rebuild(output, iter(leaves))

    def _entries(self, value: Any) -> Iterator[int]:
        """The cache entries among the arguments of a call."""
        if id(value) in self.entry_of:
            yield self.entry_of[id(value)]
        elif isinstance(value, (tuple, list, dict)) and not isinstance(value, nn.Module):
            for item in value.values() if isinstance(value, dict) else value:
                yield from self._entries(item)

    def hold_caches(self) -> None:
        """Turn what the caches hold into placeholders."""
        for entry, cache in enumerate(self.caches):
            _swap_arrays(cache, partial(self.placeholder, kind="cache", what=entry))

    def needs(self) -> Iterator[tuple[Any, Needs]]:
        """(product, what it is directly made of), by walking the graph up to the named nodes."""
        for entry, cache in enumerate(self.caches):

            def note(array: mx.array, entry: int = entry) -> mx.array:
                self.product(array, ("state", entry))
                return array

            _swap_arrays(cache, note)
        made_by, inputs = operations(self.named)
        at = {made_by[name]: meaning for name, meaning in self.meaning.items()}
        for what, op in (
            (w, made_by[n]) for n, (kind, w) in self.meaning.items() if kind == "made"
        ):
            found = Needs()
            todo, seen = list(inputs[op]), {op}
            while todo:
                node = todo.pop()
                if node in seen:
                    continue
                seen.add(node)
                kind, meant = at.get(node, ("", None))
                if kind == "leaf":
                    found.leaves.add(meant)
                elif kind == "cache":
                    found.caches.add(meant)
                elif kind == "param":
                    found.parameters.add(meant)
                else:
                    todo.extend(inputs[node])
            yield what, found
