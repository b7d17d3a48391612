"""A checkpoint that `CheckpointStore.find` has found whole, to be read in any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from hpcmlx.errors import IntegrityError
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.checkpoints.manifest import Manifest, shard_name
from hpcmlx.training.checkpoints.pieces import Block, assemble, storage_shape
from hpcmlx.training.checkpoints.shards import DTYPES, ShardReader


class Found:
    """A checkpoint that was whole when it was found. A context manager; read from it before the
    next save.

    Attributes:
        step, state, metric: as they were given to `save`.
        skipped: what was wrong with checkpoints that were passed over.
    """

    def __init__(self, directory: Path, manifest: Manifest, skipped: tuple[str, ...] = ()):
        self.step, self.metric = manifest.step, manifest.metric
        self.state: Mapping[str, Any] = manifest.state
        self.skipped = skipped
        self._directory, self._manifest = directory, manifest
        self._reader = ShardReader(directory)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Whole shape and dtype by name."""
        return {
            name: (tensor.shape, DTYPES[tensor.dtype])
            for name, tensor in self._manifest.tensors.items()
        }

    def read(self, name: str, cut: Cut | None = None) -> mx.array:
        """A tensor or a cut of it, whatever the layout that saved it. Each rank reads for itself.

        Args:
            cut: None for the whole tensor; an interval may occur twice.

        Returns:
            [cut.shape(whole)], evaluated.

        Raises:
            IntegrityError: there is no such tensor, it has no such positions, or a shard has
                changed since it was verified.
        """
        tensor = self._manifest.tensors.get(name)
        if tensor is None:
            raise IntegrityError(f"{self._directory} has no tensor {name}")
        shape = tensor.shape
        if cut is not None:
            shape = cut.shape(storage_shape(tensor.shape))
        blocks: dict[str, list[Block]] = {}
        for block in assemble(name, tensor, cut):
            blocks.setdefault(shard_name(block.rank), []).append(block)
        return self._reader.read(name, tensor.dtype, shape, blocks)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
