"""What does one forward bring a batch of sequences?

`prefill` reads a prompt and gives its first token; `decode_step` verifies each sequence's draft block and, in the same
forward, drafts the next block for the outcomes of the verification that its plan names (TiDAR, section 3.2; the plans:
`modes`). With one pending token and no group it is the autoregressive mode, through the same code.

For beta = 1, texts follow the autoregressive mode's law; with argmax drafts they are its texts, token for token, greedy
or sampled with the same seed. In fp32 that holds up to ties within rounding (about 1e-6 in the logits), since other
batch shapes sum in another order.

Shape letters: B sequences, K block length, R rows of a forward, E embedding, V vocabulary.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tidar_core.config import DraftConfig, SamplingConfig
from tidar_core.errors import CapacityError, ConfigError, ContextLengthError, RequestError
from tidar_core.kv_cache import CachedAttention, KVCache
from tidar_core.layout import decode_layout
from tidar_core.model import TidarModel
from tidar_core.modes import StepPlan
from tidar_core.sampling import ACCEPT, DRAFT, TARGET, SamplingTensors, draw, law, sample, uniform
from tidar_core.verify import match, weigh

__all__ = ["DecodeStep", "Decoder", "Request"]

PREFILL_ROWS = 512
"""Prompt tokens read in one forward; only the last chunk carries mask tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to be continued."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingConfig


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What one forward brought one request."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, all final; at least one."""
    finish_reason: str | None
    """`stop` after an end-of-text token, `length` after max_tokens, None while it goes on."""
    accepted: int
    """n in 1..verified: pending tokens that stood, the final first one included; 0 for a prefill."""
    verified: int
    """Pending tokens that the forward read; 1 puts no draft to the test. 0 for a prefill."""


@dataclass(slots=True)
class _Sequence:
    request: Request
    prefix_len: int
    pending: int
    """Tokens of the draft block that are worth verifying: d_1 and what masks have drafted."""
    emitted: int = 0


@dataclass(frozen=True, slots=True)
class _NextBlock:
    first_row: int
    """Row of the mask at the position of the next d_1; those after it draft d_2, d_3, .."""
    pending: int


class Decoder:
    """A batch of sequences on one model; rows 0..B-1 of the cache belong to the running ones, always."""

    def __init__(self, model: TidarModel, draft: DraftConfig, *, rows: int, context_len: int | None = None) -> None:
        """rows         sequences that may run together
        context_len  most tokens of prompt and completion; the model's own by default
        """
        if draft.block_len > 1 and model.config.mask_id is None:
            raise ConfigError(
                f"block_len is {draft.block_len} and the model has no mask token; train it in dual mode, "
                "or decode with block_len 1"
            )
        self.model, self.draft, self.rows = model, draft, rows
        self.context_len = context_len or model.config.context_len
        if max(self.context_len, draft.block_len) > model.config.context_len:
            raise ConfigError(
                f"a context of {self.context_len} and a block of {draft.block_len} were asked for; the model was built "
                f"for {model.config.context_len} positions; ask for no more"
            )
        weight = model.embedding.weight
        self.device = weight.device
        K = draft.block_len
        self.cache = KVCache(
            model.config,
            rows=rows,
            slot_len=self.context_len + K,
            scratch_len=K * K,
            dtype=weight.dtype,
            device=self.device,
        )
        self._running: list[_Sequence] = []
        self._prefix_len = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._draft = torch.zeros(rows, K, dtype=torch.long, device=self.device)
        self._proposal = (
            torch.zeros(rows, K, model.config.vocab_size, device=self.device) if draft.kind == "sampled" else None
        )
        self._sampling = SamplingTensors.of([], self.device)

    @property
    def running(self) -> tuple[str, ...]:
        """Requests that the next decode step serves."""
        return tuple(sequence.request.request_id for sequence in self._running)

    @property
    def pending(self) -> tuple[int, ...]:
        """How many tokens each running sequence has pending: d_1 and its drafts, 1..K."""
        return tuple(sequence.pending for sequence in self._running)

    @property
    def context(self) -> int:
        """Clean tokens of the longest running sequence."""
        return max((sequence.prefix_len for sequence in self._running), default=0)

    def check(self, request: Request) -> None:
        """Raise RequestError if this decoder could never serve `request`."""
        prompt_len, max_tokens = len(request.prompt), request.sampling.max_tokens
        if not prompt_len:
            raise RequestError("prompt has no tokens; it needs at least one")
        if prompt_len + max_tokens > self.context_len:
            raise ContextLengthError(
                f"prompt has {prompt_len} tokens and max_tokens is {max_tokens}; together they must not exceed the "
                f"context of {self.context_len}; shorten one of them"
            )
        if request.request_id in self.running:
            raise RequestError(f"request id {request.request_id!r} is running already; give each request its own")
        mask_id, vocab_size = self.model.config.mask_id, self.model.config.vocab_size
        for token in request.prompt:
            if token == mask_id or not 0 <= token < vocab_size:
                raise RequestError(f"prompt token {token} is not a token of text; ids are 0..{vocab_size - 1}, "
                                   f"without the mask token {mask_id}")  # fmt: skip

    @torch.inference_mode()
    def prefill(self, request: Request, *, drafts: bool = True) -> DecodeStep:
        """Read the prompt of a new request and give its first token; joins the running ones.

        drafts  draft the first block in the same forward
        """
        self.check(request)
        if len(self._running) == self.rows:
            raise CapacityError(f"all {self.rows} rows are running; finish or abort a request first")
        row, prompt_len = len(self._running), len(request.prompt)
        sampling = SamplingTensors.of([request.sampling], self.device)
        masked = drafts or not sampling.trusts_ar
        prompt = torch.tensor([request.prompt], device=self.device)
        for start in range(0, prompt_len, PREFILL_ROWS):
            chunk = prompt[:, start : start + PREFILL_ROWS]
            end = start + chunk.shape[1]
            groups = (chunk.shape[1],) if masked and end == prompt_len else ()
            hidden = self._forward(row, torch.tensor([start], device=self.device), chunk, groups, end)
        plan = StepPlan(chunk.shape[1], groups)
        last, first_mask = hidden[:, plan.clean_len - 1 : plan.clean_len], hidden[:, plan.clean_len :][:, :1]
        self._prefix_len[row] = prompt_len
        logits, position = self._target_logits(last, first_mask, sampling), self._prefix_len[row : row + 1, None]
        first = sample(logits, sampling, position, TARGET)[:, 0]
        self._propose(slice(row, row + 1), first, torch.full_like(first, plan.clean_len), hidden, plan, sampling)
        self._running.append(
            _Sequence(request, prompt_len, _blocks_after(plan, self.draft.block_len)[plan.clean_len].pending)
        )
        self._gather_sampling()
        return self._finish_steps([self._step(row, [int(first)], 0, 0)])[0]

    @torch.inference_mode()
    def decode_step(self, plan: StepPlan) -> list[DecodeStep]:
        """One forward for all running requests; those that finished have left when it returns.

        Any plan may follow any other. Where a request has beta below 1, groups that the plan leaves out are added.
        """
        B, C, sampling = len(self._running), plan.clean_len, self._sampling
        if not B:
            return []
        if not sampling.trusts_ar:
            plan = StepPlan(C, tuple(range(1, C + 1)))
        prefix_B, draft_BC = self._prefix_len[:B], self._draft[:B, :C]
        hidden_BRE = self._forward(0, prefix_B, draft_BC, plan.groups, self.context + C)
        first_masks_BGE = hidden_BRE[:, C :: self.draft.block_len]
        logits_BCV = self._target_logits(hidden_BRE[:, :C], first_masks_BGE, sampling)
        next_BC = prefix_B[:, None] + 1 + torch.arange(C, device=self.device)
        if self._proposal is None:
            verdict = match(draft_BC, sample(logits_BCV, sampling, next_BC, TARGET))
        else:
            accept_BC, target_BC = (uniform(sampling.seed_B, next_BC, role) for role in (ACCEPT, TARGET))
            verdict = weigh(draft_BC, law(logits_BCV, sampling), self._proposal[:B, :C], accept_BC, target_BC)
        accepted_B = verdict.accepted_B
        emitted_BC = torch.cat([draft_BC[:, 1:], verdict.next_B[:, None]], 1)
        emitted_BC.scatter_(1, accepted_B[:, None] - 1, verdict.next_B[:, None])
        self._prefix_len[:B] += accepted_B
        self._propose(slice(0, B), verdict.next_B, accepted_B, hidden_BRE, plan, sampling)
        table = torch.cat([accepted_B[:, None], emitted_BC], 1).tolist()
        block_after = _blocks_after(plan, self.draft.block_len)
        for sequence, (n, *_) in zip(self._running, table):
            sequence.pending = block_after[n].pending
        return self._finish_steps([self._step(b, tokens[:n], n, C) for b, (n, *tokens) in enumerate(table)])

    def abort(self, request_id: str) -> bool:
        """Drop a running request; False if it is not running. Its row is free at once."""
        if request_id not in self.running:
            return False
        self._release(self.running.index(request_id))
        return True

    def redraft(self, request_id: str, tokens: list[int]) -> None:
        """Replace the pending drafts d_2..d_K of a request, as if the model had proposed them outright.

        Any proposals leave the text the same, only the number of forwards changes; so this is how a known
        continuation, or a hostile one, is put to the test. Needs argmax drafts.
        """
        assert self._proposal is None, "drafts chosen outright cannot replace sampled ones"
        assert len(tokens) == self.draft.block_len - 1, "d_1 is final; give the other block_len - 1"
        row = self.running.index(request_id)
        self._draft[row, 1:] = torch.tensor(tokens, device=self.device)
        self._running[row].pending = self.draft.block_len

    def _forward(self, first_row: int, prefix_B: Tensor, clean_BC: Tensor, groups: tuple[int, ...],
                 used_len: int) -> Tensor:  # fmt: skip
        """Hidden states of clean rows, then of a block of masks for each group."""
        K = self.draft.block_len
        layout = decode_layout(prefix_B, clean_BC.shape[1], groups, K)
        masks_BM = clean_BC.new_full((len(clean_BC), len(groups) * K), self.model.config.mask_id or 0)
        attention = CachedAttention(self.cache, first_row, layout, clean_BC.shape[1], used_len)
        return self.model(torch.cat([clean_BC, masks_BM], 1), layout.position, attention)

    def _target_logits(self, clean_BRE: Tensor, first_masks_BRE: Tensor, sampling: SamplingTensors) -> Tensor:
        """z = beta * AR + (1 - beta) * diffusion; both predict the same positions (TiDAR, section 4.4.3)."""
        ar_BRV = self.model.head(clean_BRE).float()
        if sampling.trusts_ar:
            return ar_BRV
        beta_B11 = sampling.beta_B[:, None, None]
        mixed_BRV = beta_B11 * ar_BRV + (1 - beta_B11) * self.model.head(first_masks_BRE).float()
        return torch.where(ar_BRV.isneginf(), ar_BRV, mixed_BRV)

    def _propose(self, rows: slice, first_B: Tensor, accepted_B: Tensor, hidden_BRE: Tensor, plan: StepPlan,
                 sampling: SamplingTensors) -> None:  # fmt: skip
        """Set the next draft block: the final token, then what the masks after its position believe.

        Where there is no mask, the final token stands in, a point mass like any other guess. The prefix lengths must be
        the new ones.
        """
        K = self.draft.block_len
        self._draft[rows] = first_B[:, None].expand(-1, K)
        if self._proposal is not None:
            self._proposal[rows] = 0.0
            self._proposal[rows].scatter_(2, self._draft[rows][..., None], 1.0)
        if K == 1 or not plan.groups:
            return
        blocks = _blocks_after(plan, self.draft.block_len)
        first_row_B = torch.tensor([block.first_row for block in blocks], device=self.device)[accepted_B]
        pending_B1 = torch.tensor([block.pending for block in blocks], device=self.device)[accepted_B][:, None]
        offset_R = torch.arange(1, K, device=self.device)
        batch_B1 = torch.arange(len(first_B), device=self.device)[:, None]
        guessed_BR = offset_R < pending_B1
        logits_BRV = self.model.head(hidden_BRE[batch_B1, torch.where(guessed_BR, first_row_B[:, None] + offset_R, 0)])
        if self._proposal is None:
            self._draft[rows, 1:] = torch.where(guessed_BR, logits_BRV.argmax(-1), first_B[:, None])
            return
        proposal_BRV = law(logits_BRV, sampling)
        position_BR = self._prefix_len[rows, None] + offset_R
        drawn_BR = draw(proposal_BRV, uniform(sampling.seed_B, position_BR, DRAFT))
        self._draft[rows, 1:] = torch.where(guessed_BR, drawn_BR, first_B[:, None])
        self._proposal[rows, 1:] = torch.where(guessed_BR[..., None], proposal_BRV, self._proposal[rows, 1:])

    def _step(self, row: int, tokens: list[int], accepted: int, verified: int) -> DecodeStep:
        """Cut new tokens at the first end-of-text token and at max_tokens."""
        sequence = self._running[row]
        sampling = sequence.request.sampling
        sequence.prefix_len += accepted
        tokens = tokens[: sampling.max_tokens - sequence.emitted]
        stop = next((i for i, token in enumerate(tokens) if token in sampling.eos_ids), None)
        tokens = tokens if stop is None else tokens[: stop + 1]
        sequence.emitted += len(tokens)
        ended = "length" if sequence.emitted == sampling.max_tokens else None
        reason = "stop" if stop is not None else ended
        return DecodeStep(sequence.request.request_id, tuple(tokens), reason, accepted, verified)

    def _finish_steps(self, steps: list[DecodeStep]) -> list[DecodeStep]:
        for step in steps:
            if step.finish_reason is not None:
                self._release(self.running.index(step.request_id))
        return steps

    def _release(self, row: int) -> None:
        """Free a row; the last running sequence moves into it, so that no step ever gathers rows."""
        last = len(self._running) - 1
        if row != last:
            self.cache.move(last, row, self._running[last].prefix_len)
            for state in (self._prefix_len, self._draft, self._proposal):
                if state is not None:
                    state[row] = state[last]
            self._running[row] = self._running[last]
        del self._running[last]
        self._gather_sampling()

    def _gather_sampling(self) -> None:
        self._sampling = SamplingTensors.of([s.request.sampling for s in self._running], self.device)


@lru_cache(maxsize=1024)
def _blocks_after(plan: StepPlan, block_len: int) -> tuple[_NextBlock, ...]:
    """For each accepted length 0..clean_len: which masks of the forward draft the next block.

    The masks of the largest group that is no larger; where that is smaller, its later ones.
    """
    blocks = [_NextBlock(0, 1)]
    for n in range(1, plan.clean_len + 1):
        below = [index for index, group in enumerate(plan.groups) if group <= n]
        late = n - plan.groups[below[-1]] if below else block_len
        first_row = plan.clean_len + below[-1] * block_len + late if late < block_len else 0
        blocks.append(_NextBlock(first_row, max(1, block_len - late)))
    return tuple(blocks)
