"""What does the decoder remember of a request on its way?"""

from dataclasses import dataclass, field

from tidar_core.decoding.logit_rules import LogitRules
from tidar_core.decoding.page_pool import SequencePages
from tidar_core.decoding.request import DecodeStep, Request, TokenLogprob

__all__ = ["Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, what has been said to it, and what it holds."""

    request: Request
    arrival: int
    """Ordinal; the younger gives way."""
    tokens: list[int]
    """Prompt and completion so far."""
    rules: LogitRules | None
    """None where the request has none."""
    holding: SequencePages = field(default_factory=SequencePages)
    read: int = 0
    """Clean tokens in the cache; while it runs, all tokens but the last."""
    pending: int = 1
    """Tokens of the draft block that are worth verifying: d_1 and what masks have drafted."""
    late: int = 0
    """Which mask of its block predicted d_1's place."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: int | None = None
    """Tokens of the prompt that were in the cache already when it was first to be read; None before."""

    @property
    def emitted(self) -> int:
        """Tokens of the completion."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def goal(self) -> int:
        """Tokens to be read before it runs: all, and the first of the completion follows; or all but that one."""
        return len(self.tokens) - (self.emitted > 0)

    def add(self, tokens: list[int], accepted: int, verified: int) -> DecodeStep:
        """Take in new tokens, cut at the first end-of-text token and at max_tokens."""
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
        late, cached = (self.late, 0) if verified else (0, self.cached or 0)
        return DecodeStep(
            self.request.request_id, tuple(tokens), reason, self.pending, accepted, verified, late=late, cached=cached
        )
