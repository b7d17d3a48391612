"""What must not be seen: secrets, kept out of everything that a job writes or says.

A value that was written as `${oc.env:X}` is put back to that text in every message of this process
(`hide`, `scrub`); files get the configuration as it was written. What looks like a secret is
taken out of the run record's command line and configuration (`command_line`, `values`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

#: What stands in the place of a secret.
HIDDEN = "(hidden)"
#: Keys whose values name a place or are said to mpirun and Slurm: they cannot be kept from others.
PUBLIC = ("run_dir", "resume", "launch")

_FROM_ENVIRONMENT = re.compile(r"oc\.env\s*:\s*[\"']?([A-Za-z_]\w*)")
_SECRET_KEY = re.compile(
    r"(?:^|[._\-+])(?:token|pass|password|passwd|passphrase|secret|credentials?|auth"
    r"|(?:api|access|private|secret)[_-]?key)$",
    re.IGNORECASE,
)
# As issued by Hugging Face, OpenAI and others, GitHub, Slack, AWS; a JSON web token.
_SECRET_TEXT = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
# Shorter ones are words like "auto" or a number of ranks. Up to _WORD characters a value counts
# only as a whole word: in a longer one it stands by chance.
_SHORTEST, _WORD = 4, 12

#: (pattern of a value, what was written for it), the longest first; of this process.
_hidden: tuple[tuple[re.Pattern[str], str], ...] = ()


def secrets(config: Mapping[str, Any], unresolved: Mapping[str, str]) -> dict[str, str]:
    """The values that came from the environment, each with what was written for it.

    Args:
        config: plain nested values, interpolations resolved.
        unresolved: dotted key -> text, of the values that were written as interpolations.
    """
    found = {}
    for key, text in unresolved.items():
        if "oc.env" not in text or key.partition(".")[0] in PUBLIC:
            continue
        for name in _FROM_ENVIRONMENT.findall(text):
            if name in os.environ:
                found[os.environ[name]] = f"${{oc.env:{name}}}"
        # Also where the name is not plain: it may itself be an interpolation.
        found |= dict.fromkeys(_texts(_at(config, key)), text)
    return {value: text for value, text in found.items() if len(value) >= _SHORTEST}


def written(key: str, value: Any, unresolved: Mapping[str, str]) -> Any:
    """What a file keeps of a setting: the value, or the text it was written as."""
    return next((text for k, text in unresolved.items() if _covers(k, key)), value)


def compared(key: str, value: Any, unresolved: Mapping[str, str]) -> Any:
    """The same where a later launch has to see whether the value has changed: the text and the
    value's hash."""
    if (text := next((t for k, t in unresolved.items() if _touches(k, key)), None)) is None:
        return value
    plain = json.dumps(value, ensure_ascii=False)
    return f"{text} with SHA-256 {hashlib.sha256(plain.encode()).hexdigest()}"


def hide(values: Mapping[str, str]) -> None:
    """From now on `scrub` replaces these values; those it was told before, no longer."""
    global _hidden
    _hidden = tuple(
        (_pattern(value), values[value]) for value in sorted(values, key=len, reverse=True)
    )


def scrub(text: str) -> str:
    """A message of this process without what came from the environment."""
    for pattern, written in _hidden:
        text = pattern.sub(lambda _, written=written: written, text)  # type: ignore[misc]
    return text


def command_line(argv: Iterable[str]) -> list[str]:
    """A command line without the values of keys like `api_key=`, and without known tokens."""
    shown = []
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and _SECRET_KEY.search(key) and not _is_written(value):
            word = f"{key}={HIDDEN}"
        shown.append(_text(word))
    return shown


def values(node: Any, key: str = "") -> Any:
    """The same for plain nested values: a configuration as it was written."""
    if isinstance(node, Mapping):
        return {name: values(value, str(name)) for name, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [values(value, key) for value in node]
    if not isinstance(node, str):
        return node
    if _SECRET_KEY.search(key) and not _is_written(node):
        return HIDDEN
    return _text(node)


def _covers(key: str, other: str) -> bool:
    """Whether `other` is `key` or a part of it."""
    return other == key or other.startswith((f"{key}.", f"{key}["))


def _touches(key: str, other: str) -> bool:
    return _covers(key, other) or _covers(other, key)


def _is_written(value: str) -> bool:
    return value.strip("'\"").startswith("${")


def _text(text: str) -> str:
    return _LOGIN.sub(f"{HIDDEN}@", _SECRET_TEXT.sub(HIDDEN, text))


def _pattern(value: str) -> re.Pattern[str]:
    text = re.escape(value)
    return re.compile(rf"(?<!\w){text}(?!\w)" if len(value) <= _WORD else text)


def _texts(node: Any) -> Iterator[str]:
    """Every text in plain nested values."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping | list):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from _texts(value)


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, as in `data.train[0]`."""
    node: Any = config
    for name in re.findall(r"[^.\[\]]+", key):
        try:
            node = node[int(name)] if isinstance(node, list) else node[name]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return node
