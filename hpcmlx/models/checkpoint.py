"""What a model directory holds, without reading it: config, tensor names and shapes; then exactly
the bytes that a rank asks for.

Safetensors headers are parsed and checked here because every fault in them must end as one line
that names the file; `open_checkpoint` also opens GGUF files, which offer the same interface.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import snapshot_download
from mlx_lm import utils as mlx_lm_utils

from hpcmlx.errors import ConfigError, IntegrityError, StorageError
from hpcmlx.models.byteranges import MAX_DIM, ByteFile, TensorInfo, cut_dims, to_mlx
from hpcmlx.models.gguf import GGUFCheckpoint
from hpcmlx.parallel.partition import Cut

__all__ = ["FETCH_PATTERNS", "Checkpoint", "GGUFCheckpoint", "TensorInfo", "open_checkpoint"]

# The files of a repository that hold data; never *.py, *.bin or any other pickle.
FETCH_PATTERNS = (
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "tiktoken.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
)

_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "C64": mx.complex64,
    "F8_E4M3": mx.uint8,  # as mx.load does: the model's sanitize decodes it
}
_MAX_HEADER = 100_000_000  # the bound of the safetensors library
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COPY_AGAIN = "copy the file again"


def open_checkpoint(path: str | Path) -> Checkpoint | GGUFCheckpoint:
    """Open a model: a directory, a *.gguf file, or `org/name` of a fetched repository.

    Nothing is downloaded here. Only headers are read.

    Raises:
        ConfigError: there is no such model, or it cannot be used without running its own code.
        IntegrityError: its files are damaged or incomplete.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return Checkpoint(local)
    if local.is_file():
        if local.suffix == ".gguf":
            return GGUFCheckpoint(local)
        raise ConfigError(f"{local}: a model is a directory or a *.gguf file")
    name = str(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"model.path={name}: no such file or directory")
    try:
        found = snapshot_download(name, local_files_only=True, allow_patterns=list(FETCH_PATTERNS))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={name}: neither a directory here nor in the Hugging Face cache; "
            f"run `python jobs/fetch.py {name}` first"
        ) from error
    return Checkpoint(Path(found))


class Checkpoint:
    """A Hugging Face or MLX model directory.

    All `model*.safetensors` are read, as mlx-lm does, and all files that the index names. A file
    that is missing, or a tensor that is in two of them, is an error.

    Attributes:
        path: the directory.
        config: config.json with the end-of-sequence ids of generation_config.json.
        tensors: every tensor by name.
        format: what the files say wrote them: "mlx" (names and layouts are final) or "pt".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self._files = {name: ByteFile(path / name) for name in _weight_files(path)}
        self.tensors: Mapping[str, TensorInfo]
        self.tensors, self.format = self._read_headers()
        self._check_index()
        self._header_bytes = sum(file.bytes_read for file in self._files.values())

    @property
    def bytes_read(self) -> int:
        """Weight bytes read so far (without headers)."""
        return sum(file.bytes_read for file in self._files.values()) - self._header_bytes

    def read(self, name: str, cut: Cut | None = None) -> mx.array:
        """The tensor `name`, or the part of it that `cut` names, reading only those bytes.

        Raises:
            KeyError: there is no such tensor.
            IntegrityError: the file ends before the tensor does.
        """
        info = self.tensors[name]
        file = self._files[info.file.name]
        # One descriptor at a time: a model may have more shards than a process may open files.
        for other in self._files.values():
            if other is not file:
                other.close()
        if cut is None:
            return to_mlx(file.read(info.offset, info.nbytes), info.shape, info.dtype)
        outer, length, inner = cut_dims(info.shape, cut.axis, info.dtype.size)
        data = file.read_cut(info.offset, outer, length, inner, cut.intervals)
        return to_mlx(data, cut.shape(info.shape), info.dtype)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _read_headers(self) -> tuple[dict[str, TensorInfo], str]:
        tensors: dict[str, TensorInfo] = {}
        source = "pt"
        for file in self._files.values():
            try:
                found, metadata = read_header(file)
            finally:
                file.close()
            source = metadata.get("format", source)
            if twice := tensors.keys() & found.keys():
                name = min(twice)
                raise IntegrityError(
                    f"{self.path}: tensor {name} is in {tensors[name].file.name} and in "
                    f"{file.path.name}; remove the file that does not belong to the model"
                )
            tensors.update(found)
        return tensors, source

    def _check_index(self) -> None:
        for name, shard in _read_index(self.path).items():
            info = self.tensors.get(name)
            if info is None or info.file.name != shard:
                raise IntegrityError(
                    f"{self.path / shard}: tensor {name} is missing, the index says it is there; "
                    f"{_COPY_AGAIN}"
                )


def read_header(file: ByteFile) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one safetensors file; every claim is checked.

    Raises:
        IntegrityError: the header or the sizes are wrong.
        ConfigError: a tensor has a dtype that MLX lacks.
    """
    path = file.path
    if file.size < 8:
        raise IntegrityError(f"{path}: {file.size} bytes, no safetensors header; {_COPY_AGAIN}")
    (length,) = struct.unpack("<Q", file.read(0, 8).tobytes())
    if length > min(_MAX_HEADER, file.size - 8):
        raise IntegrityError(
            f"{path}: the header claims {length} bytes, the file has {file.size}; {_COPY_AGAIN}"
        )
    try:
        text = file.read(8, length).tobytes().decode()  # json.loads would take UTF-16 too
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: bad safetensors header ({error}); {_COPY_AGAIN}") from error
    if not isinstance(header, dict):
        raise IntegrityError(f"{path}: the safetensors header is not an object; {_COPY_AGAIN}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise IntegrityError(f"{path}: __metadata__ is not an object; {_COPY_AGAIN}")
    begin = 8 + length
    spans = []
    tensors = {}
    for name, entry in header.items():
        dtype, shape, (start, stop) = _check_entry(path, name, entry)
        if begin + stop > file.size:
            raise IntegrityError(
                f"{path}: tensor {name} ends at byte {begin + stop}, the file has {file.size}; "
                f"{_COPY_AGAIN}"
            )
        spans.append((start, stop, name))
        tensors[name] = TensorInfo(shape, dtype, path, begin + start)
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise IntegrityError(f"{path}: tensor {name} {what} (byte {start}); {_COPY_AGAIN}")
        end = stop
    if begin + end != file.size:
        raise IntegrityError(
            f"{path}: the tensors end at byte {begin + end}, the file has {file.size}; "
            f"{_COPY_AGAIN}"
        )
    return tensors, metadata


def _check_entry(
    path: Path, name: str, entry: Any
) -> tuple[mx.Dtype, tuple[int, ...], tuple[int, int]]:
    if not name.isprintable():
        raise IntegrityError(f"{path}: tensor {name!a} has no proper name; {_COPY_AGAIN}")
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or not isinstance(entry["shape"], list):
        raise IntegrityError(f"{path}: tensor {name} has a bad header entry; {_COPY_AGAIN}")
    if too_large := [n for n in shape if n > MAX_DIM]:
        raise ConfigError(
            f"{path}: tensor {name} has a dimension of {too_large[0]}, MLX's end at {MAX_DIM}"
        )
    if not isinstance(code, str) or code not in _DTYPES:
        raise ConfigError(f"{path}: tensor {name} has dtype {code!a}, which MLX does not have")
    dtype = _DTYPES[code]
    if (expected := prod(shape) * dtype.size) != stop - start:
        raise IntegrityError(
            f"{path}: tensor {name} {list(shape)} {code} needs {expected} bytes, the header gives "
            f"it {stop - start}; {_COPY_AGAIN}"
        )
    return dtype, shape, (start, stop)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!a} occurs twice")
    return result


def _read_index(path: Path) -> dict[str, str]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return {}
    try:
        text = index.read_text(encoding="utf-8")
        weight_map = json.loads(text, object_pairs_hook=_no_duplicates)["weight_map"]
        good = all(isinstance(shard, str) for shard in weight_map.values())
    except OSError as error:
        raise StorageError(f"{index}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{index}: no readable weight_map; {_COPY_AGAIN}") from error
    if not good or any(Path(shard).name != shard for shard in weight_map.values()):
        raise IntegrityError(f"{index}: names a file outside {path}; {_COPY_AGAIN}")
    if odd := [n for entry in weight_map.items() for n in entry if not n.isprintable()]:
        raise IntegrityError(f"{index}: {odd[0]!a} is no proper name; {_COPY_AGAIN}")
    return weight_map


def _weight_files(path: Path) -> list[str]:
    """Names of the weight files, all of which exist."""
    names = {file.name for file in path.glob("model*.safetensors")}
    named = set(_read_index(path).values())
    for name in names:
        if match := re.fullmatch(r"(model.*-)(\d+)(-of-)(\d+)(\.safetensors)", name):
            stem, digits, of, total, suffix = match.groups()
            if int(total) <= 100_000:
                shards = (str(i).zfill(len(digits)) for i in range(1, int(total) + 1))
                named |= {f"{stem}{shard}{of}{total}{suffix}" for shard in shards}
    # A link whose target is gone is in the directory too.
    missing = sorted(name for name in names | named if not (path / name).is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise IntegrityError(f"{path / missing[0]} is missing{more}; copy or fetch the model again")
    if names | named:
        return sorted(names | named)
    if pickles := sorted(file.name for p in _PICKLES for file in path.glob(p)):
        raise ConfigError(
            f"{path / pickles[0]}: pickled weights can run code and are never opened; "
            "convert the model to safetensors"
        )
    raise ConfigError(f"{path}: no model*.safetensors in this directory")


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file} is missing: {path} is not a model directory")
    try:
        config = mlx_lm_utils.load_config(path)
        # mlx-lm passes over a damaged one, and the model over its end-of-sequence tokens.
        if (generation := path / "generation_config.json").is_file():
            json.loads(generation.read_text(encoding="utf-8"))
        # NVIDIA's exports keep their quantization in a file of its own.
        extra = path / "hf_quant_config.json"
        if "quantization_config" not in config and extra.is_file():
            config["quantization_config"] = json.loads(extra.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        what = "not a readable model config, or generation_config.json is not"
        raise ConfigError(f"{file}: {what} ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{file}: model_type is missing")
    _refuse_code(file, config)
    return config


def _refuse_code(file: Path, config: dict[str, Any]) -> None:
    """Refuse models that can only be built by running a file of theirs.

    `model_file` always asks for that. `auto_map` is common in repositories whose model_type mlx-lm
    implements itself; mlx-lm never follows it, so it is refused only where nothing else remains.
    """
    if config.get("model_file") is not None:
        raise ConfigError(
            f"{file}: model_file={config['model_file']!r} asks to run code from the model "
            "directory, which is never done; use a model that mlx-lm implements"
        )
    if config.get("auto_map") is None:
        return
    kind = mlx_lm_utils.MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    if not re.fullmatch(r"[\w-]+", kind) or not importlib.util.find_spec(f"mlx_lm.models.{kind}"):
        raise ConfigError(
            f"{file}: mlx-lm has no architecture {config['model_type']!r}, and its auto_map asks "
            "to run code from the model directory, which is never done"
        )
