"""Continuations of a few prompts during training, generated greedily."""

from collections.abc import Sequence
from dataclasses import dataclass

from tidar_core.artifacts.text.tokenizer import Tokenizer
from tidar_core.config import DraftConfig, ModelConfig, SamplingConfig
from tidar_core.decoding.completion import complete
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.errors import ConfigError
from tidar_core.transformer.model import TidarModel

__all__ = ["Continuations", "check_prompts", "continued"]


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
    decoder = Decoder(model, DraftConfig(block_len=block_len), slots=len(requests))
    planner = FixedMode("single-pass" if drafts else "autoregressive", block_len)
    completions = complete(Scheduler(decoder, planner), requests)
    return Continuations(
        prompts,
        [tokenizer.continued(completion.request.prompt, completion.token_ids) for completion in completions],
        sum(len(completion.token_ids) for completion in completions) / sum(c.forwards for c in completions),
    )
