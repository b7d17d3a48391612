"""Directories that appear when they are whole, and safetensors written tensor by tensor: only one
group of tensors is in memory at a time, however large the file gets.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from hpcmlx.errors import OutputError
from hpcmlx.files import atomic_writer, cannot_create, flush, reported, write_atomic
from hpcmlx.flight import recorder

MAX_SHARD_BYTES = 5_000_000_000  # as the hub has them

_CODES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16",
    mx.uint32: "U32", mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64", mx.float16: "F16",
    mx.bfloat16: "BF16", mx.float32: "F32", mx.complex64: "C64",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One tensor of an output: all that a header says of it."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Group:
    """Tensors that are made together: the experts of a stack, a packed weight and its scales.

    Attributes:
        parts: what they are.
        make: name -> array of each of them; called once, when their turn has come.
    """

    parts: tuple[Part, ...]
    make: Callable[[], Mapping[str, mx.array]]


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name when the block ends without an exception; of
    any other end nothing is left.

    Raises:
        OutputError: `out` exists and is not an empty directory, or nothing can be created there.
        StorageError: writing fails half-way.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty; remove it or choose another name")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise cannot_create(error, out) from error
    try:
        with reported(out):
            yield partial
            for file in partial.iterdir():
                # Private until here; now whoever may read the directory may read it.
                file.chmod(partial.stat().st_mode & 0o666)
                with file.open("rb") as stream:
                    flush(stream.fileno())
            partial.rename(out)
            folder = os.open(out.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a JSON file."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def write_weights(
    folder: Path, groups: Sequence[Group], source: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Write a model's tensors as `model.safetensors`, or as shards with their index.

    Args:
        source: "mlx" or "pt": whose names and layouts these are.
        max_shard_bytes: of a file; one tensor may be larger.

    Returns:
        Bytes of all tensors.
    """
    groups = _aligned(groups)
    shards = list(_shards([part for group in groups for part in group.parts], max_shard_bytes))
    total = sum(part.nbytes for shard in shards for part in shard)
    names = ["model.safetensors"]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in numbers]
    stream = _arrays(groups)
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, stream, source)
    if len(shards) > 1:
        where = {p.name: n for n, shard in zip(names, shards, strict=True) for p in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return total


def write_safetensors(path: Path, groups: Sequence[Group], source: str) -> int:
    """Write one file; arguments and result as `write_weights`."""
    groups = _aligned(groups)
    parts = [part for group in groups for part in group.parts]
    _write(path, parts, _arrays(groups), source)
    return sum(part.nbytes for part in parts)


def _aligned(groups: Sequence[Group]) -> list[Group]:
    """Wide elements first: torch cannot look at a float32 that does not begin at a multiple of 4,
    and the format has no gaps."""
    return sorted(groups, key=lambda group: -max(part.dtype.size for part in group.parts))


def _shards(parts: Sequence[Part], max_bytes: int) -> Iterator[list[Part]]:
    shard: list[Part] = []
    size = 0
    for part in parts:
        if shard and size + part.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.nbytes
    yield shard


def _arrays(groups: Sequence[Group]) -> Iterator[mx.array]:
    for group in groups:
        made = dict(group.make())
        for part in group.parts:
            array = mx.contiguous(made.pop(part.name))
            mx.eval(array)
            recorder.tick()
            if (array.shape, array.dtype) != (part.shape, part.dtype):
                raise RuntimeError(f"{part} was announced, {array.shape} {array.dtype} was made")
            yield array


def _write(path: Path, parts: Sequence[Part], arrays: Iterator[mx.array], source: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": source}}
    end = 0
    for part in parts:
        start, end = end, end + part.nbytes
        entry = {"dtype": _CODES[part.dtype], "shape": part.shape, "data_offsets": [start, end]}
        header[part.name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_writer(path) as write:
        write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            array = next(arrays)
            if part.nbytes:
                flat = array.reshape(-1)
                flat = flat.view(mx.uint16) if part.dtype == mx.bfloat16 else flat  # numpy has none
                write(memoryview(np.array(flat, copy=False)))
