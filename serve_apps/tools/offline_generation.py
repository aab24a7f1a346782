"""How is one text written without a service?

In this process, by the same reading of fields, the same rules and the same transcript as the service has.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.completion_response import Logprobs, PromptScores
from serve_apps.api.errors import ParameterError
from serve_apps.api.parsing import parse_request
from serve_apps.api.token_origins import Decoding
from serve_apps.ingress.translate import generation_requests
from serve_apps.replica.bundle_runtime import BundleRuntime
from tidar_core.artifacts.model.bundle import Bundle
from tidar_core.config import DraftConfig
from tidar_core.decoding.completion import Completion

__all__ = ["OneText"]

TIMING_SECONDS = 5.0
"""Longest that decode steps are timed for one text, where no latency table was kept."""


class OneText:
    """The completion of one prompt."""

    def __init__(
        self,
        bundle: Bundle,
        bundle_uri: str,
        fields: Mapping[str, Any],
        *,
        mode: str,
        block_len: int | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """fields     of the body of POST /v1/completions; n is 1. Raises RequestError for those that are wrong
        block_len  K; by default what the bundle was trained with
        report     takes a line about what is done before the first token
        """
        body = parse_request(json.dumps({"model": bundle_uri, **fields}).encode(), CompletionRequest)
        if len(asked := generation_requests(body, "text")) != 1:
            raise ParameterError(f"{len(asked)} texts are asked for; one is written here; give one prompt and n = 1")
        self._asked, self._mode = asked[0], mode
        runtime = BundleRuntime(bundle, bundle_uri, DraftConfig(block_len=block_len or bundle.info.block_len), slots=1)
        self._prompts = runtime.prompts
        self._completion = Completion(self._prompts.request(self._asked))
        request = self._completion.request
        runtime.decoder.check(request)
        length = len(request.prompt) + request.sampling.max_tokens
        self._scheduler = runtime.scheduler(mode, planned_len=length, budget=TIMING_SECONDS, report=report)
        self._detokenizer = runtime.detokenizer(self._asked, request.prompt)
        self._answer: dict[str, Any] = {"text": "", "finish_reason": None, "stop_reason": None}

    def pieces(self) -> Iterator[str]:
        """Text as it becomes final."""
        began = time.perf_counter()
        completion, detokenizer, answer = self._completion, self._detokenizer, self._answer
        self._scheduler.submit(completion.request)
        while detokenizer.finish_reason is None:
            for step in self._scheduler.advance():
                completion.add(step)
                detokenizer.add([step])
            piece = detokenizer.take()
            answer["text"] += piece.text
            for kind, part in (("logprobs", piece.logprobs), ("decoding", piece.decoding)):
                if isinstance(part, Logprobs | Decoding):
                    so_far = answer.setdefault(kind, {})
                    for name, told in part.model_dump(mode="json").items():
                        so_far.setdefault(name, []).extend(told)
            if piece.prompt_logprobs is not None:
                answer["prompt_logprobs"] = TypeAdapter(PromptScores).dump_python(piece.prompt_logprobs, mode="json")
            yield piece.text
        self._prompts.check_grammar(self._asked, completion.request)
        answer |= {"finish_reason": detokenizer.finish_reason, "stop_reason": detokenizer.stop_reason}
        answer["seconds"] = time.perf_counter() - began

    def figures(self) -> dict[str, Any]:
        """All that is known once the pieces have come."""
        completion = self._completion
        return self._answer | {
            "token_ids": completion.token_ids,
            "mode": self._mode,
            "forwards": completion.forwards,
            "tokens_per_forward": completion.tokens_per_forward,
            "choice": self._scheduler.planner.facts(),
        }
