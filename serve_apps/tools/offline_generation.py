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
from serve_apps.replica.prompt_encoder import PromptEncoder
from serve_apps.streaming.detokenizer import IncrementalDetokenizer
from tidar_core.artifacts.model.bundle import Bundle
from tidar_core.artifacts.model.latency_file import bundle_planner
from tidar_core.config import DraftConfig
from tidar_core.decoding.decoder import Decoder
from tidar_core.decoding.scheduler import Completion, Scheduler

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
        decoder = Decoder(bundle.model, DraftConfig(block_len=block_len or bundle.info.block_len), rows=1)
        self._reader = PromptEncoder(
            bundle.tokenizer, None, end_ids=bundle.end_ids,
            vocab_size=bundle.model.config.vocab_size, context_len=decoder.context_len, tool_form=None,
        )  # fmt: skip
        self._completion = Completion(self._reader.request(self._asked))
        request = self._completion.request
        decoder.check(request)
        length = len(request.prompt) + request.sampling.max_tokens
        self._planner = bundle_planner(mode, bundle_uri, decoder, length, budget=TIMING_SECONDS, report=report)
        self._batcher = Scheduler(decoder, self._planner)
        self._transcript = IncrementalDetokenizer(
            bundle.tokenizer, self._asked, request.prompt, block_len=decoder.draft.block_len
        )
        self._answer: dict[str, Any] = {"text": "", "finish_reason": None, "stop_reason": None}

    def pieces(self) -> Iterator[str]:
        """Text as it becomes final."""
        began = time.perf_counter()
        completion, transcript, answer = self._completion, self._transcript, self._answer
        self._batcher.submit(completion.request)
        while transcript.finish_reason is None:
            for step in self._batcher.advance():
                completion.add(step)
                transcript.add([step])
            piece = transcript.take()
            answer["text"] += piece.text
            for kind, part in (("logprobs", piece.logprobs), ("decoding", piece.decoding)):
                if isinstance(part, Logprobs | Decoding):
                    so_far = answer.setdefault(kind, {})
                    for name, told in part.model_dump(mode="json").items():
                        so_far.setdefault(name, []).extend(told)
            if piece.prompt_logprobs is not None:
                answer["prompt_logprobs"] = TypeAdapter(PromptScores).dump_python(piece.prompt_logprobs, mode="json")
            yield piece.text
        self._reader.check_grammar(self._asked, completion.request)
        answer |= {"finish_reason": transcript.finish_reason, "stop_reason": transcript.stop_reason}
        answer["seconds"] = time.perf_counter() - began

    def figures(self) -> dict[str, Any]:
        """All that is known once the pieces have come."""
        completion = self._completion
        return self._answer | {
            "token_ids": completion.token_ids,
            "mode": self._mode,
            "forwards": completion.forwards,
            "tokens_per_forward": completion.tokens_per_forward,
            "choice": self._planner.facts(),
        }
