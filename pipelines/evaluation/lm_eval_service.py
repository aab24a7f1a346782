"""A running service behind lm-eval's interface, called over HTTP by lm-eval's own client of completions.

Prompts are sent as token ids of the bundle's tokenizer, so that both ends read the same. The cost of a text is the
service's own report on its decoding. No other server is called.
"""

import json
import os
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from pipelines.evaluation.job import EvaluateJob
from pipelines.evaluation.lm_eval_model import GeneratedTexts
from tidar_core.artifacts.model.bundle_info import hf_location, model_info
from tidar_core.artifacts.network.loopback import exempt_loopback, open_url
from tidar_core.artifacts.text.tokenizer import load_tokenizer
from tidar_core.errors import ConfigError

__all__ = ["ServiceModel"]

CARD_SECONDS = 30.0
"""Timeout of the request for the list of models."""
ANSWER_SECONDS = 600
"""Timeout of a question."""


class ServiceModel(LocalCompletionsAPI):
    """The service of a job behind lm-eval's interface. Raises ConfigError unless it serves the job's bundle."""

    def __init__(self, job: EvaluateJob) -> None:
        assert job.service is not None, "the job names a service"
        self.service = job.service.rstrip("/")
        headers = _headers(job.service_key_env)
        self.card = _card(self.service, headers, job.service_model)
        """The service's description of its model."""
        if (served := self.card.get("bundle_hash")) != (ours := model_info(job.bundle).bundle_hash):
            raise ConfigError(
                f"service {self.service} serves bundle {str(served)[:12]} as {self.card['id']}; {job.bundle} is "
                f"{ours[:12]}; name the bundle that is served"
            )
        self.block_len = 1 if self.card["mode"] == "autoregressive" else int(self.card["block_len"])
        self.generated: defaultdict[str | None, GeneratedTexts] = defaultdict(GeneratedTexts)
        """Texts by lm-eval's name of the task; the cost of all texts is under `None`."""
        exempt_loopback()  # lm-eval's client reads the environment
        super().__init__(
            model=self.card["id"],
            base_url=f"{self.service}/completions",
            header=headers,
            tokenizer_backend=None,  # lm-eval would load the tokenizer class that the folder names
            num_concurrent=job.task_batch,
            max_length=min(job.task_context, int(self.card["max_model_len"])),
            timeout=ANSWER_SECONDS,
        )
        self.tokenizer, self.tokenized_requests = load_tokenizer(hf_location(job.bundle)), True

    @property
    def eot_token_id(self) -> int:
        """The token before a text that has no context."""
        return int(self.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """Token before a text that has no context."""
        return int(self.tokenizer.eos_id)

    @property
    def eos_string(self) -> str:
        """The name of the end-of-text token, which lm-eval adds to the stop strings."""
        return str(self.tokenizer.decode([self.tokenizer.eos_id], skip_special=False))

    def tok_encode(self, string: str | list[str], left_truncate_len: int | None = None, **_: Any) -> Any:
        """Token ids of a text, or of each of several; without special tokens; the last `left_truncate_len` of each."""
        if isinstance(string, str):
            return self.tokenizer.encode(string)[-(left_truncate_len or 0) :]
        return [ids[-(left_truncate_len or 0) :] for ids in self.tokenizer.encode_batch(string)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first of its stop strings."""
        with self._in_one_line():
            texts: list[str] = super().generate_until(requests, disable_tqdm)
        for request, text in zip(requests, texts):
            self.generated[request.task_name].texts.append(text)
        return texts

    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[str]:
        """The texts of one answer or several; their cost is counted."""
        for answer in [outputs] if isinstance(outputs, dict) else outputs:
            cost = self.generated[None]
            cost.tokens += answer["usage"]["completion_tokens"]
            cost.forwards += sum(max(choice["decoding"]["forward"]) + 1 for choice in answer["choices"])
            if metrics := answer.get("metrics"):
                cost.accepted += Counter(dict(enumerate(metrics["speculative_decoding"]["acceptance_histogram"], 1)))
        return list(super().parse_generations(outputs, **kwargs))

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        with self._in_one_line():
            return list(super()._loglikelihood_tokens(requests, **kwargs))

    def _create_payload(self, messages: Any, generate: bool = False, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(messages, generate=generate, **kwargs)
        return payload | {"return_decoding": True} if generate else payload

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, aiohttp.ClientError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ConfigError(
                f"service {self.service} did not answer a question ({reason}); look at its log, then evaluate again, "
                "with a lower task_batch if it was full"
            ) from error


def _headers(key_env: str | None) -> dict[str, str]:
    """Headers of every request. Without a key of the job they hold no key, where lm-eval would send OpenAI's."""
    if key_env is None:
        return {"Accept": "application/json"}
    if not (key := os.environ.get(key_env)):
        raise ConfigError(f"service_key_env is {key_env}, which is not set; set it where the job runs, to the API key")
    return {"Accept": "application/json", "Authorization": f"Bearer {key}"}


def _card(service: str, headers: dict[str, str], name: str | None) -> dict[str, Any]:
    """The service's description of the model `name`; without a name, of its only model."""
    remedy = "give the address of a running service, such as http://HOST:8000/v1"
    if not service.startswith(("http://", "https://")):
        raise ConfigError(f"service is {service}; {remedy}")
    try:
        request = urllib.request.Request(f"{service}/models", headers=headers)
        with open_url(request, timeout=CARD_SECONDS) as answer:
            cards = {card["id"]: card for card in json.load(answer)["data"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"service {service} does not list its models ({error}); {remedy}") from error
    if name is None and len(cards) == 1:
        return dict(next(iter(cards.values())))
    if name not in cards:
        raise ConfigError(
            f"service_model is {name}; {service} serves {', '.join(cards) or 'nothing'}; give one of them"
        )
    return dict(cards[name])
