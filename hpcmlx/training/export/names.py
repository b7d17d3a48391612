"""Which tensors of Hugging Face's checkpoint a model's parameters are: `sanitize`, backwards.

Of a checkpoint with Hugging Face's names the skeleton says so itself. For one in MLX's format
layouts are proposed and the model's own `sanitize` has to make the model's parameters of one of
them: what it only renames, or stacks, can be undone; what it computes with is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.models.adapters import SWITCHES
from hpcmlx.models.checkpoint import Checkpoint, GGUFCheckpoint, TensorInfo
from hpcmlx.models.skeleton import Skeleton, build_skeleton
from hpcmlx.parallel.dataflow import named_parameters

# How checkpoints that hold their experts one by one call their projections.
_EXPERT_NAMES: tuple[Mapping[str, str], ...] = (
    {},
    {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
)
# Where other checkpoints of the same model may have what MLX has under the first.
_OTHER_PREFIXES = (
    ("model.", ""),
    ("model.", "transformer."),
    ("language_model.", ""),
    ("language_model.model.", "model.language_model."),
)


@dataclass(frozen=True)
class Names:
    """Where a model's parameters are in Hugging Face's checkpoint.

    Attributes:
        tensors: parameter path -> the tensor that it is, or those that it is a stack of.
        stacked: paths of the latter.
        lost: path -> why it is neither.
    """

    tensors: Mapping[str, tuple[str, ...]]
    stacked: frozenset[str]
    lost: Mapping[str, str]

    def of(self, path: str) -> tuple[str, ...]:
        """The tensors of one parameter.

        Raises:
            ConfigError: it has none.
        """
        if path in self.lost:
            raise ConfigError(
                f"{path} has no name in Hugging Face's checkpoint: {self.lost[path]}; export to "
                "mlx or mlx-adapter, or give the original model as the base"
            )
        return self.tensors[path]


def has_hub_names(checkpoint: Checkpoint | GGUFCheckpoint) -> bool:
    """Whether a checkpoint's tensors have the names and layouts of Hugging Face's."""
    return checkpoint.format != "mlx" and "quantization" not in checkpoint.config


def find_names(
    skeleton: Skeleton, checkpoint: Checkpoint | GGUFCheckpoint, paths: Iterable[str]
) -> Names:
    """The names of the parameters `paths`.

    Args:
        skeleton: of the checkpoint, with unpacked weights.
    """
    if has_hub_names(checkpoint):
        return _invert(skeleton, checkpoint.tensors, paths)
    if other := _other_layout(skeleton):
        return Names({}, frozenset(), dict.fromkeys(paths, other))
    for tensors in _layouts(skeleton):
        config = {k: v for k, v in skeleton.config.items() if not k.startswith("quantization")}
        try:
            found = build_skeleton(config, tensors, None, "keep")
        except IntegrityError:
            continue
        names = _invert(found, tensors, paths)
        lost = dict(names.lost)
        for path in names.tensors.keys() - names.stacked:
            if len(tensors[path].shape) > 2:  # convolutions: axes may come in another order there
                lost[path] = "the base is in MLX's format, and its layout elsewhere is not known"
        return Names(names.tensors, names.stacked, lost)
    why = f"{skeleton.model_type} arranges its experts in a way that is not known"
    return Names({}, frozenset(), dict.fromkeys(paths, why))


def _invert(skeleton: Skeleton, tensors: Mapping[str, TensorInfo], paths: Iterable[str]) -> Names:
    found: dict[str, tuple[str, ...]] = {}
    lost: dict[str, str] = {}
    stacks: dict[str, tuple[str, ...]] = {}
    users: dict[str, set[str]] = {}
    wholes = dict(named_parameters(skeleton.model))
    for path, origin in skeleton.origins.items():
        for name in origin.tensors:
            users.setdefault(name, set()).add(path)
    for path in paths:
        origin = skeleton.origins[path]
        others = set().union(*(users[name] for name in origin.tensors)) - {path}
        shapes = {tensors[name].shape for name in origin.tensors}
        if others:
            lost[path] = f"{origin.tensors[0]} is {min(others)} as well"
        elif path.removesuffix(".weight") in skeleton.packed:
            lost[path] = "it is quantized there"
        elif origin.stored:
            found[path] = origin.tensors
        elif len(shapes) == 1 and wholes[path].shape == (len(origin.tensors), *shapes.pop()):
            stacks[path] = origin.tensors
        else:
            lost[path] = f"it is computed from {', '.join(origin.tensors[:3]) or 'nothing'}"
    for path, names in _orders(skeleton, stacks):
        if names:
            found[path] = names
        else:
            lost[path] = f"it is computed from {', '.join(stacks[path][:3])}"
    return Names(found, frozenset(stacks) & found.keys(), lost)


def _orders(
    skeleton: Skeleton, stacks: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(path, the tensors it is a stack of, in order); none if it is anything else.

    Seen on matrices of one row, told apart by their values.
    """
    if not stacks:
        return
    rows = {
        name: mx.array([[i, i + len(names)]])
        for names in stacks.values()
        for i, name in enumerate(names)
    }
    try:
        outputs = skeleton.sanitized(rows)
    except IntegrityError:
        yield from ((path, ()) for path in stacks)
        return
    for path, names in stacks.items():
        stack = outputs[path]
        order: tuple[str, ...] = ()
        if stack.shape == (len(names), 1, 2):
            order = tuple(names[int(i)] for i in np.array(stack[:, 0, 0]))
            if not mx.array_equal(stack, mx.stack([rows[name] for name in order])):
                order = ()
        yield path, order


def _layouts(skeleton: Skeleton) -> Iterator[dict[str, TensorInfo]]:
    """What Hugging Face's checkpoint may look like: MLX's names, experts one by one."""
    infos = {
        path: _info(array.shape, array.dtype) for path, array in named_parameters(skeleton.model)
    }
    experts = [
        path
        for path, module in skeleton.model.named_modules()
        if isinstance(module, SWITCHES) and path.count(".") > 1
    ]
    if not experts:
        yield infos
        return
    for convention in _EXPERT_NAMES:
        layout = dict(infos)
        for path in experts:
            block, _, projection = path.rpartition(".")
            block = block.rpartition(".")[0]
            name = convention.get(projection, projection)
            for part in ("weight", "bias"):
                if (stack := layout.pop(f"{path}.{part}", None)) is not None:
                    one = _info(stack.shape[1:], stack.dtype)
                    for expert in range(stack.shape[0]):
                        layout[f"{block}.experts.{expert}.{name}.{part}"] = one
        yield layout


def _other_layout(skeleton: Skeleton) -> str:
    """Why the names of MLX's format need not be those of Hugging Face's: `sanitize` makes the
    same parameters of tensors with other names. Empty if none are known."""
    parameters = dict(named_parameters(skeleton.model))
    for prefix, other in _OTHER_PREFIXES:
        moved = {p: other + p.removeprefix(prefix) for p in parameters if p.startswith(prefix)}
        layout = {moved.get(p, p): _info(a.shape, a.dtype) for p, a in parameters.items()}
        try:
            outputs = Skeleton(skeleton.model, skeleton.config, {}, {}, {}, layout).sanitized({})
        except IntegrityError:
            continue
        if both := sorted(moved.keys() & outputs.keys()):
            return (
                f"the base is in MLX's format, and {both[0]} may be {moved[both[0]]} elsewhere as "
                "well as what it is here"
            )
    return ""


def _info(shape: tuple[int, ...], dtype: mx.Dtype) -> TensorInfo:
    return TensorInfo(tuple(shape), dtype, Path(), 0)
