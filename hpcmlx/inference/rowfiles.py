"""How rows are written down: lines with a CRC, logs of commits, sealed parts.

A log is a sequence of commits. A commit is a header line, which lists (index, sample, bytes) of its
rows, and a line for each row. A part is an HDF5 file with the lines of a full log; a user block
before it holds the SHA-256 of all that follows, so that libhdf5 never gets a damaged file to read.
`store.py` decides what is written when.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import h5py
import numpy as np

from hpcmlx.errors import IntegrityError
from hpcmlx.inference.logprobs import TokenLogprobs
from hpcmlx.inference.rows import RowResult

#: What to do about a damaged file.
RESTORE = "restore it from a copy, or delete it to compute its rows again"
_USER_BLOCK = 512  # the smallest that HDF5 has

#: Where a row is: its line, `nbytes` long, at `offset` of file number `file`; `crc` is its line's.
PLACE = np.dtype(
    [
        ("index", "i8"),
        ("sample", "i8"),
        ("offset", "i8"),
        ("nbytes", "i8"),
        ("crc", "u4"),
        ("file", "i4"),
    ]
)


def encode(row: RowResult) -> bytes:
    """A row as a line: 8 hex digits of CRC-32, a space, JSON, a newline."""
    values = dict(vars(row))
    if row.logprobs is not None:
        values["logprobs"] = [[token.logprob, token.top] for token in row.logprobs]
    return _line(values)


def decode(line: bytes) -> RowResult:
    """The row of a line that `encode` made.

    Raises:
        IntegrityError: its CRC is wrong, or another version of hpcmlx wrote it.
    """
    if not is_whole(line):
        raise IntegrityError("a stored row is damaged: its CRC is wrong")
    values = json.loads(line[9:].decode("utf-8", "surrogatepass"))
    values["tokens"] = tuple(values["tokens"])
    if values["logprobs"] is not None:
        values["logprobs"] = tuple(
            TokenLogprobs(logprob, tuple((token, value) for token, value in top))
            for logprob, top in values["logprobs"]
        )
    try:
        return RowResult(**values)
    except TypeError as error:
        raise IntegrityError(f"a stored row is of another version of hpcmlx: {error}") from error


def build_commit(keys: Sequence[tuple[int, int]], lines: Sequence[bytes]) -> bytes:
    """What a log gets for rows that are committed together."""
    header = _line([(*key, len(line)) for key, line in zip(keys, lines, strict=True)])
    return b"".join([header, *lines])


def read_log(path: Path, data: bytes) -> np.ndarray:
    """Where the rows of a log are, without a last commit that is not whole.

    Args:
        data: its content.

    Raises:
        IntegrityError: a commit that is not the last is damaged.
    """
    found: list[tuple[int, ...]] = []
    position = 0
    while position < len(data):
        rows, end = _commit_at(data, position)
        if not rows:
            if any(_is_header(line + b"\n") for line in data[end:].split(b"\n")[:-1]):
                number = data.count(b"\n", 0, end) + 1
                raise IntegrityError(f"{path}, line {number}: damaged; {RESTORE}")
            break
        found += rows
        position = end
    return np.array(found, PLACE)


def _commit_at(data: bytes, position: int) -> tuple[list[tuple[int, ...]], int]:
    """The rows of a commit as fields of a place, and where it ends; where it is not whole no rows,
    and the beginning of the line that is not."""
    offset = data.find(b"\n", position) + 1
    header = data[position:offset]
    if not _is_header(header):
        return [], position
    rows: list[tuple[int, ...]] = []
    for index, sample, nbytes in json.loads(header[9:]):
        line = data[offset : offset + nbytes]
        if not is_whole(line):
            return [], offset
        rows.append((index, sample, offset, nbytes, int(line[:8], 16), 0))
        offset += nbytes
    return rows, offset


def read_part(path: Path, data: bytes) -> np.ndarray:
    """Where the rows of a part are.

    Raises:
        IntegrityError: a byte of it has changed.
    """
    if data[:_USER_BLOCK] != _user_block(data):
        raise IntegrityError(f"{path}: its SHA-256 is wrong; {RESTORE}")
    with h5py.File(io.BytesIO(data)) as file:
        places = np.zeros(len(file["index"]), PLACE)
        places["index"], places["sample"] = file["index"][:], file["sample"][:]
        offsets = file["offsets"][:]
        begin = file["lines"].id.get_offset()
    places["offset"], places["nbytes"] = begin + offsets[:-1], np.diff(offsets)
    places["crc"] = [int(data[at : at + 8], 16) for at in places["offset"]]
    return places


def build_part(keys: Sequence[tuple[int, int]], lines: Sequence[bytes]) -> memoryview:
    """The image of a part: line i is lines[offsets[i]:offsets[i + 1]]."""
    image = io.BytesIO()
    table = np.array(keys, "i8")
    offsets = np.cumsum([0, *map(len, lines)])
    checked = {"fletcher32": True, "chunks": True}
    with h5py.File(image, "w", libver="latest", userblock_size=_USER_BLOCK) as file:
        file.create_dataset("index", data=table[:, 0], **checked)
        file.create_dataset("sample", data=table[:, 1], **checked)
        file.create_dataset("offsets", data=offsets, **checked)
        # In one piece, so that a row can be read by its place in the file; it has a CRC itself.
        file.create_dataset("lines", data=np.frombuffer(b"".join(lines), "u1"))
    data = image.getbuffer()
    data[:_USER_BLOCK] = _user_block(data)
    return data


def _user_block(data: bytes | memoryview) -> bytes:
    digest = sha256(memoryview(data)[_USER_BLOCK:]).hexdigest()
    return f"hpcmlx rows, SHA-256 of what follows: {digest}\n".encode().ljust(_USER_BLOCK, b"\0")


def _line(values: Any) -> bytes:
    # Half of a surrogate pair may come out of a tokenizer.
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    data = text.encode("utf-8", "surrogatepass")
    return b"%08x %s\n" % (crc32(data), data)


def is_whole(line: bytes) -> bool:
    return line[-1:] == b"\n" and line[:9] == b"%08x " % crc32(line[9:-1])


def _is_header(line: bytes) -> bool:
    return line[9:10] == b"[" and is_whole(line)
