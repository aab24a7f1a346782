"""What is asked of a decoder, and what comes back?"""

from dataclasses import dataclass

from tidar_core.config import ModelConfig, SamplingConfig
from tidar_core.decoding import logit_rules
from tidar_core.decoding.logit_rules import Constraint
from tidar_core.errors import ContextLengthError, RequestError

__all__ = ["DecodeStep", "Request", "TokenLogprob", "check_request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to be continued."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingConfig
    constraint: Constraint | None = None
    """What the text must keep to; its own, at the beginning of the text."""
    speculative: bool = True
    """False: no draft is put to the test for it, whatever the others of its batch do; each forward gives one token."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the autoregressive mode held a token to be, before any rule or temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens there and their log-probabilities, as many as asked for."""


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What one forward brought one request."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, all final; at least one."""
    finish_reason: str | None
    """`stop` after an end-of-text token, `length` after max_tokens, None while it goes on."""
    pending: int
    """Tokens of the draft block before the forward: d_1, and what masks had drafted after it; 1 for a prefill."""
    accepted: int
    """n in 1..verified: pending tokens that stood, the final first one included; 0 for a prefill."""
    verified: int
    """Tokens of the draft block that the forward read, those beyond `pending` in vain; 1 puts no draft to the test.
    0 for a prefill."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each new token, where the request asks for them."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the first token: one for each token of the prompt but the first, where the request asks for them."""
    late: int = 0
    """Which mask of its block, from 0, predicted the place of the first pending token: that of the i-th draft after it
    is mask late + i. Of no meaning where nothing else was pending."""
    cached: int = 0
    """With the first token: tokens of the prompt that were in the cache already."""


def check_request(request: Request, config: ModelConfig, context_len: int) -> None:
    """Raise RequestError if a decoder of such a model could never serve `request`.

    context_len  most tokens of prompt and completion
    """
    prompt_len, max_tokens = len(request.prompt), request.sampling.max_tokens
    if not prompt_len:
        raise RequestError("prompt has no tokens; it needs at least one")
    if prompt_len + max_tokens > context_len:
        raise ContextLengthError(
            f"prompt has {prompt_len} tokens and max_tokens is {max_tokens}; together they must not exceed the "
            f"context of {context_len}; shorten one of them"
        )
    for token in request.prompt:
        if token == config.mask_id or not 0 <= token < config.vocab_size:
            raise RequestError(
                f"prompt token {token} is not a token of text; ids are 0..{config.vocab_size - 1}, "
                f"without the mask token {config.mask_id}"
            )
    logit_rules.check(request.sampling, config.vocab_size)
