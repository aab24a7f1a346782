"""How likely did the autoregressive mode hold the tokens that were said?

Taken from the raw logits of its own rows, before any rule, temperature or cut, so that a score does not depend on how a
text was drafted.

Shape letters: R rows, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from tidar_core.decoding.request import TokenLogprob

__all__ = ["token_logprobs"]


def token_logprobs(ar_logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """One entry for each of `tokens`, the i-th being what row i predicts; `top` likeliest tokens beside it."""
    logprob_RV = ar_logits_RV[: len(tokens)].float().log_softmax(-1)
    said = logprob_RV[range(len(tokens)), list(tokens)].tolist()
    values, ids = logprob_RV.topk(top, -1) if top else (logprob_RV[:, :0], logprob_RV[:, :0])
    return [
        TokenLogprob(token, logprob, tuple(zip(top_ids, top_values)))
        for token, logprob, top_ids, top_values in zip(tokens, said, ids.tolist(), values.tolist())
    ]
