"""What is trained: fresh LoRA or DoRA factors on chosen modules, or the model's own parameters.

Factors are attached to the skeleton like those of a stored adapter (`models/adapters.py`), so that
the plan cuts them with the weight beside them. Their first values are functions of the seed and
the module's path alone: every layout begins with the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from hpcmlx.errors import ConfigError
from hpcmlx.models.adapters import (
    LINEARS,
    SWITCHES,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
    whole_weight,
)
from hpcmlx.models.loader import Attach, take
from hpcmlx.models.skeleton import Skeleton
from hpcmlx.parallel import layers
from hpcmlx.parallel.dataflow import find_layers, layer_paths
from hpcmlx.parallel.partition import Cut
from hpcmlx.parallel.tensor import EMBEDDINGS, input_dims

#: Ends of the paths of the parameters that a method adds.
FACTORS = (".lora_down", ".lora_up", ".dora_magnitude")


@dataclass(frozen=True)
class Method:
    """How a model is trained.

    Attributes:
        kind: "lora", "dora" or "full".
        rank: of the factors.
        scale: what their product is multiplied by.
        num_layers: train the last so many layers; None is all of them. What lies outside the layers
            is only trained where a pattern names it, or where `full` trains all layers.
        modules: patterns of module paths, whole or from the layer on: `self_attn.*`, `*.q_proj`,
            `lm_head`. For "full" of parameters' paths as well.
        seed: of the factors' first values.
    """

    kind: str = "lora"
    rank: int = 8
    scale: float = 20.0
    num_layers: int | None = None
    modules: tuple[str, ...] = ("*",)
    seed: int = 0

    def attach(self) -> Attach | None:
        """What `load_model` is handed as its adapter; None for "full"."""
        return None if self.kind == "full" else self._attach

    def _attach(self, skeleton: Skeleton) -> FreshAdapter:
        return FreshAdapter(self, skeleton)

    def trained(self, model: nn.Module, paths: Iterable[str]) -> list[str]:
        """Which of the parameters `paths` of `model` are trained, in their order.

        Raises:
            ConfigError: none of the whole model is, or one is packed, so that it has no gradient.
        """
        paths = list(paths)
        if self.kind != "full":
            return [path for path in paths if path.endswith(FACTORS)]
        modules, inside = dict(model.named_modules()), _Layers(model)
        everything = self.num_layers is None and self.modules == ("*",)
        found = []
        for path in paths:
            module = path.rpartition(".")[0]
            if not (everything or self._chosen(module, inside) or self._chosen(path, inside)):
                continue
            if "scales" in modules[module] and not path.endswith((".bias", *FACTORS)):
                raise ConfigError(
                    f"{path} is quantized and cannot be trained as it is: set "
                    "model.weights=dequantize, or method.kind=lora"
                )
            found.append(path)
        return found

    def _chosen(self, path: str, inside: _Layers) -> bool:
        """Whether the module (or parameter) at `path` is meant."""
        index, rest = inside.place(path)
        if index is None:
            return any(fnmatchcase(path, p) for p in self.modules if p != "*")
        if self.num_layers is not None and index < inside.count - self.num_layers:
            return False
        return any(fnmatchcase(rest, p) or fnmatchcase(path, p) for p in self.modules)


class _Layers:
    """Where a path lies in a model: in which layer, and where in it."""

    def __init__(self, model: nn.Module):
        self._paths = layer_paths(model, find_layers(model))
        self.count = len(self._paths)
        self._index = {path: index for index, path in enumerate(self._paths)}

    def place(self, path: str) -> tuple[int | None, str]:
        """(layer, path inside it); (None, path) outside the layers."""
        parts = path.split(".")
        for end in range(1, len(parts)):
            if (index := self._index.get(".".join(parts[:end]))) is not None:
                return index, ".".join(parts[end:])
        return None, path


class DoRATraining(LoRALinear):
    """DoRA whose magnitude and factors are being trained (arXiv:2402.09353): rows of the adapted
    weight are divided by their norms, which count as constants in the backward pass (section 4.3).

    The norms come from `||W||^2 + 2 s (up . W down^T) + s^2 (up . up (down down^T))`, so the
    adapted weight is never built.
    """

    dora_magnitude: mx.array
    _row_squares: mx.array  # of the frozen weight; not a parameter

    def __call__(self, x: mx.array) -> mx.array:
        with _without_bias(self) as bias:
            y = super().__call__(x)
            norms = mx.stop_gradient(mx.sqrt(self.squares(y)))
        y = (self.dora_magnitude.astype(mx.float32) / norms).astype(y.dtype) * y
        return y if bias is None else y + bias

    def squares(self, after: mx.array | None = None) -> mx.array:
        """[out] float32: squared norms of the adapted weight's rows, whole on every rank.

        Args:
            after: what is to be there before. Of sums over ranks that do not wait for each other,
                ranks with other shares may do another one first.
        """
        down, up = (mx.stop_gradient(a) for a in (self.lora_down, self.lora_up))
        if after is not None:
            down = mx.depends(down, mx.stop_gradient(after))
        scale = self.lora_scale
        with _without_bias(self):
            adapted = super().__call__(down)  # [rank, out]: down W^T + s (down down^T) up^T
        down, up, adapted = (a.astype(mx.float32) for a in (down, up, adapted))
        half = scale * up @ (down @ down.T)
        cross = 2 * scale * (adapted.T - half)
        squares = self._row_squares + mx.sum(up * (cross + scale * half), axis=-1)
        if isinstance(self, layers.Rowwise):  # the inputs are cut: these are partial sums
            squares = self.tp_group.all_sum(squares)
        return squares


@contextmanager
def _without_bias(module: nn.Module) -> Iterator[mx.array | None]:
    bias = module.pop("bias", None)
    try:
        yield bias
    finally:
        if bias is not None:
            module["bias"] = bias


class FreshAdapter:
    """New factors on the modules that a method names. Made by `Method.attach`.

    Attributes:
        sources: paths of the parameters it provides.
    """

    bytes_read = 0

    def __init__(self, method: Method, skeleton: Skeleton):
        self.method, self.model = method, skeleton.model
        self._modules = dict(self.model.named_modules())
        self._whole: dict[str, tuple[int, ...]] = {}
        inside = _Layers(self.model)
        adapted = [p for p, m in self._modules.items() if self._is_meant(p, m, inside)]
        if not adapted:
            kinds = LINEARS + SWITCHES
            have = {inside.place(p)[1] for p, m in self._modules.items() if isinstance(m, kinds)}
            raise ConfigError(
                f"method.modules={list(method.modules)} names no projection of "
                f"{skeleton.model_type}; it has {', '.join(sorted(have))}"
            )
        for path in adapted:
            self._adapt(path)
        self.sources = frozenset(self._whole)

    def _is_meant(self, path: str, module: nn.Module, inside: _Layers) -> bool:
        if not self.method._chosen(path, inside):
            return False
        if isinstance(module, LINEARS):
            return True
        if isinstance(module, SWITCHES + EMBEDDINGS):
            if self.method.kind == "lora":
                return True
            raise ConfigError(
                f"method.kind=dora: no way is known to put DoRA on {path}; leave it out of "
                "method.modules, as in method.modules=[self_attn.*], or use lora"
            )
        return False

    def _adapt(self, path: str) -> None:
        module: Any = self._modules[path]
        dtype = next(
            a.dtype
            for _, a in tree_flatten(module.parameters())
            if mx.issubdtype(a.dtype, mx.floating)
        )
        experts, out = module.weight.shape[:-2], module.weight.shape[-2]
        rank = self.method.rank
        self._add(path, "lora_down", (*experts, rank, input_dims(module)), dtype)
        self._add(path, "lora_up", (*experts, out, rank), dtype)
        module.lora_scale = self.method.scale
        if self.method.kind == "dora":
            self._add(path, "dora_magnitude", (out,), dtype)
            module._row_squares = mx.ones((out,))  # until `settle` has the weight
            behaviour: type[nn.Module] = DoRATraining
        elif isinstance(module, EMBEDDINGS):
            behaviour = LoRAEmbedding
        else:
            behaviour = LoRALinear if isinstance(module, LINEARS) else LoRASwitchLinear
        layers.mix_in(module, behaviour)

    def _add(self, path: str, name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self._modules[path][name] = mx.zeros(shape, dtype)
        self._whole[f"{path}.{name}"] = shape

    def arrays(
        self, paths: Iterable[str], cuts: Mapping[str, Cut]
    ) -> Iterator[tuple[str, mx.array]]:
        """(path, first values) of the factors among `paths`: as mlx-lm's, one of each pair uniform
        within 1/sqrt(inputs), the other zero. Magnitudes follow in `settle`."""
        dtypes = {path: a.dtype for path, a in tree_flatten(self.model.parameters())}
        for path in paths:
            if path not in self._whole:
                continue
            whole = mx.contiguous(_first_values(self.method.seed, path, self._whole[path]))
            cut = cuts.get(path)
            array = (whole if cut is None else take(whole, cut)).astype(dtypes[path])
            mx.eval(array)
            yield path, array

    def settle(self, paths: Iterable[str]) -> None:
        """Magnitudes begin as the norms of the frozen weight's rows, so that nothing changes."""
        held = set(paths)
        for path, module in self._modules.items():
            if f"{path}.dora_magnitude" not in held:
                continue
            module._row_squares = mx.sum(mx.square(whole_weight(module)), axis=-1)
            mx.eval(module._row_squares)
            squares = module.squares()
            mx.eval(squares)
            module.dora_magnitude = mx.sqrt(squares).astype(module.lora_up.dtype)
            mx.eval(module.dora_magnitude)

    def describe(self, paths: Iterable[str]) -> str:
        """One phrase: what of it is on this rank."""
        number = sum(path.endswith(".lora_up") for path in self.sources & set(paths))
        kind = {"lora": "LoRA", "dora": "DoRA"}[self.method.kind]
        return f"new {kind} of rank {self.method.rank} on {number} modules"

    def close(self) -> None:
        """There are no files."""


def _first_values(seed: int, path: str, shape: tuple[int, ...]) -> mx.array:
    if not path.endswith(".lora_down"):
        return mx.zeros(shape)
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    key = mx.random.key(int.from_bytes(digest[:8], "little"))
    bound = 1 / sqrt(shape[-1])
    return mx.random.uniform(-bound, bound, shape, key=key)
