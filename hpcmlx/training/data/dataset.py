"""The examples of some files, tokenized once per host and found again by what they are made of.

The first rank of each host looks for the cache and builds it if need be, while the others wait;
no file system needs to be shared. Called by the trainer before the model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpcmlx import comm
from hpcmlx.agree import share_failure
from hpcmlx.comm import Communicator
from hpcmlx.errors import HpcmlxError, InputError, IntegrityError
from hpcmlx.files import cannot_create, sha256_of
from hpcmlx.training.data.examples import (
    Counts,
    ExampleReader,
    ExampleSettings,
    Sample,
    data_files,
    fast_tokenizer,
)
from hpcmlx.training.data.token_cache import FORMAT, CachedTokens, is_whole, write_cache

_log = logging.getLogger(__name__)


class Dataset:
    """Tokenized examples, read from disk when they are asked for.

    Attributes:
        lengths: [samples] int32, in tokens.
        num_targets: [samples] int32, tokens to be predicted; at least 1.
        counts: what became of the rows of the files.
        content_hash: SHA-256, in hex, of what the examples are made of and of the examples.
    """

    def __init__(self, tokens: CachedTokens):
        self._tokens = tokens
        self.lengths: np.ndarray = tokens.lengths
        self.num_targets: np.ndarray = tokens.num_targets
        self.counts: Counts = tokens.counts
        self.content_hash = hashlib.sha256(f"{tokens.key} {tokens.digest}".encode()).hexdigest()

    @property
    def target_share(self) -> float:
        """Of all tokens those that are to be predicted."""
        return float(self.num_targets.sum() / self.lengths.sum())

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Sample:
        """
        Raises:
            IndexError: there is no such sample.
            IntegrityError: the file has changed since it was opened.
        """
        return self._tokens[index]

    def close(self) -> None:
        """Close the file."""
        self._tokens.close()


def open_dataset(
    paths: Sequence[str | Path],
    tokenizer: Any,
    settings: ExampleSettings,
    cache_dir: str | Path,
    world: Communicator,
    *,
    split: str | None = None,
) -> Dataset:
    """The examples of some files. Collective: whatever fails on one rank is raised on all.

    Args:
        paths, split: as `data_files` takes them.
        tokenizer: as `load_tokenizer` gives it; the first rank of each host uses it.
        settings: how rows become examples.
        cache_dir: where caches are kept; made if need be.
        world: all ranks that will read.

    Raises:
        InputError: rows are bad (first file and line, and how many), or there are none; hosts have
            different data.
        ConfigError: the tokenizer cannot be used.
        OutputError, StorageError: the cache cannot be written or the data not be read.
        IntegrityError: a rank cannot read the cache of its host.
    """
    host = world.split_by_host()
    failure: HpcmlxError | None = None
    path: Path | None = None
    if host.rank == 0:
        try:
            path = _prepare(data_files(paths, split), tokenizer, settings, Path(cache_dir))
        except HpcmlxError as error:
            failure = error
    share_failure(world, failure)
    path = host.bcast(path)
    assert path is not None
    tokens: CachedTokens | None = None
    try:
        tokens = CachedTokens(path)
    except HpcmlxError as error:
        failure = error
    share_failure(world, failure)
    assert tokens is not None
    dataset = Dataset(tokens)
    _check_equal(world, dataset, paths)
    if world.rank == 0:
        _report(dataset, settings)
    return dataset


def content_key(files: Sequence[Path], tokenizer: Any, settings: ExampleSettings) -> str:
    """SHA-256, in hex, of all that decides the examples: the files' bytes in their order, the
    tokenizer with its special tokens and chat template, the settings.

    Raises:
        ConfigError: the tokenizer is none that `ExampleReader` takes.
        StorageError: a file cannot be read.
    """
    own = json.loads(fast_tokenizer(tokenizer).to_str())
    parts = {
        "format": FORMAT,
        "settings": asdict(settings),
        "files": [sha256_of(file) for file in files],
        # How a text was last cut or padded is written there as well.
        "tokenizer": {k: v for k, v in own.items() if k not in ("truncation", "padding")},
        "special": [tokenizer.bos_token, tokenizer.eos_token_id],
        "template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _prepare(
    files: Sequence[Path], tokenizer: Any, settings: ExampleSettings, cache_dir: Path
) -> Path:
    """The path of the cache, which is whole when this returns."""
    key = content_key(files, tokenizer, settings)
    path = cache_dir / f"tokens-{key[:24]}.h5"
    if _is_usable(path, key):
        return path
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_create(error, cache_dir) from error
    reader = ExampleReader(tokenizer, settings)
    _log.info("tokenizing %d file(s) into %s", len(files), path)
    write_cache(path, key, reader.read(files), reader.counts)
    return path


def _is_usable(path: Path, key: str) -> bool:
    """Whether the cache is there and whole; a damaged one is reported."""
    try:
        if not is_whole(path):
            return False
        tokens = CachedTokens(path)
    except IntegrityError as error:
        _log.warning("the tokens are computed again: %s", error)
        return False
    tokens.close()
    return tokens.key == key


def _check_equal(world: Communicator, dataset: Dataset, paths: Sequence[str | Path]) -> None:
    found = world.allgather((dataset.content_hash, comm.hostname()))
    for rank, (content, name) in enumerate(found):
        if content != found[0][0]:
            raise InputError(
                f"rank {rank} on {name} and rank 0 on {found[0][1]} have different examples from "
                f"{', '.join(map(str, paths))}: copy data and model to every host again"
            )


def _report(dataset: Dataset, settings: ExampleSettings) -> None:
    counts = dataset.counts
    _log.info(
        "%d examples of %d rows, %d tokens, %d of them to be predicted",
        len(dataset),
        counts.rows,
        dataset.lengths.sum(dtype=np.int64),
        dataset.num_targets.sum(dtype=np.int64),
    )
    for number, what in ((counts.truncated, "cut to it"), (counts.dropped, "left out")):
        if number:
            _log.warning(
                "%d of %d rows were longer than max_length=%d and were %s",
                number,
                counts.rows,
                settings.max_length,
                what,
            )
