"""Requests to a decoder, and the decode steps that answer them."""

from dataclasses import dataclass

from tidar_core.config import ModelConfig, SamplingConfig
from tidar_core.decoding import logit_rules
from tidar_core.decoding.logit_rules import Constraint
from tidar_core.errors import ContextLengthError, PromptError

__all__ = ["DecodeStep", "Request", "TokenLogprob", "check_request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt to be continued, and how."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingConfig
    constraint: Constraint | None = None
    """Grammar that the text must keep to, at the beginning of the text; no other request uses the same object."""
    speculative: bool = True
    """False: no draft is verified for it, whatever other requests of its batch do; each forward gives one token."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token in the autoregressive mode, before any rule or temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens there and their log-probabilities, as many as the request wants."""


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """The result of one forward for one request."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, all final; at least one."""
    finish_reason: str | None
    """`stop` after an end-of-text token, `length` after max_tokens, None while it goes on."""
    pending: int
    """Tokens of the draft block before the forward: d_1 and the drafts of masks after it."""
    accepted: int
    """n in 1..verified: accepted pending tokens, d_1 included; 0 for a prefill."""
    verified: int
    """Tokens of the draft block that the forward read; tokens beyond `pending` are read in vain. 1: no draft is
    verified. 0 for a prefill."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Entry for each new token, where the request wants log-probabilities."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Entry for each prompt token but the first; comes with the first token, where the request wants them."""
    mask_offset: int = 0
    """Index in its block, from 0, of the mask at the place of the first pending token. The i-th draft after it came
    from mask mask_offset + i. Without meaning where no draft was pending."""
    cached: int = 0
    """Tokens of the prompt that the cache held already; comes with the first token."""


def check_request(request: Request, config: ModelConfig, context_len: int) -> None:
    """Raise RequestError if a decoder of such a model could never serve `request`.

    context_len  most tokens of prompt and completion
    """
    prompt_len, max_tokens = len(request.prompt), request.sampling.max_tokens
    if not prompt_len:
        raise PromptError("prompt has no tokens; it needs at least one")
    if prompt_len + max_tokens > context_len:
        raise ContextLengthError(
            f"prompt has {prompt_len} tokens and max_tokens is {max_tokens}; together they must not exceed the "
            f"context of {context_len}; shorten one of them"
        )
    for token in request.prompt:
        if token == config.mask_id or not 0 <= token < config.vocab_size:
            raise PromptError(
                f"prompt token {token} is not a token of text; ids are 0..{config.vocab_size - 1}, "
                f"without the mask token {config.mask_id}; drop it"
            )
    logit_rules.check(request.sampling, config.vocab_size)
