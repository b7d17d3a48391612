"""What flows between the layers of an mlx-lm model, found by tracing its own forward code.

The forward pass is run on tracers: nothing is evaluated, so weights may be lazy placeholders of the
right shape. MLX's graph then says which outputs of other layers, which parameters and which cache
entries each layer's outputs and the logits are made of. `pipeline` cuts stages along that.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from hpcmlx.errors import ConfigError

Key = tuple[int, int]  # (layer, index of the leaf in the layer's flattened output)
LOGITS: Key = (-1, 0)

# (batch, length) of the first call. Three of them, so that the part of each dim that comes from the
# batch and the part that comes from the length can be told apart.
_SIZES = ((2, 5), (3, 5), (2, 6))
_EDGE = re.compile(r'^(?:"([^"]+)" -> (\d+)|(\d+) -> "([^"]+)")$', re.MULTILINE)


@dataclass(frozen=True)
class Leaf:
    """One array that crosses a stage boundary: a leaf of the output of layer `layer`.

    Attributes:
        layer: the layer that makes it.
        index: which leaf of the layer's output (0 is the hidden state).
        dtype: its dtype in the traced model.
        dims: per dim (constant, per batch row, per token): its size is `c + b * batch + t * length`.
        fixed: whether `dims` holds in every call. False for keys and values that later layers share:
            they grow with the cache, so the sender must tell the shape.
    """

    layer: int
    index: int
    dtype: mx.Dtype
    dims: tuple[tuple[int, int, int], ...]
    fixed: bool

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Shape for tokens [batch, length]; only to be relied on when `fixed`."""
        return tuple(c + b * batch + t * length for c, b, t in self.dims)


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


@dataclass(frozen=True)
class Output:
    """What a layer returns: the structure, and a `Key` or the constant for each of its leaves."""

    structure: Any
    leaves: tuple[Any, ...]


@dataclass
class Dataflow:
    """The result of `trace`: what each layer's outputs and the logits are made of.

    Attributes:
        model_type: for messages.
        num_layers: length of `model.layers`.
        leaves: every array that a layer returns.
        outputs: per layer, the form of its output (None: never called).
        passed: keys of leaves that have the shape of the layer's first argument.
        needs: direct needs of each leaf, and of the logits under `LOGITS`.
        parameter_layer: every parameter's name -> the layer it belongs to, or None.
        shared_names: names of a parameter that is reachable under several names.
        owners: per cache entry, the layers that are handed it.
        signatures: per cache entry, its type and settings; equal ones can stand in for each other.
    """

    model_type: str
    num_layers: int
    leaves: dict[Key, Leaf]
    outputs: list[Output | None]
    passed: set[Key]
    needs: dict[Key, Needs]
    parameter_layer: dict[str, int | None]
    shared_names: dict[str, tuple[str, ...]]
    owners: list[frozenset[int]]
    signatures: list[Any]

    def live(self) -> set[Key]:
        """The leaves that the logits are made of, directly or through other leaves."""
        seen: set[Key] = set()
        todo = [LOGITS]
        while todo:
            fresh = self.needs[todo.pop()].leaves - seen
            seen |= fresh
            todo.extend(fresh)
        return seen

    def crossing(self, boundary: int) -> list[Key]:
        """The leaves of layers < `boundary` that layers >= `boundary`, or the logits, consume."""
        live = self.live()
        users = [LOGITS, *(key for key in live if key[0] >= boundary)]
        used = set().union(*(self.needs[key].leaves for key in users))
        return sorted(key for key in used if key[0] < boundary)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers, in order.

    Raises:
        ConfigError: the model has no list of layers.
    """
    layers = getattr(model, "layers", None)
    if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
        raise ConfigError(f"{type_name(model)}: has no list of layers to cut into stages; use tp")
    return list(layers)


def layer_paths(model: nn.Module, layers: list[nn.Module]) -> list[str]:
    """Path of each layer in the module tree, e.g. `model.layers.3`."""
    paths = {id(module): name for name, module in model.named_modules()}
    return [paths[id(layer)] for layer in layers]


def type_name(model: nn.Module) -> str:
    """The model type, as messages name it."""
    return str(getattr(model, "model_type", type(model).__name__))


def subclass_call(module: nn.Module, call: Callable[..., Any]) -> None:
    """Give one module its own `__call__` while everything else about it stays.

    A Python object may change to a subclass of its class; parameters, attributes and `isinstance`
    are untouched, which a wrapper around the module could not offer.
    """
    base = type(module)
    module.__class__ = type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


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


class _Trace:
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
            _swap_arrays(cache, lambda a, e=entry: self.placeholder(a, "cache", e))

    def needs(self) -> Iterator[tuple[Any, Needs]]:
        """(product, what it is directly made of), by walking the graph up to the named nodes."""
        for entry, cache in enumerate(self.caches):

            def note(array: mx.array, entry: int = entry) -> mx.array:
                self.product(array, ("state", entry))
                return array

            _swap_arrays(cache, note)
        text = io.StringIO()
        mx.export_to_dot(text, **self.named)
        parents: dict[str, list[str]] = {}
        for array, op, op_out, array_out in _EDGE.findall(text.getvalue()):
            if op:
                parents.setdefault(op, []).append(array)
            else:
                parents.setdefault(array_out, []).append(op_out)
        for name, (kind, what) in self.meaning.items():
            if kind != "made":
                continue
            found = Needs()
            todo, seen = list(parents.get(name, ())), {name}
            while todo:
                node = todo.pop()
                if node in seen:
                    continue
                seen.add(node)
                kind, meant = self.meaning.get(node, ("", None))
                if kind == "leaf":
                    found.leaves.add(meant)
                elif kind == "cache":
                    found.caches.add(meant)
                elif kind == "param":
                    found.parameters.add(meant)
                else:
                    todo.extend(parents.get(node, ()))
            yield what, found


def trace(model: nn.Module) -> Dataflow:
    """Find what each layer of a whole, untouched model consumes. Evaluates nothing.

    Args:
        model: an mlx-lm model; its parameters may be lazy placeholders of their final dtype.

    Raises:
        ConfigError: the model cannot be traced: no layer list, a layer that runs twice, a forward
            pass that reads values out of arrays, or kernels that this host does not have.
    """
    return _Tracer(model).run()


class _Tracer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = find_layers(model)
        self.paths = layer_paths(model, self.layers)
        self.parameters = tree_flatten(model.parameters())
        names: dict[int, list[str]] = {}
        for name, value in self.parameters:
            names.setdefault(id(value), []).append(name)
        self.shared = {n[0]: tuple(n) for n in names.values() if len(n) > 1}
        self.unique = [(n, v) for n, v in self.parameters if names[id(v)][0] == n]
        self.needs: dict[Key, Needs] = {LOGITS: Needs()}
        self.state: dict[int, Needs] = {}
        self.outputs: list[Output | None] = [None] * len(self.layers)
        self.used: list[set[int]] = [set() for _ in self.layers]
        self.not_passed: set[Key] = set()
        self.shapes: dict[tuple[int, int], dict[Key, tuple[int, ...]]] = {}
        self.later: list[tuple[int, int, dict[Key, tuple[int, ...]]]] = []
        self.dtypes: dict[Key, mx.Dtype] = {}

    def run(self) -> Dataflow:
        fresh = make_prompt_cache(self.model)
        signatures = [signature(cache) for cache in fresh]
        for size in _SIZES:
            self._generation(*size, fresh, first=size == _SIZES[0])
            fresh = make_prompt_cache(self.model)
        self._without_cache(*_SIZES[0])
        layer_of = self._parameter_layers()
        owners = [
            frozenset(i for i, used in enumerate(self.used) if entry in used)
            for entry in range(len(signatures))
        ]
        # A layer that runs must also be able to fill its caches for the next call.
        for entry, needs in self.state.items():
            for key in self.needs:
                if key[0] in owners[entry] or not owners[entry] and key == LOGITS:
                    self.needs[key].add(needs)
        leaves = {key: self._leaf(key) for key in self.dtypes}
        return Dataflow(
            type_name(self.model), len(self.layers), leaves, self.outputs,
            set(leaves) - self.not_passed, self.needs, layer_of, self.shared, owners, signatures,
        )  # fmt: skip

    def _generation(self, batch: int, length: int, caches: list[Any], first: bool) -> None:
        """Prefill; and for the first size a second chunk and a decode step on what it left."""
        for step, size in enumerate((length, length, 1) if first else (length,)):
            run = self._forward(batch, size, caches, with_graph=first)
            shapes = self._absorb(run, with_graph=first)
            if step == 0:
                self.shapes[batch, size] = shapes
            else:
                self.later.append((batch, size, shapes))

    def _without_cache(self, batch: int, length: int) -> None:
        """Scoring a text takes no cache and may take other code; not every model offers it."""
        try:
            run = self._forward(batch, length, None, with_graph=True)
        except ConfigError:
            return
        self._absorb(run, with_graph=True)

    def _forward(self, batch: int, length: int, caches: list[Any] | None, with_graph: bool) -> _Trace:
        classes = [type(layer) for layer in self.layers]
        result: list[_Trace] = []

        def traced(tokens: mx.array, seed: mx.array) -> mx.array:
            run = _Trace(caches, seed)
            result.append(run)
            # Tracers in the place of the weights too: a compiled function called on plain arrays
            # would share its graph's operations between calls, and the graph would mix them up.
            held = {id(v): run.placeholder(v, "param", n) for n, v in self.unique}
            self.model.update(tree_unflatten([(n, held[id(v)]) for n, v in self.parameters]))
            run.hold_caches()
            position = {id(layer): index for index, layer in enumerate(self.layers)}

            def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
                index = position[id(layer)]
                bound = classes[index].__call__.__get__(layer)
                return run.layer_call(index, bound, args, kwargs)

            for layer in {id(layer): layer for layer in self.layers}.values():
                subclass_call(layer, call)
            run.product(self.model(tokens, cache=caches), LOGITS)
            run.graph = list(run.needs()) if with_graph else []
            return tokens

        # Models remember arrays that they derive from their weights; the trace must leave none.
        before = [(module, dict(module), dict(vars(module))) for module in self.model.modules()]
        try:
            # Inside a transformation an attempt to evaluate raises instead of reading weights.
            mx.compile(traced)(mx.zeros((batch, length), mx.int32), mx.zeros(()))
        except ConfigError:
            raise
        except Exception as exc:
            raise ConfigError(self._why(exc)) from exc
        finally:
            for layer, cls in zip(self.layers, classes, strict=True):
                layer.__class__ = cls
            for module, entries, attributes in before:
                dict.clear(module)
                dict.update(module, entries)
                vars(module).clear()
                vars(module).update(attributes)
        return result[0]

    def _why(self, exc: Exception) -> str:
        reason = " ".join(str(exc).split())[:200] or type(exc).__name__
        if "metal" in reason.lower():
            return f"{type_name(self.model)}: needs Metal kernels, which this host does not have"
        return (
            f"{type_name(self.model)}: its forward pass cannot be cut into stages because it cannot "
            f"be traced without evaluating it ({reason}); use tp"
        )

    def _absorb(self, run: _Trace, with_graph: bool) -> dict[Key, tuple[int, ...]]:
        shapes: dict[Key, tuple[int, ...]] = {}
        for index, calls in run.calls.items():
            if len(calls) > 1:
                raise ConfigError(
                    f"{type_name(self.model)}: layer {index} runs {len(calls)} times in one forward "
                    "pass, which a pipeline cannot do; use tp"
                )
            output, first = calls[0]
            leaves = flatten(output)
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, mx.array):
                    key = (index, position)
                    shapes[key] = tuple(leaf.shape)
                    self.dtypes.setdefault(key, leaf.dtype)
                    self.needs.setdefault(key, Needs())
                    leaves[position] = key
                    if shapes[key] != first:
                        self.not_passed.add(key)
            if self.outputs[index] is None:
                structure = rebuild(output, iter([None] * len(leaves)))
                self.outputs[index] = Output(structure, tuple(leaves))
            self.used[index] |= run.used.get(index, set())
        if with_graph:
            for what, needs in run.graph:
                if what[0] == "state":
                    self.state.setdefault(what[1], Needs()).add(needs)
                else:
                    self.needs[what].add(needs)
        return shapes

    def _leaf(self, key: Key) -> Leaf:
        (b0, l0), (b1, _), (_, l1) = _SIZES
        base, more_rows, more_tokens = (self.shapes[size].get(key, ()) for size in _SIZES)
        dims = []
        for n, rows, tokens in zip(base, more_rows, more_tokens, strict=False):
            per_row, per_token = (rows - n) // (b1 - b0), (tokens - n) // (l1 - l0)
            dims.append((n - per_row * b0 - per_token * l0, per_row, per_token))
        leaf = Leaf(*key, self.dtypes[key], tuple(dims), True)
        # A leaf without a token axis may look different under another kind of cache.
        fixed = any(b for _, b, _ in dims) and any(t for _, _, t in dims)
        fixed = fixed and all(s.get(key) == leaf.shape(b, n) for b, n, s in self.later)
        return Leaf(*key, self.dtypes[key], tuple(dims), fixed)

    def _parameter_layers(self) -> dict[str, int | None]:
        layer_of: dict[str, int | None] = {name: None for name, _ in self.parameters}
        for index, path in enumerate(self.paths):
            for name in layer_of:
                if name.startswith(path + "."):
                    layer_of[name] = index
        return layer_of
