"""Smoke test of a service: it starts the service and sends requests over HTTP."""

import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve_apps.app import address_of, run
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.network.loopback import open_direct

__all__ = ["Answered", "chat_over_http", "completions_over_http"]

TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One question, and its answers with and without drafts."""

    question: str
    answer: str
    equal: bool
    """Whether the answer without drafts is the same text."""
    tokens: int
    seconds: float
    seconds_plain: float


def completions_over_http(settings: ServeSettings, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
    """Start the service, complete each prompt greedily through its HTTP endpoint, and return the texts.

    The service keeps running; `serve_apps.app.shutdown` ends it.
    """
    run(settings, blocking=False)
    completed = (_sent(settings, "completions", prompt=prompt, max_tokens=max_tokens) for prompt in prompts)
    return [response["choices"][0]["text"] for response, _ in completed]


def chat_over_http(settings: ServeSettings, questions: Sequence[str], *, max_tokens: int) -> list[Answered]:
    """Start the service and send each question twice, with drafts and without; return both greedy answers.

    A request for one token comes before: the service then has read the question for both, so neither time contains it.
    The service keeps running; `serve_apps.app.shutdown` ends it.
    """
    run(settings, blocking=False)
    answered = []
    for question in questions:
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
        _sent(settings, "chat/completions", **body | {"max_tokens": 1})
        (drafted, seconds), (plain, seconds_plain) = (
            _sent(settings, "chat/completions", **body, speculative=speculative) for speculative in (True, False)
        )
        texts = [response["choices"][0]["message"]["content"] for response in (drafted, plain)]
        answered.append(
            Answered(
                question=question,
                answer=texts[0],
                equal=texts[0] == texts[1],
                tokens=drafted["usage"]["completion_tokens"],
                seconds=seconds,
                seconds_plain=seconds_plain,
            )
        )
    return answered


def _sent(settings: ServeSettings, route: str, **fields: Any) -> tuple[dict[str, Any], float]:
    """Response to a greedy request, and the seconds that it took."""
    body = {"model": settings.shown_name, "temperature": 0, **fields}
    request = urllib.request.Request(
        f"http://{address_of(settings)}/v1/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with open_direct(request, timeout=TIMEOUT_SECONDS) as response:
        return json.load(response), time.perf_counter() - began
