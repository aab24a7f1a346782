"""Rules of one sequence: changes to its logits that follow from its history, its request and its grammar.

Few sequences have rules, so each of these has its own object, and the others pay nothing. In vLLM's order:

    0. log-probabilities are reported of the AR logits as they are: no rule touches them
    1. bans: what the grammar does not allow, the last token of a bad word, end-of-text before min_tokens
    2. logit_bias
    3. penalties: repetition (prompt and output), then frequency, then presence (output alone)
    4. temperature, min_p, top_k, top_p: the distribution (`sampling`)

Where all tokens are banned, only the request's end-of-text tokens are allowed. With a grammar, the grammar alone holds
there. Without end-of-text tokens, no ban holds there.

Exact under drafting: the logits after a draft are adjusted as if the draft were accepted. Logits after a rejected draft
are never read. So adjusting many positions at once equals adjusting one token at a time, bit for bit.

Shape letters: C clean tokens (`step_plan`), R masks, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tidar_core.config import SamplingConfig
from tidar_core.errors import RequestError

__all__ = ["Constraint", "LogitRules", "adjusting", "check"]


class Constraint(Protocol):
    """A grammar that one text must keep to, and its state after the tokens of the text so far."""

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """Bool [len(tokens) + 1, V] on the CPU: tokens that may follow the text and the first 0, 1, .. of `tokens`.

        An end-of-text token may follow where the text may end; at least one token may always follow. Entries after a
        token that is not allowed are undefined, since nothing reads them. The text is unchanged when this returns.
        """
        ...

    def advance(self, tokens: Sequence[int]) -> None:
        """Add `tokens`, each allowed at its place, to the text."""
        ...

    def retreat(self, count: int) -> None:
        """Remove the last `count` tokens from the text."""
        ...

    @property
    def finished(self) -> bool:
        """Whether only an end-of-text token may follow."""
        ...


def check(sampling: SamplingConfig, vocab_size: int) -> None:
    """Raise RequestError if the rules of `sampling` name tokens that the model does not have."""
    named = [("logit_bias", token) for token, _ in sampling.logit_bias]
    named += [("bad_words", token) for word in sampling.bad_words for token in word]
    for field, token in named:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{field} names token {token}; ids are 0..{vocab_size - 1}")


class LogitRules:
    """The rules and the history of one text."""

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
        """constraint  a grammar at the beginning of its text; these rules own it from now on
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
        """Count of each token in the output."""
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
        """New fp32 logits [C, V] with all rules applied, before temperature and cuts.

        logits_CV  entry j is for the token after the committed output and drafts[:j]
        drafts     d_2..d_C, where d_1 is the last committed token; empty after a prefill
        """
        assert len(logits_CV) == len(drafts) + 1, f"{len(drafts)} drafts need logits of {len(drafts) + 1} positions"
        logits_CV = self._without_banned(logits_CV.float(), drafts)
        if self._bias_V is not None:
            logits_CV = logits_CV + self._bias_V
        if self._count_V is not None:
            logits_CV = self._penalised(logits_CV, self._count_V, drafts)
        return logits_CV

    def adjust_drafts(self, logits_RV: Tensor, linked: Callable[[int, Tensor], Tensor] | None = None) -> list[int]:
        """Drafts d_2.., R of them or fewer, within the rules.

        From left to right, each is the likeliest token that the rules allow after the drafts before it. The drafts
        stop where the text ends.

        logits_RV  logits of the masks that draft d_2..d_{R+1}; d_1 is committed already
        linked     corrects the logits of a mask in place, given its index and the token before it [1]; returns [1, V]
        """
        drafts: list[int] = []
        for index, logits_V in enumerate(logits_RV):
            if drafts:
                self.commit(drafts[-1:])
            before_1 = torch.tensor(self._output[-1:], device=self._device)
            logits_1V = logits_V[None] if linked is None else linked(index, before_1)
            drafts.append(int(self.adjust(logits_1V).argmax()))
            if drafts[-1] in self._ends:
                break
        self._retract(len(drafts) - 1)
        return drafts

    def _retract(self, count: int) -> None:
        """Undo the commit of the last `count` tokens; no end-of-text token may be among them."""
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
        emitted_CV = count_CV > 0
        repetition = self._sampling.repetition_penalty
        if repetition != 1:
            repeated_CV = torch.where(logits_CV > 0, logits_CV / repetition, logits_CV * repetition)
            logits_CV = torch.where(emitted_CV | self._prompted_V, repeated_CV, logits_CV)
        logits_CV = logits_CV - self._sampling.frequency_penalty * count_CV
        return logits_CV - self._sampling.presence_penalty * emitted_CV


def adjusting(ruled: Mapping[int, LogitRules], drafts_BC: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A function that copies the target logits [B, C, V] of a batch and applies the rules of some of its slots.

    ruled      rules by slot
    drafts_BC  the drafts that the step reads after each d_1; None after a prefill
    """
    drafts = None if drafts_BC is None else drafts_BC.tolist()

    def adjust(logits_BCV: Tensor) -> Tensor:
        logits_BCV = logits_BCV.clone()  # log-probabilities are taken from the logits of the AR mode
        for slot, rules in ruled.items():
            logits_BCV[slot] = rules.adjust(logits_BCV[slot], drafts[slot] if drafts else ())
        return logits_BCV

    return adjust


def _penalises(sampling: SamplingConfig) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
