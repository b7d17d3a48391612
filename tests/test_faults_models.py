"""Model directories that are damaged or hostile: one line and the right exit code before anything
of them is used, nothing of theirs executed, and never another result without a word."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from hpcmlx import comm
from hpcmlx.errors import ConfigError, HpcmlxError, InputError
from hpcmlx.models.checkpoint import Checkpoint, open_checkpoint
from hpcmlx.models.checksums import CHECKSUMS, verify, write_checksums
from hpcmlx.models.tokenizer import load_tokenizer, render_chat
from tests.fixtures import (
    assert_done,
    assert_refused,
    copy_model,
    job_line,
    run,
    run_line,
    write_rows,
)
from tests.fixtures import model as model
from tests.test_gguf import write as write_gguf

pytestmark = pytest.mark.fault
NUM_FLIPS = 200


# -- malformed safetensors --


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(**changes: Any) -> dict[str, Any]:
    """A header with the one tensor x, [2] F32, with changes."""
    return {"x": entry([2], [0, 8]) | changes}


def raw(header: Any, data: int = 8, length: int | None = None) -> bytes:
    """A safetensors file of that header and so many zero bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


DUPLICATE = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{}}'
TWO = {"x": entry([2], [0, 8]), "y": entry([2], [8, 16])}
# What the file is, its exit code, words of the message.
FILES: dict[str, tuple[bytes, int, str]] = {
    "no bytes": (b"", 77, "0 bytes, no safetensors header"),
    "seven bytes": (bytes(7), 77, "7 bytes, no safetensors header"),
    "header of length 0": (raw(b""), 77, "bad safetensors header"),
    "header longer than the file": (raw(one(), length=200), 77, "header claims 200 bytes"),
    "absurd header": (raw(one(), length=1 << 60), 77, f"header claims {1 << 60} bytes"),
    "largest header": (raw(one(), length=(1 << 64) - 1), 77, "header claims"),
    "header cut short": (raw(one(), length=20), 77, "bad safetensors header"),
    "not UTF-8": (raw(b'{"\xff": 1}'), 77, "bad safetensors header"),
    "UTF-16": (raw(json.dumps(one()).encode("utf-16")), 77, "bad safetensors header"),
    "not JSON": (raw(b'{"x": '), 77, "bad safetensors header"),
    "deep nesting": (raw(b"[" * 100_000), 77, "bad safetensors header"),
    "huge number": (raw(b'{"x": ' + b"9" * 5000 + b"}"), 77, "bad safetensors header"),
    "not an object": (raw(b"[]"), 77, "not an object"),
    "metadata is a list": (raw(one() | {"__metadata__": ["mlx"]}), 77, "__metadata__"),
    "name twice": (raw(DUPLICATE), 77, "'x' occurs twice"),
    "key twice": (raw(b'{"x":{"dtype":"F32","dtype":"F16"}}'), 77, "'dtype' occurs twice"),
    "name with a newline": (raw({"x\ny": entry([2], [0, 8])}), 77, r"tensor 'x\\ny'"),
    "entry is a number": (raw({"x": 1}), 77, "tensor x has a bad header entry"),
    "no dtype": (raw({"x": {"shape": [2], "data_offsets": [0, 8]}}), 77, "bad header entry"),
    "no shape": (raw({"x": {"dtype": "F32", "data_offsets": [0, 8]}}), 77, "bad header entry"),
    "no offsets": (raw({"x": {"dtype": "F32", "shape": [2]}}), 77, "bad header entry"),
    "one offset": (raw(one(data_offsets=[0])), 77, "bad header entry"),
    "three offsets": (raw(one(data_offsets=[0, 4, 8])), 77, "bad header entry"),
    "negative dim": (raw(one(shape=[-1, -2])), 77, "bad header entry"),
    "fractional dim": (raw(one(shape=[2.0])), 77, "bad header entry"),
    "dim is text": (raw(one(shape=["2"])), 77, "bad header entry"),
    "dim is true": (raw(one(shape=[True, 2])), 77, "bad header entry"),
    "dim is NaN": (raw(one(shape=[float("nan")])), 77, "bad header entry"),
    "shape is an object": (raw(one(shape={})), 77, "bad header entry"),
    "shape overflows": (raw(one(shape=[1 << 30] * 3)), 77, f"needs {4 << 90} bytes"),
    "dim of 32 bits": (raw(one(shape=[0, 1 << 31], data_offsets=[0, 0]), 0), 78, "a dimension of"),
    "size differs": (raw(one(shape=[3])), 77, "needs 12 bytes, the header gives it 8"),
    "dtype too wide": (raw(one(dtype="I64")), 77, "needs 16 bytes, the header gives it 8"),
    "negative offset": (raw(one(data_offsets=[-8, 0])), 77, "bad header entry"),
    "offsets reversed": (raw(one(data_offsets=[8, 0])), 77, "the header gives it -8"),
    "outside the file": (raw(one(data_offsets=[8, 16])), 77, "ends at byte .* the file has"),
    "far outside": (raw(one(data_offsets=[1 << 62, (1 << 62) + 8])), 77, "ends at byte"),
    "overlap": (raw(TWO | {"y": entry([2], [4, 12])}, 12), 77, "y overlaps the tensor before"),
    "same place": (raw(TWO | {"y": entry([2], [0, 8])}), 77, "y overlaps the tensor before"),
    "hole": (raw({"y": entry([2], [12, 20]), **one()}, 20), 77, "y leaves a gap before it"),
    "hole at the start": (raw(one(data_offsets=[4, 12]), 12), 77, "x leaves a gap before it"),
    "truncated": (raw(TWO, 15), 77, "y ends at byte .* the file has"),
    "trailing bytes": (raw(TWO, 17), 77, "the tensors end at byte"),
    "unknown dtype": (raw(one(dtype="F7")), 78, "tensor x has dtype 'F7'"),
    "dtype is a list": (raw(one(dtype=["F32"])), 78, "has dtype"),
    "dtype with a newline": (raw(one(dtype="F\n")), 78, r"has dtype 'F\\n'"),
    "a pickle": (pickle.dumps({"x": [0.0, 1.0]}), 77, "header claims"),
}


def bare_model(path: Path, weights: bytes | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    return path


def assert_one_line(error: HpcmlxError, code: int, *names: str) -> None:
    assert error.exit_code == code
    text = str(error)
    assert text.isprintable() and all(name in text for name in names), text


@pytest.mark.parametrize("kind", FILES)
def test_a_malformed_safetensors_file(tmp_path, kind):
    weights, code, words = FILES[kind]
    path = bare_model(tmp_path / "m", weights)
    with pytest.raises(HpcmlxError, match=words) as caught:
        open_checkpoint(path)
    assert_one_line(caught.value, code, str(path / "model.safetensors"))


def test_the_table_starts_from_good_files(tmp_path):
    for name, header, size in (("one", one(), 8), ("two", TWO, 16)):
        assert open_checkpoint(bare_model(tmp_path / name, raw(header, size))).tensors


INDEXES: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "no readable weight_map"),
    "a list": ("[]", "no readable weight_map"),
    "no weight_map": ('{"metadata": {}}', "no readable weight_map"),
    "weight_map is a list": ('{"weight_map": ["x"]}', "no readable weight_map"),
    "tensor twice": (
        '{"weight_map": {"x": "model.safetensors", "x": "b.safetensors"}}',
        "no readable weight_map",
    ),
    "deep nesting": ('{"weight_map": ' + "[" * 100_000, "no readable weight_map"),
    "shard is a number": ('{"weight_map": {"x": 1}}', "names a file outside"),
    "parent": ('{"weight_map": {"x": "../model.safetensors"}}', "names a file outside"),
    "absolute": ('{"weight_map": {"x": "/etc/passwd"}}', "names a file outside"),
    "subdirectory": ('{"weight_map": {"x": "a/model.safetensors"}}', "names a file outside"),
    "the directory": ('{"weight_map": {"x": ".."}}', "is missing"),
    "shard with a newline": (r'{"weight_map": {"x": "a\nb"}}', "is no proper name"),
    "tensor with an escape": (
        r'{"weight_map": {"\u001b[2J": "model.safetensors"}}',
        "is no proper name",
    ),
    "missing shard": ('{"weight_map": {"x": "b.safetensors"}}', "b.safetensors is missing"),
    "missing tensor": ('{"weight_map": {"z": "model.safetensors"}}', "tensor z is missing"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_malformed_index(tmp_path, kind):
    text, words = INDEXES[kind]
    path = bare_model(tmp_path / "m", raw(one()))
    (tmp_path / "model.safetensors").write_bytes(raw(one()))  # what "../" would find
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(HpcmlxError, match=words) as caught:
        open_checkpoint(path)
    assert_one_line(caught.value, 77, str(path))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"\xff", b"[" * 100_000], ids=["cut", "list", "bytes", "deep"]
)
def test_a_config_that_cannot_be_read(tmp_path, name, text):
    path = bare_model(tmp_path / "m", raw(one()))
    (path / name).write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(path)
    assert_one_line(caught.value, 78, "config.json")


# -- flipped bits --


def flips(files: list[Path], seed: int, last: int | None = None) -> Iterator[Path]:
    """Flip one random bit of one of the files (of its first `last` bytes), and take it back."""
    draw = random.Random(seed)
    for _ in range(NUM_FLIPS):
        path = draw.choice(files)
        whole = path.read_bytes()
        data = bytearray(whole)
        data[draw.randrange(min(len(data), last or len(data)))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        yield path
        path.write_bytes(whole)


def content(path: Path) -> dict[str, bytes]:
    """Everything of a model that may decide a result."""
    checkpoint = open_checkpoint(path)
    verify(path)
    found = {"config": json.dumps(checkpoint.config).encode()}
    for name, info in checkpoint.tensors.items():
        array = checkpoint.read(name)
        found[name] = f"{info.shape}{info.dtype}".encode() + bytes(memoryview(array.view(mx.uint8)))
    small = [file for file in path.iterdir() if file.suffix in (".json", ".jinja")]
    return found | {f.name: f.read_bytes() for f in small if f.name != CHECKSUMS}


def test_no_flipped_bit_gives_another_model(model, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(model, path)
    write_checksums(path)
    want = content(path)
    files = sorted(path.iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json", CHECKSUMS} <= {
        file.name for file in files
    }
    caught = 0
    for flipped in flips(files, seed=40):
        try:
            assert content(path) == want, f"a flipped bit in {flipped.name} went unseen"
            assert flipped.name == CHECKSUMS
        except HpcmlxError as error:
            assert error.exit_code in (77, 78) and str(error).isprintable(), error
            caught += 1
    # White space in the checksum file may change without a consequence; little else may.
    assert caught > 0.9 * NUM_FLIPS
    assert content(path) == want


def num_open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def check_headers(path: Path, files: list[Path], last: int) -> int:
    """How many of the flips were refused; anything but a clean refusal fails."""
    refused, before = 0, num_open_files()
    for _ in flips(files, seed=41, last=last):
        try:
            checkpoint = open_checkpoint(path)
        except HpcmlxError as error:
            assert error.exit_code in (77, 78) and str(error).isprintable(), error
            refused += 1
        else:
            checkpoint.close()
    assert num_open_files() == before
    return refused


def test_without_checksums_a_flipped_header_never_ends_in_a_traceback(model, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(model, path)
    weights = path / "model.safetensors"
    (length,) = struct.unpack("<Q", weights.read_bytes()[:8])
    assert check_headers(path, [weights, path / "config.json"], 8 + length) > NUM_FLIPS / 4


def test_nor_does_that_of_a_gguf_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    assert check_headers(path, [path], 3000) > NUM_FLIPS / 10


# -- nothing of a model directory is executed --


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Iterator[Path]:
    """What hostile code and pickles would make; nobody may."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists(), "code of the model directory was run"


@pytest.fixture
def hostile(model, tmp_path, mark) -> Path:
    """A good model with everything in it that some library would run."""
    path = tmp_path / "hostile"
    shutil.copytree(model, path)
    code = f"open({str(mark)!r}, 'w')\nclass Model: pass\n"
    for name in ("evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(code)
    names = ["adapter_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pt", "vocab.pkl"]
    for name in names:
        (path / name).write_bytes(pickle.dumps(Evil(mark)))
    auto = {"auto_map": {"AutoProcessor": "evil.Model", "AutoTokenizer": ["evil.Model", None]}}
    for name in ("processor_config.json", "preprocessor_config.json", "adapter_config.json"):
        (path / name).write_text(json.dumps(auto | {"processor_class": "EvilProcessor"}))
    return path


def test_what_lies_beside_a_model_is_not_run(hostile, mark):
    checkpoint = open_checkpoint(hostile)
    assert isinstance(checkpoint, Checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.decode(render_chat(tokenizer, [{"role": "user", "content": "hi"}]))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Model", None]}},
        {"tokenizer_class": "TransfoXLTokenizer", "pretrained_vocab_file": "tokenizer.pt"},
        {"tool_parser_type": "evil"},
        {"tool_parser_type": "..evil"},
        {"chat_template_type": "evil"},
    ],
    ids=["class", "pickle", "tool parser", "tool parser above", "template module"],
)
def test_a_tokenizer_that_wants_code_or_a_pickle(hostile, mark, monkeypatch, changes):
    monkeypatch.chdir(hostile)  # an import that looks here would find evil.py
    monkeypatch.syspath_prepend(str(hostile))
    if "tokenizer_class" in changes:  # with tokenizer.json its name does not matter
        (hostile / "tokenizer.json").unlink()
    edit(hostile / "tokenizer_config.json", **changes)
    with pytest.raises(ConfigError, match="tokenizer") as caught:
        load_tokenizer(open_checkpoint(hostile))
    assert_one_line(caught.value, 78, str(hostile))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch mark') }}",
        "{% import 'evil.py' as evil %}",
        "{% include '/etc/passwd' %}",
    ],
    ids=["subclasses", "globals", "import", "include"],
)
def test_a_chat_template_file_stays_in_the_sandbox(hostile, mark, template):
    (hostile / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(open_checkpoint(hostile))
    with pytest.raises((ConfigError, InputError), match="template"):
        render_chat(tokenizer, [{"role": "user", "content": "hi"}])


def test_links_are_followed_as_data(model, tmp_path, mark):
    """Hub caches consist of links, and sites keep weights elsewhere; a link cannot make more of a
    file than data."""
    path = tmp_path / "linked"
    path.mkdir()
    for file in model.iterdir():
        (path / file.name).symlink_to(file)
    assert content(path) == content(model)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    weights = path / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "pytorch_model.bin")
    with pytest.raises(HpcmlxError, match="header claims"):
        open_checkpoint(path)
    (tmp_path / "pytorch_model.bin").unlink()  # as where a cache was cleared
    with pytest.raises(HpcmlxError, match="model.safetensors is missing"):
        open_checkpoint(path)


# -- the same from the command line --


@pytest.mark.parametrize("kind", ["absurd header", "overlap", "unknown dtype"])
def test_a_job_says_one_line(tmp_path, kind):
    weights, code, _ = FILES[kind]
    path = bare_model(tmp_path / "m", weights)
    outcome = run_line(job_line("convert", str(path), str(tmp_path / "target")))
    assert outcome.code == code
    [(_, line)] = outcome.lines
    assert line.startswith(f"convert: {path}/model.safetensors: ")
    assert not (tmp_path / "target").exists()


def test_a_flipped_weight_ends_the_job_before_it_loads(model, tmp_path):
    path = copy_model(model, tmp_path / "m")
    write_checksums(path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(data)
    prompts = write_rows(tmp_path / "in.jsonl", [{"prompt": "Hello"}])
    line = [f"model.path={path}", f"input={prompts}", "sampling.max_tokens=2", "parallel.tp=2"]
    run_dir = tmp_path / "run"
    outcome = run("generate", *line, f"run_dir={run_dir}", ranks=2)
    words = ["model.safetensors has SHA-256", "found by rank", comm.hostname(), "convert.py"]
    assert_refused(outcome, 77, *words, run_dir=run_dir)
    run_dir = tmp_path / "unverified"
    outcome = run("generate", *line, f"run_dir={run_dir}", "model.verify=false", ranks=2)
    assert_done(outcome, run_dir)
