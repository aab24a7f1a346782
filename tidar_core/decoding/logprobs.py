"""Log-probabilities of emitted tokens in the autoregressive mode.

They are taken from the raw logits of clean tokens, before any rule, temperature or cut. So they do not depend on how a
text was drafted.

Shape letters: R query tokens, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from tidar_core.decoding.request import TokenLogprob

__all__ = ["token_logprobs"]


def token_logprobs(ar_logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens`, the i-th of which query token i predicts, each with the `top` likeliest tokens."""
    logprob_RV = ar_logits_RV[: len(tokens)].float().log_softmax(-1)
    own = logprob_RV[range(len(tokens)), list(tokens)].tolist()
    values, ids = logprob_RV.topk(top, -1) if top else (logprob_RV[:, :0], logprob_RV[:, :0])
    return [
        TokenLogprob(token, logprob, tuple(zip(top_ids, top_values)))
        for token, logprob, top_ids, top_values in zip(tokens, own, ids.tolist(), values.tolist())
    ]
