"""mlx-lm's own LoRA trainer, step by step, from the first values and on the batches that it is
given. `training.py` compares with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.utils import average_gradients, value_and_grad
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from hpcmlx.training.data.batches import Step
from hpcmlx.training.data.dataset import Dataset
from hpcmlx.training.methods import Method
from hpcmlx.training.optim import OptimSettings

# The names of the factors there; its matrices stand the other way round.
_NAMES = {"lora_down": "lora_a", "lora_up": "lora_b"}
Batch = tuple[mx.array, mx.array]


class MlxLmTuner:
    """What `mlx_lm.tuner.trainer.train` does at each of its iterations, without its reports."""

    def __init__(
        self,
        model: str,
        method: Method,
        settings: OptimSettings,
        factors: Mapping[str, mx.array],
        *,
        compiled: bool = True,
    ):
        """
        Args:
            factors: first values, by the paths they have in hpcmlx.
            compiled: as mlx-lm does it, or the same step without `mx.compile`.
        """
        self.model: Module = load_model(Path(model))[0]
        self.model.freeze()
        lora = {"rank": method.rank, "scale": method.scale, "dropout": 0.0}
        linear_to_lora_layers(self.model, len(self.model.layers), lora)
        self.model.load_weights([_theirs(*item) for item in factors.items()], strict=False)
        self.model.train()
        self._optimizer = optim.Adam(settings.learning_rate, bias_correction=True)
        self._optimizer.init(self.model.trainable_parameters())
        self._state = [self.model.state, self._optimizer.state, mx.random.state]
        self._step = self._as_in_train()
        if compiled:
            self._step = partial(mx.compile, inputs=self._state, outputs=self._state)(self._step)

    def _as_in_train(self) -> Any:
        loss_and_grad = value_and_grad(self.model, default_loss)

        def step(batch: Batch, prev_grad: Any, do_update: bool) -> tuple[mx.array, mx.array, Any]:
            (loss, num_tokens), grad = loss_and_grad(self.model, *batch)
            if prev_grad is not None:
                grad = tree_map(lambda x, y: x + y, grad, prev_grad)
            if do_update:
                grad = average_gradients(grad)
                self._optimizer.update(self.model, grad)
                grad = None
            return loss, num_tokens, grad

        return step

    def step(self, batch: Batch) -> float:
        """One iteration; its loss."""
        loss, num_tokens, grad = self._step(batch, None, True)
        mx.eval(self._state, loss, num_tokens, grad)
        mx.clear_cache()
        return float(loss)

    @staticmethod
    def batches(dataset: Dataset, plans: Sequence[Step]) -> list[Batch]:
        """The batches of some steps, padded by mlx-lm.

        It counts the padding behind each example as one more target; that is left out here.
        """
        found = []
        for plan in plans:
            samples = sorted((dataset[i] for i in plan.ids), key=lambda sample: len(sample.tokens))
            targets = [np.flatnonzero(sample.targets) for sample in samples]
            for sample, places in zip(samples, targets, strict=True):
                # A mask of mlx-lm is one span.
                assert len(places) == places[-1] - places[0] + 1, sample
            rows = [(sample.tokens.tolist(), 0) for sample in samples]
            longest = 1 + max(len(tokens) for tokens, _ in rows) + 32
            tokens, _ = next(iterate_batches(rows, len(rows), longest))
            found.append((tokens, mx.array([[int(p[0]), int(p[-1])] for p in targets])))
        return found


def _theirs(path: str, array: mx.array) -> tuple[str, mx.array]:
    module, _, name = path.rpartition(".")
    return f"{module}.{_NAMES[name]}", mx.contiguous(array.T)


@contextmanager
def checkpointed(model: Module) -> Iterator[None]:
    """mlx-lm's `grad_checkpoint`, which changes a class, for as long as it is wanted."""
    layer = model.layers[0]
    with patch.object(type(layer), "__call__", type(layer).__call__):
        grad_checkpoint(layer)
        yield
