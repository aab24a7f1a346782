"""The answers that a prompt gets: greedy or sampled, at which temperature, with which seed.

They are computed from the seed of the job and the hash of the prompt. So neither the order of prompts nor the
division into units and workers can change an answer.
"""

import hashlib
from dataclasses import dataclass

from pipelines.answers.job import AnswersJob
from tidar_core.config import SamplingConfig

__all__ = ["Variant", "variants_of"]


@dataclass(frozen=True, slots=True)
class Variant:
    """How an answer to a prompt is drawn."""

    temperature: float
    """0 for a greedy answer."""
    seed: int
    """Seed of all draws of the conversation, from 0 to 2^63 - 1."""

    def sampling(self, job: AnswersJob, end_ids: tuple[int, ...]) -> SamplingConfig:
        """Sampling settings of an answer."""
        return SamplingConfig(
            max_tokens=job.max_tokens, temperature=self.temperature, top_p=job.top_p, top_k=job.top_k, seed=self.seed,
            eos_ids=end_ids,
        )  # fmt: skip


def variants_of(job: AnswersJob, key: str) -> list[Variant]:
    """The answers that a prompt gets, the greedy answer first.

    One draw of the prompt decides both shares: greedy prompts lie at its beginning, sampled prompts at its end.

    key  hash of the prompt
    """
    share = _draw(job.seed, key, "share") / 2**63
    greedy = [Variant(0.0, _draw(job.seed, key, "greedy"))] if share < job.greedy else []
    whole, fraction = divmod(job.sampled, 1)
    count = int(whole) + (share >= 1 - fraction)
    return greedy + [_sampled(job, key, ordinal) for ordinal in range(count)]


def _sampled(job: AnswersJob, key: str, ordinal: int) -> Variant:
    place = _draw(job.seed, key, f"temperature {ordinal}") * len(job.temperatures) >> 63
    return Variant(job.temperatures[place], _draw(job.seed, key, f"sampled {ordinal}"))


def _draw(seed: int, key: str, purpose: str) -> int:
    """A number from 0 to 2^63 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}/{purpose}".encode()).digest()[:8], "big") >> 1
