"""A GGUF file as a checkpoint with Hugging Face tensor names, read by byte range.

Q4_0, Q4_1 and Q8_0 stay quantized, as MLX's affine triples of groups of 32; the other quantized
types are dequantized to float16 on reading. What llama.cpp's converter did to the weights (rope
order of Llama's q and k rows, gemma's norms plus one) is undone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.models.byteranges import ByteFile, Bytes, TensorInfo, to_mlx
from hpcmlx.models.gguf_config import architecture_of, hf_name, read_config
from hpcmlx.models.gguf_file import GGUFTensor, read_gguf_header
from hpcmlx.parallel.partition import Cut, Interval

_PLAIN = {Kind.F32: mx.float32, Kind.F16: mx.float16, Kind.BF16: mx.bfloat16}
_AFFINE_BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q8_0: 8}
_GROUP = 32


@dataclass(frozen=True)
class _Source:
    """Where a tensor comes from: the GGUF tensor, which part of its blocks it is ("plain",
    "values", "weight", "scales", "biases"), and what has to be undone."""

    tensor: GGUFTensor
    part: str
    heads: int = 0  # rows are in llama.cpp's rope order, with that many heads
    minus_one: bool = False

    @property
    def unit(self) -> int:
        """Positions along the last axis per block."""
        if self.part == "weight":
            return _GROUP * _AFFINE_BITS[self.tensor.kind] // 32
        return 1 if self.part in ("scales", "biases", "plain") else self.tensor.block[0]


class GGUFCheckpoint:
    """The same interface as `Checkpoint`, over one GGUF file.

    Attributes:
        path: the file.
        config: config.json as mlx-lm would have it, `quantization` included.
        metadata: the file's own keys (the tokenizer is built from them).
        tensors: every tensor by its Hugging Face name; a quantized one is three.
        format: "mlx": names and layouts are final.
    """

    format = "mlx"

    def __init__(self, path: Path) -> None:
        header = read_gguf_header(path)
        self.path = path
        self.metadata = header.metadata
        self._file = ByteFile(path)
        self._cached: tuple[Any, Bytes] | None = None
        try:
            arch = architecture_of(header.metadata)
            tensors = dict(header.tensors)
            embedding = tensors.get("token_embd.weight")
            if embedding is None:
                raise IntegrityError("tensor token_embd.weight is missing; copy the file again")
            freqs = tensors.pop("rope_freqs.weight", None)
            self.config = read_config(
                header.metadata, list(tensors), embedding.shape[0], self._floats(freqs)
            )
            self._sources = _sources(arch, self.config, tensors)
        except (ConfigError, IntegrityError) as error:
            self._file.close()
            raise type(error)(f"{path}: {error}") from error
        if bits := _quantization(self._sources):
            self.config["quantization"] = bits
        self.tensors: Mapping[str, TensorInfo] = {
            name: _info(path, source) for name, source in self._sources.items()
        }
        self._header_bytes = self._file.bytes_read
        self._file.close()

    @property
    def bytes_read(self) -> int:
        """Weight bytes read so far (without the header)."""
        return self._file.bytes_read - self._header_bytes

    def read(self, name: str, cut: Cut | None = None) -> mx.array:
        """The tensor `name`, or the part of it that `cut` names.

        Only the blocks that the cut touches are read; the three parts of a quantized tensor share
        one read when they are asked for one after the other with the same cut.

        Raises:
            KeyError: there is no such tensor.
            IntegrityError: the file ends before the tensor does, or a value overflows.
        """
        source, info = self._sources[name], self.tensors[name]
        shape = info.shape if cut is None else cut.shape(info.shape)
        rows: tuple[Interval, ...] = ((0, info.shape[0]),)
        columns: tuple[Interval, ...] | None = None
        if cut is not None and cut.axis == 0:
            rows = cut.intervals
        elif cut is not None:
            columns = cut.intervals
        array = self._decode(source, self._blocks(source, rows, columns))
        if columns is not None and source.unit > 1:
            array = np.concatenate([array[:, i] for i in _inside(columns, source.unit)], axis=1)
        if source.minus_one:
            array = array - np.float32(1)
        if source.part != "plain" and not np.isfinite(array).all():
            raise IntegrityError(f"{self.path}: {name} holds a value that float16 cannot represent")
        return to_mlx(np.ascontiguousarray(array).view(np.uint8), shape, info.dtype)

    def close(self) -> None:
        """Close the file and drop the last blocks read."""
        self._file.close()
        self._cached = None

    def _floats(self, tensor: GGUFTensor | None) -> list[float]:
        if tensor is None:
            return []
        if tensor.kind != Kind.F32:
            raise ConfigError(f"GGUF tensor {tensor.name} is {tensor.kind.name}, not F32")
        return self._file.read(tensor.offset, tensor.nbytes).view(np.float32).tolist()

    def _blocks(
        self, source: _Source, rows: tuple[Interval, ...], columns: tuple[Interval, ...] | None
    ) -> Bytes:
        """Raw blocks `[rows, blocks, bytes of a block]`; a vector counts as rows of one block."""
        tensor = source.tensor
        elements, size = tensor.block
        per_row = tensor.shape[1] // elements if len(tensor.shape) == 2 else 1
        taken = None if columns is None else _block_intervals(columns, source.unit)
        key = (tensor.name, rows, taken)
        if self._cached is not None and self._cached[0] == key:
            return self._cached[1]
        self._cached = None
        if taken is not None:
            raw = self._file.read_cut(tensor.offset, tensor.shape[0], per_row, size, taken)
            raw = raw[_rope_rows(tensor.shape[0], source.heads)] if source.heads else raw
        else:
            runs, inverse = _row_runs(rows, tensor.shape[0], source.heads)
            raw = self._file.read_cut(tensor.offset, 1, tensor.shape[0], per_row * size, runs)
            raw = raw.reshape(-1, per_row, size)
            raw = raw if inverse is None else raw[inverse]
        if source.part in ("weight", "scales", "biases"):
            self._cached = (key, raw)
        return raw

    def _decode(self, source: _Source, raw: Bytes) -> npt.NDArray[Any]:
        """Blocks as numbers `[rows, positions]` (raw bytes for plain types)."""
        kind = source.tensor.kind
        if source.part == "plain":
            flat = raw.reshape(raw.shape[0], -1)
            return flat.view(np.float32) if source.minus_one else flat
        if source.part == "values":
            with np.errstate(over="ignore"):  # `read` refuses what float16 cannot hold
                return dequantize(raw.reshape(raw.shape[0], -1), kind).astype(np.float16)
        scales = np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]
        if source.part == "scales":
            return scales
        if source.part == "biases":
            if kind == Kind.Q4_1:
                return np.ascontiguousarray(raw[..., 2:4]).view(np.float16)[..., 0]
            # MLX's integers are unsigned, so zero sits at 8 or 128: exact, a power of two.
            with np.errstate(over="ignore"):
                return scales * np.float16(-8 if kind == Kind.Q4_0 else -128)
        if kind == Kind.Q8_0:
            packed: Bytes = raw[..., 2:] ^ np.uint8(0x80)  # int8 plus 128
        else:
            # GGUF packs element i with i + 16, MLX packs 2i with 2i + 1.
            packed = raw[..., -16:]
            halves = np.concatenate([packed & 0x0F, packed >> 4], axis=-1)
            packed = halves[..., 0::2] | halves[..., 1::2] << 4
        return np.ascontiguousarray(packed).view("<u4").reshape(raw.shape[0], -1)


def _sources(
    arch: str, config: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]
) -> dict[str, _Source]:
    """Every tensor of the file under its Hugging Face names.

    Raises:
        ConfigError: a tensor has no place in the model or no known storage format.
    """
    sources: dict[str, _Source] = {}
    for name, tensor in tensors.items():
        target = hf_name(arch, name)
        heads = 0
        if arch == "llama" and ".attn_q." in name:
            heads = config["num_attention_heads"]
        elif arch == "llama" and ".attn_k." in name:
            heads = config["num_key_value_heads"]
        minus_one = arch.startswith("gemma") and name.endswith("norm.weight")
        if len(tensor.shape) > 2 or (minus_one and tensor.kind != Kind.F32):
            raise ConfigError(f"GGUF tensor {name} is {tensor.kind.name} {list(tensor.shape)}")
        if heads and tensor.shape[0] % (2 * heads):
            raise ConfigError(f"GGUF tensor {name} has {tensor.shape[0]} rows for {heads} heads")
        if tensor.kind in _AFFINE_BITS:
            for part in ("weight", "scales", "biases"):
                sources[f"{target.removesuffix('.weight')}.{part}"] = _Source(tensor, part, heads)
        elif tensor.kind in _PLAIN:
            sources[target] = _Source(tensor, "plain", heads, minus_one)
        else:
            try:
                dequantize(np.zeros((1, tensor.block[1]), np.uint8), tensor.kind)
            except (NotImplementedError, KeyError) as error:
                raise ConfigError(
                    f"GGUF tensor {name} has storage type {tensor.kind.name}, which cannot be read"
                ) from error
            sources[target] = _Source(tensor, "values", heads)
    return sources


def _info(path: Path, source: _Source) -> TensorInfo:
    tensor = source.tensor
    if source.part == "plain":
        return TensorInfo(tensor.shape, _PLAIN[tensor.kind], path, tensor.offset)
    shape = (*tensor.shape[:-1], tensor.shape[-1] // tensor.block[0] * source.unit)
    dtype = mx.uint32 if source.part == "weight" else mx.float16
    return TensorInfo(shape, dtype, path, tensor.offset)


def _quantization(sources: Mapping[str, _Source]) -> dict[str, Any] | None:
    """mlx-lm's `quantization` entry: the commonest width, and the layers that differ."""
    bits = {
        name.removesuffix(".scales"): _AFFINE_BITS[source.tensor.kind]
        for name, source in sources.items()
        if source.part == "scales"
    }
    if not bits:
        return None
    common = Counter(bits.values()).most_common(1)[0][0]

    def entry(width: int) -> dict[str, Any]:
        return {"group_size": _GROUP, "bits": width, "mode": "affine"}

    overrides = {path: entry(width) for path, width in bits.items() if width != common}
    return {**entry(common), **overrides}


def _rope_rows(num_rows: int, heads: int) -> npt.NDArray[np.int64]:
    """For every row in Hugging Face order its row in the file: within a head, the file alternates
    between the two halves that Hugging Face keeps apart."""
    rows = np.arange(num_rows).reshape(heads, num_rows // heads // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _row_runs(
    rows: tuple[Interval, ...], num_rows: int, heads: int
) -> tuple[list[Interval], npt.NDArray[np.int64] | None]:
    """Runs of file rows to read, and for every wanted row its position among them (None: as
    read)."""
    if not heads:
        return list(rows), None
    order = _rope_rows(num_rows, heads)
    wanted = np.concatenate([order[start:stop] for start, stop in rows] or [order[:0]])
    found, inverse = np.unique(wanted, return_inverse=True)
    breaks = np.flatnonzero(np.diff(found) != 1) + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(found, breaks) if run.size]
    return runs, inverse.reshape(-1)


def _block_intervals(columns: tuple[Interval, ...], unit: int) -> tuple[Interval, ...]:
    return tuple((start // unit, -(-stop // unit)) for start, stop in columns)


def _inside(columns: tuple[Interval, ...], unit: int) -> list[slice]:
    """Where the wanted positions lie among the blocks that were read for them."""
    slices, at = [], 0
    for (start, stop), (first, last) in zip(columns, _block_intervals(columns, unit), strict=True):
        begin = at * unit + start - first * unit
        slices.append(slice(begin, begin + stop - start))
        at += last - first
    return slices
