"""Trained factors as an adapter of mlx-lm or of PEFT.

The library that owns a format has the last word: mlx-lm builds its modules for the adapter's
configuration, on stand-ins, before anything is written. What a format cannot say is refused, with
the reason; a merged model (`merged.py`) can say everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.tuner.utils import linear_to_lora_layers

from hpcmlx.errors import ConfigError
from hpcmlx.models.adapter_files import CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS
from hpcmlx.models.adapters import LINEARS
from hpcmlx.models.checkpoint import Checkpoint, GGUFCheckpoint, open_checkpoint
from hpcmlx.models.skeleton import Skeleton, build_skeleton
from hpcmlx.parallel.dataflow import find_layers, layer_paths, named_parameters
from hpcmlx.parallel.tensor import EMBEDDINGS
from hpcmlx.training.export.files import (
    Group,
    Part,
    new_directory,
    write_json,
    write_safetensors,
)
from hpcmlx.training.export.names import find_names, has_hub_names
from hpcmlx.training.export.source import Exported, Trained, Update


def export_mlx_adapter(trained: Trained, base: str | Path, out: str | Path) -> Exported:
    """Write the directory `out` that `mlx_lm.load(base, adapter_path=out)` takes.

    Args:
        base: what `open_checkpoint` takes: the model that was trained, packed or not as it is used.

    Raises:
        OutputError: `out` is there already and not empty, or cannot be created.
        ConfigError: mlx-lm has no such adapter.
        IntegrityError: checkpoint and base do not belong together.
        StorageError: writing failed half-way; nothing is left.
    """
    checkpoint = open_checkpoint(base)
    update = Update(trained, _skeleton(checkpoint, "dequantize").model, base)
    model = _skeleton(checkpoint, "keep").model
    packed = {path for path, module in model.named_modules() if "scales" in module}
    num_layers = len(find_layers(model))
    settings: dict[str, Any] = {}
    if update.kind == "full":
        for path in update.whole:
            if path.removesuffix(".weight") in packed:
                raise _refused(path, "mlx-lm cannot put a whole weight in place of a packed one")
        groups = [_group(update, path, path) for path in update.whole]
    else:
        if update.whole:
            raise _refused(update.whole[0], "mlx-lm's adapters hold nothing beside factors")
        num_layers, keys = _layers_and_keys(model, update.adapted)
        settings = {"rank": update.rank, "scale": update.scale, "dropout": update.dropout}
        settings["keys"] = keys
        groups = [group for path in update.adapted for group in _mlx_factors(update, path)]
        for path in update.adapted:
            # It would take the norms of the packed integers, and say nothing.
            if (
                update.kind == "dora"
                and path in packed
                and isinstance(update.modules[path], EMBEDDINGS)
            ):
                raise _refused(path, "mlx-lm has no DoRA for a packed embedding")
        _check_with_mlx_lm(update, model, num_layers, settings, groups)
    config = {"fine_tune_type": update.kind, "num_layers": num_layers, "model": str(base)}
    config["lora_parameters"] = settings
    return _write(Path(out), MLX_WEIGHTS, groups, "mlx", config)


def export_peft(trained: Trained, base: str | Path, out: str | Path) -> Exported:
    """Write the directory `out` that PEFT's `PeftModel.from_pretrained` takes.

    Args:
        base: what `open_checkpoint` takes: the model that was trained, or the original that it was
            made of, where that one's names are not known.

    Raises:
        OutputError, IntegrityError, StorageError: as `export_mlx_adapter`.
        ConfigError: PEFT has no such adapter, or a module has no name in Hugging Face's model.
    """
    checkpoint = open_checkpoint(base)
    skeleton = _skeleton(checkpoint, "dequantize")
    update = Update(trained, skeleton.model, base)
    if update.whole:
        raise _refused(update.whole[0], "PEFT's adapters hold factors; export to hf")
    for path in update.adapted:
        _check_peft(update, path)
    weights = [p for p, _ in named_parameters(skeleton.model) if p.endswith(".weight")]
    names = find_names(skeleton, checkpoint, weights)
    everything = {name for path in weights for name in names.tensors.get(path, (path,))}
    if has_hub_names(checkpoint):
        everything |= checkpoint.tensors.keys()
    groups, adapted = [], []
    for path in update.adapted:
        modules = [_module_of(name) for name in names.of(f"{path}.weight")]
        adapted += modules
        stacked = f"{path}.weight" in names.stacked
        groups += _peft_factors(update, path, modules, stacked)
    alpha = update.scale * update.rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": update.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": update.dropout,
        "target_modules": _targets(adapted, {name.removesuffix(".weight") for name in everything}),
        "use_dora": update.kind == "dora",
        "bias": "none",
        "inference_mode": True,
    }
    notes = []
    if skeleton.packed:
        notes.append(
            "the base that was trained is packed: on the original the outputs differ by what "
            "packing changed"
        )
    return _write(Path(out), PEFT_WEIGHTS, groups, "pt", config, notes)


def _skeleton(checkpoint: Checkpoint | GGUFCheckpoint, weights: Any) -> Skeleton:
    checkpoint.close()  # only headers are needed, and they are in memory
    return build_skeleton(checkpoint.config, checkpoint.tensors, None, weights)


def _write(
    out: Path,
    weights: str,
    groups: Sequence[Group],
    source: str,
    config: dict[str, Any],
    notes: Sequence[str] = (),
) -> Exported:
    with new_directory(out) as folder:
        num_bytes = write_safetensors(folder / weights, groups, source)
        write_json(folder / CONFIG, config)
    return Exported(out, sum(len(group.parts) for group in groups), num_bytes, tuple(notes))


def _same(array: mx.array) -> mx.array:
    return array


def _transpose(array: mx.array) -> mx.array:
    return array.T


def _group(
    update: Update, path: str, name: str, change: Callable[[mx.array], mx.array] = _same
) -> Group:
    """A stored parameter as the tensor `name`, after `change`."""
    shape, dtype = update.stored(path)
    shape = change(mx.zeros(shape)).shape
    return Group((Part(name, shape, dtype),), lambda: {name: change(update.read(path))})


# -- mlx-lm --


def _mlx_factors(update: Update, path: str) -> list[Group]:
    module = update.modules[path]
    if isinstance(module, EMBEDDINGS):
        sources = {"lora_a": "lora_up", "lora_b": "lora_down"}
    else:
        sources = {"lora_a": "lora_down", "lora_b": "lora_up"}
    change = _transpose if isinstance(module, LINEARS) else _same
    groups = [
        _group(update, f"{path}.{own}", f"{path}.{name}", change) for name, own in sources.items()
    ]
    if update.kind == "dora":
        groups.append(_group(update, f"{path}.dora_magnitude", f"{path}.m"))
    return groups


def _layers_and_keys(model: nn.Module, adapted: Collection[str]) -> tuple[int, list[str]]:
    """mlx-lm's `num_layers` and `keys` that name just the modules `adapted`: keys inside the last
    layers where that is possible, whole paths otherwise."""
    layers = layer_paths(model, find_layers(model))
    inside = [{m.removeprefix(f"{p}.") for m in adapted if m.startswith(f"{p}.")} for p in layers]
    keys = set().union(*inside)
    first = next((i for i, found in enumerate(inside) if found), len(layers))
    modules = set(dict(model.named_modules()))
    wanted = [{key for key in keys if f"{path}.{key}" in modules} for path in layers[first:]]
    outside = {m for m in adapted if not any(m.startswith(f"{path}.") for path in layers)}
    if wanted != inside[first:]:
        return len(layers), sorted(adapted)
    return len(layers) - first, sorted(keys | outside)


def _check_with_mlx_lm(
    update: Update,
    model: nn.Module,
    num_layers: int,
    settings: dict[str, Any],
    groups: Sequence[Group],
) -> None:
    """mlx-lm's own modules have these very tensors. `model` is changed; nothing is evaluated."""
    try:
        linear_to_lora_layers(model, num_layers, settings, use_dora=update.kind == "dora")
    except ValueError as error:
        raise _refused(update.adapted[0], f"mlx-lm says: {error}") from error
    shapes = {
        path: array.shape
        for path, array in named_parameters(model)
        if path.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    ours = {part.name: part.shape for group in groups for part in group.parts}
    for name in sorted(shapes.keys() | ours.keys()):
        if shapes.get(name) != ours.get(name):
            raise _refused(
                name, f"mlx-lm wants {shapes.get(name, 'nothing')} where {ours.get(name)} is"
            )


# -- PEFT --


def _check_peft(update: Update, path: str) -> None:
    module = update.modules[path]
    if update.kind == "dora" and not isinstance(module, LINEARS):
        raise _refused(path, f"PEFT has no DoRA of the same kind for a {type(module).__name__}")
    if isinstance(module, EMBEDDINGS):
        rows = module.weight.shape[0]
        heads = [m for m in update.modules.values() if isinstance(m, LINEARS)]
        if not any(head.weight.shape[0] == rows for head in heads):
            raise _refused(
                path,
                "it is the output head as well, and PEFT adapts a tied embedding only where tokens "
                "are looked up; export to mlx-adapter, mlx or hf",
            )


def _module_of(name: str) -> str:
    if not name.endswith(".weight"):
        raise _refused(name, "it is not the weight of a module, which is what PEFT adapts")
    return name.removesuffix(".weight")


def _peft_factors(update: Update, path: str, modules: Sequence[str], stacked: bool) -> list[Group]:
    """The factors of one module, or of the experts that MLX has as one."""
    if isinstance(update.modules[path], EMBEDDINGS):
        names = {"lora_embedding_A": "lora_up", "lora_embedding_B": "lora_down"}
        change: Callable[[mx.array], mx.array] = _transpose
    else:
        names = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"}
        change = _same
    if update.kind == "dora":
        names["lora_magnitude_vector"] = "dora_magnitude"
    groups = []
    for name, own in names.items():
        full = [f"base_model.model.{module}.{name}" for module in modules]
        if stacked:
            groups.append(_unstacked(update, f"{path}.{own}", full))
        else:
            groups.append(_group(update, f"{path}.{own}", full[0], change))
    return groups


def _unstacked(update: Update, path: str, names: Sequence[str]) -> Group:
    shape, dtype = update.stored(path)
    parts = tuple(Part(name, shape[1:], dtype) for name in names)
    return Group(parts, lambda: dict(zip(names, update.read(path), strict=True)))


def _targets(adapted: Sequence[str], modules: Collection[str]) -> list[str]:
    """PEFT's `target_modules` for just the modules `adapted`: the ends of their names where those
    name no other module, whole names otherwise."""
    ends = {name.rpartition(".")[2] for name in adapted}
    meant = {name for name in modules if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == set(adapted) else adapted)


def _refused(what: str, why: str) -> ConfigError:
    return ConfigError(f"{what} cannot be exported so: {why}")
