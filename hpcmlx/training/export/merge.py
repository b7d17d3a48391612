"""The parameters of a trained model, one by one: the base's with the update added in float32."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import mlx.core as mx

from hpcmlx.models.checkpoint import Checkpoint, GGUFCheckpoint
from hpcmlx.models.loader import DTYPES, Reader
from hpcmlx.models.skeleton import build_skeleton
from hpcmlx.parallel.dataflow import named_parameters
from hpcmlx.training.export.source import Trained, Update


class Merger:
    """A base model and what training has made of it. Nothing is read before it is asked for.

    Attributes:
        checkpoint: the base.
        dtype: asked for; None keeps the base's.
        update: what was trained.
        config: the base's, without what it says of packing.
        model: skeleton of the result, all its weights unpacked.
        dtypes, shapes: of its parameters by path.
        skeleton: the same in float32, as it is read.
        kept: skeleton of the base as it is stored.
    """

    def __init__(
        self, trained: Trained, checkpoint: Checkpoint | GGUFCheckpoint, dtype: str | None
    ):
        config, tensors = checkpoint.config, checkpoint.tensors
        self.checkpoint, self.dtype = checkpoint, None if dtype is None else DTYPES[dtype]
        final = build_skeleton(config, tensors, self.dtype, "dequantize")
        self.model, self.dtypes = final.model, final.dtypes
        self.shapes = {path: a.shape for path, a in named_parameters(final.model)}
        self.skeleton = build_skeleton(config, tensors, mx.float32, "dequantize")
        self.kept = build_skeleton(config, tensors, None, "keep")
        self.update = Update(trained, final.model, checkpoint.path)
        self.config = {k: v for k, v in config.items() if not k.startswith("quantization")}
        self._wide = Reader(checkpoint, self.skeleton, {})
        self._stored = Reader(checkpoint, self.kept, {})

    def read(self, path: str) -> mx.array:
        """A parameter of the result, unpacked; floating-point ones in float32."""

        def base() -> mx.array:
            [(_, weight)] = self._wide.arrays([path])
            return weight

        return self.update.merged(path, base)

    def read_as_stored(self, path: str) -> mx.array:
        """A parameter of the base, packed as it is there."""
        [(_, array)] = self._stored.arrays([path])
        return array


class PackingLoss:
    """What packing has changed: squared errors and squares of weights, summed."""

    def __init__(self) -> None:
        self._error = self._square = 0.0
        self._worst = (0.0, "nothing")

    def add(self, path: str, weight: mx.array, packed: Mapping[str, mx.array], **how: Any) -> None:
        """Count one weight.

        Args:
            packed: what `mx.quantize` has made of it: weight, scales and biases.
            how: group_size, bits and mode.
        """
        scales, biases = (packed[name].astype(mx.float32) for name in ("scales", "biases"))
        error = mx.square(weight - mx.dequantize(packed["weight"], scales, biases, **how))
        lost, square = (float(mx.sum(a).item()) for a in (error, mx.square(weight)))
        self._error += lost
        self._square += square
        self._worst = max(self._worst, (sqrt(lost / square) if square else 0.0, path))

    def __str__(self) -> str:
        share = sqrt(self._error / self._square) if self._square else 0.0
        most, where = self._worst
        return (
            f"packing has changed the weights by {share:.2%} (root mean square), {where} most, by "
            f"{most:.2%}"
        )
