"""The batch engine: every rank runs the same deterministic schedule over the same requests.

Rows live in slots (microbatches). Each visit to a slot takes the tokens its last step sampled, lets
rows leave and join, and starts the next step. With as many slots as pipeline stages every stage
has work while the others compute; only activations and sampled tokens travel.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from hpcmlx import faults
from hpcmlx.comm import Pending
from hpcmlx.inference.batching import merge_caches, why_not_batched
from hpcmlx.inference.rows import Request, RowResult
from hpcmlx.inference.sampling import Sampler
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.parallel.link import StageLink

_log = logging.getLogger(__name__)


@dataclass
class Stats:
    """What a run did, on this rank. Times are wall-clock seconds."""

    num_rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_steps: int = 0


@dataclass
class _Row:
    request: Request
    detokenizer: Any
    started: float
    tokens: list[int] = field(default_factory=list)
    num_sampled: int = 0  # steps started, may be one ahead of len(tokens)
    first_token: float = 0.0


@dataclass
class _Slot:
    """One microbatch: rows that step together, their caches and what they are fed next."""

    rows: list[_Row] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    feed: mx.array | Pending | None = None  # [rows] next inputs, not yet seen by the host
    num_fresh: int = 0  # trailing rows whose entry in `feed` is the end of their prompt


class Engine:
    """Generates text for requests on one replica (dp coordinate) of the mesh."""

    def __init__(
        self,
        loaded: LoadedModel,
        mesh: Mesh,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        num_microbatches: int | None = None,
        prefill_chunk: int = 512,
    ):
        """
        Args:
            tokenizer: mlx-lm's TokenizerWrapper (end tokens and detokenizer).
            batch_size: rows per microbatch.
            num_microbatches: slots in flight; None is one per pipeline stage.
            prefill_chunk: prompt tokens per forward pass.
        """
        self.stage, self.mesh, self.tokenizer = loaded.stage, mesh, tokenizer
        self.link = StageLink(mesh, loaded.stage)
        self.sampler = Sampler(mesh.tp_group, loaded.vocab_interval, loaded.vocab_size)
        self.prefill_chunk = prefill_chunk
        self.batch_size = self._batch_size(batch_size)
        self._places = self.batch_size
        self.slots = [_Slot() for _ in range(num_microbatches or mesh.dims.pp)]
        # On one stage the next step can start before the host has seen this one's tokens.
        self.lookahead = mesh.dims.pp == 1
        self.eos = set(tokenizer.eos_token_ids)
        self.stats = Stats()

    def _batch_size(self, wanted: int) -> int:
        if wanted == 1:
            return 1
        reasons = self.mesh.replica.allgather(why_not_batched(self.stage))
        reason = next(filter(None, reasons), None)
        if reason is None:
            return wanted
        if self.mesh.world.rank == 0:
            _log.warning(
                "this model cannot step rows of different lengths together (%s): one row "
                "at a time instead of %d",
                reason,
                wanted,
            )
        return 1

    def run(self, requests: Sequence[Request], on_row: Callable[[RowResult], None]) -> Stats:
        """Generate every request; `on_row` gets each row as it finishes, on every rank."""
        queue = deque(requests)
        # Few rows are spread over the slots, so that no stage waits for want of a microbatch.
        self._places = min(self.batch_size, max(1, -(-len(requests) // len(self.slots))))
        while queue or any(slot.rows for slot in self.slots):
            for slot in self.slots:
                if slot.rows or queue:
                    self._visit(slot, queue, on_row)
        self.link.flush()
        return self.stats

    def _visit(
        self, slot: _Slot, queue: deque[Request], on_row: Callable[[RowResult], None]
    ) -> None:
        begin = time.perf_counter()
        ahead = None
        if slot.feed is not None:
            if self.lookahead and not self._all_end_by_length(slot):
                ahead = self._start_step(slot, slot.feed)
            keep = self._take_tokens(slot, on_row)
            if len(keep) < len(slot.rows):
                ahead = self._drop(slot, keep, ahead)
        self.stats.decode_seconds += time.perf_counter() - begin
        new = self._admit(slot, queue)
        if not slot.rows:
            slot.feed = None
            return
        begin = time.perf_counter()
        if ahead is None:
            tokens = [r.tokens[-1] if r.tokens else r.request.tokens[-1] for r in slot.rows]
            slot.feed, slot.num_fresh = self._start_step(slot, mx.array(tokens, mx.int32)), 0
        else:
            prompt_ends = mx.array([row.request.tokens[-1] for row in new], mx.int32)
            slot.feed = mx.concatenate([ahead, prompt_ends]) if new else ahead
            slot.num_fresh = len(new)
        self.stats.decode_seconds += time.perf_counter() - begin

    # -- decode --

    def _start_step(self, slot: _Slot, feed: mx.array) -> mx.array | Pending:
        """One decode step of a slot: feed [rows] tokens, give the [rows] tokens it will sample."""
        positions = [row.num_sampled for row in slot.rows]
        for row in slot.rows:
            row.num_sampled += 1
        self.stats.num_steps += 1
        faults.strike(self.mesh.world.rank, self.stats.num_steps)
        if self.stats.num_steps % 256 == 0:
            mx.clear_cache()
        logits = self.link.forward(feed[:, None], slot.caches)
        if logits is None:
            return self.link.receive_tokens(len(slot.rows))
        params = [row.request.sampling for row in slot.rows]
        tokens = self.sampler(logits[:, -1], params, positions)
        mx.async_eval(tokens)
        self.link.send_tokens(tokens)
        return tokens

    def _take_tokens(self, slot: _Slot, on_row: Callable[[RowResult], None]) -> list[int]:
        """Give the slot's sampled tokens to its rows; indices of the rows that go on."""
        feed = slot.feed
        tokens = (feed.wait() if isinstance(feed, Pending) else feed).tolist()
        now = time.perf_counter()
        num_sampled = len(tokens) - slot.num_fresh
        keep = list(range(num_sampled, len(tokens)))
        for i, (row, token) in enumerate(zip(slot.rows[:num_sampled], tokens, strict=False)):
            if not row.tokens:
                row.first_token = now
            row.tokens.append(token)
            reason = self._finish_reason(row, token)
            if reason is None:
                keep.append(i)
            else:
                self._finish(row, reason, now, on_row)
        return sorted(keep)

    def _all_end_by_length(self, slot: _Slot) -> bool:
        return all(row.num_sampled >= row.request.sampling.max_tokens for row in slot.rows)

    def _finish_reason(self, row: _Row, token: int) -> str | None:
        if token in self.eos:
            return "stop"
        row.detokenizer.add_token(token)
        sampling = row.request.sampling
        if sampling.stop and any(s in row.detokenizer.text for s in sampling.stop):
            return "stop"
        return "length" if len(row.tokens) >= sampling.max_tokens else None

    def _finish(
        self, row: _Row, reason: str, now: float, on_row: Callable[[RowResult], None]
    ) -> None:
        row.detokenizer.finalize()
        text = row.detokenizer.text
        ends = [text.find(s) for s in row.request.sampling.stop if s in text]
        if ends:
            text, reason = text[: min(ends)], "stop"
        request = row.request
        self.stats.num_rows += 1
        self.stats.generated_tokens += len(row.tokens)
        on_row(
            RowResult(
                request.index,
                request.id,
                text,
                tuple(row.tokens),
                reason,
                len(request.tokens),
                row.first_token - row.started,
                now - row.started,
                created=time.time(),
            )
        )

    def _drop(self, slot: _Slot, keep: list[int], ahead: mx.array | None) -> mx.array | None:
        slot.rows = [slot.rows[i] for i in keep]
        if not keep:
            slot.caches = []
            return None
        index = mx.array(keep)
        for cache in slot.caches:
            cache.filter(index)
        return None if ahead is None else ahead[index]

    # -- prefill --

    def _admit(self, slot: _Slot, queue: deque[Request]) -> list[_Row]:
        """Fill the slot's free places from the queue, prefilling each prompt but its last token.

        Rows are prefilled alone, so a row's numbers do not depend on its neighbours' lengths.
        """
        begin = time.perf_counter()
        new: list[_Row] = []
        new_caches = []
        while queue and len(slot.rows) + len(new) < self._places:
            request = queue.popleft()
            new.append(_Row(request, self.tokenizer.detokenizer, time.perf_counter()))
            new_caches.append(self._prefill(request.tokens[:-1]))
            self.stats.prompt_tokens += len(request.tokens)
        if not new:
            return new
        slot.rows += new
        if self._places == 1:
            slot.caches = new_caches[0]
        else:
            merged = merge_caches(new_caches)
            for batch, joining in zip(slot.caches, merged, strict=False):
                batch.extend(joining)
            slot.caches = slot.caches or merged
        self.stats.prefill_seconds += time.perf_counter() - begin
        return new

    def _prefill(self, tokens: Sequence[int]) -> list[Any]:
        """A new row's caches after `tokens`, in chunks that follow each other down the stages."""
        caches = self.stage.make_cache()
        for start in range(0, len(tokens), self.prefill_chunk):
            chunk = mx.array([tokens[start : start + self.prefill_chunk]])
            self.link.forward(chunk, caches)
            # The last stage's logits of a prompt are not needed and never computed.
            mx.eval([cache.state for cache in caches])
        return caches
