"""SHA-256 of a model's files: written where a model is made or fetched, compared before it is used.

A flipped bit in a weight is a valid weight, so only a checksum can tell. `jobs/convert.py` and
`jobs/fetch.py` write `checksums.json`; jobs call `verify_together` before they read a model. What
others publish, `SHA256SUMS` in the directory or `FILE.gguf.sha256`, is honoured likewise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from hpcmlx import comm
from hpcmlx.agree import share_failure
from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError, HpcmlxError, IntegrityError, StorageError
from hpcmlx.files import sha256_of, write_atomic
from hpcmlx.models.checkpoint import FETCH_PATTERNS

CHECKSUMS = "checksums.json"
_PUBLISHED = "SHA256SUMS"
# What may decide a result. Other files of a directory (README.md) are never read.
_PATTERNS = (*FETCH_PATTERNS, "adapter*.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUM_LINE = re.compile(r"\\?([0-9a-fA-F]{64})(?: [ *](.+))?")
# One thread hashes 0.8 to 2 GB/s; more than these wait for the disk.
_MAX_THREADS = 8


@dataclass(frozen=True)
class Manifest:
    """What a checksum file says.

    Attributes:
        path: the checksum file.
        sha256: hexadecimal digest of each file, by its name beside the checksum file.
        sizes: in bytes, where it gives them.
    """

    path: Path
    sha256: Mapping[str, str]
    sizes: Mapping[str, int]


def write_checksums(model: Path) -> Path:
    """Hash the model's files as they are now: `checksums.json` of a directory, or
    `FILE.gguf.sha256`. The path of what was written.

    Raises:
        ConfigError: there is no such model.
        IntegrityError: a file of a hub cache is not the one that its name promises.
        OutputError, StorageError: reading or writing failed.
    """
    if model.is_file():
        path = model.with_name(f"{model.name}.sha256")
        text = f"{sha256_of(model)}  {model.name}\n"
        source = model
    elif names := _covered(model):
        digests = dict(zip(names, _digests([model / name for name in names]), strict=True))
        for name, digest in digests.items():
            _check_blob(model / name, digest)
        sizes = {name: (model / name).stat().st_size for name in names}
        path = model / CHECKSUMS
        text = json.dumps({"sha256": digests, "bytes": sizes}, indent=2) + "\n"
        source = model / names[0]
    else:
        raise ConfigError(f"{model}: no model to make checksums of")
    write_atomic(path, text)
    shutil.copymode(source, path)  # readable by whoever may read the model
    return path


def verify(model: Path, files: Iterable[str] | None = None, part: tuple[int, int] = (0, 1)) -> bool:
    """Compare the model's files with its checksums, where it has any.

    Args:
        model: a directory or a *.gguf file.
        files: names of the files to compare; None for all.
        part: (i, n): only the i-th of n shares of about equal size.

    Returns:
        Whether there are checksums.

    Raises:
        IntegrityError: a file differs, is missing, or is new; or the checksums are damaged.
        StorageError: a file cannot be read.
    """
    manifest = read_manifest(model)
    if manifest is not None:
        _verify(model, manifest, files, part)
    return manifest is not None


def verify_together(model: Path, world: Communicator) -> bool:
    """`verify` by all ranks: those of one host share its files, and all of them fail if one does.

    Collective over `world`. Hosts that keep copies of their own must have equal checksums.

    Returns:
        Whether there are checksums.

    Raises:
        IntegrityError, StorageError: as `verify`; the message names the rank and host.
    """
    failure: HpcmlxError | None = None
    manifest = None
    try:
        manifest = read_manifest(model)
    except HpcmlxError as error:
        failure = error
    share_failure(world, failure)
    sums = world.allgather(None if manifest is None else dict(manifest.sha256))
    hosts = world.allgather(comm.hostname())
    if other := next((rank for rank, found in enumerate(sums) if found != sums[0]), 0):
        raise IntegrityError(
            f"{model}: rank {other} on {hosts[other]} and rank 0 on {hosts[0]} have different "
            "checksums (or one has none): copy the whole model directory to every host again"
        )
    if manifest is None:
        return False
    # Ranks that see the very same checksum file share the work; a name alone may be on many hosts.
    stat = manifest.path.stat()
    places = world.allgather((comm.hostname(), stat.st_dev, stat.st_ino, stat.st_mtime_ns))
    mine = [rank for rank, place in enumerate(places) if place == places[world.rank]]
    try:
        _verify(model, manifest, None, (mine.index(world.rank), len(mine)))
    except HpcmlxError as error:
        failure = error
    share_failure(world, failure)
    return True


def read_manifest(model: Path) -> Manifest | None:
    """The checksums of a model directory or a GGUF file; None where it has none.

    Raises:
        IntegrityError: they cannot be understood.
        StorageError: they cannot be read.
    """
    if model.is_dir():
        if (path := model / CHECKSUMS).exists():
            return _own(path)
        path = model / _PUBLISHED
    elif (path := model.with_name(f"{model.name}.sha256")).exists():
        if model.name not in _published(path):
            raise IntegrityError(f"{path} has no checksum of {model.name}; make or copy it again")
    else:
        path = model.with_name(_PUBLISHED)
    if not path.exists():
        return None
    found = _published(path)
    names = [n for n in found if (_is_covered(n) if model.is_dir() else n == model.name)]
    return Manifest(path, {n: found[n] for n in names}, {}) if names else None


def _verify(
    model: Path, manifest: Manifest, files: Iterable[str] | None, part: tuple[int, int]
) -> None:
    wanted = sorted(set(manifest.sha256) if files is None else set(files) & set(manifest.sha256))
    hint = _advice(manifest)
    folder = manifest.path.parent
    for name in wanted:
        if not (folder / name).is_file():
            raise IntegrityError(
                f"{folder / name} is missing but {manifest.path.name} has it{hint}"
            )
    new = sorted(set(_covered(model)) - set(manifest.sha256)) if model.is_dir() else []
    if new and manifest.path.name == CHECKSUMS:  # what others publish may leave files out
        raise IntegrityError(f"{folder / new[0]} is not in {manifest.path.name}{hint}")
    sizes = {name: (folder / name).stat().st_size for name in wanted}
    mine = _share(sizes, part)
    for name in mine:
        if (expected := manifest.sizes.get(name, sizes[name])) != sizes[name]:
            raise IntegrityError(
                f"{folder / name} has {sizes[name]} bytes, {manifest.path.name} says "
                f"{expected}{hint}"
            )
    paths = [folder / name for name in mine]
    for name, found in zip(mine, _digests(paths, part[1]), strict=True):
        if found != manifest.sha256[name]:
            raise IntegrityError(
                f"{folder / name} has SHA-256 {found[:12]}…, {manifest.path.name} says "
                f"{manifest.sha256[name][:12]}…{hint}"
            )


def _advice(manifest: Manifest) -> str:
    if manifest.path.name == CHECKSUMS:
        again = f"run `python jobs/convert.py --checksums {manifest.path.parent}`"
    else:
        again = f"remove {manifest.path}"
    return f": copy or fetch the model again; or, if it was changed on purpose, {again}"


def _share(sizes: Mapping[str, int], part: tuple[int, int]) -> list[str]:
    """The names of share i of n: the largest file goes to the share that has least, and so on."""
    index, count = part
    loads = [0] * count
    mine = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == index:
            mine.append(name)
    return sorted(mine)


def _covered(directory: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    except OSError as error:
        raise StorageError(f"{directory}: {error.strerror}") from error
    return [name for name in names if _is_covered(name)]


def _is_covered(name: str) -> bool:
    return name != CHECKSUMS and any(fnmatch(name, pattern) for pattern in _PATTERNS)


def _digests(paths: list[Path], num_sharing: int = 1) -> list[str]:
    """Of each file, several at once: hashing releases the interpreter's lock."""
    threads = min(_MAX_THREADS, (os.cpu_count() or 1) // num_sharing, len(paths))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(sha256_of, paths))


def _check_blob(path: Path, digest: str) -> None:
    """A hub cache names what a large file's link leads to by the SHA-256 that the hub has for it,
    and compares only lengths itself."""
    if not path.is_symlink():
        return
    blob = Path(os.path.abspath(path.parent / path.readlink()))
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and blob.name != digest:
        raise IntegrityError(
            f"{path} has SHA-256 {digest[:12]}…, the hub says {blob.name[:12]}…: remove {blob} "
            "and fetch the model again"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: not UTF-8; copy the file again") from error


def _own(path: Path) -> Manifest:
    """`{"sha256": {name: digest}, "bytes": {name: size}}`, both with every file."""
    try:
        content = json.loads(_text(path))
        sha256, sizes = content.pop("sha256"), content.pop("bytes")
        good = not content and sha256.keys() == sizes.keys()
        good = good and all(Path(name).name == name and _is_covered(name) for name in sha256)
        good = good and all(_SHA256.fullmatch(digest) for digest in sha256.values())
        good = good and all(type(size) is int for size in sizes.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise IntegrityError(f"{path}: damaged; copy the file again, or remove it to do without")
    return Manifest(path, sha256, sizes)


def _published(path: Path) -> dict[str, str]:
    """Digests by name from the output of `sha256sum`; a line without a name is about the file that
    the checksum file is named after."""
    found = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _SUM_LINE.fullmatch(line.rstrip())
        if match is None:
            raise IntegrityError(
                f"{path}:{number}: not a line of `sha256sum`; copy the file again, or remove it"
            )
        name = match[2] or path.name.removesuffix(".sha256")
        found[name.removeprefix("./")] = match[1].lower()
    return found
