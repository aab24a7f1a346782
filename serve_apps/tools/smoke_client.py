"""Smoke test of a service: it starts the service and completes prompts over HTTP."""

import json
import urllib.request
from collections.abc import Sequence

from serve_apps.app import address_of, run
from serve_apps.settings import ServeSettings
from tidar_core.artifacts.network.loopback import open_direct

__all__ = ["completions_over_http"]

TIMEOUT_SECONDS = 120


def completions_over_http(settings: ServeSettings, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
    """Start the service, complete each prompt greedily through its HTTP endpoint, and return the texts.

    The service keeps running; `serve_apps.app.shutdown` ends it.
    """
    run(settings, blocking=False)
    return [_complete(settings, prompt, max_tokens) for prompt in prompts]


def _complete(settings: ServeSettings, prompt: str, max_tokens: int) -> str:
    body = {"model": settings.shown_name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://{address_of(settings)}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with open_direct(request, timeout=TIMEOUT_SECONDS) as response:
        return json.load(response)["choices"][0]["text"]
