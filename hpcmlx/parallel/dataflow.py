"""What flows between the layers of an mlx-lm model, found by tracing its own forward code.

The forward pass is run on tracers: nothing is evaluated, so weights may be lazy placeholders of the
right shape. MLX's graph then says which outputs of other layers, which parameters and which cache
entries each layer's outputs and the logits are made of. `pipeline` cuts stages along that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from hpcmlx.errors import ConfigError
from hpcmlx.parallel.tracing import (
    LOGITS,
    Forward,
    Key,
    Needs,
    flatten,
    rebuild,
    signature,
    subclass_call,
)

__all__ = ["LOGITS", "Dataflow", "Key", "Leaf", "Output", "find_layers", "trace"]

# (batch, length) of the first call. Three of them, so that the part of each dim that comes from the
# batch and the part that comes from the length can be told apart.
_SIZES = ((2, 5), (3, 5), (2, 6))


@dataclass(frozen=True)
class Leaf:
    """One array that crosses a stage boundary: a leaf of the output of layer `layer`.

    Attributes:
        layer: the layer that makes it.
        index: which leaf of the layer's output (0 is the hidden state).
        dtype: its dtype in the traced model.
        dims: per dim (constant, per batch row, per token): its size is c + b * batch + t * length.
        fixed: whether `dims` holds in every call. False for keys and values that later layers
            share: they grow with the cache, so the sender must tell the shape.
    """

    layer: int
    index: int
    dtype: mx.Dtype
    dims: tuple[tuple[int, int, int], ...]
    fixed: bool

    def shape(self, batch: int, length: int) -> tuple[int, ...]:
        """Shape for tokens [batch, length]; only to be relied on when `fixed`."""
        return tuple(c + b * batch + t * length for c, b, t in self.dims)


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


def named_parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    """(path, array) of every parameter."""
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def type_name(model: nn.Module) -> str:
    """The model type, as messages name it."""
    return str(getattr(model, "model_type", type(model).__name__))


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
        self.parameters = named_parameters(model)
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

    def _forward(
        self, batch: int, length: int, caches: list[Any] | None, with_graph: bool
    ) -> Forward:
        classes = [type(layer) for layer in self.layers]
        result: list[Forward] = []

        def traced(tokens: mx.array, seed: mx.array) -> mx.array:
            run = Forward(caches, seed)
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
            f"{type_name(self.model)}: cannot be cut into stages: its forward pass cannot be "
            f"traced without evaluating it ({reason}); use tp"
        )

    def _absorb(self, run: Forward, with_graph: bool) -> dict[Key, tuple[int, ...]]:
        shapes: dict[Key, tuple[int, ...]] = {}
        for index, calls in run.calls.items():
            if len(calls) > 1:
                raise ConfigError(
                    f"{type_name(self.model)}: layer {index} runs {len(calls)} times in one "
                    "forward pass, which a pipeline cannot do; use tp"
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
