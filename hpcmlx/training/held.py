"""Other values for some of a model's parameters, for the time of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
from mlx import nn


class Held:
    """The places of the parameters `names` in `model`.

    Attributes:
        names: their paths.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        self.names = names
        modules = dict(model.named_modules())
        self._places = [
            (modules[path], name) for path, _, name in (n.rpartition(".") for n in names)
        ]

    @contextmanager
    def __call__(self, values: Sequence[mx.array]) -> Iterator[None]:
        """Let the model hold `values`, and what it held before afterwards: the tracers of a
        transformation must not stay in it."""
        before = self.get()
        self.set(values)
        try:
            yield
        finally:
            self.set(before)

    def get(self) -> list[mx.array]:
        """What the model holds."""
        return [module[name] for module, name in self._places]

    def set(self, values: Sequence[mx.array]) -> None:
        """Put `values` into the model."""
        for (module, name), value in zip(self._places, values, strict=True):
            module[name] = value
