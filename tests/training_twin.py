"""The single-process truth of training: one mlx-lm model, whole batches, nothing clever.

The loss of a step is the sum of -log p over all targets of the global batch, divided by their
number. How the batch is cut into microbatches and replicas cannot change it. Tolerances of what is
compared with it: tests/test_training_oracle.py compares it with torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from hpcmlx.training.optim import Optimizer, OptimSettings

_BLOCK = 256


@dataclass(frozen=True)
class TwinStep:
    """One optimizer update.

    Attributes:
        loss: mean of -log p over the targets, before the update, in nats.
        num_targets: how many there were.
        grad_norm: global norm of the gradients, before they were clipped.
        grads: by path, before they were clipped.
    """

    loss: float
    num_targets: int
    grad_norm: float
    grads: dict[str, mx.array]


class TwinTrainer:
    """Trains an mlx-lm model.

    For LoRA: `model.freeze()`, then mlx_lm's `linear_to_lora_layers`; dropout must be 0.

    Attributes:
        params: what is trained, by path: all of the model that is not frozen. May be replaced.
        steps: what happened so far; their number is the number of the next one.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimSettings,
        total_steps: int,
        max_norm: float = 0.0,
        trainable: Callable[[str], bool] = lambda path: True,
    ):
        """
        Args:
            max_norm: of the gradients; 0 for no clipping.
            trainable: which paths of those that are not frozen to train.
        """
        self.model = model.train()
        free = tree_flatten(model.trainable_parameters())
        self.params = {path: value for path, value in free if trainable(path)}
        self.optimizer = Optimizer(settings, total_steps)
        self.max_norm = max_norm
        self.steps: list[TwinStep] = []

    def loss(self, params: dict[str, mx.array], tokens: mx.array, targets: mx.array) -> mx.array:
        """Mean -log p of the targets, each given all tokens before it in its row.

        Args:
            tokens: [batch, seq] ids; what follows a row's last target does not matter.
            targets: [batch, seq] bool, which of `tokens` are targets. Column 0 has none.
        """
        assert not targets[:, 0].any().item(), "nothing comes before a row's first token"
        self.model.update(tree_unflatten(list(params.items())))
        logits = self.model(tokens[:, :-1]).astype(mx.float32)
        chosen = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        nll = logsumexp(logits) - chosen
        return mx.where(targets[:, 1:], nll, 0.0).sum() / targets.sum()

    def evaluate(self, tokens: mx.array, targets: mx.array) -> float:
        """The loss as it is now."""
        return self.loss(self.params, tokens, targets).item()

    def gradients(
        self, tokens: mx.array, targets: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The loss and its gradient by path."""
        value, grads = mx.value_and_grad(self.loss)(self.params, tokens, targets)
        self.model.update(tree_unflatten(list(self.params.items())))  # `loss` left tracers there
        mx.eval(value, grads)
        return value, grads

    def step(self, tokens: mx.array, targets: mx.array) -> TwinStep:
        """One update on a global batch; arguments as `loss`."""
        value, grads = self.gradients(tokens, targets)
        norm = global_norm(grads)
        scale = min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0
        scaled = {path: grad * scale for path, grad in grads.items()}
        self.params = self.optimizer.update(self.params, scaled, len(self.steps))
        mx.eval(self.params, self.optimizer.state)
        self.model.update(tree_unflatten(list(self.params.items())))
        self.steps.append(TwinStep(value.item(), targets.sum().item(), norm, grads))
        return self.steps[-1]


def logsumexp(logits: mx.array) -> mx.array:
    """Over the last axis, of float32, exact to its last digits: MLX's own adds a large vocabulary
    up in a few running sums."""
    top = mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    terms = mx.exp(logits - top)
    terms = mx.pad(terms, [(0, 0)] * (terms.ndim - 1) + [(0, -terms.shape[-1] % _BLOCK)])
    blocks = terms.reshape(*terms.shape[:-1], -1, _BLOCK).sum(axis=-1)
    return mx.log(blocks.sum(axis=-1)) + top[..., 0]


def global_norm(grads: dict[str, mx.array]) -> float:
    """In float64."""
    arrays = [np.array(grad.astype(mx.float32)).astype(np.float64) for grad in grads.values()]
    return float(np.sqrt(sum(np.square(array).sum() for array in arrays)))


def relative_error(ours: mx.array, truth: mx.array) -> float:
    """The largest difference between two tensors in units of the truth's largest number."""
    a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (ours, truth))
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
