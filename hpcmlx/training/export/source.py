"""What a training run has made of a model: factors beside its weights, or weights of their own.

A checkpoint's tensors are matched with the base model before anything is written; the exports see
only what is here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import mlx.core as mx
from mlx import nn

from hpcmlx.comm import Communicator
from hpcmlx.config import resolved
from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.inference.manifest import fingerprint
from hpcmlx.models.adapters import LINEARS, SWITCHES
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.parallel.dataflow import named_parameters
from hpcmlx.parallel.tensor import EMBEDDINGS, input_dims
from hpcmlx.rundir import lock_run_dir
from hpcmlx.training.checkpoints.found import Found
from hpcmlx.training.checkpoints.store import CheckpointStore

#: What the names of trained parameters begin with in a training checkpoint.
PREFIX = "param/"
_ROLES = ("lora_down", "lora_up", "dora_magnitude")


class Trained(Protocol):
    """A training checkpoint, as far as an export needs it: what `CheckpointStore.find` gives."""

    @property
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and dtype by name."""

    @property
    def state(self) -> Mapping[str, Any]:
        """`state["method"]` says how was trained: kind, rank, scale."""

    def read(self, name: str) -> mx.array:
        """The whole tensor."""


@contextmanager
def open_run(run_dir: str | Path, step: str | int | None = None) -> Iterator[Found]:
    """A checkpoint of a training run that is not under way; its directory is locked meanwhile.

    Args:
        step: a step, "best" for the one with the lowest metric; None or "latest" for the newest.

    Raises:
        ConfigError: there is no such checkpoint.
        IntegrityError: it is damaged, or is not all on this host.
        OutputError: the run is under way.
    """
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(
            f"{run_dir} is no run directory of a training job: no {folder.name} in it"
        )
    wanted: int | Literal["best"] | None = None
    if step == "best":
        wanted = "best"
    elif step not in (None, "latest"):
        if not str(step).isdecimal():
            raise ConfigError(f"step={step} is not a number, best or latest")
        wanted = int(str(step))
    lock = lock_run_dir(run_dir)  # the run would go on to delete what is being read
    try:
        found = CheckpointStore(folder, Communicator()).find(wanted)
        if found is None:
            what = "no checkpoint" if wanted is None else f"no checkpoint {wanted}"
            raise ConfigError(f"{folder} has {what}")
        with found:
            yield found
    finally:
        os.close(lock)


def base_of(found: Found) -> str:
    """Path of the model that a run has trained.

    Raises:
        ConfigError: it is not there, or not what it was when the run began.
    """
    model = found.state["model"]
    path = resolved(model["path"])
    checkpoint = open_checkpoint(path)
    now = fingerprint(checkpoint)
    checkpoint.close()
    for name, digest in model["files"].items():
        decides = name == "config.json" or name.endswith((".safetensors", ".gguf"))
        if decides and now.get(name) != digest:
            raise ConfigError(
                f"{model['path']}: {name} is not what it was when the run began; restore it, or "
                "give --base"
            )
    return path


@dataclass(frozen=True)
class Exported:
    """What has been written.

    Attributes:
        path: the directory.
        num_tensors, num_bytes: of its weights.
        notes: what whoever uses it should know; a sentence each.
    """

    path: Path
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()


class Update:
    """The difference between a model and its base.

    Attributes:
        kind: "lora", "dora" or "full".
        rank, scale: of the factors; 0 and 1 for "full".
        dropout: that the factors were trained with.
        adapted: paths of the modules that have factors, in the model's order.
        whole: paths of the parameters that were trained themselves, in the model's order.
    """

    def __init__(self, trained: Trained, model: nn.Module, base: str | Path):
        """Match a checkpoint with `model`, a skeleton of the base with unpacked weights.

        Raises:
            IntegrityError: they do not belong together.
        """
        self._trained, self._base = trained, base
        self._tensors = trained.tensors
        method = trained.state.get("method", {})
        self.kind = method.get("kind")
        if self.kind not in ("lora", "dora", "full"):
            raise self._alien(f"its method is {self.kind!r}, not one of lora, dora, full")
        if self.kind != "full" and not {"rank", "scale"} <= method.keys():
            raise self._alien(f"it does not say with what rank and scale {self.kind!r} was trained")
        self.rank, self.scale = method.get("rank", 0), float(method.get("scale", 1))
        self.dropout = float(method.get("dropout", 0))
        self.modules = dict(model.named_modules())
        names = {n.removeprefix(PREFIX) for n in self._tensors if n.startswith(PREFIX)}
        factors = {name for name in names if name.rpartition(".")[2] in _ROLES}
        if not names or (self.kind == "full") != (not factors):
            raise self._alien(f"it has {len(factors)} factors of {len(names)} parameters")
        modules = {name.rpartition(".")[0] for name in factors}
        self.adapted = [path for path in self.modules if path in modules]
        if strangers := modules - set(self.adapted):
            raise self._alien(f"the model has no module {min(strangers)}")
        for path in self.adapted:
            self._check_factors(path)
        parameters = {path: array.shape for path, array in named_parameters(model)}
        self.whole = [path for path in parameters if path in names]
        if strangers := names - factors - set(self.whole):
            raise self._alien(f"the model has no parameter {min(strangers)}")
        for path in self.whole:
            self._check_shape(path, parameters[path])
        self._changed = {*self.whole, *(f"{path}.weight" for path in self.adapted)}

    def changes(self, path: str) -> bool:
        """Whether the parameter at `path` is not what it is in the base."""
        return path in self._changed

    def merged(self, path: str, weight: Callable[[], mx.array]) -> mx.array:
        """The parameter at `path` as it has become, floating-point ones in float32; unevaluated.

        Args:
            weight: gives the base's, unpacked and in float32; not called where it is not needed.
        """
        if path in self.whole:
            return self.read(path).astype(mx.float32)
        if not self.changes(path):
            return weight()
        module = path.removesuffix(".weight")
        up, down = (self.read(f"{module}.{r}").astype(mx.float32) for r in ("lora_up", "lora_down"))
        adapted = weight() + self.scale * (up @ down)
        if self.kind == "dora":
            norms = mx.sqrt(mx.sum(mx.square(adapted), axis=-1, keepdims=True))
            magnitude = self.read(f"{module}.dora_magnitude").astype(mx.float32)
            adapted = magnitude[..., None] / norms * adapted
        return adapted

    def read(self, path: str) -> mx.array:
        """A trained parameter as it is stored. Of a module: `lora_down` [rank, in], `lora_up`
        [out, rank], `dora_magnitude` [out]; those of experts have one axis more before these."""
        return self._trained.read(PREFIX + path)

    def stored(self, path: str) -> tuple[tuple[int, ...], mx.Dtype]:
        """Shape and dtype of a parameter in the checkpoint."""
        shape, dtype = self._tensors[PREFIX + path]
        return tuple(shape), dtype

    def _check_factors(self, path: str) -> None:
        module = self.modules[path]
        if not isinstance(module, LINEARS + SWITCHES + EMBEDDINGS):
            raise self._alien(f"{path} is a {type(module).__name__}, which has no factors")
        *experts, out, _ = module.weight.shape
        shapes = {
            "lora_down": (*experts, self.rank, input_dims(module)),
            "lora_up": (*experts, out, self.rank),
            "dora_magnitude": (*experts, out),
        }
        if self.kind == "lora":
            del shapes["dora_magnitude"]
        for role in _ROLES:
            if (f"{PREFIX}{path}.{role}" in self._tensors) != (role in shapes):
                raise self._alien(f"{path} has not just the parameters of {self.kind!r}")
        for role, shape in shapes.items():
            self._check_shape(f"{path}.{role}", shape)

    def _check_shape(self, path: str, shape: tuple[int, ...]) -> None:
        if (found := self.stored(path)[0]) != shape:
            raise self._alien(f"{path} has shape {found}, the model wants {shape}")

    def _alien(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"the training checkpoint and the model {self._base} do not belong together: {why}"
        )
