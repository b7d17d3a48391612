"""Messages of a conversation, in OpenAI's form, as chat templates want them.

Batch rows and training examples both come through here before `tokenizer.ChatRenderer`.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


class BadMessages(Exception):
    """Messages or tools that cannot be used, in words."""


def check_messages(messages: Any) -> list[Message]:
    """Messages with text as one string, arguments of tool calls as objects, and no key without a
    value.

    Args:
        messages: from a JSON row.

    Raises:
        BadMessages: they are of another form, or hold what is no text.
    """
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    ):
        raise BadMessages("'messages' must be a list of objects with 'role' and 'content'")
    return [_message(message) for message in messages]


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools of a row, none if it names none.

    Raises:
        BadMessages: they are no list of objects.
    """
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadMessages("'tools' must be a list of objects")
    return tools


def _message(message: Message) -> Message:
    # Tables that became JSON have every column in every message.
    message = {key: value for key, value in message.items() if value is not None}
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(calls)
    elif "content" not in message:
        raise BadMessages(f"a message of role {message['role']!r} has no 'content'")
    return {**message, "content": _text(message.get("content", ""))}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadMessages(f"the content of a message must be text, not {type(content).__name__!r}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise BadMessages(f"a content part of type {kind!r} cannot be used: only 'text' can")
        if not isinstance(part.get("text"), str):
            raise BadMessages("a content part of type 'text' needs a 'text' that is a string")
    return "".join(part["text"] for part in content)


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """OpenAI writes arguments as JSON text; templates want objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadMessages("'tool_calls' must be a list of objects")
    done = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                raise BadMessages("the arguments of a tool call are not JSON") from None
            call = {**call, "function": {**function, "arguments": arguments}}
        done.append(call)
    return done
