"""A pipeline stage of any mlx-lm model: layers [start, stop) of the model's own forward code.

The whole model object stays; a layer that the stage does not hold hands its input, or what was
received, through. MLX is lazy, so of the code around the layers (embedding, masks, head) only what
the stage's products need is ever evaluated. No MPI here: the caller moves the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from hpcmlx.errors import ConfigError
from hpcmlx.parallel.dataflow import (
    LOGITS,
    Dataflow,
    Key,
    Leaf,
    Output,
    find_layers,
    named_parameters,
    trace,
    type_name,
)
from hpcmlx.parallel.tracing import first_argument, flatten, rebuild, subclass_call

__all__ = [
    "Dataflow",
    "Head",
    "Leaf",
    "Stage",
    "build_stage",
    "check_layers",
    "check_stage",
    "find_layers",
    "split_head",
    "trace",
]


class Stage:
    """One pipeline stage of an mlx-lm model: layers [start, stop). Made by `build_stage`.

    Attributes:
        model: the model, converted in place.
        receives: what `__call__` takes as `inputs`, in order.
        sends: what `__call__` returns, in order; empty for the last stage, which returns logits. A
            leaf that a later stage needs from an earlier one is both received and sent.
        parameters: names (those of `tree_flatten(model.parameters())`) that this stage must load.
    """

    def __init__(self, model: nn.Module, start: int, stop: int, num_layers: int) -> None:
        self.model = model
        self.start, self.stop = start, stop
        self.first, self.last = start == 0, stop == num_layers
        self.receives: tuple[Leaf, ...] = ()
        self.sends: tuple[Leaf, ...] = ()
        self.parameters: frozenset[str] = frozenset()
        # Which entries of the model's cache list are this stage's own, in order; for every entry of
        # the full list, which own one stands there; the own ones no layer here fills.
        self._own: list[int] | None = None
        self._stand_in: list[int] = []
        self._shadows: list[int] = []
        self._arrays: dict[Key, mx.array] = {}
        self._size: tuple[int, ...] = (0, 0)

    def make_cache(self, model_caches: list[Any] | None = None) -> list[Any]:
        """This stage's own cache entries.

        Args:
            model_caches: a full list of the model's cache entries to take them from, e.g. batch
                caches; by default `make_prompt_cache` makes a fresh one.
        """
        full = make_prompt_cache(self.model) if model_caches is None else model_caches
        return full if self._own is None else [full[entry] for entry in self._own]

    def expand(self, cache: list[Any]) -> list[Any]:
        """The full-length list for the model: entries of other stages' layers are stood in for by
        own ones of the same type and settings, whose offsets and masks are the same."""
        if self._own is None:
            return cache
        return [cache[position] for position in self._stand_in]

    def __call__(
        self,
        tokens: mx.array,
        inputs: Sequence[mx.array] = (),
        cache: list[Any] | None = None,
    ) -> list[mx.array] | mx.array:
        """Run the stage, lazily; the only side effect is on `cache`.

        Args:
            tokens: [batch, length] token ids; every stage is given them.
            inputs: the arrays of `receives`.
            cache: what `make_cache` returned, or None to run without one.

        Returns:
            The arrays of `sends`; on the last stage the logits [batch, length, vocab].
        """
        outputs = self.run(tokens, inputs, None if cache is None else self.expand(cache))
        if cache is not None and self._shadows:
            step = mx.zeros((*tokens.shape[:1], 1, tokens.shape[1], 1))
            for position in self._shadows:
                _advance(cache[position], step)
        return outputs

    def run(
        self, tokens: mx.array, inputs: Sequence[mx.array], caches: list[Any] | None
    ) -> list[mx.array] | mx.array:
        """`__call__` with a cache for every entry of the model's list, whoever's layer it is."""
        if self._own is None:
            return self.model(tokens, cache=caches)
        arrays = dict(zip(((x.layer, x.index) for x in self.receives), inputs, strict=True))
        self._arrays, self._size = arrays, tokens.shape
        try:
            logits = self.model(tokens, cache=caches)
        finally:
            self._arrays = {}
        return logits if self.last else [arrays[leaf.layer, leaf.index] for leaf in self.sends]


class Head:
    """What a model does behind its last layer, as a stage without layers. Made by `split_head`.

    Training computes its loss in pieces of the sequence, so that logits [batch, seq, vocab] are
    never whole: it runs the stage for what the head `receives`, and the head on pieces of that.

    Attributes:
        receives: outputs of layers that the logits are made of, in order.
        parameters: names of the parameters that the logits are directly made of.
    """

    def __init__(self, stage: Stage, flow: Dataflow) -> None:
        self._stage, self._active = stage, False
        keys = flow.crossing(flow.num_layers)
        self.receives = tuple(flow.leaves[key] for key in keys)
        self.parameters = frozenset(flow.needs[LOGITS].parameters)
        self._made: dict[Key, mx.array] = {}
        self._arrays: dict[Key, mx.array] = {}
        self._size: tuple[int, ...] = (0, 0)
        for index, layer in enumerate(find_layers(stage.model)):
            if (output := flow.outputs[index]) is not None:
                own = [key for key in keys if key[0] == index]
                subclass_call(layer, self._switch(layer, flow, output, index, own))

    def _switch(
        self, layer: nn.Module, flow: Dataflow, output: Output, index: int, own: list[Key]
    ) -> Callable[..., Any]:
        run, skip = type(layer).__call__, _pass_through(self, flow, output, index)

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._active:
                return skip(layer, *args, **kwargs)
            result = run(layer, *args, **kwargs)
            for key in own:
                self._made[key] = _handle(flatten(result)[key[1]])
            return result

        return call

    def body(
        self, tokens: mx.array, inputs: Sequence[mx.array] = (), caches: list[Any] | None = None
    ) -> list[mx.array]:
        """Run the last stage up to the head, lazily; the arrays of `receives`.

        Args:
            caches: one for every entry of the model's cache list, or None.
        """
        try:
            self._stage.run(tokens, inputs, caches)
            return [self._made[leaf.layer, leaf.index] for leaf in self.receives]
        finally:
            self._made = {}

    def __call__(self, tokens: mx.array, arrays: Sequence[mx.array]) -> mx.array:
        """Logits [batch, length, vocab] of tokens [batch, length] from the arrays of `receives`."""
        keys = ((leaf.layer, leaf.index) for leaf in self.receives)
        self._arrays = dict(zip(keys, arrays, strict=True))
        self._size, self._active = tokens.shape, True
        try:
            return self._stage.model(tokens)
        finally:
            self._arrays, self._active = {}, False


def split_head(stage: Stage, flow: Dataflow) -> Head:
    """The head of the last stage, to be run by itself; the stage goes on as before.

    Raises:
        ConfigError: this is not the last stage.
    """
    if not stage.last:
        raise ConfigError(f"{flow.model_type}: layers before {stage.stop} have no head")
    return Head(stage, flow)


def _advance(cache: Any, step: mx.array) -> None:
    """Move a cache that no layer here fills on by the tokens of one call."""
    for part in getattr(cache, "caches", (cache,)):
        if hasattr(part, "update_and_fetch"):
            part.update_and_fetch(step, step)


def check_layers(num_layers: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Refuse stages whose half-open layer ranges are not the model's, in order, without overlap.

    Raises:
        ConfigError: naming the first stage that is wrong.
    """
    if len(ranges) > num_layers:
        raise ConfigError(
            f"{len(ranges)} pipeline stages for {num_layers} layers; use fewer stages"
        )
    expected = 0
    for stage, (start, stop) in enumerate(ranges):
        if start != expected or stop <= start:
            raise ConfigError(
                f"pipeline stage {stage} holds layers {start}:{stop}, but has to start at "
                f"{expected} and hold at least one; the layers of all stages are 0:{num_layers}"
            )
        expected = stop
    if expected != num_layers:
        raise ConfigError(f"the pipeline stages hold layers 0:{expected} of 0:{num_layers}")


def check_stage(dataflow: Dataflow, start: int, stop: int) -> frozenset[str]:
    """The parameters that layers [start, stop) need, or a refusal. Pure: no rank need hold them.

    Raises:
        ConfigError: the range is not one of layers, or these layers use another stage's weights or
            caches other than through layer outputs.
    """
    flow, last = dataflow, stop == dataflow.num_layers
    if not 0 <= start < stop <= flow.num_layers:
        raise ConfigError(
            f"{flow.model_type}: layers {start}:{stop} are not a stage of {flow.num_layers} layers"
        )
    received = set(flow.crossing(start))
    todo = [LOGITS] if last else [key for key in flow.crossing(stop) if key[0] >= start]
    seen = set(todo)
    wanted: set[str] = set()
    while todo:
        key = todo.pop()
        needs = flow.needs[key]
        who = "the head" if key == LOGITS else f"layer {key[0]}"
        for entry in sorted(needs.caches):
            sharers = sorted({*flow.owners[entry], *([] if key == LOGITS else [key[0]])})
            if flow.owners[entry] and not all(start <= layer < stop for layer in sharers):
                raise ConfigError(
                    f"{flow.model_type}: layers {', '.join(map(str, sharers))} share a cache and "
                    f"have to be on one stage, not cut by {start}:{stop}; use other or fewer "
                    "stages, or tp"
                )
        for name in sorted(needs.parameters):
            names = flow.shared_names.get(name, (name,))
            owners = [flow.parameter_layer[n] for n in names]
            here = [o is None or start <= o < stop for o in owners]
            if not any(here):
                raise _refusal(flow, f"{who} uses {name} outside its layer's call", owners[0])
            wanted.update(n for n, ok in zip(names, here, strict=True) if ok)
        for leaf in sorted(needs.leaves - seen):
            seen.add(leaf)
            if start <= leaf[0] < stop:
                todo.append(leaf)
            elif leaf not in received:
                raise _refusal(flow, f"{who} uses the output of layer {leaf[0]}", leaf[0])
    # All of a layer's own parameters, also those that a short trace did not reach: code for long
    # sequences (a sparse-attention indexer) sleeps below its threshold.
    wanted.update(n for n, o in flow.parameter_layer.items() if o is not None and start <= o < stop)
    return frozenset(wanted)


def _refusal(flow: Dataflow, why: str, layer: int | None) -> ConfigError:
    return ConfigError(
        f"{flow.model_type}: {why}, and layer {layer} is on another stage; use fewer stages or tp"
    )


def build_stage(model: nn.Module, dataflow: Dataflow | None, start: int, stop: int) -> Stage:
    """Convert `model` in place into the stage that holds layers [start, stop).

    The arrays of the other layers are dropped. Wrap layers (e.g. in checkpointing) before this.

    Args:
        model: the model that was traced, or another of the same config.
        dataflow: the result of `trace`; a stage that holds all layers does without.

    Raises:
        ConfigError: the structure does not allow this cut.
    """
    layers = find_layers(model)
    stage = Stage(model, start, stop, len(layers))
    if stage.first and stage.last:
        stage.parameters = frozenset(name for name, _ in named_parameters(model))
        return stage
    if dataflow is None:
        raise ConfigError(f"{type_name(model)}: cutting layers {start}:{stop} out needs its trace")
    stage.parameters = check_stage(dataflow, start, stop)
    received, sent = dataflow.crossing(start), () if stage.last else dataflow.crossing(stop)
    stage.receives = tuple(dataflow.leaves[key] for key in received)
    stage.sends = tuple(dataflow.leaves[key] for key in sent)
    _assign_caches(stage, dataflow)
    kept = {id(m) for layer in layers[start:stop] for m in layer.modules()}
    for index, layer in enumerate(layers):
        if start <= index < stop:
            captured = [key for key in sent if key[0] == index]
            if captured:
                subclass_call(layer, _capture(stage, layer, captured))
        elif (output := dataflow.outputs[index]) is not None:
            subclass_call(layer, _pass_through(stage, dataflow, output, index))
            for module in layer.modules():
                if id(module) not in kept:
                    for name in [n for n, v in module.items() if isinstance(v, mx.array)]:
                        del module[name]
    return stage


def _assign_caches(stage: Stage, flow: Dataflow) -> None:
    """Choose the stage's own cache entries and who stands in for the others."""
    local = range(stage.start, stage.stop)
    # An entry that no layer is handed belongs to the code around the layers, which runs everywhere.
    own = [e for e, owners in enumerate(flow.owners) if not owners or owners & set(local)]
    by_signature = {flow.signatures[entry]: entry for entry in reversed(own)}
    shadows = []
    for entry, signature in enumerate(flow.signatures):
        # The model may build a mask from an entry of a kind that no layer here has; keep one of
        # that kind and move it on, so that its offset is right.
        if signature not in by_signature:
            by_signature[signature] = entry
            shadows.append(entry)
    stage._own = sorted({*own, *shadows})
    position = {entry: p for p, entry in enumerate(stage._own)}
    stage._shadows = [position[entry] for entry in shadows]
    stage._stand_in = [
        position[entry if entry in position else by_signature[signature]]
        for entry, signature in enumerate(flow.signatures)
    ]


def _handle(array: mx.array) -> mx.array:
    """The same array under another handle: model code that assigns into slices of a hidden state
    rebinds the handle it was given, and must not reach what is sent."""
    return array.astype(array.dtype)


def _capture(stage: Stage, layer: nn.Module, keys: list[Key]) -> Callable[..., Any]:
    """A layer of this stage whose outputs later stages need."""
    run = type(layer).__call__

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = run(layer, *args, **kwargs)
        leaves = flatten(output)
        for key in keys:
            leaf = leaves[key[1]]
            # Without a cache some models return a number where there is an array with one.
            stage._arrays[key] = _handle(leaf if isinstance(leaf, mx.array) else mx.array(leaf))
        return output

    return call


def _pass_through(
    stage: Stage | Head, flow: Dataflow, output: Output, index: int
) -> Callable[..., Any]:
    """A layer of another stage: what was received of it, else its input or zeros of its shape."""
    structure, leaves = output.structure, output.leaves
    received = {(leaf.layer, leaf.index) for leaf in stage.receives}
    keys = [(index, position) for position in range(len(leaves))]

    def stand_in(key: Key, leaf: Any, hidden: mx.array) -> Any:
        if key in received:
            return _handle(stage._arrays[key])
        if leaf != key:
            return leaf  # not an array: None or a setting
        if key in flow.passed:
            return hidden
        array = flow.leaves[key]
        return mx.zeros(array.shape(*stage._size), array.dtype)

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = first_argument(args, kwargs)
        parts = (stand_in(key, leaf, hidden) for key, leaf in zip(keys, leaves, strict=True))
        return rebuild(structure, parts)

    def call_received(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _handle(stage._arrays[index, 0])

    def call_input(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return first_argument(args, kwargs)

    if structure is None:  # one array, as almost always
        if (index, 0) in received:
            return call_received
        if (index, 0) in flow.passed:
            return call_input
    return call
