"""Conversations as chat templates want them, and where in the rendered text the assistant speaks.

The template itself says what a turn is: what a message adds to the text that leads up to it. So
the conversation is rendered up to each answer, and all of these texts must be beginnings of the
whole one. Called by `examples.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcmlx.errors import InputError
from hpcmlx.models.messages import BadMessages, Message
from hpcmlx.models.tokenizer import ChatRenderer

#: Half-open range of characters.
Span = tuple[int, int]


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
        BadMessages: the template refuses the messages; or it writes a turn differently once others
            follow, so that the turn's place in the whole is not known.
    """
    for weight in (message.get("weight", 1) for message in messages):
        if weight not in (0, 1):
            raise BadMessages(f"the weight of a message must be 0 or 1, not {weight!r}")
    shown = [{k: v for k, v in message.items() if k != "weight"} for message in messages]

    def text(count: int, ask: bool) -> str:
        options = {"tools": list(tools)} if tools else {}
        try:
            return renderer.text(shown[:count], add_generation_prompt=ask, **options)
        except InputError as error:
            part = "" if count == len(shown) else f" (of the first {count} of {len(shown)})"
            raise BadMessages(f"{error}{part}") from None

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
            raise BadMessages(_differs(turn, "the text that asks for it is not how it begins"))
        if not whole.startswith(after) or len(after) <= len(before):
            raise BadMessages(_differs(turn, "it is written differently once others follow"))
        spans.append((len(before), len(after)))
    return whole, spans


def _differs(turn: int, how: str) -> str:
    return (
        f"the chat template does not say where message {turn + 1} is: {how}; give each answer a "
        "row of its own, with targets=last"
    )
