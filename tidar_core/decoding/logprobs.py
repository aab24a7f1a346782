"""Log-probabilities of emitted tokens in the autoregressive mode.

They are taken from the raw logits of clean tokens, before any rule, temperature or cut. So they do not depend on how a
text was drafted.

Shape letters: R query tokens, E embedding, V vocabulary.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import Tensor

from tidar_core.decoding.request import DecodeStep, TokenLogprob
from tidar_core.decoding.sequence import Sequence

__all__ = ["score_prompt", "scored", "token_logprobs"]


def token_logprobs(ar_logits_RV: Tensor, tokens: Collection[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens`, the i-th of which query token i predicts, each with the `top` likeliest tokens."""
    logprob_RV = ar_logits_RV[: len(tokens)].float().log_softmax(-1)
    own = logprob_RV[range(len(tokens)), list(tokens)].tolist()
    values, ids = logprob_RV.topk(top, -1) if top else (logprob_RV[:, :0], logprob_RV[:, :0])
    return [
        TokenLogprob(token, logprob, tuple(zip(top_ids, top_values)))
        for token, logprob, top_ids, top_values in zip(tokens, own, ids.tolist(), values.tolist())
    ]


def scored(sequence: Sequence, step: DecodeStep, ar_logits_RV: Tensor | None) -> DecodeStep:
    """Add the log-probabilities that the request wants to a step: of its tokens, and once of its prompt."""
    top = sequence.request.sampling.logprobs
    if top is not None:
        assert ar_logits_RV is not None, "a step is scored where a request wants log-probabilities"
        step = replace(step, logprobs=tuple(token_logprobs(ar_logits_RV, step.token_ids, top)))
    if sequence.prompt_logprobs:
        step = replace(step, prompt_logprobs=tuple(sequence.prompt_logprobs))
        sequence.prompt_logprobs = []
    return step


def score_prompt(sequence: Sequence, start: int, hidden_RE: Tensor, head: Callable[[Tensor], Tensor]) -> None:
    """Keep the log-probabilities of prompt tokens that a chunk predicts, where the request wants them.

    start      position of the chunk's first token; the sequence is read to the chunk's end
    hidden_RE  hidden states of the chunk, from its first token on
    """
    sampling, following = sequence.request.sampling, sequence.tokens[start + 1 : sequence.read + 1]
    if sampling.prompt_logprobs and following and not sequence.emitted:
        logits_RV = head(hidden_RE[: len(following)])
        sequence.prompt_logprobs += token_logprobs(logits_RV, following, sampling.logprobs or 0)
