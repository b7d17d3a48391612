"""The tokenizer of a model, as mlx-lm wraps it, and its chat template rendered within limits.

Nothing from a model directory is ever executed: `trust_remote_code` is always False, and templates
run in transformers' sandbox, for 5 s at most.
"""

from __future__ import annotations

import ctypes
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


def render_chat(
    tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], **kwargs: Any
) -> list[int]:
    """The prompt tokens of a conversation, ready for the assistant's turn.

    Args:
        messages: `{"role", "content"}` objects.
        kwargs: passed to the template (`add_generation_prompt=False`, `tools=…`).

    Raises:
        InputError: the model has no chat template, or its template refuses these messages.
        ConfigError: the template is broken, tries to leave the sandbox, or takes longer than 5 s.
    """
    if not tokenizer.has_chat_template:
        raise InputError(
            "the model has no chat template, so it cannot take `messages`; give `prompt` instead"
        )
    options = {"add_generation_prompt": True, **kwargs}
    try:
        return _limited(
            lambda: list(tokenizer.apply_chat_template([dict(m) for m in messages], **options))
        )
    except (SecurityError, jinja2.TemplateSyntaxError, ImportError) as error:
        raise ConfigError(f"the model's chat template is refused: {error}") from error
    except (MemoryError, OverflowError, RecursionError) as error:
        raise ConfigError(f"the model's chat template runs out of bounds: {error}") from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"the chat template refuses these messages: {error}") from error


def _load(directory: Path, named: Path, ends: int | list[int] | None) -> TokenizerWrapper:
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(
            directory,
            {"trust_remote_code": False, "local_files_only": True},
            eos_token_ids=ends,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{named}: no usable tokenizer ({line})") from error
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


def _limited(function: Callable[[], T], seconds: float | None = None) -> T:
    """Call `function` in a thread of its own and give up after `seconds`.

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

    seconds = TEMPLATE_SECONDS if seconds is None else seconds
    thread = threading.Thread(target=run, name="chat-template", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Expired)
        )
        thread.join(1.0)
        raise ConfigError(f"the model's chat template did not end within {seconds:g} s")
    if failure:
        raise failure[0]
    return outcome[0]
