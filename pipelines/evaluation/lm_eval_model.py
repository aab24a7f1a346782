"""A bundle behind lm-eval's interface, for likelihoods and for texts.

Likelihoods belong to the AR mode, with one plain causal forward a text. Texts come from the decoder, in any mode, many
at a time. Registered with lm-eval as `tidar`: lm-eval's own command takes it as

    python -m pipelines.evaluation.lm_eval_model run --model tidar --model_args bundle=FOLDER,mode=two-pass --tasks ...
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from tidar_core.artifacts.model.bundle import DTYPES, Bundle, load_for_decoding
from tidar_core.artifacts.text.detokenizer import TextStream
from tidar_core.config import AUTOREGRESSIVE, DraftConfig, SamplingConfig, mode_of
from tidar_core.decoding.autoregressive import score
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.request import DecodeStep, Request
from tidar_core.decoding.scheduler import Scheduler
from tidar_core.decoding.step_plan import FixedMode
from tidar_core.decoding.stop_strings import StopStrings, stop_tokens
from tidar_core.errors import ConfigError

__all__ = ["GeneratedTexts", "LmEvalModel"]

DEFAULT_MAX_TOKENS = 256
SAMPLED = ("temperature", "top_p", "top_k")
UNDERSTOOD = ("until", "max_gen_toks", "do_sample", *SAMPLED)


@register_model("tidar")
class LmEvalModel(TemplateLM):
    """A bundle behind lm-eval's interface."""

    def __init__(
        self,
        bundle: "str | Bundle",
        mode: str | None = None,
        batch_size: int | str = 8,
        block_len: int | None = None,
        dtype: str = "fp32",
        device: str | None = None,
        context_len: int | None = None,
        max_batch_size: int | None = None,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """mode         by default single-pass if the model drafts
        batch_size   prompts decoded together; `max_batch_size` is lm-eval's and has no meaning here
        context_len  most tokens of a prompt and its answer; longer prompts lose their beginning; default: the model's
        on_answer    called after each request of lm-eval's
        """
        super().__init__()
        if isinstance(bundle, str):
            bundle = load_for_decoding(bundle, dtype=DTYPES[dtype], device=device or "cpu")
        self.bundle, self.on_answer = bundle, on_answer
        self.max_length = min(context_len or bundle.model.config.context_len, bundle.model.config.context_len)
        mode = mode_of(bundle.model.config, mode, default="single-pass")
        self.block_len = 1 if mode == AUTOREGRESSIVE else block_len or bundle.info.block_len
        draft = DraftConfig(block_len=self.block_len)
        decoder = Decoder(bundle.model, draft, slots=int(batch_size), context_len=self.max_length)
        self.scheduler = Scheduler(decoder, FixedMode(mode, self.block_len), max_waiting=sys.maxsize)
        self.generated: defaultdict[str | None, GeneratedTexts] = defaultdict(GeneratedTexts)
        """Generated texts by lm-eval's name of the task."""

    @property
    def eot_token_id(self) -> int:
        """Token before a text that has no context."""
        return self.bundle.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, without special tokens."""
        return self.bundle.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        answers = []
        for _texts, context, continuation in requests:
            answers.append(self._likelihood(context, continuation))
            self.on_answer()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context if they are longer."""
        answers = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1, context_len=1,
            )  # fmt: skip
            pairs = [utils.make_disjoint_window(window) for window in windows]
            answers.append(sum(self._likelihood(context, continuation)[0] for context, continuation in pairs))
            self.on_answer()
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first of its stop strings."""
        texts = {str(index): self._text(str(index), request) for index, request in enumerate(requests)}
        for text in texts.values():
            self.scheduler.submit(text.request)
        while self.scheduler.busy:
            for step in self.scheduler.advance():
                text = texts[step.request_id]
                if not text.ended and text.add(step):
                    self.scheduler.abort(step.request_id)
                    self.on_answer()
        for instance, text in zip(requests, texts.values()):
            self.generated[instance.task_name].add(text)
        return [text.text for text in texts.values()]

    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        count = len(continuation)
        if count >= self.max_length:
            raise ConfigError(f"an answer has {count} tokens; the context of {self.max_length} must hold more than it")
        tokens = (*context, *continuation)[-self.max_length :]
        scores = score(self.bundle.model, tokens, top=1)
        greedy = scores.top_token_LT[-count:, 0].tolist() == continuation
        return float(scores.logprob_L[-count:].sum()), greedy

    def _text(self, request_id: str, instance: Instance) -> "_Text":
        context, given = instance.args
        if unknown := given.keys() - set(UNDERSTOOD):
            raise ConfigError(f"generation_kwargs hold {', '.join(sorted(unknown))}; known are {', '.join(UNDERSTOOD)}")
        max_tokens = int(given.get("max_gen_toks") or min(DEFAULT_MAX_TOKENS, self.max_length // 2))
        if max_tokens >= self.max_length:
            raise ConfigError(
                f"max_tokens of task {instance.task_name} is {max_tokens}; the context of {self.max_length} must hold "
                "a prompt as well; lower it"
            )
        drawn = {key: given[key] for key in SAMPLED if key in given} if given.get("do_sample") else {}
        until = given.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ends = dict.fromkeys([*self.bundle.end_ids, *stop_tokens(stops, self.bundle.tokenizer.special_ids)])
        sampling = SamplingConfig(max_tokens=max_tokens, eos_ids=tuple(ends), **drawn)
        prompt = tuple(self.tok_encode(context))[max_tokens - self.max_length :] or (self.eot_token_id,)
        return _Text(Request(request_id=request_id, prompt=prompt, sampling=sampling),
                     self.bundle.tokenizer.stream(after=prompt), StopStrings(stops))  # fmt: skip


@dataclass(slots=True)
class _Text:
    """A text while it is generated, up to a stop string."""

    request: Request
    stream: TextStream
    stops: StopStrings
    text: str = ""
    tokens: int = 0
    forwards: int = 0
    accepted: Counter[int] = field(default_factory=Counter)
    ended: bool = False

    def add(self, step: DecodeStep) -> bool:
        """Add a decode step; returns whether the text has ended."""
        self.forwards += 1
        if step.verified > 1:
            self.accepted[step.accepted] += 1
        for token in step.token_ids:
            self.tokens += 1
            if token not in self.request.sampling.eos_ids:
                self._add_text(self.stream.push(token))
            if self.ended:
                return True
        if step.finish_reason is not None:
            self._add_text(self.stream.flush())
            self.text += self.stops.flush()
            self.ended = True
        return self.ended

    def _add_text(self, delta: str) -> None:
        """Add text up to the first complete stop string, which ends the text."""
        self.text += self.stops.push(delta)
        self.ended = self.stops.found is not None


@dataclass(slots=True)
class GeneratedTexts:
    """Texts generated for a task of lm-eval, and their cost."""

    tokens: int = 0
    forwards: int = 0
    accepted: Counter[int] = field(default_factory=Counter)
    texts: list[str] = field(default_factory=list)

    def add(self, text: _Text) -> None:
        """Add a text that has ended."""
        self.tokens += text.tokens
        self.forwards += text.forwards
        self.accepted += text.accepted
        self.texts.append(text.text)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
