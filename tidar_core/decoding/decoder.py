"""What does one forward bring a batch of sequences?

`prefill` reads prompts and gives their first tokens; `decode_step` verifies each sequence's draft block and, in the
same forward, drafts the next block for the outcomes of the verification that its plan names (TiDAR, section 3.2; the
plans: `modes`). With one pending token and no group it is the autoregressive mode, through the same code.

For beta = 1, texts follow the autoregressive mode's law; with argmax drafts they are its texts, token for token, greedy
or sampled with the same seed. In fp32 that holds up to ties within rounding (about 1e-6 in the logits), since other
batch shapes sum in another order.

This is the host's side: who runs, in which row, on which pages. What a forward computes: `step`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.decoding.batch_state import BatchState
from tidar_core.decoding.cuda_graphs import CudaRecorder, StepGraphs
from tidar_core.decoding.decode_step import DecodeStepRunner, Outcome
from tidar_core.decoding.decoder_size import DecoderSize
from tidar_core.decoding.logit_rules import LogitRules, adjusting
from tidar_core.decoding.logprobs import token_logprobs
from tidar_core.decoding.page_pool import PAGE_LEN, PagePool, SequencePages, page_count
from tidar_core.decoding.plan_tensors import NextBlock, block_after, blocks_after
from tidar_core.decoding.request import DecodeStep, Request, check_request
from tidar_core.decoding.sampling import SamplingTensors
from tidar_core.decoding.sequence import Sequence
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.errors import CapacityError, RequestError
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["PREFILL_TOKENS", "Decoder"]

PREFILL_TOKENS = 512
"""Prompt tokens read in one forward, so that those who decode wait no longer; only the last forward of a prompt carries
mask tokens."""


class Decoder:
    """A batch of sequences on one model and one cache."""

    def __init__(
        self,
        model: TidarModel,
        draft: DraftConfig,
        *,
        rows: int,
        context_len: int | None = None,
        pages: int | None = None,
        page_len: int = PAGE_LEN,
        share_prefixes: bool = True,
    ) -> None:
        """rows            sequences that may run together
        context_len     most tokens of prompt and completion; the model's own by default
        pages           of the cache; by default enough for `rows` whole contexts. With fewer, the youngest sequences
                        give theirs up when there are none left, and are read again later
        page_len        tokens of a page
        share_prefixes  read the beginning that two prompts have in common once
        """
        size = DecoderSize.of(model.config, draft, rows=rows, context_len=context_len, pages=pages, page_len=page_len)
        self.model, self.draft, self.rows, self.share_prefixes = model, draft, rows, share_prefixes
        self.context_len = size.context_len
        weight = model.embedding.weight
        self.device = weight.device
        self.pool = PagePool(size.pages, page_len)
        self.cache = KVCache(model.config, pages=size.pages, page_len=page_len, dtype=weight.dtype, device=self.device)
        vocab = model.config.vocab_size if draft.kind == "sampled" else None
        self._state = BatchState(rows, draft.block_len, size.max_pages, proposal_vocab=vocab, device=self.device)
        self._stepper = DecodeStepRunner(model, draft, self.cache, self._state)
        self._graphs: StepGraphs | None = None
        if self.device.type == "cuda":
            self._graphs = StepGraphs(self._stepper, CudaRecorder(self.device))
        self._running: list[Sequence] = []
        self._arriving: deque[Sequence] = deque()
        self._arrivals = 0
        self.preemptions = 0
        """Times that a running sequence gave up its pages."""
        self.shared_tokens = 0
        """Prompt tokens that were in the cache already and not read again."""

    @property
    def running(self) -> tuple[str, ...]:
        """Requests that the next decode step serves."""
        return tuple(sequence.request.request_id for sequence in self._running)

    @property
    def arriving(self) -> tuple[str, ...]:
        """Requests whose prompts are not read to the end, or which wait for pages."""
        return tuple(sequence.request.request_id for sequence in self._arriving)

    @property
    def captures(self) -> bool:
        """Whether each shape of step is captured when it is first met, which takes a while."""
        return self._graphs is not None

    @property
    def free_rows(self) -> int:
        """Requests that may be admitted now."""
        return self.rows - len(self._running) - len(self._arriving)

    @property
    def pending(self) -> dict[str, int]:
        """How many tokens each running request has pending: d_1 and its drafts, 1..K."""
        return {sequence.request.request_id: sequence.pending for sequence in self._running}

    @property
    def context(self) -> int:
        """Clean tokens of the longest running sequence."""
        return max((sequence.read for sequence in self._running), default=0)

    def check(self, request: Request) -> None:
        """Raise RequestError if this decoder could never serve `request`."""
        check_request(request, self.model.config, self.context_len)
        if request.request_id in (*self.running, *self.arriving):
            raise RequestError(f"request id {request.request_id!r} is running already; give each request its own")

    def admit(self, request: Request) -> None:
        """Take in a request; `prefill` will read it."""
        self.check(request)
        if not self.free_rows:
            raise CapacityError(f"all {self.rows} rows are running; finish or abort a request first")
        ruled = request.constraint is not None or LogitRules.needed(request.sampling)
        vocab_size = self.model.config.vocab_size
        rules = (
            LogitRules(request.sampling, request.prompt, vocab_size, self.device, request.constraint) if ruled else None
        )
        self._arriving.append(Sequence(request, self._arrivals, list(request.prompt), rules))
        self._arrivals += 1

    @torch.inference_mode()
    def prefill(self, max_tokens: int = PREFILL_TOKENS, *, drafts: bool = True) -> list[DecodeStep]:
        """Read up to `max_tokens` tokens of the arriving prompts, in order; first tokens of those read to the end.

        Stops where pages run out. A sequence that was preempted is read again, its completion included, and brings no
        step.

        drafts  draft first blocks in the same forwards
        """
        steps: list[DecodeStep] = []
        while self._arriving and max_tokens > 0:
            sequence = self._arriving[0]
            if not self._hold(sequence):
                break
            count = min(max_tokens, PREFILL_TOKENS, sequence.goal - sequence.read)
            max_tokens -= count
            last = sequence.read + count == sequence.goal
            fresh = not sequence.emitted
            masked = fresh and (drafts or sequence.request.sampling.beta < 1)
            plan = StepPlan(count, (count,) if last and masked else ())
            hidden = self._read(sequence, plan) if count else None
            if not last:
                continue
            self._arriving.popleft()
            row = self._join(sequence)
            if fresh:
                assert hidden is not None, "the last token of a prompt is always read"
                steps.append(self._begin(row, sequence, hidden, plan))
        return self._finish_steps(steps)

    @torch.inference_mode()
    def decode_step(self, plan: StepPlan) -> list[DecodeStep]:
        """One forward for all running requests; those that finished have left when it returns.

        Any plan may follow any other. Where a request has beta below 1, groups that the plan leaves out are added.
        Where pages run out, the youngest sequences are preempted first and bring no step.
        """
        self._make_room(plan.clean_len)
        if not self._running:
            return []
        if any(sequence.request.sampling.beta < 1 for sequence in self._running):
            plan = StepPlan(plan.clean_len, tuple(range(1, plan.clean_len + 1)))
        batch, used_pages = len(self._running), page_count(self.context, self.pool.page_len)
        ruled = {row: sequence.rules for row, sequence in enumerate(self._running) if sequence.rules is not None}
        adjust = adjusting(ruled, self._state.draft[:batch, 1 : plan.clean_len]) if ruled else None
        outcome = self._launch(batch, plan, used_pages, adjust)
        blocks, logits = blocks_after(plan, self.draft.block_len), outcome.ar_logits
        steps = []
        for row, (n, *tokens) in enumerate(outcome.accepted_emitted[:batch].tolist()):
            sequence = self._running[row]
            steps.append(self._step(sequence, tokens[:n], n, plan.clean_len, None if logits is None else logits[row]))
            sequence.pending, sequence.late = blocks[n].pending, blocks[n].late
            if sequence.rules is not None and steps[row].finish_reason is None:
                assert outcome.hidden is not None, "rules are never captured"
                self._draft_within_rules(row, outcome.hidden[row], blocks[n])
        return self._finish_steps(steps)

    def abort(self, request_id: str) -> bool:
        """Drop a request; False if it is not here. Its row and pages are free at once."""
        for sequence in self._arriving:
            if sequence.request.request_id == request_id:
                self._arriving.remove(sequence)
                self._drop_pages(sequence)
                return True
        if request_id not in self.running:
            return False
        self._release(self.running.index(request_id))
        return True

    def drop_begun(self) -> None:
        """Drop the requests that hold a row or pages, as after a forward that failed.

        A request that holds neither goes on where it is, be it new or preempted: its tokens and rules are the host's,
        and the forwards of others do not touch them.
        """
        reading = [sequence.request.request_id for sequence in self._arriving if sequence.holding.pages]
        for request_id in (*self.running, *reading):
            self.abort(request_id)

    def redraft(self, request_id: str, tokens: list[int]) -> None:
        """Replace the pending drafts d_2..d_K of a request, as if the model had proposed them outright.

        Any proposals leave the text the same, only the number of forwards changes; so this is how a known
        continuation, or a hostile one, is put to the test.
        """
        assert len(tokens) == self.draft.block_len - 1, "d_1 is final; give the other block_len - 1"
        self._set_drafts(self.running.index(request_id), tokens)

    @contextmanager
    def rehearsal(self, batch: int, context: int) -> Iterator[Callable[[StepPlan], None]]:
        """Decode steps of `batch` sequences that do not exist, each with `context` tokens read: for timing alone."""
        assert not self._running, "rehearse while nothing runs"
        assert not (self._arrivals and self.share_prefixes), "rehearse before requests come: it writes over pages"
        state, used_pages = self._state, page_count(context, self.pool.page_len)
        state.gather_sampling([SamplingConfig()] * batch)
        spread = torch.arange(batch * state.page_table.shape[1], device=self.device) % self.pool.pages + 1
        state.page_table[:batch] = spread.view(batch, -1)
        state.prefix_len[:batch] = context

        @torch.inference_mode()
        def step(plan: StepPlan) -> None:
            self._launch(batch, plan, used_pages).accepted_emitted.tolist()

        try:
            yield step
        finally:
            state.page_table.zero_()
            state.prefix_len.zero_()
            state.gather_sampling([])

    def _launch(
        self, batch: int, plan: StepPlan, used_pages: int, adjust: Callable[[Tensor], Tensor] | None = None
    ) -> Outcome:
        if self._graphs is None or adjust is not None:
            return self._stepper.step(batch, self._stepper.tensors_of(plan), used_pages, adjust)
        scored = any(sequence.request.sampling.logprobs is not None for sequence in self._running)
        return self._graphs.step(batch, plan, used_pages, scored=scored)

    def _hold(self, sequence: Sequence) -> bool:
        """Pages for all that is to be read and the first step after; shared ones where the cache has the beginning."""
        if sequence.holding.pages:
            return True
        if self.share_prefixes and not sequence.request.sampling.prompt_logprobs:
            sequence.holding = self.pool.share(sequence.tokens[:-1])
        if not self.pool.grow(sequence.holding, len(sequence.tokens) + self.draft.block_len):
            self._drop_pages(sequence)
            return False
        sequence.read = sequence.holding.full * self.pool.page_len
        self.shared_tokens += sequence.read
        if sequence.cached is None:  # later, what it has read itself is among it
            sequence.cached = sequence.read
        return True

    def _read(self, sequence: Sequence, plan: StepPlan) -> Tensor:
        """The next `plan.clean_len` tokens of a sequence; hidden states of the rows that the plan names."""
        start, stop = sequence.read, sequence.read + plan.clean_len
        chunk = torch.tensor([sequence.tokens[start:stop]], device=self.device)
        pages = torch.tensor([sequence.holding.pages], device=self.device)
        hidden = self._stepper.read(pages, start, chunk, plan)
        sequence.read = stop
        self.pool.commit(sequence.holding, sequence.tokens, stop)
        sampling, following = sequence.request.sampling, sequence.tokens[start + 1 : stop + 1]
        if sampling.prompt_logprobs and following and not sequence.emitted:
            logits = self.model.head(hidden[0, : len(following)])
            sequence.prompt_logprobs += token_logprobs(logits, following, sampling.logprobs or 0)
        return hidden

    def _join(self, sequence: Sequence) -> int:
        """A sequence that was read to its goal takes the next row; d_1 is its last token, where it has said any."""
        row = len(self._running)
        self._running.append(sequence)
        self._state.begin(row, sequence.read)
        self._state.give_pages(row, 0, sequence.holding.pages)
        self._gather_sampling()
        if sequence.emitted:
            sequence.pending = 1
            last = torch.tensor(sequence.tokens[-1:], device=self.device)
            self._stepper.fill_with_point_mass(slice(row, row + 1), last)
        return row

    def _begin(self, row: int, sequence: Sequence, hidden: Tensor, plan: StepPlan) -> DecodeStep:
        """First token of a completion, and the block behind it."""
        rows, C = slice(row, row + 1), plan.clean_len
        sampling = SamplingTensors.of([sequence.request.sampling], self.device)
        ar_logits = self.model.head(hidden[:, C - 1 : C])
        last_11 = torch.tensor([sequence.tokens[-1:]], device=self.device)
        logits = self._stepper.target_logits(ar_logits, hidden[:, C : C + 1], last_11, sampling)
        if sequence.rules is not None:
            logits = sequence.rules.adjust(logits[0])[None]
        first = int(self._stepper.begin(rows, hidden, plan, logits, sampling))
        block = block_after(plan, self.draft.block_len, C)
        sequence.pending, sequence.late = block.pending, block.late
        step = self._step(sequence, [first], 0, 0, ar_logits[0])
        if sequence.rules is not None and step.finish_reason is None:
            self._draft_within_rules(row, hidden[0], block)
        return step

    def _draft_within_rules(self, row: int, hidden_RE: Tensor, block: NextBlock) -> None:
        """Draft anew what the rules of a request allow, from the masks that drafted its block."""
        sequence = self._running[row]
        assert sequence.rules is not None
        masks_RE = hidden_RE[block.first_row + 1 : block.first_row + block.pending]
        drafts = sequence.rules.adjust_drafts(self.model.head(masks_RE), self.model.linked)
        self._set_drafts(row, drafts)

    def _set_drafts(self, row: int, tokens: list[int]) -> None:
        """Point masses in the place of the row's first drafts; no more are pending."""
        drafted = slice(1, 1 + len(tokens))
        chosen = torch.tensor(tokens, dtype=torch.long, device=self.device)
        self._state.draft[row, drafted] = chosen
        if self._state.proposal is not None:
            self._state.proposal[row, drafted] = 0.0
            self._state.proposal[row, drafted].scatter_(1, chosen[:, None], 1.0)
        self._running[row].pending = 1 + len(tokens)

    def _make_room(self, clean_len: int) -> None:
        """Pages for the clean rows of the next step; where there are too few, the youngest give theirs up."""
        row = 0
        while row < len(self._running):
            sequence = self._running[row]
            held = len(sequence.holding.pages)
            if self.pool.grow(sequence.holding, sequence.read + clean_len):
                if len(sequence.holding.pages) > held:
                    self._state.give_pages(row, held, sequence.holding.pages[held:])
                row += 1
            elif reading := [arriving for arriving in self._arriving if arriving.holding.pages]:
                self._drop_pages(reading[0])
            else:
                youngest = max(self._running, key=lambda running: running.arrival)
                self._release(self._running.index(youngest))
                self._arriving.appendleft(youngest)
                self.preemptions += 1
                row = 0

    def _step(
        self, sequence: Sequence, tokens: list[int], accepted: int, verified: int, ar_logits_RV: Tensor | None
    ) -> DecodeStep:
        """Give a sequence its new tokens, and publish the pages that they fill."""
        step = sequence.add(tokens, accepted, verified)
        self.pool.commit(sequence.holding, sequence.tokens, min(sequence.read, len(sequence.tokens)))
        top = sequence.request.sampling.logprobs
        if top is not None:
            assert ar_logits_RV is not None, "a step is scored where a request asks for log-probabilities"
            step = replace(step, logprobs=tuple(token_logprobs(ar_logits_RV, step.token_ids, top)))
        if sequence.prompt_logprobs:
            step = replace(step, prompt_logprobs=tuple(sequence.prompt_logprobs))
            sequence.prompt_logprobs = []
        return step

    def _finish_steps(self, steps: list[DecodeStep]) -> list[DecodeStep]:
        for step in steps:
            if step.finish_reason is not None:
                self._release(self.running.index(step.request_id))
        return steps

    def _release(self, row: int) -> None:
        """Free a row and its pages; the last running sequence takes the row."""
        last = len(self._running) - 1
        self._drop_pages(self._running[row])
        self._running[row] = self._running[last]
        del self._running[last]
        self._state.free(row, last)
        self._gather_sampling()

    def _drop_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.holding)
        sequence.holding, sequence.read, sequence.prompt_logprobs = SequencePages(), 0, []

    def _gather_sampling(self) -> None:
        self._state.gather_sampling([sequence.request.sampling for sequence in self._running])
