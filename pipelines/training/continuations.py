"""Continuations of a few prompts during training, generated greedily.

The prompts are those of the job, to be read by people, or beginnings of held-out documents, to be counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tidar_core.artifacts.shards import ShardReader
from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.config import DraftConfig, ModelConfig, SamplingConfig
from tidar_core.decoding.completion import Completion, complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.errors import ConfigError
from tidar_core.transformer.layout import PADDING
from tidar_core.transformer.model import TidarModel

__all__ = ["Continuations", "check_prompts", "continued", "held_out_prompts", "tokens_per_forward"]

SLOTS = 8
"""Held-out prompts that are continued at a time."""


@dataclass(frozen=True, slots=True)
class Continuations:
    """Prompts and their continuations."""

    prompts: Sequence[str]
    texts: Sequence[str]
    """Texts without their prompts."""
    tokens_per_forward: float
    """Mean over all continuations: how many drafts are accepted so far."""

    def page(self, step: int) -> str:
        """Markdown page of the continuations after `step` train steps."""
        pieces = [f"# After {step} train steps\n", f"{self.tokens_per_forward:.2f} tokens per forward\n"]
        pieces += [f"**{prompt!r}**\n\n```\n{prompt}{text}\n```\n" for prompt, text in zip(self.prompts, self.texts)]
        return "\n".join(pieces)


def check_prompts(tokenizer: Tokenizer, model: ModelConfig, prompts: Sequence[str], max_tokens: int) -> None:
    """Raise ConfigError for a prompt that is empty, or too long for the context."""
    for prompt in prompts:
        count = len(tokenizer.encode(prompt))
        if not count or count + max_tokens > model.context_len:
            raise ConfigError(
                f"sample_prompts has {prompt[:40]!r} of {count} tokens and sample_tokens is {max_tokens}; there must "
                f"be 1 token or more, and {model.context_len} at most with what is generated"
            )


def continued(
    model: TidarModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    block_len: int,
    max_tokens: int,
    end_ids: Sequence[int],
    drafts: bool,
) -> Continuations:
    """Greedy continuations.

    end_ids  tokens that end a text
    drafts  decode with drafts, if the model was trained in both modes; the texts are the same
    """
    sampling = SamplingConfig(max_tokens=max_tokens, eos_ids=tuple(end_ids))
    requests = [
        Request(request_id=str(index), prompt=tuple(tokenizer.encode(prompt)), sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]
    completions = _completed(model, requests, block_len, len(requests), "single-pass" if drafts else "autoregressive")
    return Continuations(
        prompts,
        [tokenizer.continued(completion.request.prompt, completion.token_ids) for completion in completions],
        _per_forward(completions),
    )


def held_out_prompts(reader: ShardReader, count: int, context_len: int, max_tokens: int) -> list[tuple[int, ...]]:
    """Tokens of the first `count` held-out prompts that leave room for `max_tokens` in the context.

    The prompt of a conversation ends where its first answer begins; that of any other document is its first quarter.
    Raises ConfigError if there are none.
    """
    found: list[tuple[int, ...]] = []
    for index in range(len(reader)):
        row = reader.rows([index])
        for document in row.document_ids_BS[row.document_ids_BS != PADDING].unique().tolist():
            of_document = row.document_ids_BS[0] == document
            ids = row.input_ids_BS[0, of_document].tolist()
            length = len(ids) // 4
            if row.trained_BS is not None:
                answers = row.trained_BS[0, of_document].nonzero()[:, 0].tolist()
                length = answers[0] if answers else 0
            if 0 < length <= context_len - max_tokens:
                found.append(tuple(ids[:length]))
            if len(found) == count:
                return found
    if not found:
        raise ConfigError(
            f"decoded_prompts is {count} and no held-out row has a prompt that leaves {max_tokens} tokens of a context "
            f"of {context_len}; pack with held_out, reduce decoded_tokens, or give decoded_prompts: 0"
        )
    return found


def tokens_per_forward(
    model: TidarModel, prompts: Sequence[tuple[int, ...]], *, block_len: int, max_tokens: int, end_ids: Sequence[int]
) -> float:
    """Tokens per forward of greedy continuations in single-pass mode, over all of them together."""
    sampling = SamplingConfig(max_tokens=max_tokens, eos_ids=tuple(end_ids))
    requests = [Request(request_id=str(n), prompt=prompt, sampling=sampling) for n, prompt in enumerate(prompts)]
    return _per_forward(_completed(model, requests, block_len, min(SLOTS, len(requests)), "single-pass"))


def _completed(model: TidarModel, requests: list[Request], block_len: int, slots: int, mode: str) -> list[Completion]:
    decoder = Decoder(model, DraftConfig(block_len=block_len), slots=slots)
    return complete(Scheduler(decoder, FixedMode(mode, block_len)), requests)


def _per_forward(completions: Sequence[Completion]) -> float:
    return sum(len(c.token_ids) for c in completions) / sum(c.forwards for c in completions)
