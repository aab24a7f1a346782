"""State of a request on its way through the decoder: tokens, pages, rules, its draft block, the next chunk to read."""

from dataclasses import dataclass, field

from torch import Tensor

from tidar_core.decoding.decode_forward import Passage
from tidar_core.decoding.logit_rules import LogitRules
from tidar_core.decoding.page_pool import SequencePages
from tidar_core.decoding.request import DecodeStep, Request, TokenLogprob
from tidar_core.decoding.step_plan import StepPlan

__all__ = ["Chunk", "Reading", "Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, the tokens it has so far, and the pages it holds."""

    request: Request
    arrival: int
    """Ordinal of the request; where pages run out, the youngest sequence gives its own up."""
    tokens: list[int]
    """Prompt and completion so far."""
    rules: LogitRules | None = None
    """`None` where the request has no rules, and before its prompt is first read."""
    pages: SequencePages = field(default_factory=SequencePages)
    read: int = 0
    """Clean tokens in the cache; while it runs, all tokens but the last."""
    pending: int = 1
    """Tokens of the draft block that are worth verifying: d_1 and the drafts of masks, 1..K."""
    mask_offset: int = 0
    """Index in its block of the mask at the place of d_1."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: int | None = None
    """Tokens of the prompt that the cache held already when the prompt was first to be read; None before."""

    @property
    def emitted(self) -> int:
        """Tokens of the completion."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def goal(self) -> int:
        """Tokens to be read before it runs: the whole prompt, or all but the last token of a completion."""
        return len(self.tokens) - (self.emitted > 0)

    def set_block(self, pending: int, mask_offset: int) -> None:
        """Take note of the next draft block; without speculation only d_1 counts, whatever the block holds."""
        self.pending, self.mask_offset = (pending, mask_offset) if self.request.speculative else (1, 0)

    def add(self, tokens: list[int], accepted: int, verified: int) -> DecodeStep:
        """Add new tokens, cut at the first end-of-text token and at max_tokens.

        accepted  pending tokens that were accepted; 0 for a prefill
        verified  tokens of the draft block that the forward read; 0 for a prefill
        """
        sampling = self.request.sampling
        tokens = tokens[: sampling.max_tokens - self.emitted]
        stop = next((i for i, token in enumerate(tokens) if token in sampling.eos_ids), None)
        tokens = tokens if stop is None else tokens[: stop + 1]
        self.tokens += tokens
        self.read += accepted
        if self.rules is not None:
            self.rules.commit(tokens)
        ended = "length" if self.emitted == sampling.max_tokens else None
        reason = "stop" if stop is not None else ended
        mask_offset, cached = (self.mask_offset, 0) if verified else (0, self.cached or 0)
        verified = (
            verified if self.request.speculative else min(verified, 1)
        )  # its drafts only filled the batch's shape
        return DecodeStep(
            self.request.request_id, tuple(tokens), reason, self.pending, accepted, verified,
            mask_offset=mask_offset, cached=cached,
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class Chunk:
    """The next tokens of a sequence without a slot."""

    sequence: Sequence
    plan: StepPlan
    """Number of the tokens, and the masks behind them."""
    hidden: Tensor | None = None
    """Hidden states [1, R, E] of tokens and masks, after all layers."""


@dataclass(slots=True, eq=False)
class Reading:
    """Chunks that pass the layers together, in one forward or in several."""

    chunks: list[Chunk]
    passage: Passage | None
    """Query tokens of all chunks; None if there are none: a text that was preempted may find all of its pages in the
    cache."""
    left: int
    """Layers that the tokens have not passed."""

    @property
    def unread(self) -> list[Chunk]:
        """The chunks that have tokens to read."""
        return [chunk for chunk in self.chunks if chunk.plan.clean_len]

    @property
    def tokens(self) -> int:
        """Tokens of all chunks, without masks."""
        return sum(chunk.plan.clean_len for chunk in self.chunks)
