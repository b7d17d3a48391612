"""What decides the rows of a run: written at its first start, compared when it goes on.

Rank 0 builds the manifest before the model is loaded. Layout, batch size and memory are not in it:
they may change from one launch to the next.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hpcmlx.errors import ConfigError, IntegrityError, StorageError
from hpcmlx.files import sha256_of, write_atomic
from hpcmlx.models.checkpoint import FETCH_PATTERNS, Checkpoint, GGUFCheckpoint
from hpcmlx.models.checksums import CHECKSUMS
from hpcmlx.redact import compared
from hpcmlx.rundir import MANIFEST
from hpcmlx.settings import GenerateConfig

_VERSIONS = ("hpcmlx", "mlx", "mlx-lm")
# Of a weight file, so much is hashed: its header and blocks spread over it. Another training step
# changes nearly every weight, and 400 GB cannot be read whole at every start.
_BLOCK, _NUM_BLOCKS = 64 << 10, 16
_LISTED = 8  # differences that a refusal spells out


@dataclass(frozen=True)
class Manifest:
    """
    Attributes:
        input: its path and SHA-256.
        model, adapter: path and SHA-256 by file name; of weight files the SHA-256 of a sample.
        settings: by dotted key, what else decides the rows; dtype and weights as resolved.
        versions: of the packages that compute them.
    """

    input: dict[str, str]
    model: dict[str, Any]
    adapter: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def build(
        cls,
        config: GenerateConfig,
        checkpoint: Checkpoint | GGUFCheckpoint,
        *,
        input_sha256: str,
        dtype: str,
        weights: str,
    ) -> Manifest:
        """
        Args:
            input_sha256: of the input file, in hex, as `read_batch` gives it.
            dtype, weights: what `model.dtype` and `model.weights` come to on this host.

        Raises:
            StorageError: a file cannot be read.
        """
        values = {
            "model.dtype": dtype,
            "model.weights": weights,
            "inference.kv_bits": config.inference.kv_bits,
            **{f"sampling.{key}": value for key, value in asdict(config.sampling).items()},
            **{f"data.{key}": value for key, value in asdict(config.data).items()},
        }
        shown = config.unresolved
        adapter: dict[str, Any] = {"path": None, "files": {}}
        if config.model.adapter is not None:
            adapter["files"] = {
                path.name: sha256_of(path)
                for path in _visible(config.model.adapter)
                if path.suffix in (".json", ".safetensors") and path.name != CHECKSUMS
            }
            adapter["path"] = shown.get("model.adapter", config.model.adapter)
        return cls(
            {"path": shown.get("input", config.input), "sha256": input_sha256},
            {
                "path": shown.get("model.path", config.model.path),
                "files": fingerprint(checkpoint),
            },
            adapter,
            {key: compared(key, value, shown) for key, value in values.items()},
            {name: metadata.version(name) for name in _VERSIONS},
        )

    def write(self, run_dir: Path) -> None:
        """Write `manifest.json`. From then on the run can be resumed.

        Raises:
            OutputError, StorageError: as `write_atomic`.
        """
        write_atomic(run_dir / MANIFEST, json.dumps(asdict(self), indent=2) + "\n")


def check(run_dir: Path, manifest: Manifest) -> list[str]:
    """Compare a run that is to go on with how it was begun.

    Returns:
        Warnings: versions that have changed.

    Raises:
        ConfigError: its rows would not be those of one run; says each difference.
        IntegrityError: `manifest.json` cannot be understood.
        StorageError: it cannot be read.
    """
    path = run_dir / MANIFEST
    try:
        before = Manifest(**json.loads(path.read_bytes()))
        differences = [*_differences(before, manifest)]
        versions = [
            f"{name} was {before.versions.get(name)} when this run was begun, is {version}"
            for name, version in manifest.versions.items()
            if before.versions.get(name) != version
        ]
    except OSError as error:
        raise StorageError(f"reading {path} failed: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(f"{path}: not a manifest ({error}); use a new run_dir") from error
    if differences:
        more = len(differences) - _LISTED
        text = "; ".join(differences[:_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise ConfigError(
            f"run directory {run_dir} was begun differently: {text} (set it back, or give another "
            "run_dir)"
        )
    return versions


def _differences(before: Manifest, now: Manifest) -> Iterable[str]:
    for key in sorted(before.settings.keys() | now.settings.keys()):
        was, value = (_text(side.settings, key) for side in (before, now))
        if was != value:
            yield f"{key} was {was}, is {value}"
    if before.input["sha256"] != now.input["sha256"]:
        yield (
            f"input {now.input['path']} has changed (sha256 "
            f"{_arrow(before.input['sha256'], now.input['sha256'])})"
        )
    for kind in ("model", "adapter"):
        was, found = getattr(before, kind), getattr(now, kind)
        if kind == "adapter" and bool(was["files"]) != bool(found["files"]):
            yield f"model.adapter was {_json(was['path'])}, is {_json(found['path'])}"
            continue
        # Unequal paths are named, equal content under another path is the same model.
        moved = was["path"] != found["path"]
        where = f"{found['path']} (was {was['path']})" if moved else found["path"]
        for name in sorted(was["files"].keys() | found["files"].keys()):
            old, new = was["files"].get(name), found["files"].get(name)
            if old is None or new is None:
                yield f"{kind} {where}: file {name} is {'new' if old is None else 'gone'}"
            elif old != new:
                yield f"{kind} {where}: file {name} has changed ({_arrow(old, new)})"


def _text(settings: Mapping[str, Any], key: str) -> str:
    return _json(settings[key]) if key in settings else "not a setting"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _arrow(before: str, now: str) -> str:
    return f"{before[:8]}… → {now[:8]}…"


def fingerprint(checkpoint: Checkpoint | GGUFCheckpoint) -> dict[str, str]:
    """SHA-256 by file name of what a model consists of; of weight files that of a sample."""
    headers: dict[Path, int] = {}  # of each weight file: where its first tensor begins
    for info in checkpoint.tensors.values():
        headers[info.file] = min(info.offset, headers.get(info.file, info.offset))
    found = {path.name: _sampled_sha256(path, length) for path, length in headers.items()}
    if checkpoint.path.is_dir():
        for path in _visible(checkpoint.path):
            weights = path.suffix == ".safetensors" or path.name == CHECKSUMS
            if not weights and any(path.match(pattern) for pattern in FETCH_PATTERNS):
                found[path.name] = sha256_of(path)
    return dict(sorted(found.items()))


def _visible(directory: str | Path) -> list[Path]:
    try:
        paths = sorted(Path(directory).iterdir())
    except OSError as error:
        raise StorageError(f"reading {directory} failed: {error.strerror}") from error
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


def _sampled_sha256(path: Path, header: int) -> str:
    """Of the file's size, its first `header` bytes and blocks spread evenly over the rest; of all
    of it where that is not more."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(f"{size}:".encode())
            digest.update(file.read(header))
            rest = size - header
            if rest <= _BLOCK * _NUM_BLOCKS:
                digest.update(file.read())
                return digest.hexdigest()
            for number in range(_NUM_BLOCKS):
                file.seek(header + (rest - _BLOCK) * number // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
            return digest.hexdigest()
    except OSError as error:
        raise StorageError(f"reading {path} failed: {error.strerror}") from error
