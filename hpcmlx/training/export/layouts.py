"""Which tensors a merged model's files hold, and how each is made: MLX's format, packed or not, and
the checkpoint of Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm import utils as mlx_lm_utils

from hpcmlx.errors import ConfigError
from hpcmlx.parallel.dataflow import named_parameters
from hpcmlx.training.export.files import Group, Part
from hpcmlx.training.export.merge import Merger, PackingLoss
from hpcmlx.training.export.names import Names, find_names, has_hub_names

_PACKED = ("weight", "scales", "biases")


def mlx_groups(merger: Merger) -> list[Group]:
    """Every parameter by its path, unpacked."""
    parts = _parts(merger)
    return [Group((part,), partial(_plain, merger, part)) for part in parts.values()]


def packed_groups(
    merger: Merger, packing: Mapping[str, int], loss: PackingLoss
) -> tuple[list[Group], dict[str, Any]]:
    """Every parameter by its path, packed where mlx-lm's own rules for the model pack.

    What the base has packed so, and is not trained, stays as it is, to the bit.

    Args:
        packing: {"bits": ..., "group_size": ...}.
        loss: counts what is packed anew.

    Returns:
        (groups, the config that fits them).

    Raises:
        ConfigError: there is no such packing.
    """
    bits, group_size = packing.get("bits", 4), packing.get("group_size", 64)
    if bits not in (2, 3, 4, 5, 6, 8) or group_size not in (32, 64, 128):
        raise ConfigError(
            f"no packing into {bits} bits in groups of {group_size}: MLX has 2, 3, 4, 5, 6 or 8 "
            "bits in groups of 32, 64 or 128"
        )
    # On stand-ins: nothing is evaluated.
    model, config = mlx_lm_utils.quantize_model(merger.model, merger.config, group_size, bits)
    modules = dict(model.named_modules())
    stored = dict(merger.kept.model.named_modules())
    parts = _parts(merger)
    groups = []
    for path, part in parts.items():
        owner, _, name = path.rpartition(".")
        module = modules[owner]
        if "scales" not in module or name not in _PACKED:
            groups.append(Group((part,), partial(_plain, merger, part)))
        elif name == "weight":
            own = tuple(parts[f"{owner}.{n}"] for n in _PACKED if n in module)
            if not merger.update.changes(path) and _packed_alike(stored[owner], module):
                groups.append(Group(own, partial(_as_stored, merger, own)))
            else:
                groups.append(Group(own, partial(_packed, merger, owner, module, loss)))
    return groups, config


def hub_groups(merger: Merger) -> list[Group]:
    """All tensors of a checkpoint of Hugging Face: the base's own but for those that were trained;
    or, where the base is in MLX's format, all of them from the model's parameters.

    Raises:
        ConfigError: the base is quantized by others than MLX, or a name is not known.
    """
    if not has_hub_names(merger.checkpoint):
        paths = [path for path, _ in named_parameters(merger.model)]
        names = find_names(merger.skeleton, merger.checkpoint, paths)
        return [_renamed(merger, names, path) for path in paths]
    if settings := merger.checkpoint.config.get("quantization_config"):
        raise ConfigError(
            f"the base is quantized ({settings.get('quant_method')}), and Hugging Face's format "
            "wants whole weights here; export to mlx, or give the original model as the base"
        )
    changed = [path for path in merger.dtypes if merger.update.changes(path)]
    names = find_names(merger.skeleton, merger.checkpoint, changed)
    path_of = {name: path for path in changed for name in names.of(path)}
    twins = _twins(merger, names, changed)
    origins = merger.skeleton.origins
    user = {name: path for path, origin in origins.items() for name in origin.tensors}
    groups = []
    for name, info in merger.checkpoint.tensors.items():
        if name in twins:
            groups.append(_renamed(merger, twins[name], *twins[name].tensors))
        elif (path := path_of.get(name)) is None:
            dtype = info.dtype
            if merger.dtype is not None and mx.issubdtype(dtype, mx.floating):
                dtype = merger.dtypes[user[name]] if name in user else merger.dtype
            part = Part(name, info.shape, dtype)
            groups.append(Group((part,), partial(_copied, merger, part)))
        elif name == names.of(path)[0]:
            groups.append(_renamed(merger, names, path))
    return groups


def _parts(merger: Merger) -> dict[str, Part]:
    parameters = named_parameters(merger.model)
    return {path: Part(path, array.shape, array.dtype) for path, array in parameters}


def _plain(merger: Merger, part: Part) -> dict[str, mx.array]:
    return {part.name: merger.read(part.name).astype(part.dtype)}


def _packed(merger: Merger, owner: str, module: Any, loss: PackingLoss) -> dict[str, mx.array]:
    path = f"{owner}.weight"
    how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    weight = merger.read(path)
    arrays = mx.quantize(weight.astype(merger.dtypes[path]), **how)
    packed = dict(zip(_PACKED, arrays, strict=True))
    loss.add(path, weight, packed, **how)
    return {f"{owner}.{name}": array for name, array in packed.items()}


def _packed_alike(stored: Any, wanted: Any) -> bool:
    if "scales" not in stored or stored.scales.dtype != wanted.scales.dtype:
        return False
    return all(getattr(stored, k) == getattr(wanted, k) for k in ("group_size", "bits", "mode"))


def _as_stored(merger: Merger, parts: Sequence[Part]) -> dict[str, mx.array]:
    return {part.name: merger.read_as_stored(part.name) for part in parts}


def _copied(merger: Merger, part: Part) -> dict[str, mx.array]:
    return {part.name: merger.checkpoint.read(part.name).astype(part.dtype)}


def _renamed(merger: Merger, names: Names, path: str) -> Group:
    """One parameter under its names, the experts of a stack one by one."""
    tensors, dtype, stacked = names.of(path), merger.dtypes[path], path in names.stacked
    shape = merger.shapes[path][1:] if stacked else merger.shapes[path]

    def make() -> dict[str, mx.array]:
        whole = merger.read(path).astype(dtype)
        mx.eval(whole)
        return dict(zip(tensors, whole if stacked else [whole], strict=True))

    return Group(tuple(Part(name, shape, dtype) for name in tensors), make)


def _twins(merger: Merger, names: Names, changed: Sequence[str]) -> dict[str, Names]:
    """Tensors that `sanitize` drops and that are equal to one that was trained: a head that is tied
    to the embedding. They get the same new values, or the file would contradict itself."""
    checkpoint = merger.checkpoint
    used = {name for origin in merger.skeleton.origins.values() for name in origin.tensors}
    twins = {}
    for name in checkpoint.tensors.keys() - used:
        for path in changed:
            if path in names.stacked:
                continue
            [own] = names.of(path)
            if checkpoint.tensors[own].shape == checkpoint.tensors[name].shape and mx.array_equal(
                checkpoint.read(own), checkpoint.read(name)
            ):
                twins[name] = Names({path: (name,)}, frozenset(), {})
    return twins
