"""Runs step plans for the sequences in its slots, on one model and one cache.

`read` and `begin` read prompts and give their first tokens. `decode_step` verifies each sequence's draft block. In the
same forward it drafts the next block for the outcomes of the verification that the plan names (TiDAR, section 3.2; the
plans: `step_plan`). With one pending token and no group it is the autoregressive mode, through the same code.

For beta = 1, texts follow the distribution of the autoregressive mode. With argmax drafts they are its texts, token for
token, greedy or sampled with the same seed. In fp32 that holds up to ties within rounding (about 1e-6 in the logits),
since other batch shapes sum in another order.

The decoder keeps no waiting line and owns no pages: both are the scheduler's. `decode_step` computes a forward.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tidar_core.config import DraftConfig
from tidar_core.decoding.batch_state import BatchState
from tidar_core.decoding.cuda_graphs import CudaRecorder, StepGraphs
from tidar_core.decoding.decode_forward import Passage, QueryTokens
from tidar_core.decoding.decode_step import DEFAULT_TUNING, DecodeStepRunner, DecodeTuning, Outcome
from tidar_core.decoding.decoder_size import DecoderSize
from tidar_core.decoding.logit_rules import adjusting
from tidar_core.decoding.logprobs import score_prompt, scored
from tidar_core.decoding.page_pool import PAGE_LEN, page_count
from tidar_core.decoding.plan_tensors import NextBlock, block_after, blocks_after
from tidar_core.decoding.request import DecodeStep, Request, check_request
from tidar_core.decoding.sampling import SamplingTensors
from tidar_core.decoding.sequence import Chunk, Reading, Sequence
from tidar_core.decoding.step_plan import StepPlan
from tidar_core.transformer.draft_adapter import exchange_drafts
from tidar_core.transformer.kv_cache import KVCache
from tidar_core.transformer.model import TidarModel

__all__ = ["Decoder"]


class Decoder:
    """A batch of sequences on one model and one cache."""

    def __init__(
        self,
        model: TidarModel,
        draft: DraftConfig,
        *,
        slots: int,
        context_len: int | None = None,
        pages: int | None = None,
        page_len: int = PAGE_LEN,
        tuning: DecodeTuning = DEFAULT_TUNING,
    ) -> None:
        """slots        sequences that may run together
        context_len  most tokens of prompt and completion; the model's own by default
        pages        pages of the cache; by default enough for `slots` whole contexts
        page_len     tokens of a page
        """
        size = DecoderSize.of(model.config, draft, slots=slots, context_len=context_len, pages=pages, page_len=page_len)
        self.model, self.draft, self.slots = model, draft, slots
        self.context_len, self.pages = size.context_len, size.pages
        weight = model.embedding.weight
        self.device = weight.device
        self.cache = KVCache(model.config, pages=size.pages, page_len=page_len, dtype=weight.dtype, device=self.device)
        vocab = model.config.vocab_size if draft.kind == "sampled" else None
        self._state = BatchState(slots, draft.block_len, size.max_pages, proposal_vocab=vocab, device=self.device)
        self._runner = DecodeStepRunner(model, draft, self.cache, self._state, tuning=tuning)
        on_gpu = self.device.type == "cuda"
        self._graphs = StepGraphs(self._runner, CudaRecorder(self.device)) if on_gpu else None
        self.running: list[Sequence] = []
        """The running sequences by slot; they always take the first slots."""
        self._moved = False
        """Whether sequences took or left slots since the last step."""
        self._has_read = False

    @property
    def captures(self) -> bool:
        """Whether each shape of decode step is captured as a CUDA graph when it is first met, which takes a while.

        A captured step reads no chunks of prompts in its forward.
        """
        return self._graphs is not None

    def computed_slots(self, batch: int) -> int:
        """Slots that a step of `batch` sequences computes: more than `batch` if few shapes are captured."""
        return batch if self._graphs is None else self._graphs.slots(batch)

    @property
    def context(self) -> int:
        """Clean tokens of the longest running sequence."""
        return max((sequence.read for sequence in self.running), default=0)

    def check(self, request: Request) -> None:
        """Raise RequestError if this decoder could never serve `request`."""
        check_request(request, self.model.config, self.context_len)

    @torch.inference_mode()
    def load_drafts(self, weights: Mapping[str, Tensor]) -> None:
        """Exchange the weights of adapter and link, between any two steps, in the middle of texts too.

        Drafts are proposals, so texts with beta = 1 keep their distribution; with argmax drafts they stay the same,
        token for token. Values go into the same tensors, so captured steps read them too. Raises WeightsError, and
        changes nothing, if names or shapes differ.

        weights  values by their names in the model: all of its adapter and its link
        """
        exchange_drafts(self.model, weights)
        self._runner.refresh_drafts()

    @torch.inference_mode()
    def enter(self, chunks: list[Chunk]) -> Reading:
        """Chunks of different sequences that have no slot yet, before the first layer."""
        reading = Reading(chunks, None, 0)
        if unread := reading.unread:
            reading.passage = self._runner.enter([self._query_tokens(chunk) for chunk in unread])
            reading.left = self.model.config.layers
        return reading

    @torch.inference_mode()
    def read(self, reading: Reading) -> None:
        """Take chunks through all layers that are left."""
        if reading.passage is not None and reading.left:
            self._runner.read(reading.passage)
            self._has_passed(reading, reading.left)

    @torch.inference_mode()
    def begin(self, chunk: Chunk) -> DecodeStep:
        """Put a sequence into the next slot, after the chunk that ends its prompt was read.

        Returns the first token of its completion, and drafts the block after it.
        """
        sequence, plan, hidden = chunk.sequence, chunk.plan, chunk.hidden
        assert hidden is not None, "the last token of a prompt is always read"
        slot = self._take_slot(sequence)
        sampling = SamplingTensors.of([sequence.request.sampling], self.device)
        last_11 = torch.tensor([sequence.tokens[-1:]], device=self.device)
        adjust = None if sequence.rules is None else adjusting({0: sequence.rules})
        first, ar_logits = self._runner.begin(slice(slot, slot + 1), hidden, plan, last_11, sampling, adjust)
        block = block_after(plan, self.draft.block_len, plan.clean_len)
        sequence.set_block(block.pending, block.mask_offset)
        step = scored(sequence, sequence.add([int(first)], 0, 0), ar_logits[0])
        if sequence.rules is not None and step.finish_reason is None:
            self._draft_within_rules(slot, hidden[0], block)
        return step

    @torch.inference_mode()
    def resume(self, sequence: Sequence) -> None:
        """Put a sequence that was read again, completion included, into the next slot; its last token is pending."""
        slot = self._take_slot(sequence)
        sequence.set_block(1, sequence.mask_offset)
        last = torch.tensor(sequence.tokens[-1:], device=self.device)
        self._runner.fill_with_point_mass(slice(slot, slot + 1), last)

    @torch.inference_mode()
    def decode_step(self, plan: StepPlan, beside: Reading | None = None, layers: int = 0) -> list[DecodeStep]:
        """Run one forward for all running sequences; returns one step for each, by slot.

        Any plan may follow any other. Where a request has beta below 1, groups that the plan leaves out are added. The
        caller has given the pages that `plan.clean_len` more tokens take.

        beside  chunks that pass their next `layers` layers in the same forward; none where steps are captured
        """
        if any(sequence.request.sampling.beta < 1 for sequence in self.running):
            plan = StepPlan(plan.clean_len, tuple(range(1, plan.clean_len + 1)))
        batch, used_pages = len(self.running), page_count(self.context, self.cache.page_len)
        if self._moved:  # once a step, however many begin and end between two steps
            self._state.gather_sampling([sequence.request.sampling for sequence in self.running])
            self._moved = False
        ruled = {slot: sequence.rules for slot, sequence in enumerate(self.running) if sequence.rules is not None}
        adjust = adjusting(ruled, self._state.draft[:batch, 1 : plan.clean_len].clamp(min=0)) if ruled else None
        passage = None if beside is None else beside.passage
        outcome = self._launch(batch, plan, used_pages, adjust, passage, layers)
        if beside is not None and layers:
            self._has_passed(beside, layers)
        blocks, logits = blocks_after(plan, self.draft.block_len), outcome.ar_logits
        steps = []
        for slot, (n, *tokens) in enumerate(outcome.accepted_emitted[:batch].tolist()):
            sequence = self.running[slot]
            step = sequence.add(tokens[:n], n, plan.clean_len)
            steps.append(scored(sequence, step, None if logits is None else logits[slot]))
            sequence.set_block(blocks[n].pending, blocks[n].mask_offset)
            if sequence.rules is not None and step.finish_reason is None:
                assert outcome.hidden is not None, "steps with rules are never captured"
                self._draft_within_rules(slot, outcome.hidden[slot], blocks[n])
        return steps

    def give_pages(self, slot: int, first: int) -> None:
        """Pass the pages of the slot's sequence on to the device, from its page `first` on."""
        self._state.give_pages(slot, first, self.running[slot].pages.ids[first:])

    def leave(self, sequence: Sequence) -> None:
        """Free the slot of a sequence; the sequence of the last taken slot moves there."""
        slot, last = self.running.index(sequence), len(self.running) - 1
        self.running[slot] = self.running[last]
        del self.running[last]
        self._state.free(slot, last)
        self._moved = True

    def redraft(self, sequence: Sequence, tokens: list[int]) -> None:
        """Replace the first drafts of a running sequence by ids or NO_DRAFT, as if the model had proposed these.

        No more drafts are pending. Any proposals leave the text the same; only the number of forwards changes.
        """
        self._state.redraft(self.running.index(sequence), tokens)
        sequence.set_block(1 + len(tokens), sequence.mask_offset)

    @contextmanager
    def rehearsal(self, batch: int, context: int) -> Iterator[Callable[[StepPlan], None]]:
        """Decode steps of `batch` sequences that do not exist, each with `context` tokens read: for timing alone."""
        assert not self._has_read, "rehearse before requests come: a rehearsal overwrites pages"
        used_pages = page_count(context, self.cache.page_len)

        @torch.inference_mode()
        def step(plan: StepPlan) -> None:
            self._launch(batch, plan, used_pages).accepted_emitted.tolist()

        with self._state.rehearsal(batch, context, self.pages):
            yield step

    def _launch(
        self,
        batch: int,
        plan: StepPlan,
        used_pages: int,
        adjust: Callable[[Tensor], Tensor] | None = None,
        beside: Passage | None = None,
        layers: int = 0,
    ) -> Outcome:
        if self._graphs is None or adjust is not None:
            return self._runner.step(batch, self._runner.tensors_of(plan), used_pages, adjust, beside, layers)
        assert beside is None, "a captured step reads no chunks"
        scored = any(sequence.request.sampling.logprobs is not None for sequence in self.running)
        return self._graphs.step(batch, plan, used_pages, scored=scored)

    def _query_tokens(self, chunk: Chunk) -> QueryTokens:
        self._has_read = True
        sequence, start = chunk.sequence, chunk.sequence.read
        tokens = torch.tensor([sequence.tokens[start : start + chunk.plan.clean_len]], device=self.device)
        pages = sequence.pages
        if pages.row is None:  # a long prompt has many chunks, and thousands of pages
            pages.row = torch.tensor([pages.ids], device=self.device)
        return self._runner.chunk(pages.row, start, tokens, chunk.plan)

    def _has_passed(self, reading: Reading, layers: int) -> None:
        """Note that chunks have passed so many more layers."""
        reading.left = max(0, reading.left - layers)
        if reading.left or reading.passage is None:
            return
        for chunk, hidden in zip(reading.unread, reading.passage.hidden, strict=True):
            sequence, start = chunk.sequence, chunk.sequence.read
            sequence.read, chunk.hidden = start + chunk.plan.clean_len, hidden
            score_prompt(sequence, start, hidden[0], self.model.head)

    def _take_slot(self, sequence: Sequence) -> int:
        slot = len(self.running)
        self.running.append(sequence)
        self._state.begin(slot, sequence.read)
        self.give_pages(slot, 0)
        self._moved = True
        return slot

    def _draft_within_rules(self, slot: int, hidden_RE: Tensor, block: NextBlock) -> None:
        """Draft again within the rules of the request, from the masks that drafted its block."""
        sequence = self.running[slot]
        assert sequence.rules is not None
        masks_RE = hidden_RE[block.first_mask + 1 : block.first_mask + block.pending]
        self.redraft(sequence, self._runner.drafts_within(sequence.rules, masks_RE))
