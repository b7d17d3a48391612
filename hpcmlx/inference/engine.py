"""The batch engine: every rank runs the same deterministic schedule over the same requests.

Rows live in slots (microbatches). Each visit to a slot takes the tokens of its last step, lets rows
leave and join, spends a chunk on prompts that are not through yet, and starts the next step. With
as many slots as pipeline stages every stage has work while the others compute; only activations
and sampled tokens travel.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from hpcmlx import faults
from hpcmlx.comm import Pending, evaluate, start_evaluation
from hpcmlx.flight import recorder
from hpcmlx.inference.batching import SlotCaches, fork_caches, split_caches, why_not_batched
from hpcmlx.inference.kv import Budget, Load, measure_cost, num_bytes
from hpcmlx.inference.kv_quantized import quantize_caches
from hpcmlx.inference.prefix import PrefixCache, plan_prefixes
from hpcmlx.inference.rows import Request, RowResult
from hpcmlx.inference.sampling import Sampler, SamplingParams
from hpcmlx.inference.slots import Prefill, Row, Slot, Step
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.observe.stragglers import Pace
from hpcmlx.observe.timeline import OFF, Timeline
from hpcmlx.parallel.dealer import Dealer
from hpcmlx.parallel.link import StageLink
from hpcmlx.parallel.vote import StopVote

_log = logging.getLogger(__name__)

_GREEDY = SamplingParams()
# Rows join or close up when one place in so many is free: fewer, larger prefills and copies.
_JOIN_SHARE = 8
# A prefix may take one part in so many of the KV memory.
_PREFIX_SHARE = 4
# Rounds over all slots for which the stages' waiting is watched, and how much of it is too much.
_ROUNDS, _TOO_IDLE = 8, 0.1


@dataclass
class Stats:
    """What a run did, on this rank. Times are wall-clock seconds.

    Attributes:
        idle_seconds: waiting for other stages.
        host_seconds: the schedule itself: neither building nor running the model.
        pace: what this rank's time went into, where the caller has measured it.
        num_active: rows that decode now.
        stopped: the run was asked to end, and did before all rows were through.
    """

    num_rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    idle_seconds: float = 0.0
    host_seconds: float = 0.0
    pace: Pace | None = None
    seconds: float = 0.0
    num_steps: int = 0
    num_active: int = 0
    stopped: bool = False


class Engine:
    """Generates text for requests on one replica (dp coordinate) of the mesh."""

    def __init__(
        self,
        loaded: LoadedModel,
        mesh: Mesh,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        num_microbatches: int | None = None,
        prefill_chunk: int = 512,
        kv_memory: int = 1 << 62,
        kv_bits: int | None = None,
        prefix_cache: bool = True,
        timeline: Timeline = OFF,
    ):
        """
        Args:
            tokenizer: mlx-lm's TokenizerWrapper (end tokens and detokenizer).
            batch_size: rows per microbatch, at most.
            num_microbatches: slots in flight; None is one per pipeline stage, and one more where
                the busiest stage is seen to wait.
            prefill_chunk: prompt tokens per forward pass, over all its rows.
            kv_memory: bytes that KV caches may take on this rank.
            kv_bits: 8 to keep KV caches in 8 bits.
            prefix_cache: compute what prompts begin with in common once.
            timeline: is told what this stage does when.

        Raises:
            ConfigError: the caches of this model cannot be quantized.
        """
        self.stage, self.mesh, self.tokenizer = loaded.stage, mesh, tokenizer
        self.link = StageLink(mesh, loaded.stage)
        self.sampler = Sampler(mesh.tp_group, loaded.vocab_interval, loaded.vocab_size)
        self.prefill_chunk, self.kv_bits = prefill_chunk, kv_bits
        self.prefix_cache, self.timeline = prefix_cache, timeline
        self.batch_size = self._batch_size(batch_size)
        self.batched = self.batch_size > 1
        self._may_add_slot = num_microbatches is None and mesh.dims.pp > 1
        self.slots = [Slot(i) for i in range(num_microbatches or mesh.dims.pp)]
        # On one stage the next step can start before the host has seen this one's tokens.
        self.lookahead = mesh.dims.pp == 1
        self.eos = set(tokenizer.eos_token_ids)
        cost = measure_cost(self.stage, prefill_chunk, self._packed)
        self.budget = Budget(mesh.replica, cost, kv_memory)
        self.stats = Stats()
        self._not_host = 0.0  # seconds in which the host builds, runs or waits for the model
        self._device_free = 0.0

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

    def why_too_large(self, request: Request) -> str | None:
        """Why a row can never be admitted, or None: its caches alone must fit the KV memory."""
        loads = Slot(0).loads([request])
        if self.budget.fits(loads):
            return None
        return (
            f"its KV caches take up to {self.budget.bytes_of(loads) / 2**20:.0f} MiB on a rank and "
            f"the KV memory is {self.budget.limit / 2**20:.0f} MiB; lower max_tokens, raise "
            "inference.kv_memory or use more ranks"
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes that KV caches take on this rank now."""
        held = [cache for slot in self.slots if slot.caches for cache in slot.caches.entries]
        held += [c for slot in self.slots for prefill in slot.joining for c in prefill.caches]
        return num_bytes([*held, *self._prefixes.entries])

    # -- the schedule --

    def run(
        self,
        requests: Sequence[Request],
        on_row: Callable[[RowResult], None],
        on_visit: Callable[[], None] = lambda: None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> Stats:
        """Generate the requests, dealt over the replicas. Collective over the world.

        Args:
            requests: all of them, the same on every rank; each must fit (`why_too_large`).
            on_row: gets each row of this replica as it ends, on each of its ranks; log-
                probabilities are there on the last stage only.
            on_visit: called after each visit to a slot.
            asked_to_stop: whether this rank was asked to end early. Its replica then leaves the
                rows that are under way, and those that no replica has begun.
        """
        begin = time.perf_counter()
        self._requests, self._on_row = requests, on_row
        self._plan = plan_prefixes([r.tokens[:-1] for r in requests], self.prefix_cache)
        self._prefixes = PrefixCache(self._plan, self._compute_prefix)
        self._dealer = Dealer(self.mesh, len(requests))
        self._dealt: deque[int] = deque()
        # Few rows are spread over replicas and slots, so that nobody waits for want of work.
        shares = self.mesh.dims.dp * len(self.slots)
        self._places = min(self.batch_size, max(1, -(-len(requests) // shares)))
        num_rounds, self._warm = 0, (0.0, 0.0)
        vote = StopVote(self.mesh.replica)
        while self._work_left and not vote.ask(asked_to_stop()):
            for slot in self.slots:
                self._visit(slot)
                self.stats.seconds = time.perf_counter() - begin
                self.stats.idle_seconds = self.link.seconds_waiting
                on_visit()
            num_rounds += 1
            if self._may_add_slot and num_rounds % _ROUNDS == 0:
                self._look_at_waiting(num_rounds)
        self._leave()
        vote.close()
        self.link.flush()
        self._dealer.close()
        return self.stats

    @property
    def _work_left(self) -> bool:
        under_way = any(slot.rows or slot.joining for slot in self.slots)
        return under_way or bool(self._dealt) or not self._dealer.exhausted

    def _leave(self) -> None:
        """Take the tokens that are under way, so that nothing is sent to nobody."""
        for slot in self.slots:
            if slot.step is not None:
                self._take_tokens(slot.step)
        live = [row for slot in self.slots for row in slot.live if not row.ended]
        joining = any(slot.joining for slot in self.slots)
        self.stats.stopped = bool(live or joining or self._dealt or not self._dealer.exhausted)

    def _look_at_waiting(self, num_rounds: int) -> None:
        """One slot more where even the stage that waits least is idle. Looked at once, over the
        second half of the rounds up to now: the first one fills the pipeline."""
        now = (self.stats.seconds, self.link.seconds_waiting)
        if num_rounds == _ROUNDS:
            self._warm = now
            return
        seconds, waited = (b - a for a, b in zip(self._warm, now, strict=True))
        least = min(self.mesh.replica.allgather(waited / seconds))
        self._may_add_slot = False
        if least > _TOO_IDLE:
            self.slots.append(Slot(len(self.slots)))
            _log.info(
                "every stage waits at least %.0f %% of the time: %d microbatches in flight from "
                "now on",
                100 * least,
                len(self.slots),
            )

    def _visit(self, slot: Slot) -> None:
        begin, not_host, self._visited = time.perf_counter(), self._not_host, slot
        step, slot.step = slot.step, None
        if step is not None:
            if slot.feed is not None and not self._all_end_by_length(slot):
                slot.step = self._start_step(slot, slot.feed)
            self._take_tokens(step)
            slot.rows = [None if row is None or row.ended else row for row in slot.rows]
        self._admit(slot)
        self._seat(slot, self._prefill(slot))
        if slot.live:
            if slot.step is None:
                tokens = [0 if row is None else row.last_token for row in slot.rows]
                slot.step = self._start_step(slot, mx.array(tokens, mx.int32))
            slot.feed = self._next_inputs(slot)
        self.stats.num_active = sum(len(s.live) for s in self.slots)
        self.stats.host_seconds += time.perf_counter() - begin - (self._not_host - not_host)

    # -- decode --

    def _start_step(self, slot: Slot, feed: mx.array) -> Step:
        """One decode step of a slot: feed [places] tokens, sample as many."""
        self.stats.num_steps += 1
        recorder.step = self.stats.num_steps
        faults.strike(self.mesh.world.rank, self.stats.num_steps)
        if self.stats.num_steps % 256 == 0:
            mx.clear_cache()
        rows = list(slot.rows)
        params = [_GREEDY if row is None else row.request.sampling for row in rows]
        positions = [0 if row is None else row.num_sampled for row in rows]
        contexts = [None if row is None else row.context for row in rows]
        for row in slot.live:
            row.num_sampled += 1
        slot.caches.step()
        begin = time.perf_counter()
        logits = self.link.forward(feed[:, None], slot.caches.entries)
        report = None
        if logits is None:
            tokens = self.link.receive_tokens(len(rows))
        else:
            logits = logits[:, -1]
            tokens = self.sampler(logits, params, positions, contexts)
            report = self.sampler.report(logits, tokens, params)
            start_evaluation(tokens, report.arrays if report else [])
            self.link.send_tokens(tokens)
        end = time.perf_counter()
        self._not_host += end - begin
        self.stats.decode_seconds += end - begin
        if not self.lookahead:
            self._record("decode", slot, begin + self.link.last_wait, end, len(slot.live))
        return Step(rows, tokens, report, begin)

    def _take_tokens(self, step: Step) -> None:
        """Give a step's tokens to its rows, and end those that are through."""
        begin = time.perf_counter()
        array = self.link.wait(step.tokens) if isinstance(step.tokens, Pending) else step.tokens
        evaluate(array)
        tokens = array.tolist()
        logprobs = step.report.read() if step.report else [None] * len(tokens)
        now = time.perf_counter()
        self._not_host += now - begin
        self.stats.decode_seconds += now - begin
        if self.lookahead:  # the device has worked on it from its start on, behind the host
            begin, self._device_free = max(step.begin, self._device_free), now
            self._record("decode", self._visited, begin, now, len(step.rows))
        for row, token, logprob in zip(step.rows, tokens, logprobs, strict=True):
            if row is None or row.ended:
                continue
            row.take(token, logprob, self.eos, now)
            if row.ended:
                self.stats.num_rows += 1
                self.stats.generated_tokens += len(row.tokens)
                self._on_row(row.result(now, self.mesh.world.rank))

    def _next_inputs(self, slot: Slot) -> mx.array | None:
        """What the step after the one under way is fed, where that can start before the host has
        seen the tokens: they stay on the device, ends of prompts join them."""
        step = slot.step
        if not self.lookahead or any(row.context for row in slot.live):
            return None
        if slot.rows == step.rows:
            return step.tokens
        place_of = {id(row): place for place, row in enumerate(step.rows) if row is not None}
        places = [place_of.get(id(row), 0) for row in slot.rows]
        new = [row is not None and id(row) not in place_of for row in slot.rows]
        ends = [row.last_token if fresh else 0 for row, fresh in zip(slot.rows, new, strict=True)]
        return mx.where(mx.array(new), mx.array(ends, mx.int32), step.tokens[mx.array(places)])

    @staticmethod
    def _all_end_by_length(slot: Slot) -> bool:
        return all(row.num_left <= 0 for row in slot.live)

    # -- who joins --

    def _admit(self, slot: Slot) -> None:
        """Let rows into the slot's free places while every rank has the memory."""
        free = self._places - len(slot.live) - slot.num_joining
        if slot.live and free * _JOIN_SHARE < self._places and not self._dealer.exhausted:
            return
        self._dealt.extend(self._dealer.draw(free - len(self._dealt)))
        while free > 0 and self._dealt:
            group = self._next_group(slot, free)
            if not group:
                return
            free -= len(group)
            slot.joining.append(self._begin_prefill(group))
        self._prefixes.release(self._dealt[0] if self._dealt else self._dealer.dealt_to)

    def _next_group(self, slot: Slot, free: int) -> list[int]:
        """The next rows that can be prefilled together and fit the memory; taken from `_dealt`."""
        numbers: list[int] = []
        requests: list[Request] = []
        while self._dealt and len(numbers) < free:
            number = self._plan.order[self._dealt[0]]
            request = self._requests[number]
            if numbers:
                first = numbers[0]
                alike = self._plan.prefix_of[number] == self._plan.prefix_of[first] and len(
                    request.tokens
                ) == len(self._requests[first].tokens)
                if not alike or len(request.tokens) * (len(numbers) + 1) > self.prefill_chunk:
                    break
            if not self._make_room(slot, [*requests, request]):
                break
            self._dealt.popleft()
            numbers.append(number)
            requests.append(request)
        return numbers

    def _make_room(self, slot: Slot, requests: list[Request]) -> bool:
        """Whether `requests` fit into `slot`, if need be after forgetting prefixes."""
        others = [load for other in self.slots if other is not slot for load in other.loads()]
        while True:
            prefixes = [Load(1, length, prefill=True) for length in self._prefixes.lengths]
            if self.budget.fits([*others, *slot.loads(requests), *prefixes]):
                return True
            if not self._prefixes.shrink():
                return False

    def _begin_prefill(self, numbers: list[int]) -> Prefill:
        requests = [self._requests[number] for number in numbers]
        begin = time.perf_counter()
        caches, known = self._start_from(numbers[0], len(numbers))
        if known == len(requests[0].tokens) - 1:  # nothing to feed
            caches = self._packed(caches)
        rows = [Row(r, self.tokenizer.detokenizer, begin, known) for r in requests]
        tokens = mx.array([list(request.tokens[known:-1]) for request in requests], mx.int32)
        length = len(requests[0].tokens) - 1
        self.stats.prompt_tokens += sum(len(request.tokens) for request in requests)
        self.stats.cached_tokens += known * len(requests)
        return Prefill(rows, tokens.reshape(len(rows), length - known), caches, length)

    def _start_from(self, number: int, count: int) -> tuple[list[Any], int]:
        """Caches for `count` rows like `number`, and how many of their tokens are in them."""
        prefix = self._plan.prefix_of[number]
        while prefix >= 0:
            known = len(self._plan.prefixes[prefix].tokens)
            if self.budget.fits([Load(_PREFIX_SHARE, known, prefill=True)]):
                return fork_caches(self._prefixes.get(prefix), count), known
            prefix = self._plan.prefixes[prefix].parent  # too long to be kept: a shorter one
        return self.stage.make_cache(), 0

    # -- prefill --

    def _prefill(self, slot: Slot) -> list[Prefill]:
        """Feed the next chunk of what joins; those that are through."""
        budget, through = self.prefill_chunk, []
        while slot.joining and budget > 0:
            prefill = slot.joining[0]
            count, length = prefill.tokens.shape
            if length:
                piece = min(length, max(1, budget // count))
                prefill.caches = self._feed(prefill.tokens[:, :piece], prefill.caches)
                prefill.tokens = prefill.tokens[:, piece:]
                budget -= piece * count
            if prefill.tokens.shape[1] == 0:
                through.append(slot.joining.popleft())
        return through

    def _feed(self, tokens: mx.array, caches: list[Any]) -> list[Any]:
        """Put tokens [rows, length] into caches."""
        begin = time.perf_counter()
        self.link.forward(tokens, caches)
        # The last stage's logits of a prompt are not needed and never computed.
        caches = self._packed(caches)
        evaluate([cache.state for cache in caches])
        end = time.perf_counter()
        self._not_host += end - begin
        self.stats.prefill_seconds += end - begin
        self._record("prefill", self._visited, begin + self.link.last_wait, end, tokens.size)
        return caches

    def _compute_prefix(self, tokens: Sequence[int], parent: list[Any] | None) -> list[Any]:
        caches = self.stage.make_cache() if parent is None else fork_caches(parent)
        for start in range(0, len(tokens), self.prefill_chunk):
            piece = list(tokens[start : start + self.prefill_chunk])
            caches = self._feed(mx.array([piece], mx.int32), caches)
        return caches

    def _packed(self, caches: list[Any]) -> list[Any]:
        return caches if self.kv_bits is None else quantize_caches(caches, self.kv_bits)

    def _seat(self, slot: Slot, through: list[Prefill]) -> None:
        """Give prefilled rows their places: first those of rows that have ended."""
        rows = [row for prefill in through for row in prefill.rows]
        lengths = [prefill.length for prefill in through for _ in prefill.rows]
        caches = [c for p in through for c in split_caches(p.caches, len(p.rows))]
        if not slot.live:
            slot.caches = SlotCaches(caches, lengths, batched=self.batched) if rows else None
            # The step under way, if any, was for rows that have all ended.
            slot.rows, slot.step, slot.feed = list(rows), None, None
            return
        free = [place for place, row in enumerate(slot.rows) if row is None]
        taken = free[: len(rows)]
        if taken:
            slot.caches.take_over(taken, caches[: len(taken)], lengths[: len(taken)])
            for place, row in zip(taken, rows, strict=False):
                slot.rows[place] = row
        if rows[len(taken) :]:
            slot.caches.append(caches[len(taken) :], lengths[len(taken) :])
            slot.rows += rows[len(taken) :]
        self._close_up(slot)

    def _close_up(self, slot: Slot) -> None:
        """Where nobody will take the places of rows that have ended, do without them: each costs
        a row's work at every step, leaving them one copy of the caches."""
        num_free = len(slot.rows) - len(slot.live)
        coming = self._dealt or slot.joining or not self._dealer.exhausted
        if coming or num_free * _JOIN_SHARE < len(slot.rows):
            return
        places = [place for place, row in enumerate(slot.rows) if row is not None]
        slot.caches.keep(places)
        slot.rows = [slot.rows[place] for place in places]

    def _record(self, kind: str, slot: Slot, begin: float, end: float, tokens: int) -> None:
        self.timeline.record(kind, slot.number, begin, end, tokens)
