"""The tokenizer of a model, as mlx-lm wraps it, and its chat template rendered within limits.

Nothing from a model directory is ever executed: `trust_remote_code` is always False, and templates
run in transformers' sandbox, for 5 s at most.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import jinja2
from jinja2.sandbox import SecurityError
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from hpcmlx.errors import ConfigError, InputError
from hpcmlx.models.checkpoint import Checkpoint, open_checkpoint
from hpcmlx.models.gguf import GGUFCheckpoint
from hpcmlx.models.gguf_tokenizer import save_gguf_tokenizer

TEMPLATE_SECONDS = 5.0
_TRIES = 2  # a template that ran out of its time so often is left alone
# Characters of its own that a template may write, and how often it may repeat the messages.
_OWN_TEXT, _REPEATS = 1 << 18, 8

T = TypeVar("T")


def load_tokenizer(
    source: str | Path | Checkpoint | GGUFCheckpoint, config: Mapping[str, Any] | None = None
) -> TokenizerWrapper:
    """The tokenizer of a model directory or a GGUF file.

    Args:
        source: an open checkpoint, or what `open_checkpoint` takes.
        config: the model's config, for its end-of-sequence ids; None is the checkpoint's own.

    Raises:
        ConfigError: there is no usable tokenizer, or only one that wants to run its own code.
    """
    if isinstance(source, str | Path):
        source = open_checkpoint(source)
    ends = (source.config if config is None else config).get("eos_token_id")
    if isinstance(source, Checkpoint):
        return _load(source.path, source.path, ends)
    with TemporaryDirectory(prefix="hpcmlx-tokenizer-") as directory:
        save_gguf_tokenizer(source.metadata, Path(directory))
        return _load(Path(directory), source.path, ends)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Text to tokens, with the tokenizer's own start token unless the text brings it."""
    bos = tokenizer.bos_token
    return tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, which nobody has to trust.

    Whatever the template does wrong is said of the conversation at hand, so that a job can go on
    with its other rows. A template that has used up its time twice is not tried again: thousands of
    rows would wait for it one after the other.

    Args:
        tokenizer: as `load_tokenizer` gives it.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        self._num_expired = 0

    def __call__(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """The prompt tokens of a conversation, ready for the assistant's turn.

        Args:
            messages: `{"role", "content"}` objects.
            kwargs: passed to the template (`add_generation_prompt=False`, `tools=…`).

        Raises:
            InputError: the model has no chat template, or its template refuses these messages, is
                broken, tries to leave the sandbox, or takes longer than 5 s.
        """
        text = self.text(messages, **kwargs)
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        except (TypeError, ValueError) as error:
            raise InputError(f"the chat template gives no usable text: {_line(error)}") from error

    def text(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The same as text."""
        if not self._tokenizer.has_chat_template:
            raise InputError(
                "the model has no chat template, so it cannot take `messages`; give `prompt` "
                "instead"
            )
        text = self._render([dict(m) for m in messages], kwargs)
        # Tokenizing is not in the template's 5 s, because a long text may take that long and be
        # welcome; so the template must not make a short one long.
        given = len(json.dumps([messages, kwargs], ensure_ascii=False, default=str))
        if len(text) > _OWN_TEXT + _REPEATS * given:
            raise InputError(
                f"the model's chat template runs out of bounds: {len(text)} characters from "
                f"messages of {given}"
            )
        return text

    def _render(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any]) -> str:
        options = {"add_generation_prompt": True, **kwargs, "tokenize": False}
        expired = f"the model's chat template did not end within {TEMPLATE_SECONDS:g} s"
        if self._num_expired == _TRIES:
            raise InputError(expired)
        try:
            return _limited(lambda: self._tokenizer.apply_chat_template(messages, **options))
        except TimeoutError:
            self._num_expired += 1
            raise InputError(expired) from None
        except (SecurityError, jinja2.TemplateSyntaxError, ImportError) as error:
            raise InputError(f"the model's chat template is refused: {_line(error)}") from error
        except (MemoryError, OverflowError, RecursionError) as error:
            message = f"the model's chat template runs out of bounds: {_line(error)}"
            raise InputError(message) from error
        except Exception as error:  # a template can raise what it likes; it is all its own
            raise InputError(f"the chat template refuses these messages: {_line(error)}") from error


def render_chat(
    tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], **kwargs: Any
) -> list[int]:
    """The prompt tokens of one conversation; arguments and errors as `ChatRenderer`."""
    return ChatRenderer(tokenizer)(messages, **kwargs)


def _line(error: Exception) -> str:
    """The first line of what an error says, else its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _load(directory: Path, named: Path, ends: int | list[int] | None) -> TokenizerWrapper:
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(
            directory,
            {"trust_remote_code": False, "local_files_only": True},
            eos_token_ids=ends,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise ConfigError(f"{named}: no usable tokenizer ({_line(error)})") from error
    _check_templates(named, tokenizer.chat_template)
    return tokenizer


def _check_templates(named: Path, templates: str | Mapping[str, str] | None) -> None:
    """Refuse powers: `9**9**9` is one operation of the interpreter, which no limit can end."""
    texts = templates.values() if isinstance(templates, Mapping) else [templates or ""]
    for text in texts:
        before = ""
        try:
            for _, kind, value in jinja2.Environment().lex(text):
                if kind in ("whitespace", "comment"):
                    continue
                # After "(" or "," the same sign hands over keyword arguments.
                if kind == "operator" and value == "**" and before not in ("(", ","):
                    raise ConfigError(
                        f"{named}: the chat template raises to a power, which is refused"
                    )
                before = value
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{named}: the chat template is broken: {error}") from error


class _Expired(BaseException):
    """Thrown into a template's thread when its time is over; no `except Exception` stops it."""


def _limited(function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own; TimeoutError after `TEMPLATE_SECONDS`.

    A thread rather than an alarm signal: it works from any thread and leaves the process's signals
    to MPI and the test runner.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            failure.append(error)

    thread = threading.Thread(target=run, name="chat-template", daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Expired)
        )
        thread.join(1.0)
        raise TimeoutError
    if failure:
        raise failure[0]
    return outcome[0]
