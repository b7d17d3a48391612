"""Shard files: what one rank holds of a checkpoint's tensors, in HDF5.

A dataset per tensor, under its global name, with the part that the rank holds; attributes say of
which whole it is which part, so that a shard can be understood without its manifest. Numbers that
NumPy does not know (bfloat16) are stored as integers of the same width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import h5py
import mlx.core as mx
import numpy as np

from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.files import sha256_of, write_hdf5
from hpcmlx.flight import recorder
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.checkpoints.pieces import Block, Piece, as_cut, dtype_name, storage_shape

_DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.bool_]
_DTYPES += [mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64]
#: What a tensor may be made of, by name.
DTYPES = {dtype_name(dtype): dtype for dtype in _DTYPES}
_STORED_AS = {mx.bfloat16: mx.uint16, mx.bool_: mx.uint8}
#: HDF5 reads, checks and writes a chunk at a time, and Python waits for it meanwhile.
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Snapshot:
    """A piece as it was when it was taken, in memory that nothing will change.

    Attributes:
        data: [part], as it is stored.
        dtype: of the tensor.
        shape: of the whole tensor.
        cut: which part of it this is.
    """

    data: np.ndarray
    dtype: str
    shape: tuple[int, ...]
    cut: Cut


def take(pieces: Mapping[str, Piece]) -> dict[str, Snapshot]:
    """Snapshots of those pieces that have anything in them. Nothing is copied: an MLX array that
    is "changed" gets new memory, and the old one lives while it is referred to.

    Raises:
        IntegrityError: a shard cannot hold numbers of such a type.
    """
    views = {}
    for name, piece in pieces.items():
        dtype = piece.array.dtype
        if dtype not in _DTYPES:
            raise IntegrityError(f"tensor {name}: {dtype_name(dtype)} cannot be stored")
        if piece.array.size:
            # Another array object in any case: `x[0] = 1` would change what `x` itself refers to.
            views[name] = piece.array.view(_STORED_AS.get(dtype, dtype))
    mx.eval(list(views.values()))
    taken = {}
    for name, view in views.items():
        piece = pieces[name]
        data = np.array(view, copy=False)
        shape, cut = tuple(piece.shape), as_cut(piece.shape, piece.cut)
        taken[name] = Snapshot(
            data.reshape(storage_shape(data.shape)), dtype_name(piece.array.dtype), shape, cut
        )
    return taken


def write_shard(path: Path, snapshots: Mapping[str, Snapshot]) -> tuple[str, int]:
    """Write a shard, flush it, read it back and compare it with what is in memory.

    Returns:
        Its SHA-256 and its bytes.

    Raises:
        OutputError, StorageError: as `files.write_atomic`, or the disk gives back something else.
    """

    def fill(file: h5py.File) -> None:
        for name, taken in snapshots.items():
            data = taken.data
            dataset = file.create_dataset(
                name, data.shape, data.dtype, chunks=chunk_shape(data), fletcher32=True
            )
            dataset.attrs["dtype"] = taken.dtype
            dataset.attrs["shape"] = np.array(taken.shape, np.int64)
            dataset.attrs["cut_axis"] = taken.cut.axis
            dataset.attrs["cut_intervals"] = np.array(taken.cut.intervals, np.int64)
            for block in _blocks(data):
                dataset[block] = data[block]

    write_hdf5(path, fill)
    digest = _written(path, snapshots)
    return digest, path.stat().st_size


def _written(path: Path, snapshots: Mapping[str, Snapshot]) -> str:
    """The SHA-256 of a shard whose every number is what it should be, on the disk itself as far as
    the system lets us see it.

    Raises:
        StorageError: it is something else.
    """
    _forget(path)
    digest = sha256_of(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            for name, taken in snapshots.items():
                bits = f"u{taken.data.itemsize}"  # a NaN is not equal to itself
                for block in _blocks(taken.data):
                    found = file[name][block]
                    if not np.array_equal(found.view(bits), taken.data[block].view(bits)):
                        raise OSError(f"{name} differs")
    except (OSError, KeyError) as error:
        raise StorageError(
            f"{path} is not what was written ({error}): the disk or its controller is failing"
        ) from error
    return digest


def _forget(path: Path) -> None:
    """Let the system drop its copy of a flushed file, so that the next reading is from the disk."""
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def chunk_shape(data: np.ndarray) -> tuple[int, ...]:
    """Chunks of about a MiB: as many whole rows as fit, of equal numbers; parts of a row where one
    is longer."""
    chunk = list(data.shape)
    for axis, length in enumerate(data.shape):
        inner = prod(data.shape[axis + 1 :]) * data.itemsize
        num_chunks = -(-length // max(1, _CHUNK_BYTES // inner))
        chunk[axis] = -(-length // num_chunks)
        if inner <= _CHUNK_BYTES:
            break
    return tuple(chunk)


def _blocks(data: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """The chunks of an array, each as slices."""
    chunk = chunk_shape(data)
    counts = [-(-length // step) for length, step in zip(data.shape, chunk, strict=True)]
    for place in np.ndindex(*counts):
        yield tuple(slice(i * step, (i + 1) * step) for i, step in zip(place, chunk, strict=True))
        time.sleep(0)  # HDF5 held the interpreter: let the training have it


class ShardReader:
    """The shards of one checkpoint, opened when they are first needed. A context manager."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[str, h5py.File] = {}

    def read(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        blocks: Mapping[str, list[Block]],
    ) -> mx.array:
        """A tensor of `shape`, put together from blocks.

        Args:
            name: of the tensor.
            dtype: of it.
            blocks: by shard file, to be read from it; they fill the shape.

        Raises:
            IntegrityError: a shard has changed since it was verified.
        """
        kind = DTYPES[dtype]
        stored = dtype_name(_STORED_AS.get(kind, kind))
        data = np.empty(storage_shape(shape), stored)
        for shard, parts in blocks.items():
            try:
                dataset = self._file(shard)[name]
                for part in parts:
                    dataset.read_direct(data, part.source, part.target)
                    recorder.tick()
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise IntegrityError(
                    f"{self._directory / shard}: {name} cannot be read any more ({error}); restore "
                    "the file from a copy"
                ) from error
        array = mx.array(data.reshape(shape)).view(kind)
        mx.eval(array)
        return array

    def _file(self, shard: str) -> h5py.File:
        # Nobody writes to it any more, and not every file system has locks.
        if shard not in self._files:
            self._files[shard] = h5py.File(self._directory / shard, "r", locking=False)
        return self._files[shard]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
