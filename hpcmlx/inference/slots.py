"""Rows under way and the slots (microbatches) they live in: the state that the engine schedules.

Nothing here runs the model; a row knows when it has ended, a slot what memory it comes to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from hpcmlx.comm import Pending
from hpcmlx.inference.batching import SlotCaches
from hpcmlx.inference.kv import Load
from hpcmlx.inference.logprobs import Report, TokenLogprobs
from hpcmlx.inference.penalties import Context
from hpcmlx.inference.rows import Request, RowResult


@dataclass(eq=False)
class Row:
    """A sample under way.

    Attributes:
        started: when its prefill began, on the clock of `time.perf_counter`.
        num_cached: prompt tokens that a shared prefix had computed already.
        num_sampled: steps that were started for it, may be one ahead of its tokens.
        context: what its sampling looks back on, where it does.
        reason: why it has ended: "stop", "length", or "error" for logits that are not finite.
    """

    request: Request
    detokenizer: Any
    started: float
    num_cached: int
    tokens: list[int] = field(default_factory=list)
    num_sampled: int = 0
    first_token: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    context: Context | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.request.sampling.looks_back:
            self.context = Context(self.request.tokens, self.tokens)

    @property
    def num_left(self) -> int:
        return self.request.sampling.max_tokens - self.num_sampled

    @property
    def last_token(self) -> int:
        return self.tokens[-1] if self.tokens else self.request.tokens[-1]

    @property
    def ended(self) -> bool:
        return self.reason is not None

    def take(
        self, token: int, logprob: TokenLogprobs | None, eos: Collection[int], now: float
    ) -> None:
        """Its next token; -1 is none that could be sampled."""
        if not self.tokens:
            self.first_token = now
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        sampling = self.request.sampling
        if token < 0:
            self.reason = "error"
        elif token in eos:
            self.reason = "stop"
        else:
            self.detokenizer.add_token(token)
            if sampling.stop and any(s in self.detokenizer.text for s in sampling.stop):
                self.reason = "stop"
            elif len(self.tokens) >= sampling.max_tokens:
                self.reason = "length"

    def result(self, now: float, rank: int) -> RowResult:
        """What has come of it, recorded by world rank `rank`."""
        self.detokenizer.finalize()
        text, reason, request = self.detokenizer.text, self.reason, self.request
        # A stop string may show only when the detokenizer lets go of what it held back.
        if ends := [text.find(s) for s in request.sampling.stop if s in text]:
            text, reason = text[: min(ends)], "stop"
        return RowResult(
            index=request.index,
            id=request.id,
            text=text,
            tokens=tuple(self.tokens),
            finish_reason=reason or "",
            num_prompt_tokens=len(request.tokens),
            ttft=self.first_token - self.started,
            seconds=now - self.started,
            sample=request.sample,
            num_cached_tokens=self.num_cached,
            created=time.time(),
            rank=rank,
            logprobs=None if request.sampling.logprobs is None else tuple(self.logprobs),
        )


@dataclass
class Prefill:
    """Rows of one length and one prefix: their prompts are fed together, without padding."""

    rows: list[Row]
    tokens: mx.array  # [rows, length] what is still to be fed
    caches: list[Any]
    length: int  # of the prompts when they are through: all but the last token


@dataclass
class Step:
    """A step under way: who was in which place, and the tokens that come out."""

    rows: list[Row | None]
    tokens: mx.array | Pending  # [places]
    report: Report | None  # on the last stage, where rows ask for log-probabilities
    begin: float


@dataclass
class Slot:
    """One microbatch: rows that step together, their caches and what comes next."""

    number: int
    rows: list[Row | None] = field(default_factory=list)  # one per place; None: it has ended
    caches: SlotCaches | None = None
    step: Step | None = None  # started, its tokens not seen by the host
    feed: mx.array | None = None  # [places] the next inputs, where they need not wait for the host
    joining: deque[Prefill] = field(default_factory=deque)

    @property
    def live(self) -> list[Row]:
        return [row for row in self.rows if row is not None]

    @property
    def num_joining(self) -> int:
        return sum(len(prefill.rows) for prefill in self.joining)

    def loads(self, more: Sequence[Request] = ()) -> list[Load]:
        """Cache memory that this slot comes to, with `more` rows in it, until its last row ends."""
        left = [row.num_left for row in self.live]
        lengths = [0 if self.caches is None else self.caches.positions]
        for prefill in self.joining:
            left += [row.num_left for row in prefill.rows]
            lengths.append(prefill.length)
        left += [request.sampling.max_tokens for request in more]
        lengths += [len(request.tokens) for request in more]
        if not left:
            return []
        num_new = self.num_joining + len(more)
        places = max(len(self.rows), len(self.live) + num_new)
        own = [Load(len(p.rows), p.length, prefill=True) for p in self.joining]
        own += [Load(1, len(request.tokens), prefill=True) for request in more]
        # One position more: a step may be started for rows that have ended.
        return [*own, Load(places, max(lengths) + max(left) + 1)]
