"""Checksums of a model: whatever is not as it was written is named, on every rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from huggingface_hub import scan_cache_dir

from hpcmlx import comm
from hpcmlx.comm import Communicator
from hpcmlx.errors import HpcmlxError, IntegrityError
from hpcmlx.models import checksums
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.checksums import CHECKSUMS, verify, verify_together, write_checksums


def flip(path: Path, offset: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def model(tmp_path) -> Path:
    """Three shards and the usual small files; `notes.md` is nobody's business."""
    path = tmp_path / "model"
    path.mkdir()
    for i in range(1, 4):
        array = mx.arange(1000 * i).astype(mx.float32)
        mx.save_safetensors(str(path / f"model-{i:05}-of-00003.safetensors"), {f"t{i}": array})
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "notes.md").write_text("notes")
    write_checksums(path)
    return path


def sha256sum(folder: Path, *names: str) -> str:
    """What coreutils says: the twin."""
    if shutil.which("sha256sum") is None:
        pytest.skip("NOT TESTED: no sha256sum here")
    return subprocess.check_output(["sha256sum", *names], cwd=folder, text=True)


def test_the_digests_are_those_of_sha256sum(model):
    digests = json.loads((model / CHECKSUMS).read_text())["sha256"]
    twin = [line.split("  ") for line in sha256sum(model, *digests).splitlines()]
    assert digests == {name: digest for digest, name in twin}
    assert len(digests) == 5 and "notes.md" not in digests


def test_a_model_as_written_passes(model):
    assert verify(model)
    (model / "notes.md").write_text("other notes")
    assert verify(model)
    assert (model / CHECKSUMS).stat().st_mode == (model / "config.json").stat().st_mode
    (model / CHECKSUMS).unlink()
    assert not verify(model)


def remove(path: Path) -> None:
    path.unlink()


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model-00002-of-00003.safetensors", flip, "has SHA-256 .* checksums.json says"),
        ("config.json", flip, "has SHA-256"),
        ("tokenizer.json", lengthen, "has 3 bytes, checksums.json says 2"),
        ("model-00003-of-00003.safetensors", remove, "is missing but checksums.json has it"),
        ("chat_template.jinja", Path.touch, "is not in checksums.json"),
        ("model-extra.safetensors", Path.touch, "is not in checksums.json"),
    ],
    ids=["weight", "config", "longer", "missing", "template", "shard"],
)
def test_what_differs_is_named(model, name, damage, words):
    damage(model / name)
    with pytest.raises(IntegrityError, match=f"{name} {words}.*convert.py --checksums") as caught:
        verify(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c | {"more": 1},
        lambda c: {"sha256": c["sha256"]},
        lambda c: c | {"sha256": c["sha256"] | {"../secret.json": "0" * 64}},
        lambda c: c | {"sha256": c["sha256"] | {"config.json": "0" * 63}},
        lambda c: c | {"bytes": c["bytes"] | {"config.json": "23"}},
        lambda c: [c],
    ],
)
def test_damaged_checksums_are_refused(model, change):
    path = model / CHECKSUMS
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(IntegrityError, match="checksums.json: damaged"):
        verify(model)


def test_named_files_only(model):
    flip(model / "model-00001-of-00003.safetensors")
    assert verify(model, files=["config.json", "model-00002-of-00003.safetensors"])
    with pytest.raises(IntegrityError, match="model-00001"):
        verify(model, files=["model-00001-of-00003.safetensors"])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_disjoint_even_and_complete(count):
    sizes = {f"f{i}": 10 + i for i in range(12)}
    shares = [checksums._share(sizes, (i, count)) for i in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())


# -- what others publish --


def test_sha256sums_of_a_mirror(model):
    (model / CHECKSUMS).unlink()
    names = ["config.json", "model-00001-of-00003.safetensors", "notes.md"]
    (model / "SHA256SUMS").write_text("# mirror\n" + sha256sum(model, *names))
    flip(model / "notes.md")  # listed, but nothing reads it
    flip(model / "tokenizer.json", 0)  # not listed
    assert verify(model)
    flip(model / "model-00001-of-00003.safetensors")
    with pytest.raises(IntegrityError, match="model-00001.*SHA256SUMS says .*remove .*SHA256SUMS"):
        verify(model)
    (model / "SHA256SUMS").write_text("d41d8cd98f00b204e9800998ecf8427e  config.json\n")
    with pytest.raises(IntegrityError, match="SHA256SUMS:1: not a line of `sha256sum`"):
        verify(model)


@pytest.mark.parametrize("sidecar", ["m.gguf.sha256", "SHA256SUMS"])
def test_a_gguf_file_with_a_sidecar(tmp_path, sidecar):
    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(range(256)) * 40)
    (tmp_path / "other.gguf").write_bytes(b"x")
    assert not verify(file)
    names = ["m.gguf"] if sidecar != "SHA256SUMS" else ["m.gguf", "other.gguf"]
    (tmp_path / sidecar).write_text(sha256sum(tmp_path, *names))
    (tmp_path / "other.gguf").write_bytes(b"y")
    assert verify(file)
    flip(file)
    with pytest.raises(IntegrityError, match=f"m.gguf has SHA-256 .*{sidecar} says"):
        verify(file)


def test_a_sidecar_is_written_and_read_by_sha256sum_too(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    path = write_checksums(file)
    assert path.read_text() == sha256sum(tmp_path, "m.gguf") and verify(file)
    path.write_text(path.read_text()[:64] + "\n")  # the digest alone
    assert verify(file)
    path.write_text("0" * 64 + "  other.gguf\n")
    with pytest.raises(IntegrityError, match="has no checksum of m.gguf"):
        verify(file)


# -- a fetched repository --


def hub_cache(root: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of links that `snapshot_download` makes; gives the snapshot."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / ("0123456789" * 4)
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(snapshot.name)
    for file in model.iterdir():
        large = file.suffix == ".safetensors"
        name = checksums.sha256_of(file) if large else f"{abs(hash(file.name)):040x}"
        shutil.copyfile(file, repo / "blobs" / name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return snapshot


def test_checksums_in_a_hub_cache_are_found_and_do_not_disturb_it(tmp_path, model, monkeypatch):
    (model / CHECKSUMS).unlink()
    snapshot = hub_cache(tmp_path / "hub", model, monkeypatch)
    write_checksums(snapshot)
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.path == snapshot and verify(checkpoint.path)
    assert not scan_cache_dir(tmp_path / "hub").warnings
    blob = (snapshot / "model-00001-of-00003.safetensors").resolve()
    flip(blob)
    with pytest.raises(IntegrityError, match="model-00001"):
        verify(snapshot)


def test_a_download_is_compared_with_the_hub(tmp_path, model, monkeypatch):
    (model / CHECKSUMS).unlink()
    snapshot = hub_cache(tmp_path / "hub", model, monkeypatch)
    flip((snapshot / "model-00003-of-00003.safetensors").resolve())
    with pytest.raises(IntegrityError, match="model-00003.*the hub says .*fetch the model again"):
        write_checksums(snapshot)
    assert not (snapshot / CHECKSUMS).exists()


# -- many ranks --


class Threads:
    """A world whose ranks are threads: the same code, the same order of collectives."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots: list[object] = [None] * size

    def run(self, paths: list[Path]) -> list[bool | HpcmlxError]:
        """What `verify_together` gave or raised on each rank."""
        results: list[bool | HpcmlxError] = [False] * self.size

        def go(rank: int) -> None:
            try:
                results[rank] = verify_together(paths[rank], Rank(self, rank))
            except HpcmlxError as error:
                results[rank] = error

        threads = [threading.Thread(target=go, args=(r,)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Rank:
    """What `verify_together` uses of a Communicator."""

    def __init__(self, world: Threads, rank: int):
        self.world, self.rank, self.size = world, rank, world.size

    def allgather(self, value: object) -> list[object]:
        self.world.slots[self.rank] = value
        self.world.barrier.wait()
        found = list(self.world.slots)
        self.world.barrier.wait()
        return found


def test_ranks_of_one_host_share_the_work(model, monkeypatch):
    hashed: list[str] = []
    digest = checksums.sha256_of

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    monkeypatch.setattr(checksums, "sha256_of", counted)
    assert Threads(3).run([model] * 3) == [True] * 3
    assert sorted(hashed) == sorted(json.loads((model / CHECKSUMS).read_text())["sha256"])


@pytest.mark.parametrize("damaged", [0, 2])
def test_all_ranks_fail_with_the_one_that_found_it(tmp_path, model, damaged):
    # Without a shared file system: each rank has a copy of its own.
    paths = [tmp_path / f"host{rank}" / "model" for rank in range(3)]
    for path in paths:
        shutil.copytree(model, path)
    flip(paths[damaged] / "model-00002-of-00003.safetensors")
    errors = Threads(3).run(paths)
    assert {type(error) for error in errors} == {IntegrityError}
    assert len({str(error) for error in errors}) == 1
    message = str(errors[0])
    assert f"host{damaged}/model/model-00002-of-00003.safetensors has SHA-256" in message
    assert f"(found by rank {damaged} on {comm.hostname()})" in message


@pytest.mark.parametrize("other", ["another model", "none"])
def test_hosts_with_different_models_are_told_apart(tmp_path, model, other):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    if other == "none":
        (copy / CHECKSUMS).unlink()
    else:
        flip(copy / "model-00002-of-00003.safetensors")
        write_checksums(copy)
    errors = Threads(3).run([model, model, copy])
    assert {type(error) for error in errors} == {IntegrityError}
    assert f"rank 2 on {comm.hostname()} and rank 0" in str(errors[0])
    assert "different checksums" in str(errors[0])


def test_one_process_needs_no_other(model):
    assert verify_together(model, Communicator())
    flip(model / "config.json")
    with pytest.raises(IntegrityError) as caught:
        verify_together(model, Communicator())
    assert "rank" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_no_integrity_error(model):
    if os.geteuid() == 0:
        pytest.skip("NOT TESTED: root may read everything")
    (model / "config.json").chmod(0)
    with pytest.raises(HpcmlxError, match="config.json: Permission denied") as caught:
        verify(model)
    assert caught.value.exit_code == 74
