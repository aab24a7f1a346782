"""What may not be said next, and what should rather not?

The rules of one sequence: what its history, its request and its grammar make of the logits. Those who have any are the
few, so each has its own object, and the others pay nothing. In vLLM's order:

    0. log-probabilities are reported of the AR logits as they are: no rule touches them
    1. bans: what the grammar does not allow, the last token of a bad word, end-of-text before min_tokens
    2. logit_bias
    3. penalties: repetition (prompt and output), then frequency, then presence (output alone)
    4. temperature, min_p, top_k, top_p: the law (`sampling`)

A row in which all is banned allows the request's end-of-text tokens alone: there is nothing left to say. But a grammar
outweighs the other bans, and so does a request without end-of-text tokens: there they give way.

Exact under drafting: the logits after a draft are adjusted as if the draft had been said, and a row after a draft that
falls is never read. So adjusting many rows at once equals adjusting one token at a time, bit for bit.

Shape letters: C clean rows (`modes`), R mask rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tidar_core.config import SamplingConfig
from tidar_core.errors import RequestError

__all__ = ["Constraint", "LogitRules", "adjusting", "check"]


class Constraint(Protocol):
    """A grammar that one text must keep to, and how much of it has been said."""

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Bool [len(tokens) + 1, V] on the CPU: what may follow the text after none, one, .., all of `tokens`.

        An end-of-text token may follow where the text may end; something may always follow. Rows after a token that is
        not allowed may hold anything, since nobody reads them. The text is what it was when this returns.
        """
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Add `tokens`, each of them allowed where it stands, to the text."""
        ...

    def retreat(self, count: int) -> None:
        """Take the last `count` tokens from the text."""
        ...

    @property
    def finished(self) -> bool:
        """Nothing but end-of-text may follow."""
        ...


def check(sampling: SamplingConfig, vocab_size: int) -> None:
    """Raise RequestError if the rules of `sampling` name tokens that are none."""
    named = [("logit_bias", token) for token, _ in sampling.logit_bias]
    named += [("bad_words", token) for word in sampling.bad_words for token in word]
    for field, token in named:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{field} names token {token}; ids are 0..{vocab_size - 1}")


class LogitRules:
    """What is known of one text, and the logits of its next tokens."""

    @staticmethod
    def needed(sampling: SamplingConfig) -> bool:
        """Whether a request without a constraint has any rules."""
        return bool(sampling.logit_bias or sampling.bad_words or sampling.min_tokens or _penalises(sampling))

    def __init__(
        self,
        sampling: SamplingConfig,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
        constraint: Constraint | None = None,
        output: Sequence[int] = (),
    ) -> None:
        """constraint  at the beginning of its text; belongs to these rules from now on
        output      tokens emitted already
        """
        check(sampling, vocab_size)
        self._sampling, self._constraint, self._device = sampling, constraint, device
        self._output: list[int] = []
        self._ends = [token for token in sampling.eos_ids if 0 <= token < vocab_size]
        self._bias_V = torch.zeros(vocab_size, device=device) if sampling.logit_bias else None
        if self._bias_V is not None:
            tokens, biases = zip(*sampling.logit_bias)
            self._bias_V[list(tokens)] = torch.tensor(biases, device=device)
        self._count_V = torch.zeros(vocab_size, device=device) if _penalises(sampling) else None
        """How often the output holds each token."""
        self._prompted_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._prompted_V[list(prompt)] = True
        self.commit(output)

    def commit(self, tokens: Sequence[int]) -> None:
        """Add `tokens`, which are final, to the output."""
        self._output += tokens
        self._count(tokens, 1.0)
        if self._constraint is not None:
            end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
            self._constraint.advance(tokens[:end])

    def adjust(self, logits_CV: Tensor, drafts: Sequence[int] = ()) -> Tensor:
        """The logits, in fp32 and anew, that temperature and the rest are applied to.

        logits_CV  row j is of the token after the committed output and drafts[:j]
        drafts     d_2..d_C, where d_1 is the last committed token; none after a prefill
        """
        assert len(logits_CV) == len(drafts) + 1, f"{len(drafts)} drafts stand before {len(drafts) + 1} rows"
        logits_CV = self._without_banned(logits_CV.float(), drafts)
        if self._bias_V is not None:
            logits_CV = logits_CV + self._bias_V
        if self._count_V is not None:
            logits_CV = self._penalised(logits_CV, self._count_V, drafts)
        return logits_CV

    def adjust_drafts(
        self, logits_RV: Tensor, linked: Callable[[Tensor, Tensor], Tensor] = lambda logits, before: logits
    ) -> list[int]:
        """Drafts d_2.., as many as R or fewer: from left to right the likeliest token that the rules leave after the
        ones before it. So none of them breaks a rule; they stop with the text.

        logits_RV  of the mask rows that draft d_2..d_{R+1}; d_1 is committed already
        linked     logits of a mask [1, V], and the token before it [1] -> logits: `TidarModel.linked`
        """
        drafts: list[int] = []
        for logits_V in logits_RV:
            if drafts:
                self.commit(drafts[-1:])
            before_1 = torch.tensor(self._output[-1:], device=self._device)
            drafts.append(int(self.adjust(linked(logits_V[None], before_1)).argmax()))
            if drafts[-1] in self._ends:
                break
        self._retract(len(drafts) - 1)
        return drafts

    def _retract(self, count: int) -> None:
        """Undo the commit of the last `count` tokens, no end-of-text among them."""
        if count <= 0:
            return
        self._count(self._output[-count:], -1.0)
        del self._output[-count:]
        if self._constraint is not None:
            self._constraint.retreat(count)

    def _count(self, tokens: Sequence[int], times: float) -> None:
        if self._count_V is not None and tokens:
            index = torch.tensor(tokens, device=self._device)
            self._count_V.index_add_(0, index, torch.full_like(index, times, dtype=torch.float32))

    def _without_banned(self, logits_CV: Tensor, drafts: Sequence[int]) -> Tensor:
        ends_banned = max(0, min(len(logits_CV), self._sampling.min_tokens - len(self._output)))
        banned = [(row, token) for row in range(ends_banned) for token in self._ends]
        banned += [(row, token) for row in range(len(logits_CV)) for token in self._ends_of_bad_words(drafts[:row])]
        if self._constraint is None and not banned:
            return logits_CV.clone()
        if self._constraint is not None:
            allowed_CV = self._constraint.allowed(drafts).to(logits_CV.device)
            logits_CV = logits_CV.masked_fill(~allowed_CV, float("-inf"))
        left_CV = logits_CV.clone()
        if banned:
            rows, tokens = zip(*banned)
            left_CV[list(rows), list(tokens)] = float("-inf")
        empty_C1 = left_CV.isneginf().all(-1, keepdim=True)
        if self._ends and self._constraint is None:
            logits_CV = torch.full_like(logits_CV, float("-inf"))
            logits_CV[:, self._ends] = 0.0
        return torch.where(empty_C1, logits_CV, left_CV)

    def _ends_of_bad_words(self, drafts: Sequence[int]) -> list[int]:
        """The tokens that would complete a bad word after `drafts`."""
        words = self._sampling.bad_words
        longest = max(map(len, words), default=1)
        recent = tuple(self._output[-longest:]) + tuple(drafts)
        return [word[-1] for word in words if recent[len(recent) - len(word) + 1 :] == word[:-1]]

    def _penalised(self, logits_CV: Tensor, count_V: Tensor, drafts: Sequence[int]) -> Tensor:
        count_CV = count_V.repeat(len(logits_CV), 1)
        for row, token in enumerate(drafts, start=1):
            count_CV[row:, token] += 1
        said_CV = count_CV > 0
        repetition = self._sampling.repetition_penalty
        if repetition != 1:
            repeated_CV = torch.where(logits_CV > 0, logits_CV / repetition, logits_CV * repetition)
            logits_CV = torch.where(said_CV | self._prompted_V, repeated_CV, logits_CV)
        logits_CV = logits_CV - self._sampling.frequency_penalty * count_CV
        return logits_CV - self._sampling.presence_penalty * said_CV


def adjusting(ruled: Mapping[int, LogitRules], drafts_BC: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that gives the target logits [B, C, V] of a batch anew, those of some of its rows adjusted.

    ruled      rules by row
    drafts_BC  the drafts that the step reads behind each d_1
    """
    drafts = drafts_BC.tolist()

    def adjust(logits_BCV: Tensor) -> Tensor:
        logits_BCV = logits_BCV.clone()  # those of the AR mode stay what log-probabilities are taken from
        for row, rules in ruled.items():
            logits_BCV[row] = rules.adjust(logits_BCV[row], drafts[row])
        return logits_BCV

    return adjust


def _penalises(sampling: SamplingConfig) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
