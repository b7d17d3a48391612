"""Conversations as chat templates want them, and where in the rendered text the assistant speaks.

The template itself says what a turn is: what a message adds to the text that leads up to it. So
the conversation is rendered up to each answer, and all of these texts must be beginnings of the
whole one. Called by `examples.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hpcmlx.errors import InputError
from hpcmlx.models.tokenizer import ChatRenderer

Message = dict[str, Any]
#: Half-open range of characters.
Span = tuple[int, int]


class BadExample(Exception):
    """A row that cannot be an example, in words."""


def check_messages(messages: Any) -> list[Message]:
    """Messages as templates want them: text as one string, arguments of tool calls as objects, no
    key without a value.

    Args:
        messages: of OpenAI's form, from a JSON row.

    Raises:
        BadExample: they are of another form, or hold what is no text.
    """
    if not isinstance(messages, list) or not messages:
        raise BadExample("'messages' must be a list of messages")
    return [_message(message) for message in messages]


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools of a row, none if it names none. Raises BadExample."""
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadExample("'tools' must be a list of objects")
    return tools


def render(
    renderer: ChatRenderer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    *,
    answers: str | None,
) -> tuple[str, list[Span]]:
    """A conversation as text, and where in it are the answers to learn.

    A span begins where the model is asked to speak and ends where its message does, with
    everything that the template writes to end it. An answer of weight 0 (OpenAI's way to leave one
    out) has no span.

    Args:
        answers: "all" the assistant's, only the "last" one, or None of them.

    Raises:
        BadExample: the template refuses the messages; or it writes a turn differently once others
            follow, so that the turn's place in the whole is not known.
    """
    shown = [{k: v for k, v in message.items() if k != "weight"} for message in messages]

    def text(count: int, ask: bool) -> str:
        options = {"tools": list(tools)} if tools else {}
        try:
            return renderer.text(shown[:count], add_generation_prompt=ask, **options)
        except InputError as error:
            part = "" if count == len(shown) else f" (of the first {count} of {len(shown)})"
            raise BadExample(f"{error}{part}") from None

    whole = text(len(shown), False)
    turns = [i for i, message in enumerate(shown) if message["role"] == "assistant"]
    if answers is None:
        turns = []
    elif answers == "last":
        turns = turns[-1:]
    spans = []
    for turn in turns:
        if messages[turn].get("weight", 1) == 0:
            continue
        before = text(turn, True)
        after = whole if turn + 1 == len(shown) else text(turn + 1, False)
        if not whole.startswith(before):
            raise BadExample(_differs(turn, "the text that asks for it is not how it begins"))
        if not whole.startswith(after) or len(after) <= len(before):
            raise BadExample(_differs(turn, "it is written differently once others follow"))
        spans.append((len(before), len(after)))
    return whole, spans


def _differs(turn: int, how: str) -> str:
    return (
        f"the chat template does not say where message {turn + 1} is: {how}; give each answer a "
        "row of its own, with targets=last"
    )


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadExample("a message must be an object with 'role' and 'content'")
    # Tables that became JSON have every column in every message.
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("weight", 1) not in (0, 1):
        raise BadExample(f"the weight of a message must be 0 or 1, not {message['weight']!r}")
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = _tool_calls(calls)
    elif "content" not in message:
        raise BadExample(f"a message of role {message['role']!r} has no 'content'")
    return {**message, "content": _text(message.get("content", ""))}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if (
            not isinstance(part, dict)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadExample(f"the content of a message must be text, not {kind!r}")
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """OpenAI writes arguments as JSON text; templates want objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadExample("'tool_calls' must be a list of objects")
    done = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                raise BadExample("the arguments of a tool call are not JSON") from None
            call = {**call, "function": {**function, "arguments": arguments}}
        done.append(call)
    return done
