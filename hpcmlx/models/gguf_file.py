"""The header of a GGUF file: metadata and the tensor table, every claim checked against the file.

Used by `gguf.GGUFCheckpoint`. The constants come from the `gguf` package; its GGUFReader is not
used because it keeps an object per vocabulary entry: 5 s and 160 MB a rank for 49,152 tokens.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from hpcmlx.errors import ConfigError, IntegrityError, StorageError
from hpcmlx.models.byteranges import MAX_DIM

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_VERSIONS = (2, 3)
_MAX_DIMS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table.

    Attributes:
        shape: in row-major order (GGUF stores it the other way round).
        kind: the storage format.
        offset: where its bytes start in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def block(self) -> tuple[int, int]:
        """(elements, bytes) of one block; (1, item size) for plain types."""
        return GGML_QUANT_SIZES[self.kind]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        elements, size = self.block
        return prod(self.shape) // elements * size


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key (arrays as lists) and tensors by their GGUF name."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parse and check the header of the GGUF file at `path`.

    Raises:
        IntegrityError: the file is damaged or shorter than its header says.
        ConfigError: its version, byte order or a storage format is not supported.
        StorageError: it cannot be read.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    with stream:
        size = path.stat().st_size
        if size < 24 or stream.read(4) != b"GGUF":
            raise IntegrityError(f"{path}: not a GGUF file ({size} bytes); copy the file again")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Parser(path, data).header()
            except (struct.error, EOFError) as error:
                raise IntegrityError(
                    f"{path}: ends inside its header, {size} bytes found; copy the file again"
                ) from error
            except UnicodeDecodeError as error:
                raise IntegrityError(
                    f"{path}: a name in the header is not UTF-8; copy the file again"
                ) from error


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def header(self) -> GGUFHeader:
        version, num_tensors, num_keys = self._take("IQQ")
        if version not in _VERSIONS:
            raise ConfigError(
                f"{self.path}: GGUF version {version} or a big-endian file; versions 2 and 3, "
                "little-endian, can be read"
            )
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata or not key.isprintable():
                raise self._damaged(f"the key {key!a} occurs twice or is no proper name")
            metadata[key] = self._value(self._kind())
        table: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(num_tensors):
            name = self._string()
            (num_dims,) = self._take("I")
            if num_dims > _MAX_DIMS or name in table:
                raise self._damaged(f"tensor {name!a} has {num_dims} dims or occurs twice")
            if not name.isprintable():
                raise self._damaged(f"tensor {name!a} has no proper name")
            dims = self._take(f"{num_dims}Q")
            if max(dims, default=0) > MAX_DIM:
                raise self._damaged(f"tensor {name} has a dimension of {max(dims)}")
            kind, offset = self._take("IQ")
            try:
                table[name] = (tuple(reversed(dims)), GGMLQuantizationType(kind), offset)
            except ValueError as error:
                raise ConfigError(
                    f"{self.path}: tensor {name} has the unknown storage type {kind}"
                ) from error
        return GGUFHeader(metadata, self._placed(metadata, table))

    def _placed(
        self,
        metadata: dict[str, Any],
        table: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]],
    ) -> dict[str, GGUFTensor]:
        """Tensors with absolute offsets that lie inside the file and do not overlap."""
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"alignment {alignment} is not a power of two")
        begin = -(-self.at // alignment) * alignment
        tensors = {
            name: GGUFTensor(name, shape, kind, begin + offset)
            for name, (shape, kind, offset) in table.items()
        }
        end, before = begin, "the header"
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if not tensor.shape or tensor.shape[-1] % tensor.block[0]:
                raise self._damaged(f"tensor {tensor.name} {list(tensor.shape)} has half a block")
            if tensor.offset < end:
                raise self._damaged(f"tensor {tensor.name} overlaps {before}")
            end, before = tensor.offset + tensor.nbytes, f"tensor {tensor.name}"
            if end > len(self.data):
                raise self._damaged(f"{before} ends at byte {end}, the file has {len(self.data)}")
        return tensors

    def _damaged(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self.path}: {what}; copy the file again")

    def _take(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{codes}", self.data, self.at)
        self.at += struct.calcsize(f"<{codes}")
        return values

    def _string(self) -> str:
        (length,) = self._take("Q")
        if self.at + length > len(self.data):
            raise EOFError
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _kind(self) -> GGUFValueType:
        (raw,) = self._take("I")
        try:
            return GGUFValueType(raw)
        except ValueError as error:
            raise self._damaged(f"unknown metadata type {raw}") from error

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._take(_SCALARS[kind])[0]
        items = self._kind()
        (count,) = self._take("Q")
        if items in _SCALARS:
            if count > len(self.data):  # before struct makes a format of that length
                raise EOFError
            return list(self._take(f"{count}{_SCALARS[items]}"))
        read: Callable[[], Any] = self._string
        if items == GGUFValueType.ARRAY:
            raise self._damaged("an array of arrays in the metadata")
        return [read() for _ in range(count)]
