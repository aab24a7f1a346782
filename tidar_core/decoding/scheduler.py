"""Decides which requests run on a decoder, on which pages, and with which plan.

Requests wait in one line. Between two forwards the first of them take the free slots, and leave when they have
finished. Prompts are read in chunks, so that a long prompt does not hold up running requests. The forward of a decode
step reads the weights anyway, so a chunk passes its layers too, or some of them (`prefill_pace`). Only where steps are
captured has a chunk its own forward.
Where pages run out, the youngest sequence gives its pages up, returns to the head of the line, and is read again later.

No threads: the owner calls `advance` for as long as `busy`. The only clock paces prefills (`prefill_pace`).
"""

import time
from collections import deque
from collections.abc import Mapping

from torch import Tensor

from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.logit_rules import LogitRules
from tidar_core.decoding.page_pool import PagePool, SequencePages
from tidar_core.decoding.prefill_pace import PrefillPace
from tidar_core.decoding.request import DecodeStep, Request
from tidar_core.decoding.sequence import Chunk, Reading, Sequence
from tidar_core.decoding.step_plan import FixedMode, Planner, StepPlan
from tidar_core.decoding.verify import NO_DRAFT
from tidar_core.errors import CapacityError, RequestError
from tidar_core.timing import Clock

__all__ = ["MAX_WAITING", "PREFILL_TOKENS", "Scheduler"]

MAX_WAITING = 1024
"""Requests that may wait beyond the free slots."""
PREFILL_TOKENS = 512
"""Most prompt tokens read in one forward; beside running requests `PrefillPace` allows fewer. Only the last forward of
a prompt carries mask tokens."""


class Scheduler:
    """A waiting line, a page pool and a planner for one decoder."""

    def __init__(
        self,
        decoder: Decoder,
        planner: Planner | None = None,
        *,
        max_waiting: int = MAX_WAITING,
        share_prefixes: bool = True,
        prefill_tokens: int = PREFILL_TOKENS,
        clock: Clock = time.perf_counter,
    ) -> None:
        """planner         chooses the plan of each decode step; single-pass with all groups by default
        max_waiting     requests that may wait beyond the free slots; one more is refused with CapacityError
        share_prefixes  read the beginning that two prompts have in common once
        prefill_tokens  most prompt tokens of one forward, and of one `advance`
        clock           seconds, ascending; it paces prefills beside running requests
        """
        assert not decoder.running, "another scheduler's sequences are running"
        self.decoder, self.max_waiting = decoder, max_waiting
        self.planner = planner or FixedMode("single-pass", decoder.draft.block_len)
        self.pool = PagePool(decoder.pages, decoder.cache.page_len)
        self.preemptions = 0
        """Times that a running sequence gave its pages up."""
        self.shared_tokens = 0
        """Prompt tokens that the cache held already."""
        self._share_prefixes, self._prefill_tokens = share_prefixes, prefill_tokens
        depth = 1 if decoder.captures else decoder.model.config.layers
        self._pace, self._depth = PrefillPace(prefill_tokens, clock, depth=depth), depth
        self._read = 0
        """Prompt tokens since the last decode step ended, times the layers that they passed."""
        self._reading: Reading | None = None
        """The chunks in hand: they have entered the layers, and did not pass all of them yet."""
        self._sequences: dict[str, Sequence] = {}
        """All requests that wait or run, by id."""
        self._line: deque[Sequence] = deque()
        """Sequences without a slot of their own. Only the first may hold pages, and those whose chunks are in hand."""
        self._arrivals = 0

    @property
    def busy(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._sequences)

    @property
    def running(self) -> tuple[str, ...]:
        """Requests that the next decode step serves, by slot."""
        return tuple(sequence.request.request_id for sequence in self.decoder.running)

    @property
    def arriving(self) -> tuple[str, ...]:
        """Requests that have a slot and are not read to the end: as many of the line as slots are free."""
        return tuple(sequence.request.request_id for sequence in tuple(self._line)[: self._free])

    @property
    def queued(self) -> tuple[Request, ...]:
        """Requests that wait for a slot, in the order of the line."""
        return tuple(sequence.request for sequence in tuple(self._line)[self._free :])

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return max(0, len(self._line) - self._free)

    @property
    def free_slots(self) -> int:
        """Slots for requests that are not here yet."""
        return max(0, self._free - len(self._line))

    @property
    def taken_slots(self) -> int:
        """Slots of running and arriving requests."""
        return self.decoder.slots - self.free_slots

    @property
    def pending(self) -> dict[str, int]:
        """Pending tokens of each running request: d_1 and its drafts, 1..K."""
        return {sequence.request.request_id: sequence.pending for sequence in self.decoder.running}

    def submit(self, request: Request) -> None:
        """Put a request into the line.

        Raises RequestError if it can never run, CapacityError if too many requests wait.
        """
        self.decoder.check(request)
        if request.request_id in self._sequences:
            raise RequestError(f"request id {request.request_id!r} is in use already; give each request its own")
        if len(self._line) >= self.max_waiting + self._free:
            raise CapacityError(
                f"all {self.decoder.slots} slots are taken and {self.max_waiting} requests wait already, the most "
                "allowed; try again later"
            )
        sequence = Sequence(request, self._arrivals, list(request.prompt))
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._line.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop a request; False if it is not here. Its slot and pages are free at once."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence in self.decoder.running:
            self._leave(sequence)
        else:
            self._line.remove(sequence)
            self._drop_pages(sequence)
        return True

    def drop_begun(self) -> set[str]:
        """Drop the requests that run or hold pages, as after a forward that failed; returns the ids of the others.

        A request without slot and pages goes on where it is, new or preempted. Its tokens and rules lie on the host,
        and the forwards of others do not touch them.
        """
        reading = [sequence for sequence in self._line if sequence.pages.ids]
        for sequence in (*self.decoder.running, *reading):
            self.abort(sequence.request.request_id)
        self._sequences = {sequence.request.request_id: sequence for sequence in self._line}
        return set(self._sequences)

    def advance(self) -> list[DecodeStep]:
        """Run one decode step for all running requests, and read chunks of the prompts that are next."""
        if not self.decoder.running:
            self._pace.idle()
            self._read = 0
            return self._prefill()
        running, plan = len(self.decoder.running), self._plan()
        self._make_room(plan.clean_len)
        layers = self._layers_beside(running)
        steps = self._stepped(plan, layers)
        self.planner.observe(steps, beside=layers > 0)
        self._pace.step_ended(self._read, min(len(self._line), self._free) / running)
        self._read = 0
        if self._reading is not None and self._reading.left == 0:
            self.planner.begin_prefill()
            steps += self._settle(self._begun())
            self.planner.end_prefill()
        elif self.decoder.captures or not self.decoder.running:
            steps += self._prefill()
        return steps

    def load_drafts(self, weights: Mapping[str, Tensor]) -> None:
        """Exchange the drafts of the decoder between two steps; see `Decoder.load_drafts`."""
        self.decoder.load_drafts(weights)
        self.planner.forget_drafts()

    def decode_step(self, plan: StepPlan) -> list[DecodeStep]:
        """Run one forward for all running requests; finished requests have left when it returns.

        Where pages run out, the youngest sequences are preempted first and bring no step.
        """
        self._make_room(plan.clean_len)
        return self._stepped(plan)

    def prefill(self, max_tokens: int | None = None, *, drafts: bool = True) -> list[DecodeStep]:
        """Read up to `max_tokens` tokens of the prompts that have a slot, in order.

        Returns the first token of each prompt that was read to its end. Stops where pages run out. A sequence that was
        preempted is read again with its completion, and brings no step. Chunks in hand come first, as they are.

        max_tokens  `prefill_tokens` of the scheduler by default
        drafts      draft first blocks in the same forwards
        """
        left = self._prefill_tokens if max_tokens is None else max_tokens
        steps: list[DecodeStep] = []
        while left > 0 and (reading := self._chunks_in_hand(min(left, self._prefill_tokens), drafts=drafts)):
            left -= reading.tokens
            self._read += reading.tokens * min(reading.left, self._depth)
            self.decoder.read(reading)
            steps += self._begun()
        return self._settle(steps)

    def redraft(self, request_id: str, tokens: list[int]) -> None:
        """Replace the pending drafts d_2..d_K of a running request.

        The text stays the same, so this puts a known continuation, or a hostile one, to the test.
        """
        assert len(tokens) == self.decoder.draft.block_len - 1, "d_1 is final; give the other block_len - 1"
        self.decoder.redraft(self._sequences[request_id], tokens)

    @property
    def _free(self) -> int:
        """Slots without a running sequence."""
        return self.decoder.slots - len(self.decoder.running)

    def _prefill(self) -> list[DecodeStep]:
        """Read what comes next of the line, if anything, in forwards of its own."""
        if not self._line or not self._free:
            return []
        self.planner.begin_prefill()
        most = self._pace.tokens(len(self.decoder.running))
        steps = self.prefill(max_tokens=most, drafts=self.planner.drafts_first_blocks)
        self.planner.end_prefill()
        return steps

    def _stepped(self, plan: StepPlan, layers: int = 0) -> list[DecodeStep]:
        """Steps of all running requests, for which there is room.

        layers  layers that the chunks in hand pass in the same forward
        """
        if not self.decoder.running:
            return []
        return self._settle(self.decoder.decode_step(plan, self._reading if layers else None, layers))

    def _layers_beside(self, running: int) -> int:
        """Number of layers that the chunks in hand pass in the forward of the next decode step.

        running  requests that ran when pages were made sure of
        """
        if self.decoder.captures or not self.decoder.running:
            return 0
        reading = self._chunks_in_hand(self._pace.tokens(running), drafts=self.planner.drafts_first_blocks)
        if reading is None or not reading.left:
            return 0
        layers = self._pace.layers(reading.tokens, reading.left)
        self._read += reading.tokens * layers
        return layers

    def _chunks_in_hand(self, most: int, *, drafts: bool) -> Reading | None:
        """The chunks that have passed some layers, or else the next of the line; see `_next_chunks`."""
        if self._reading is None and (chunks := self._next_chunks(most, drafts=drafts)):
            self._reading = self.decoder.enter(chunks)
        return self._reading

    def _next_chunks(self, most: int, *, drafts: bool) -> list[Chunk]:
        """The next tokens of the line, `most` together, for one forward; all chunks but the last end a prompt.

        drafts  draft first blocks in the same forward
        """
        chunks: list[Chunk] = []
        for sequence in tuple(self._line)[: self._free]:
            if most <= 0 or (chunks and self._shares_later(sequence, chunks)) or not self._hold(sequence):
                break
            count = min(most, sequence.goal - sequence.read)
            most -= count
            request, last = sequence.request, sequence.read + count == sequence.goal
            masked = last and not sequence.emitted and ((drafts and request.speculative) or request.sampling.beta < 1)
            chunks.append(Chunk(sequence, StepPlan(count, (count,) if masked else ())))
        return chunks

    def _shares_later(self, sequence: Sequence, chunks: list[Chunk]) -> bool:
        """Whether a sequence without pages would share more of them once these chunks are read."""
        if not self._share_prefixes or sequence.pages.ids or sequence.request.sampling.prompt_logprobs:
            return False
        shared = self.pool.share(sequence.tokens[:-1])
        beyond = (shared.full + 1) * self.pool.page_len
        self.pool.release(shared)
        beginning = sequence.tokens[:beyond]
        return beyond < len(sequence.tokens) and any(chunk.sequence.tokens[:beyond] == beginning for chunk in chunks)

    def _begun(self) -> list[DecodeStep]:
        """Publish the pages of the chunks in hand, which were read; first tokens of the prompts that they end."""
        steps: list[DecodeStep] = []
        reading, self._reading = self._reading, None
        for chunk in reading.chunks if reading else []:
            sequence = chunk.sequence
            self.pool.commit(sequence.pages, sequence.tokens, sequence.read)
            if sequence.read < sequence.goal:
                continue
            self._line.popleft()
            if sequence.emitted:
                self.decoder.resume(sequence)
            else:
                steps.append(self.decoder.begin(chunk))
        return steps

    def _plan(self) -> StepPlan:
        """The autoregressive plan if no request wants drafts, else the planner's.

        In a mixed batch, the drafts of requests without drafts are NO_DRAFT, which is always rejected.
        """
        undrafted = [sequence for sequence in self.decoder.running if not sequence.request.speculative]
        if len(undrafted) == len(self.decoder.running):
            return StepPlan(1)
        plan = self.planner.next_plan(self.pending, self.decoder.context)
        if plan.clean_len > 1:
            for sequence in undrafted:
                self.decoder.redraft(sequence, [NO_DRAFT] * (plan.clean_len - 1))
        return plan

    def _make_room(self, clean_len: int) -> None:
        """Give every running sequence pages for `clean_len` more tokens; where they run out, preempt the youngest."""
        slot, running = 0, self.decoder.running
        while slot < len(running):
            sequence = running[slot]
            held = len(sequence.pages.ids)
            if self.pool.grow(sequence.pages, sequence.read + clean_len):
                if len(sequence.pages.ids) > held:
                    self.decoder.give_pages(slot, held)
                slot += 1
            elif self._line and self._line[0].pages.ids:
                self._drop_pages(self._line[0])
            else:
                youngest = max(running, key=lambda sequence: sequence.arrival)
                self._leave(youngest)
                self._line.appendleft(youngest)
                self.preemptions += 1
                slot = 0

    def _hold(self, sequence: Sequence) -> bool:
        """Take pages for all tokens to be read and the first decode step; shared pages where the cache has the
        beginning. False where there are too few."""
        if sequence.pages.ids:
            return True
        request, config = sequence.request, self.decoder.model.config
        if self._share_prefixes and not request.sampling.prompt_logprobs:
            sequence.pages = self.pool.share(sequence.tokens[:-1])
        if not self.pool.grow(sequence.pages, len(sequence.tokens) + self.decoder.draft.block_len):
            self._drop_pages(sequence)
            return False
        sequence.read = sequence.pages.full * self.pool.page_len
        self.shared_tokens += sequence.read
        if sequence.cached is None:  # first time: later, the cache also holds what it has read itself
            sequence.cached = sequence.read
            if request.constraint is not None or LogitRules.needed(request.sampling):
                device = self.decoder.device
                sequence.rules = LogitRules(
                    request.sampling, request.prompt, config.vocab_size, device, request.constraint
                )
        return True

    def _settle(self, steps: list[DecodeStep]) -> list[DecodeStep]:
        """Publish the pages that new tokens have filled, and free what finished requests held."""
        for step in steps:
            sequence = self._sequences[step.request_id]
            self.pool.commit(sequence.pages, sequence.tokens, min(sequence.read, len(sequence.tokens)))
            if step.finish_reason is not None:
                self.abort(step.request_id)
        return steps

    def _leave(self, sequence: Sequence) -> None:
        self.decoder.leave(sequence)
        self._drop_pages(sequence)

    def _drop_pages(self, sequence: Sequence) -> None:
        """Release the pages of a sequence.

        Chunks in hand that write there are dropped. Their other sequences release their pages too, but for the first of
        the line.
        """
        self.pool.release(sequence.pages)
        sequence.pages, sequence.read, sequence.prompt_logprobs = SequencePages(), 0, []
        chunks = self._reading.chunks if self._reading else []
        if any(chunk.sequence is sequence for chunk in chunks):
            self._reading, first = None, next(iter(self._line), None)
            for other in chunks:
                if other.sequence is not first:
                    self._drop_pages(other.sequence)
