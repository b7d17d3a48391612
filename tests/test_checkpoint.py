"""Model directories: exact bytes of every cut, and one clear line for every damaged file."""

from __future__ import annotations

import json
import runpy
import struct
import sys
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from hpcmlx.errors import ConfigError, ExitCode, IntegrityError
from hpcmlx.models import checkpoint as checkpoint_module
from hpcmlx.models.byteranges import ByteFile
from hpcmlx.models.checkpoint import FETCH_PATTERNS, Checkpoint, open_checkpoint
from hpcmlx.parallel.partition import Cut

CONFIG = {"model_type": "llama", "eos_token_id": 2}
ROOT = Path(__file__).parents[1]


def model_dir(path: Path, tensors: dict[str, mx.array] | None = None, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if tensors is not None:
        mx.save_safetensors(str(path / "model.safetensors"), tensors)
    return path


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A model directory with a hand-made safetensors file."""
    model_dir(path)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (path / "model.safetensors").write_bytes(prefix + text + data)
    return path


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "dtype",
    [mx.float32, mx.float16, mx.bfloat16, mx.bool_, mx.uint8, mx.int8, mx.uint16, mx.int16]
    + [mx.uint32, mx.int32, mx.uint64, mx.int64],
    ids=str,
)
def test_every_dtype_reads_as_written(tmp_path, dtype):
    values = (mx.arange(24) % 7).reshape(4, 6).astype(dtype)
    scalar = mx.array(1).astype(dtype)
    checkpoint = open_checkpoint(model_dir(tmp_path / "m", {"x": values, "s": scalar}))
    got = checkpoint.read("x", Cut(1, ((4, 6), (1, 3))))
    want = mx.concatenate([values[:, 4:6], values[:, 1:3]], axis=1)
    assert got.dtype == dtype and mx.array_equal(got, want)
    assert mx.array_equal(checkpoint.read("x"), values)
    assert checkpoint.read("s").shape == () and mx.array_equal(checkpoint.read("s"), scalar)


def test_float8_reads_as_its_bytes(tmp_path):
    path = write_raw(tmp_path / "m", {"x": entry([4], 0, 4, "F8_E4M3")}, bytes([0, 56, 255, 7]))
    assert open_checkpoint(path).read("x").tolist() == [0, 56, 255, 7]


CUTS = [
    Cut(0, ((0, 5),)),
    Cut(0, ((2, 3), (3, 5))),
    Cut(0, ((3, 5), (0, 1))),
    Cut(0, ((1, 2), (1, 2))),
    Cut(1, ((0, 4),)),
    Cut(1, ((5, 7), (0, 2))),
    Cut(2, ((0, 3),)),
    Cut(2, ((100, 1500), (7, 8), (7, 8))),
    Cut(2, ((3, 3),)),
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_cut_reads_its_bytes_and_no_others(tmp_path, cut):
    array = mx.random.uniform(shape=(5, 7, 1600), key=mx.random.key(3))
    path = model_dir(tmp_path / "m", {"a": mx.ones((3,)), "x": array, "z": mx.ones((9,))})
    checkpoint = open_checkpoint(path)
    assert checkpoint.bytes_read == 0
    index = np.concatenate([np.arange(*i) for i in cut.intervals]).astype(int)
    want = np.take(np.array(array), index, axis=cut.axis)
    got = checkpoint.read("x", cut)
    assert got.shape == cut.shape(array.shape) == want.shape
    assert np.array_equal(np.array(got), want)
    assert checkpoint.bytes_read == want.nbytes
    checkpoint.close()
    assert np.array_equal(np.array(checkpoint.read("x", cut)), want)  # reopens


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts a process's reads")
def test_the_system_counts_no_more_reads_than_bytes_read(tmp_path):
    path = model_dir(tmp_path / "m", {"x": mx.zeros((64, 8192))})
    checkpoint = open_checkpoint(path)
    cut = Cut(1, ((2048, 4096),))

    def counted() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = counted()
    checkpoint.read("x", cut)
    assert checkpoint.bytes_read == 64 * 8192
    assert counted() - before < 1.1 * checkpoint.bytes_read


def test_an_interval_outside_the_tensor_is_a_bug(tmp_path):
    checkpoint = open_checkpoint(model_dir(tmp_path / "m", {"x": mx.zeros((4, 4))}))
    with pytest.raises(ValueError, match="do not fit 4"):
        checkpoint.read("x", Cut(0, ((2, 5),)))


def test_a_file_that_shrinks_after_opening(tmp_path):
    path = model_dir(tmp_path / "m", {"x": mx.zeros((64, 512))})
    checkpoint = open_checkpoint(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4096])
    for cut in (None, Cut(0, ((60, 64),)), Cut(1, ((0, 8),))):
        with pytest.raises(IntegrityError, match="model.safetensors.*copy the file again"):
            checkpoint.read("x", cut)


TWO = {"a": entry([2], 0, 8), "b": entry([2], 8, 16)}
MALFORMED = {
    "empty": (b"", b"", None, "no safetensors header|bad safetensors header"),
    "header longer than file": (TWO, bytes(16), 1 << 40, "header claims 1099511627776 bytes"),
    "not json": (b'{"a": ', b"", None, "bad safetensors header"),
    "not an object": (b"[1, 2]", b"", None, "not an object"),
    "duplicate name": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}',
        bytes(1),
        None,
        "'a' occurs twice",
    ),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None, "tensor a has"),
    "negative dim": ({"a": entry([-2], 0, 8)}, bytes(8), None, "tensor a has a bad header entry"),
    "size differs": ({"a": entry([3], 0, 8)}, bytes(8), None, r"a \[3\] F32 needs 12 bytes.* 8"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), None, "b overlaps"),
    "gap": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20), None, "b leaves a gap"),
    "truncated": (TWO, bytes(12), None, "tensor b ends at byte .* the file has"),
    "trailing bytes": (TWO, bytes(20), None, "the tensors end at byte"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_safetensors_are_refused_by_name(tmp_path, kind):
    header, data, length, message = MALFORMED[kind]
    path = write_raw(tmp_path / "m", header, data, length)
    with pytest.raises(IntegrityError, match=message) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "model.safetensors" in text and "copy the file again" in text and "\n" not in text
    assert caught.value.exit_code == ExitCode.INTEGRITY


def test_a_dtype_that_mlx_lacks_is_named(tmp_path):
    path = write_raw(tmp_path / "m", {"x": entry([1], 0, 8, "F64")}, bytes(8))
    with pytest.raises(ConfigError, match="tensor x has dtype 'F64'"):
        open_checkpoint(path)


def sharded(path: Path) -> Path:
    """Two shards and an index."""
    model_dir(path)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for i, name in enumerate(names):
        mx.save_safetensors(str(path / name), {f"t{i}": mx.full((2,), i)}, {"format": "mlx"})
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_shards_are_one_checkpoint(tmp_path):
    checkpoint = open_checkpoint(sharded(tmp_path / "m"))
    assert {n: checkpoint.read(n).tolist() for n in checkpoint.tensors} == {
        "t0": [0, 0],
        "t1": [1, 1],
    }
    assert checkpoint.bytes_read == 16 and checkpoint.format == "mlx"


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(tmp_path, with_index):
    path = sharded(tmp_path / "m")
    (path / "model-00002-of-00002.safetensors").unlink()
    if not with_index:
        (path / "model.safetensors.index.json").unlink()
    with pytest.raises(IntegrityError, match="model-00002-of-00002.safetensors is missing"):
        open_checkpoint(path)


def test_the_index_is_checked(tmp_path):
    path = sharded(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "t9": weight_map["t0"]}}))
    with pytest.raises(IntegrityError, match="tensor t9 is missing"):
        open_checkpoint(path)
    index.write_text(json.dumps({"weight_map": {"t0": "../secret.safetensors"}}))
    with pytest.raises(IntegrityError, match="names a file outside"):
        open_checkpoint(path)
    index.write_text("{}")
    with pytest.raises(IntegrityError, match="no readable weight_map"):
        open_checkpoint(path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    path = sharded(tmp_path / "m")
    mx.save_safetensors(str(path / "model.safetensors"), {"t0": mx.ones((2,))})
    with pytest.raises(IntegrityError, match="tensor t0 is in .* and in"):
        open_checkpoint(path)


def test_generation_config_gives_the_end_tokens(tmp_path):
    path = model_dir(tmp_path / "m", {"x": mx.ones((1,))})
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert open_checkpoint(path).config["eos_token_id"] == [2, 7]


def test_directories_that_want_code_are_refused(tmp_path):
    weights = {"x": mx.ones((1,))}
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()\n"
    path = model_dir(tmp_path / "a", weights, model_file="own.py")
    (path / "own.py").write_text(code)
    with pytest.raises(ConfigError, match="model_file='own.py'"):
        open_checkpoint(path)
    auto_map = {"AutoModel": "own.Model"}
    path = model_dir(tmp_path / "b", weights, model_type="unheard_of", auto_map=auto_map)
    (path / "own.py").write_text(code)
    with pytest.raises(ConfigError, match="no architecture 'unheard_of'"):
        open_checkpoint(path)
    # The same entry beside an architecture of mlx-lm's own is never followed.
    assert open_checkpoint(model_dir(tmp_path / "c", weights, auto_map=auto_map)).tensors
    assert not marker.exists()


def test_pickled_weights_are_refused(tmp_path):
    path = model_dir(tmp_path / "m")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="pytorch_model.bin: pickled weights"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "config.json is missing"), ("{", "not a readable"), ("[]", "model_type is missing")]
    + [("{}", "model_type is missing")],
)
def test_a_bad_config_is_refused(tmp_path, text, message):
    path = model_dir(tmp_path / "m", {"x": mx.ones((1,))})
    (path / "config.json").unlink()
    if text is not None:
        (path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == ExitCode.CONFIG


def test_a_path_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such file or directory"):
        open_checkpoint(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"run `python jobs/fetch.py org/name` first"):
        open_checkpoint("org/name")
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="a directory or a \\*.gguf file"):
        open_checkpoint(tmp_path / "x.bin")


def test_a_fetched_repository_is_found_offline(tmp_path, monkeypatch):
    path = model_dir(tmp_path / "snapshot", {"x": mx.ones((1,))})
    seen = {}

    def stand_in(name, **kwargs):
        seen.update(kwargs, name=name)
        return str(path)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", stand_in)
    found = open_checkpoint("org/name")
    assert isinstance(found, Checkpoint) and found.path == path
    assert seen == {
        "name": "org/name",
        "local_files_only": True,
        "allow_patterns": list(FETCH_PATTERNS),
    }


def test_fetch_asks_for_data_only(tmp_path, monkeypatch, capsys):
    seen = {}
    path = model_dir(tmp_path / "snapshot", {"x": mx.ones((1,))})

    def stand_in(name, **kwargs):
        seen.update(kwargs, name=name)
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in)
    monkeypatch.setattr(sys, "argv", ["fetch.py", "org/name", "--revision", "v1"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "jobs" / "fetch.py"), run_name="__main__")
    assert caught.value.code == 0 and capsys.readouterr().out == f"{path}\n"
    assert (path / "checksums.json").exists()
    assert seen["name"] == "org/name" and seen["revision"] == "v1"
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
    ]
    patterns = seen["allow_patterns"]
    assert all(any(fnmatch(name, p) for p in patterns) for name in wanted)
    never = ["modeling_own.py", "pytorch_model.bin", "model.pt", "original/consolidated.00.pth"]
    assert not any(fnmatch(name, p) for name in never for p in patterns)


def test_small_and_large_pieces_read_alike(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (9, 40000), dtype=np.uint8)
    path = tmp_path / "blob"
    path.write_bytes(b"xyz" + data.tobytes())
    file = ByteFile(path)
    for start, stop in ((17, 30), (5, 39000), (39999, 40000)):
        got = file.read_cut(3, 9, 40000, 1, [(start, stop)])
        assert np.array_equal(got.reshape(9, -1), data[:, start:stop])
