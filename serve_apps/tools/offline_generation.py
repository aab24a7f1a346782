"""Generation of a text in this process, without a service.

It uses the service's own parser of fields, rules and detokenizer.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.errors import ParameterError
from serve_apps.api.parsing import parse_request
from serve_apps.ingress.translate import generation_requests
from serve_apps.messages.token_origins import Decoding
from serve_apps.messages.token_scores import Logprobs, PromptScores
from serve_apps.replica.bundle_runtime import BundleRuntime
from serve_apps.streaming.logprobs import score_models
from tidar_core.artifacts.model.bundle import Bundle
from tidar_core.config import DraftConfig, mode_of
from tidar_core.decoding.completion import Completion

__all__ = ["OfflineGeneration"]

TIMING_SECONDS = 5.0
"""Longest time for timing decode steps before a text if there is no latency table."""


class OfflineGeneration:
    """Completion of a single prompt."""

    def __init__(
        self,
        bundle: Bundle,
        bundle_uri: str,
        fields: Mapping[str, Any],
        *,
        mode: str | None = None,
        block_len: int | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """mode       mode of decoding; by default single-pass if the model drafts
        fields     fields of the body of POST /v1/completions; n is 1. Raises RequestError for a wrong field
        block_len  K; by default the length that the bundle was trained with
        report     called with a line about the work before the first token
        """
        body = parse_request(json.dumps({"model": bundle_uri, **fields}).encode(), CompletionRequest)
        if len(requests := generation_requests(body, "text")) != 1:
            raise ParameterError(
                f"{len(requests)} texts are requested; this command generates one; give one prompt and n = 1"
            )
        self._request, self._mode = requests[0], mode_of(bundle.model.config, mode, default="single-pass")
        runtime = BundleRuntime(bundle, bundle_uri, DraftConfig(block_len=block_len or bundle.info.block_len), slots=1)
        self._prompts = runtime.prompts
        self._completion = Completion(self._prompts.request(self._request))
        request = self._completion.request
        runtime.decoder.check(request)
        length = len(request.prompt) + request.sampling.max_tokens
        self._scheduler = runtime.scheduler(self._mode, planned_len=length, budget=TIMING_SECONDS, report=report)
        self._detokenizer = runtime.detokenizer(self._request, request.prompt)
        self._facts: dict[str, Any] = {"text": "", "finish_reason": None, "stop_reason": None}

    def deltas(self) -> Iterator[str]:
        """Generate the text, and yield its parts as they become final."""
        began = time.perf_counter()
        completion, detokenizer, facts = self._completion, self._detokenizer, self._facts
        self._scheduler.submit(completion.request)
        while detokenizer.finish_reason is None:
            for step in self._scheduler.advance():
                completion.add(step)
                detokenizer.add([step])
            delta = detokenizer.take()
            facts["text"] += delta.text
            for kind, part in (("logprobs", delta.logprobs), ("decoding", delta.decoding)):
                if isinstance(part, Logprobs | Decoding):
                    so_far = facts.setdefault(kind, {})
                    for name, values in part.model_dump(mode="json").items():
                        so_far.setdefault(name, []).extend(values)
            if delta.prompt_scores is not None:
                scores = score_models(delta.prompt_scores)
                facts["prompt_logprobs"] = TypeAdapter(PromptScores).dump_python(scores, mode="json")
            yield delta.text
        self._prompts.check_grammar(self._request, completion.request)
        facts |= {"finish_reason": detokenizer.finish_reason, "stop_reason": detokenizer.stop_reason}
        facts["seconds"] = time.perf_counter() - began

    def figures(self) -> dict[str, Any]:
        """Text, tokens, forwards and times; complete after the last delta."""
        completion = self._completion
        return self._facts | {
            "token_ids": completion.token_ids,
            "mode": self._mode,
            "forwards": completion.forwards,
            "tokens_per_forward": completion.tokens_per_forward,
            "choice": self._scheduler.planner.facts(),
        }
