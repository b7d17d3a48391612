"""This rank's stages, ready to be trained: loaded, with what is trained in them, head and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from hpcmlx.errors import ConfigError
from hpcmlx.mesh import Mesh
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import LoadedModel, check_coverage, load_model
from hpcmlx.parallel.dataflow import find_layers, layer_paths
from hpcmlx.parallel.partition import Cut
from hpcmlx.parallel.pipeline import split_head
from hpcmlx.training.executor import Chunk
from hpcmlx.training.loss import Loss
from hpcmlx.training.methods import Method
from hpcmlx.training.placement import Place, find_places
from hpcmlx.training.recompute import recompute_layers

Announce = Callable[[Mapping[str, mx.array]], None]


@dataclass
class Stages:
    """What a rank trains.

    Attributes:
        chunks: its stages.
        places: of every trained parameter that is here.
        num_trained: numbers that are trained in the whole model.
        num_parameters: of the whole model, packed words counted as such.
    """

    chunks: list[Chunk]
    places: dict[str, Place]
    num_trained: int
    num_parameters: int

    def __str__(self) -> str:
        share = self.num_trained / self.num_parameters
        return f"{self.num_trained:,} parameters are trained ({share:.2%})"

    def parameters(self) -> dict[str, mx.array]:
        """The trained parameters that are here."""
        found: dict[str, mx.array] = {}
        for part in self.chunks:
            found |= zip(part.names, part.held.get(), strict=True)
        return found

    def set_parameters(self, values: Mapping[str, mx.array]) -> None:
        """Put new values in; every path of `parameters` is there."""
        for part in self.chunks:
            part.held.set([values[name] for name in part.names])


def load_stages(
    path: str,
    mesh: Mesh,
    method: Method,
    *,
    num_chunks: int = 1,
    recompute: bool = True,
    loss_chunk: int = 1024,
    target_share: float = 1.0,
    announce: Announce = lambda _: None,
    **options: Any,
) -> Stages:
    """Load and prepare this rank's stages. Collective.

    Args:
        path: what `open_checkpoint` takes.
        num_chunks: stages on each rank.
        recompute: checkpoint every layer's activations.
        loss_chunk: tokens whose logits are there at once.
        target_share: of all tokens those that are to be predicted: only these pass the head, which
            decides how many layers stand before it on the last stage.
        announce: is given stand-ins for all trained parameters of the whole model, unevaluated,
            before anything is read; it may refuse them.
        options: of `load_model`.

    Raises:
        ConfigError: nothing is trained, or the model cannot be trained in this layout.
    """
    if num_chunks > 1 and mesh.dims.pp == 1:
        raise ConfigError("train.num_chunks is for a pipeline: set parallel.pp, or num_chunks=1")
    chunks = [
        _load(
            path,
            mesh,
            method,
            (number, num_chunks),
            recompute,
            loss_chunk,
            target_share,
            announce,
            options,
        )
        for number in range(num_chunks)
    ]
    shapes = chunks[0].loaded.shapes
    if num_chunks > 1:
        held = set(chain.from_iterable(c.loaded.parameters for c in chunks))
        check_coverage(mesh, held, shapes)
    modules: dict[str, nn.Module] = {}
    cuts: dict[str, Cut] = {}
    for part in chunks:
        modules |= part.loaded.stage.model.named_modules()
        cuts |= part.loaded.cuts
    names = list(dict.fromkeys(chain.from_iterable(c.names for c in chunks)))
    everything = set().union(*mesh.replica.allgather(set(names)))
    if not everything:
        raise ConfigError("method.modules and method.num_layers leave nothing to train")
    places = find_places(mesh, modules, names, shapes, cuts)
    count = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(count[name] for name in everything)
    return Stages(chunks, places, total, sum(count.values()))


def _load(
    path: str,
    mesh: Mesh,
    method: Method,
    chunk: tuple[int, int],
    recompute: bool,
    loss_chunk: int,
    target_share: float,
    announce: Announce,
    options: Mapping[str, Any],
) -> Chunk:
    trained: list[str] = []

    def prepare(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[float]:
        parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        trained.extend(method.trained(model, parameters))
        announce({name: mx.zeros(shapes[name], parameters[name].dtype) for name in trained})
        if recompute:
            recompute_layers(model, trained)
        return _work(model, trained, recompute, method.kind == "full", target_share)

    loaded = load_model(
        open_checkpoint(path),
        mesh,
        adapter=method.attach(),
        chunk=chunk,
        prepare=prepare,
        **options,
    )
    head = loss = None
    if loaded.stage.last and loaded.flow is not None:
        head = split_head(loaded.stage, loaded.flow)
        loss = Loss(loaded, head, mesh.tp_group, loss_chunk)
    held = set(loaded.parameters)
    names = tuple(name for name in _backwards(loaded, trained) if name in held)
    return Chunk(chunk[0], loaded, names, head, loss)


def _work(
    model: nn.Module, trained: list[str], recompute: bool, full: bool, target_share: float
) -> list[float]:
    """Matrix products with each layer's weights in a step, and with the head's last: forward, once
    more where that is recomputed, backward for the inputs, and for the weights if these are
    trained. Layers before the first trained one have no backward pass."""
    paths = layer_paths(model, find_layers(model))
    own = [sum(name.startswith(f"{path}.") for name in trained) for path in paths]
    outside = len(trained) - sum(own)
    begin = 0 if outside else next((i for i, count in enumerate(own) if count), len(own))
    backward = 3.0 if recompute else 2.0
    layers = [1.0 if i < begin else backward + (full and count > 0) for i, count in enumerate(own)]
    return [*layers, target_share * (2.0 + (full and outside > 0))]


def _backwards(loaded: LoadedModel, names: list[str]) -> list[str]:
    """In the order in which the backward pass reaches them: head, last layer, ..., embedding. One
    that is outside the layers may be reached twice and comes last."""
    layer_of = loaded.flow.parameter_layer if loaded.flow else {}
    return sorted(names, key=lambda name: -1 if (at := layer_of.get(name)) is None else at)[::-1]
