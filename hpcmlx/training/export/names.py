"""Which tensors of Hugging Face's checkpoint a model's parameters are: `sanitize`, backwards.

Of a checkpoint with Hugging Face's names the skeleton says so itself. For one in MLX's format
layouts are proposed and the model's own `sanitize` has to make the model's parameters of one of
them: what it only renames, or stacks, can be undone; what it computes with is refused.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import mlx.core as mx
import numpy as np
from mlx import nn

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
_IN_MLX = "the base is in MLX's format"
# A `sanitize` that calls one of these renames or computes in ways that its results do not show.
_REARRANGES = {
    "concatenate", "flatten", "removeprefix", "replace", "reshape", "sub", "swapaxes", "take",
    "transpose", "mx.split",
}  # fmt: skip


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
    if calls := sorted(_called(skeleton.model) & _REARRANGES):
        why = f"{_IN_MLX}, and how mlx-lm made it of others ({calls[0]}) cannot be seen from here"
        return Names({}, frozenset(), dict.fromkeys(paths, why))
    for tensors in _layouts(skeleton):
        config = {k: v for k, v in skeleton.config.items() if not k.startswith("quantization")}
        try:
            found = build_skeleton(config, tensors, None, "keep")
        except IntegrityError:
            continue
        names = _invert(found, tensors, paths)
        lost = {**names.lost, **_other_names(skeleton, tensors, names)}
        for path in names.tensors.keys() - names.stacked:
            if len(tensors[path].shape) > 2:  # convolutions: axes may come in another order there
                lost[path] = f"{_IN_MLX}, and its layout elsewhere is not known"
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
        name_of = dict(enumerate(names))
        stack = np.array(outputs[path].astype(mx.float32))
        order = tuple(name_of.get(int(i), "") for i in stack.reshape(len(stack), -1)[:, 0])
        pure = all(order) and np.array_equal(stack, [np.array(rows[name]) for name in order])
        yield path, order if pure else ()


def _layouts(skeleton: Skeleton) -> Iterator[dict[str, TensorInfo]]:
    """What Hugging Face's checkpoint may look like: MLX's names, experts one by one."""
    infos = {
        path: _info(array.shape, array.dtype) for path, array in named_parameters(skeleton.model)
    }
    experts = [p for p, module in skeleton.model.named_modules() if isinstance(module, SWITCHES)]
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


def _called(model: nn.Module) -> set[str]:
    """What the `sanitize` of the model, and of models inside it, calls: `mx.split` as that and as
    `split`."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    called: set[str] = set()
    for kind in kinds:
        if "sanitize" in vars(kind):
            tree = ast.parse(dedent(inspect.getsource(kind.sanitize)))
            names = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
            called |= {*names, *(name.rpartition(".")[2] for name in names)}
    return called


def _other_names(
    skeleton: Skeleton, tensors: Mapping[str, TensorInfo], names: Names
) -> dict[str, str]:
    """Path -> why its name need not be Hugging Face's: `sanitize` makes the same parameter of a
    tensor whose name lacks a part. So MLX's names get a prefix, and modules a wrapper."""
    other = {}
    plain = [path for path in names.tensors if path not in names.stacked]
    for place in range(max(path.count(".") for path in plain)):
        moved = {}
        for path in plain:
            parts = path.split(".")
            if place < len(parts) - 1 and not parts[place].isdecimal():
                moved[path] = ".".join(parts[:place] + parts[place + 1 :])
        layout = {moved.get(name, name): info for name, info in tensors.items()}
        try:
            outputs = Skeleton(skeleton.model, skeleton.config, {}, {}, {}, layout).sanitized({})
        except IntegrityError:
            continue
        for path in moved.keys() & outputs.keys():
            other[path] = f"{_IN_MLX}, and it may be {moved[path]} elsewhere as well as what it is"
    return other


def _info(shape: tuple[int, ...], dtype: mx.Dtype) -> TensorInfo:
    return TensorInfo(tuple(shape), dtype, Path(), 0)
