"""Exact byte ranges of one file: the only place where weight bytes come from disk.

Both checkpoint formats read through `ByteFile`, so `bytes_read` counts every weight byte that a
rank takes, and a short read is an error that names the file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.flight import recorder
from hpcmlx.parallel.partition import Interval

Bytes = npt.NDArray[np.uint8]

#: The longest dimension of an MLX array.
MAX_DIM = (1 << 31) - 1
# macOS refuses, and Linux shortens, a single read of 2 GiB or more.
_MAX_READ = 1 << 30
# Pieces from here on are read by one pread each (2 us a call, no page is mapped). Smaller ones lie
# on pages that are fetched whole anyway: slicing a map copies 73,728 pieces of 768 bytes in 18 ms
# where preads take 169 ms, while 14 KiB pieces are as fast either way (27 and 19 ms for 56 MiB).
_MIN_PREAD = 4096
# Mapped pages count as resident memory, so a map never covers more than this.
_MAX_MAP = 32 << 20

_NUMPY = {
    mx.bool_: np.dtype(np.bool_),
    mx.uint8: np.dtype(np.uint8),
    mx.int8: np.dtype(np.int8),
    mx.uint16: np.dtype(np.uint16),
    mx.int16: np.dtype(np.int16),
    mx.uint32: np.dtype(np.uint32),
    mx.int32: np.dtype(np.int32),
    mx.uint64: np.dtype(np.uint64),
    mx.int64: np.dtype(np.int64),
    mx.float16: np.dtype(np.float16),
    mx.float32: np.dtype(np.float32),
    mx.complex64: np.dtype(np.complex64),
    mx.bfloat16: np.dtype(np.uint16),  # numpy has no bfloat16: the bits travel as integers
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as it is read.

    Attributes:
        shape: its whole shape.
        dtype: its MLX dtype.
        file: the file that holds it.
        offset: where its bytes start in that file.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in memory."""
        return prod(self.shape) * self.dtype.size


def to_mlx(data: Bytes, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Little-endian bytes as an MLX array of `shape` and `dtype` (one copy)."""
    array = mx.array(data.reshape(-1).view(_NUMPY[dtype]).reshape(shape))
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def coalesce(intervals: Sequence[Interval]) -> Iterator[Interval]:
    """Join intervals that follow each other without a gap; empty ones vanish."""
    start = stop = -1
    for first, last in intervals:
        if first == stop:
            stop = last
            continue
        if stop > start:
            yield start, stop
        start, stop = first, last
    if stop > start:
        yield start, stop


class ByteFile:
    """A file read by ranges.

    Attributes:
        path: the file.
        size: its length in bytes when it was first seen.
        bytes_read: bytes handed out so far.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        self.path = path
        self.bytes_read = 0
        self._fd: int | None = None

    def read(self, offset: int, count: int) -> Bytes:
        """`count` bytes from `offset`."""
        return self.read_cut(offset, 1, count, 1, [(0, count)]).reshape(-1)

    def read_cut(
        self, offset: int, outer: int, length: int, inner: int, intervals: Sequence[Interval]
    ) -> Bytes:
        """The positions `intervals` along the middle dim of a block of bytes.

        Args:
            offset: where the block `[outer, length, inner]` of bytes starts in the file.
            intervals: half-open ranges of `length`, concatenated in the order given.

        Returns:
            The bytes `[outer, positions, inner]`.

        Raises:
            IntegrityError: the file ends before the range does.
            StorageError: the operating system reports an error.
            ValueError: an interval lies outside `length`.
        """
        if any(not 0 <= start <= stop <= length for start, stop in intervals):
            raise ValueError(f"intervals {list(intervals)} do not fit {length} positions")
        runs = list(coalesce(intervals))
        size = sum(stop - start for start, stop in runs)
        out = np.empty((outer, size, inner), np.uint8)
        if out.size == 0:
            return out
        if runs == [(0, length)]:
            outer, length, inner, runs = 1, 1, out.size, [(0, 1)]
        blocks = out.reshape(outer, -1)
        column = 0
        for start, stop in runs:
            width = (stop - start) * inner
            pieces = blocks[:, column : column + width]
            first = offset + start * inner
            if outer == 1 or width >= _MIN_PREAD:
                for row, piece in enumerate(pieces):
                    self._pread(memoryview(piece), first + row * length * inner)
            else:
                self._copy_from_map(pieces, first, stride=length * inner)
            column += width
            recorder.tick()
        self.bytes_read += out.size
        return out

    def close(self) -> None:
        """Give the descriptor back; a later read opens the file again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _descriptor(self) -> int:
        if self._fd is None:
            try:
                self._fd = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise StorageError(f"{self.path}: {error.strerror}") from error
        return self._fd

    def _pread(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(
                    self._descriptor(), [view[done : done + _MAX_READ]], offset + done
                )
            except OSError as error:
                raise StorageError(f"{self.path}: {error.strerror}") from error
            if count == 0:
                raise self._ended(offset + len(view))
            done += count

    def _copy_from_map(self, pieces: Bytes, offset: int, stride: int) -> None:
        rows, width = pieces.shape
        if offset + (rows - 1) * stride + width > os.fstat(self._descriptor()).st_size:
            raise self._ended(offset + (rows - 1) * stride + width)
        step = max(1, _MAX_MAP // stride)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            first = offset + row * stride
            base = first - first % mmap.ALLOCATIONGRANULARITY
            span = (count - 1) * stride + width
            with mmap.mmap(
                self._descriptor(), first - base + span, access=mmap.ACCESS_READ, offset=base
            ) as mapped:
                strided = np.ndarray((count, width), np.uint8, mapped, first - base, (stride, 1))
                pieces[row : row + count] = strided
                del strided  # a map cannot be closed while an array looks into it

    def _ended(self, end: int) -> IntegrityError:
        found = os.fstat(self._descriptor()).st_size
        return IntegrityError(
            f"{self.path}: bytes up to {end} are expected, {found} found: copy the file again"
        )


def cut_dims(shape: Sequence[int], axis: int, item_size: int) -> tuple[int, int, int]:
    """`(outer, length, inner bytes)` of an array of `shape` that is cut along `axis`."""
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]) * item_size
