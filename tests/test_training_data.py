"""Examples are masked as a reader would do it by hand, kept in a cache, and found again."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError, InputError, IntegrityError
from hpcmlx.models.messages import BadMessages
from hpcmlx.models.tokenizer import load_tokenizer
from hpcmlx.training.data import dataset as dataset_module
from hpcmlx.training.data.dataset import content_key, open_dataset
from hpcmlx.training.data.examples import ExampleReader, ExampleSettings, data_files
from tests.fixtures import ROOT, save_tokenizer, write_rows

TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
TALK = {"messages": [{"role": role, "content": text} for role, text in TURNS]}
SMOLLM2 = ROOT / "models/smollm2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(saved):
    """A token for each character; `<|user|>` and the like are one token."""
    return TokenizerWrapper(PreTrainedTokenizerFast.from_pretrained(saved))


def shown(tokenizer, sample) -> str:
    """The tokens of an example, with brackets round those to be predicted."""
    text, inside = "", False
    tokens = tokenizer.convert_ids_to_tokens(sample.tokens.tolist())
    for token, target in zip(tokens, sample.targets, strict=True):
        text += ("[" if target else "]") * (bool(target) != inside) + token
        inside = bool(target)
    return text + "]" * inside


def masked(tokenizer, row, targets="assistant") -> str:
    reader = ExampleReader(tokenizer, ExampleSettings(200, targets))
    return shown(tokenizer, reader.example(row))


@pytest.mark.parametrize(
    "targets, row, wanted",
    [
        ("last", {"text": "hey"}, "h[ey</s>]"),
        ("all", {"text": "hey</s>"}, "h[ey</s>]"),
        ("assistant", {"prompt": "hi", "completion": "yo"}, "<|user|>hi\n<|assistant|>[yo\n]"),
        ("all", {"prompt": "hi", "completion": "yo"}, "<|user|>[hi\n<|assistant|>yo\n]"),
        ("assistant", TALK, "<|user|>a\n<|assistant|>[b\n]<|user|>c\n<|assistant|>[d\n]"),
        ("last", TALK, "<|user|>a\n<|assistant|>b\n<|user|>c\n<|assistant|>[d\n]"),
        ("all", TALK, "<|user|>[a\n<|assistant|>b\n<|user|>c\n<|assistant|>d\n]"),
    ],
)
def test_what_is_to_be_predicted(tokenizer, targets, row, wanted):
    assert masked(tokenizer, row, targets) == wanted


def test_turns_of_other_roles_and_of_weight_0_are_left_out(tokenizer):
    user, first, again, last = TALK["messages"]
    rows = [
        [user, first, again],
        [user, {**first, "weight": 0}, again, {**last, "weight": 1}],
        [user, first, {"role": "assistant", "content": None, "tool_calls": [{}], "name": None}],
    ]
    assert [masked(tokenizer, {"messages": messages, "tools": None}) for messages in rows] == [
        "<|user|>a\n<|assistant|>[b\n]<|user|>c\n",
        "<|user|>a\n<|assistant|>b\n<|user|>c\n<|assistant|>[d\n]",
        "<|user|>a\n<|assistant|>[b\n]<|assistant|>[\n]",
    ]


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% for m in messages %}"
        "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}={{ c.function.arguments.x + 1 }}{% endfor %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 2}'}}
    row = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "user", "content": "3"},  # tool results, as some templates have them
            {"role": "assistant", "content": "so 3"},
        ],
    }
    wanted = "f;<|user|>a\n<|assistant|>[f=3\n]<|user|>3\n<|assistant|>[so 3\n]"
    assert masked(tokenizer, row) == wanted


def test_a_template_that_rewrites_turns_is_never_masked_wrongly(tokenizer):
    """As those do that leave the thinking out of all turns but the last."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if loop.last or m.role == 'user' %}{{ m.content }}"
        "{% else %}{{ m.content.split('|')[-1] }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [{**m, "content": m["content"].replace("b", "x|b")} for m in TALK["messages"]]
    with pytest.raises(BadMessages, match=r"where message 2 is.*others follow.*targets=last"):
        masked(tokenizer, {"messages": messages})
    wanted = "<|user|>a\n<|assistant|>b\n<|user|>c\n<|assistant|>[d\n]"
    assert masked(tokenizer, {"messages": messages}, "last") == wanted
    assert masked(tokenizer, {"messages": messages[:2]}) == "<|user|>a\n<|assistant|>[x|b\n]"
    tokenizer.chat_template += "{% if add_generation_prompt %}(think){% endif %}"
    with pytest.raises(BadMessages, match="where message 4 is: the text that asks for it"):
        masked(tokenizer, {"messages": messages}, "last")


def test_a_token_that_begins_before_an_answer_is_none_of_it():
    vocab = {token: i for i, token in enumerate(["?", "a", "b", "\n", "\n\n", "\n\n\n"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\n]"), "isolated")
    template = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}\n{% endif %}"
    )
    tokenizer = TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", chat_template=template)
    )
    # The prompt ends in "\n\n" and the answer begins with "\n".
    row = {"prompt": "a", "completion": "\n\nb"}
    assert masked(tokenizer, row) == "a\n\n\n[b\n]"


def test_spaces_that_belong_to_no_token():
    """Byte-level tokenizers may count a space out of its token: at (2, 2) instead of (1, 2)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}: {% endif %}"
    )
    tokenizer = TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)
    )
    row = {"prompt": "a", "completion": ":  b c"}
    assert masked(tokenizer, row) == "aĠ:Ġ[ĠbĠcĠ]"


BAD = {
    "neither": ({"prompts": "a"}, "needs either 'text'"),
    "both": ({"text": "a", **TALK}, "needs either 'text'"),
    "no completion": ({"prompt": "a"}, "'completion' must be a string, not NoneType"),
    "number": ({"text": 3}, "'text' must be a string, not int"),
    "no messages": ({"messages": []}, "'messages' must be a list of objects"),
    "no role": ({"messages": [{"content": "a"}]}, "with 'role' and 'content'"),
    "no content": ({"messages": [{"role": "user"}]}, "role 'user' has no 'content'"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "a content part of type 'image_url' cannot be used",
    ),
    "weight": ({"messages": [{"role": "user", "content": "", "weight": 0.5}]}, "must be 0 or 1"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
        "arguments of a tool call are not JSON",
    ),
    "tools": ({"tools": "f", **TALK}, "'tools' must be a list of objects"),
    "no answer": ({"messages": TALK["messages"][:1]}, "nothing to predict"),
    "empty": ({"text": ""}, "nothing to predict"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_is_no_example_is_refused(tokenizer, kind):
    row, message = BAD[kind]
    with pytest.raises(BadMessages, match=message):
        masked(tokenizer, row)


def test_the_first_bad_row_and_their_number_are_named(tokenizer, tmp_path):
    good = write_rows(tmp_path / "a.jsonl", [{"text": "fine"}])
    bad = write_rows(tmp_path / "b.jsonl", ["", "{", {"text": "fine"}, "[1]", {"no": "text"}])
    reader = ExampleReader(tokenizer, ExampleSettings(10))
    with pytest.raises(InputError, match=rf"^{bad}:2: not JSON.* \(and 2 more bad rows\)$"):
        list(reader.read([good, bad]))
    empty = write_rows(tmp_path / "c.jsonl", [])
    with pytest.raises(InputError, match="no examples in"):
        list(ExampleReader(tokenizer, ExampleSettings(10)).read([empty]))


def test_a_model_without_a_template_takes_texts(tokenizer):
    tokenizer.chat_template = None
    tokenizer.has_chat_template = False
    assert masked(tokenizer, {"text": "hey"}) == "h[ey</s>]"
    with pytest.raises(BadMessages, match="no chat template, which 'prompt' needs"):
        masked(tokenizer, {"prompt": "hi", "completion": "yo"})


def test_long_examples_are_cut_dropped_or_refused_and_counted(tokenizer, tmp_path):
    rows = [
        {"text": "short"},
        {"text": "much too long"},
        {"prompt": "too long a prompt", "completion": "yo"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def read(too_long: str) -> tuple[list[str], int, int]:
        reader = ExampleReader(tokenizer, ExampleSettings(8, too_long=too_long))
        samples = [shown(tokenizer, sample) for sample in reader.read([path])]
        assert reader.counts.rows == 3
        return samples, reader.counts.truncated, reader.counts.dropped

    assert read("truncate") == (["s[hort</s>]", "m[uch too]"], 1, 1)
    assert read("drop") == (["s[hort</s>]"], 0, 2)
    with pytest.raises(InputError, match=r":2: 14 tokens, more than max_length=8 \(and 1 more"):
        read("refuse")


@pytest.mark.parametrize("setting", [{"targets": "user"}, {"too_long": "cut"}, {"max_length": 1}])
def test_unknown_settings_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ExampleSettings(**{"max_length": 8} | setting)


def test_files_and_directories(tmp_path):
    for name in ("valid.jsonl", "train.jsonl", "notes.txt"):
        write_rows(tmp_path / name, [])
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    assert data_files([tmp_path]) == (train, valid)
    assert data_files([tmp_path], "valid") == (valid,)
    assert data_files([valid, tmp_path], "train") == (valid, train)
    for paths, split in (([tmp_path], "test"), ([tmp_path / "none.jsonl"], None), ([], None)):
        with pytest.raises(InputError):
            data_files(paths, split)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="NOT TESTED ON A REAL MODEL: no models/smollm2")
def test_smollm2_agrees_with_mlx_lm():
    tokenizer = load_tokenizer(SMOLLM2)
    pair = {"prompt": "What is MPI?\n", "completion": "\n  A standard — since 1994."}
    text = {"text": "Ranks talk.\nHéllo 漢字 🙂"}
    talk = {"messages": [{"role": "system", "content": "Be brief."}, *TALK["messages"]]}
    offsets = {}
    for name, row, theirs in (
        ("pair", pair, CompletionsDataset([], tokenizer, "prompt", "completion", True)),
        ("talk", talk, ChatDataset([], tokenizer, mask_prompt=True)),
        ("text", text, TextDataset([], tokenizer)),
    ):
        tokens, offset = theirs.process(dict(row))
        sample = ExampleReader(tokenizer, ExampleSettings(999, "last")).example(row)
        assert sample.tokens.tolist() == list(tokens)
        assert sample.targets.tolist() == [max(offset, 1) <= i for i in range(len(tokens))]
        offsets[name] = offset
    assert offsets["pair"] > 10 and offsets["talk"] > 10
    both = ExampleReader(tokenizer, ExampleSettings(999)).example(talk)
    answers = np.split(both.tokens, np.flatnonzero(np.diff(both.targets)) + 1)[1::2]
    assert [tokenizer.decode(a.tolist()) for a in answers] == [f"{x}<|im_end|>\n" for x in "bd"]


# -- the cache --

ROWS = [{"text": "one"}, {"prompt": "hi", "completion": "yo"}, TALK, {"text": "a longer text"}]
SETTINGS = ExampleSettings(60)


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "train.jsonl", ROWS)


def opened(rows, tokenizer, settings=SETTINGS):
    return open_dataset([rows], tokenizer, settings, rows.parent / "cache", Communicator())


def check(dataset, tokenizer) -> None:
    """It holds what a reader gives."""
    reader = ExampleReader(tokenizer, SETTINGS)
    wanted = [reader.example(row) for row in ROWS]
    assert len(dataset) == len(wanted) and dataset.counts.rows == len(ROWS)
    for i in np.random.default_rng(0).permutation(len(wanted)).tolist():
        sample = dataset[i]
        assert sample.tokens.dtype == np.int32 and sample.targets.dtype == bool
        assert shown(tokenizer, sample) == shown(tokenizer, wanted[i])
        assert dataset.lengths[i] == len(sample.tokens)
        assert dataset.num_targets[i] == sample.targets.sum()
    with pytest.raises(IndexError):
        dataset[len(wanted)]


def test_examples_are_tokenized_once(rows, tokenizer, monkeypatch):
    first = opened(rows, tokenizer)
    check(first, tokenizer)
    monkeypatch.setattr(dataset_module, "ExampleReader", None)
    again = opened(rows, tokenizer)
    assert again.content_hash == first.content_hash
    monkeypatch.undo()
    check(again, tokenizer)


def test_many_examples_go_through_a_small_buffer(rows, tokenizer, monkeypatch):
    whole = opened(rows, tokenizer)
    cache = rows.parent / "cache"
    for file in cache.iterdir():
        file.unlink()
    monkeypatch.setattr("hpcmlx.training.data.token_cache._BUFFER", 20)
    pieces = opened(rows, tokenizer)
    assert pieces.content_hash == whole.content_hash
    check(pieces, tokenizer)


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(data[:-1])
    elif how == "no checksum":
        path.with_name(f"{path.name}.sha256").unlink()
    elif how == "other checksum":
        path.with_name(f"{path.name}.sha256").write_bytes(b"\0\xff")
    else:
        data[len(data) * int(how) // 100] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["0", "7", "55", "99", "cut", "no checksum", "other checksum"])
def test_a_damaged_cache_is_built_again(rows, tokenizer, how, caplog):
    caplog.set_level("WARNING", logger="hpcmlx")
    wanted = opened(rows, tokenizer).content_hash
    (path,) = (rows.parent / "cache").glob("*.h5")
    damaged(path, how)
    dataset = opened(rows, tokenizer)
    assert "the tokens are computed again" in caplog.text
    assert dataset.content_hash == wanted
    check(dataset, tokenizer)
    caplog.clear()
    opened(rows, tokenizer)
    assert not caplog.text


def test_damage_while_the_job_runs_is_seen(rows, tokenizer):
    dataset = opened(rows, tokenizer)
    (path,) = (rows.parent / "cache").glob("*.h5")
    with h5py.File(path, locking=False) as file:
        place = file["tokens"].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff")
    with pytest.raises(IntegrityError, match="has changed while it was read"):
        dataset[0]


def test_bad_rows_leave_no_cache(rows, tokenizer):
    write_rows(rows, [*ROWS, "{"])
    with pytest.raises(InputError, match=rf"{rows}:5: not JSON"):
        opened(rows, tokenizer)
    assert list((rows.parent / "cache").iterdir()) == []


def test_what_was_cut_is_said(rows, tokenizer, caplog):
    caplog.set_level("WARNING", logger="hpcmlx")
    opened(rows, tokenizer, ExampleSettings(7))
    assert "3 of 4 rows were longer than max_length=7 and were cut to it" in caplog.text
    caplog.clear()
    opened(rows, tokenizer, ExampleSettings(7, too_long="drop"))
    assert "3 of 4 rows were longer than max_length=7 and were left out" in caplog.text
    assert "were cut" not in caplog.text


def test_whatever_decides_the_examples_is_in_the_key(rows, tokenizer, saved, monkeypatch):
    other = write_rows(rows.with_name("other.jsonl"), [{"text": "more"}])
    keys = [content_key([rows], tokenizer, SETTINGS)]

    def add(files=(rows,), settings=SETTINGS, changed=tokenizer) -> None:
        keys.append(content_key(files, changed, settings))

    add([rows, other])
    add([other, rows])
    for setting in ({"max_length": 61}, {"targets": "last"}, {"too_long": "drop"}):
        add(settings=ExampleSettings(**{"max_length": 60} | setting))
    template = tokenizer.chat_template
    tokenizer.chat_template = template + " "
    add()
    tokenizer.chat_template = template
    more = PreTrainedTokenizerFast.from_pretrained(saved)
    more.add_tokens(["xyz"])
    add(changed=TokenizerWrapper(more))
    rows.write_text(rows.read_text().replace("one", "two"))
    add()
    monkeypatch.setattr(dataset_module, "FORMAT", 2)
    add()
    assert len(set(keys)) == len(keys) == 10


def test_the_key_does_not_depend_on_use(rows, tokenizer):
    key = content_key([rows], tokenizer, SETTINGS)
    tokenizer.backend_tokenizer.enable_truncation(4)
    check(opened(rows, tokenizer), tokenizer)
    assert content_key([rows], tokenizer, SETTINGS) == key
