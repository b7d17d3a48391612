"""The HDF5 file that examples are kept in: tokenized once, read slice by slice.

Examples lie one after the other in flat columns. A checksum file beside it tells whether the cache
is whole, so that libhdf5 never gets a damaged file to read. `dataset.py` says which cache is whose.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np

from hpcmlx.errors import IntegrityError
from hpcmlx.files import write_hdf5
from hpcmlx.models.checksums import verify, write_checksums
from hpcmlx.training.data.examples import Counts, Sample

#: Of what is in a cache; another version is another cache.
FORMAT = 1
_CHUNK = 1 << 15  # tokens that are read and checked together: 128 KiB
_BUFFER = 1 << 20  # tokens in memory while it is written


def write_cache(path: Path, key: str, samples: Iterable[Sample], counts: Counts) -> None:
    """Write a cache and its checksum file; an earlier one is replaced.

    Args:
        path: the file; its directory exists.
        key: what the samples were made of, in a hash.
        samples: taken to the end, and never held all at once.
        counts: of the samples, read when they have all been taken.

    Raises:
        OutputError, StorageError: as `write_hdf5`; whatever `samples` raises. No file is left.
    """
    write_hdf5(path, lambda file: _fill(file, key, samples, counts))
    write_checksums(path)


def is_whole(path: Path) -> bool:
    """Whether the file is as it was written. Reads all of it.

    Raises:
        IntegrityError: it is not, or nothing says that it is.
        StorageError: it cannot be read.
    """
    if not path.exists():
        return False
    if not verify(path):
        raise IntegrityError(f"{path} has no checksum beside it")
    return True


class CachedTokens:
    """A cache, open for reading.

    Attributes:
        path: its file.
        key: as it was written.
        digest: SHA-256 of all tokens and targets, in hex.
        counts: of the rows that it was made from.
        lengths: [samples] int32, in tokens.
        num_targets: [samples] int32.
    """

    def __init__(self, path: Path):
        """
        Raises:
            IntegrityError: this is no such cache.
        """
        self.path = path
        try:
            # It is never written to, and locks are what network file systems fail at.
            self._file = h5py.File(path, "r", locking=False)
            attributes = dict(self._file.attrs)
            self.key, self.digest = str(attributes["key"]), str(attributes["digest"])
            self.counts = Counts(*(int(attributes[name]) for name in asdict(Counts())))
            self._tokens, self._targets = self._file["tokens"], self._file["targets"]
            self._offsets = self._file["offsets"][:]
            self.num_targets = self._file["num_targets"][:]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} cannot be used: {error}; remove it") from error
        self.lengths = np.diff(self._offsets).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            IntegrityError: the file has changed since it was opened.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, stop = self._offsets[index : index + 2]
        try:
            return Sample(self._tokens[start:stop], self._targets[start:stop])
        except OSError as error:
            raise IntegrityError(
                f"{self.path} has changed while it was read ({error}); start the job again"
            ) from error

    def close(self) -> None:
        self._file.close()


def _fill(file: h5py.File, key: str, samples: Iterable[Sample], counts: Counts) -> None:
    offsets, num_targets = array("q", [0]), array("i")
    columns = {"tokens": np.dtype("i4"), "targets": np.dtype("?")}
    digests = {name: hashlib.sha256() for name in columns}
    for name, dtype in columns.items():
        file.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(_CHUNK,), fletcher32=True)
    buffer: list[Sample] = []

    def flush() -> None:
        stop = offsets[-1]
        for name in columns:
            values = np.concatenate([getattr(sample, name) for sample in buffer])
            file[name].resize((stop,))
            file[name][stop - len(values) :] = values
            digests[name].update(values.tobytes())
        buffer.clear()

    held = 0
    for sample in samples:
        buffer.append(sample)
        held += len(sample.tokens)
        offsets.append(offsets[-1] + len(sample.tokens))
        num_targets.append(int(sample.targets.sum()))
        if held >= _BUFFER:
            flush()
            held = 0
    if buffer:
        flush()
    ends = np.array(offsets, np.int64)
    counted = np.array(num_targets, np.int32)
    file.create_dataset("offsets", data=ends, chunks=True, fletcher32=True)
    file.create_dataset("num_targets", data=counted, chunks=True, fletcher32=True)
    whole = hashlib.sha256(ends.tobytes())
    for digest in digests.values():
        whole.update(digest.digest())
    file.attrs.update({"key": key, "digest": whole.hexdigest(), "format": FORMAT})
    file.attrs.update(asdict(counts))
