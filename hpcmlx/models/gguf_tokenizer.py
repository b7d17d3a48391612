"""The tokenizer that a GGUF file describes, written as the files of a Hugging Face directory.

llama.cpp stores tokens, merges or scores, and only the *name* of the rule that splits text before
the merges. A name that is not in the table here is refused: with the wrong rule a model still
answers, only worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from hpcmlx.errors import ConfigError

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the rule; "digits" and "gpt2" are GPT-2's, with and without single digits
_SPLITS = {
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "gpt-2": "gpt2",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


def save_gguf_tokenizer(metadata: Mapping[str, Any], target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into `target`.

    Args:
        metadata: the GGUF file's keys, arrays included.

    Raises:
        ConfigError: the file has no tokenizer, or one of an unknown kind.
    """

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    tokens = value("tokens")
    if not tokens:
        raise ConfigError("the GGUF file has no tokenizer (tokenizer.ggml.tokens)")
    if len(set(tokens)) != len(tokens):
        raise ConfigError("the GGUF file's vocabulary holds a token twice")
    kind = value("model")
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, value("merges", ()), value("pre"))
    elif kind == "llama":
        tokenizer = _sentencepiece(
            _positions_or_scores(metadata, tokens),
            value("add_space_prefix", True),
            value("unknown_token_id"),
        )
    else:
        raise ConfigError(f"tokenizer.ggml.model={kind!r} is not supported (gpt2 and llama are)")
    for text, token_type in zip(tokens, value("token_type", ()), strict=False):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise ConfigError("the GGUF file's special tokens are not in its vocabulary")

    def token(key: str) -> str | None:
        number = value(f"{key}_token_id")
        return None if number is None else tokenizer.id_to_token(number)

    # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
    if value("add_bos_token", kind == "llama") and (bos := token("bos")) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, value("bos_token_id"))],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(target)


def _byte_level(tokens: Sequence[str], merges: Sequence[str], rule: str | None) -> Tokenizer:
    split = _SPLITS.get(rule or "")
    if split is None:
        raise ConfigError(
            f"tokenizer.ggml.pre={rule!r}: it is not known how this tokenizer splits text; "
            "use the model's safetensors directory"
        )
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=pairs,
            # These two vocabularies hold words that no sequence of merges reaches.
            ignore_merges=split in (_LLAMA3, _TEKKEN),
        )
    )
    if split == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    if split in ("digits", "gpt2"):
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.ByteLevel(add_prefix_space=False)
        ]
        if split == "digits":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        steps = [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _positions_or_scores(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, float]:
    """How early each token is merged, highest first. Gemma's scores do not follow its merge order,
    the order of its vocabulary does; its runs of spaces may be stored as real spaces."""
    if str(metadata.get("general.architecture")).startswith("gemma"):
        runs = ("▁" * len(t) if len(t) > 1 and not t.strip(" ") else t for t in tokens)
        return {token: -float(i) for i, token in enumerate(runs)}
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ConfigError("tokenizer.ggml.scores does not fit tokenizer.ggml.tokens")
    return dict(zip(tokens, scores, strict=True))


def _sentencepiece(
    scores: Mapping[str, float], prefix_space: bool, unknown: int | None
) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(scores)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, scores),
            unk_token=None if unknown is None else list(vocab)[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix_space else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best token first: what sentencepiece's
    greedy merging by score does, as a list of merges."""
    found = []
    for token, score in scores.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
