"""Threads in which prompts are encoded, so that short prompts never wait for long ones.

Encoding a prompt is work of the processor. Grammars have one thread, long prompts another, and other prompts share the
threads of asyncio. A short prompt of text or tokens is encoded at once: a change of threads would take longer. A prompt
that still waits when its client has left is dropped.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from serve_apps.api.bounds import VALUES
from serve_apps.api.errors import ParameterError
from serve_apps.messages.generation_request import Chat, GenerationRequest
from serve_apps.replica.grammar_pool import GrammarPool
from serve_apps.replica.prompt_encoder import PromptEncoder
from tidar_core.decoding.request import Request

__all__ = ["PromptLanes"]

LONG = 2**15
"""A prompt with more characters is long. Up to this length encoding takes about 30 ms."""
SHORT = 2**10
"""A prompt of text or tokens up to this length is short. Encoding it takes less than 1 ms."""


class PromptLanes:
    """Encoder of the requests of one engine. Belongs to an event loop."""

    def __init__(self, prompts: PromptEncoder, grammars: GrammarPool) -> None:
        self._prompts, self._grammars = prompts, grammars
        self._of_grammars = ThreadPoolExecutor(1, "grammars")
        self._of_long = ThreadPoolExecutor(1, "long-prompts")

    async def request(self, request: GenerationRequest) -> Request:
        """The request in tokens. Raises RequestError."""
        loop = asyncio.get_running_loop()
        grammar = self._prompts.grammar(request)
        if grammar is None and _is_short(request):
            return self._prompts.request(request)
        lane = self._of_long if _is_long(request.prompt) or sum(map(len, request.bad_words)) > LONG else None
        if grammar is not None:
            lane = self._of_grammars
            await loop.run_in_executor(lane, self._grammars.check, grammar)
        return await loop.run_in_executor(lane, self._prompts.request, request)

    async def tokens(self, prompt: str | Chat, *, framed: bool) -> tuple[int, ...]:
        """Ids of a prompt, for a response. Raises RequestError, also for more ids than a response may hold."""
        lane = self._of_long if _is_long(prompt) else None
        read = partial(self._prompts.tokens, prompt, framed=framed)
        tokens = await asyncio.get_running_loop().run_in_executor(lane, read)
        if len(tokens) > VALUES:
            param = "messages" if isinstance(prompt, Chat) else "prompt"
            raise ParameterError(f"{param} has {len(tokens)} tokens; at most {VALUES} are returned; send less", param)
        return tokens

    def stop(self) -> None:
        """End the threads as soon as they are idle, and the process that probes grammars."""
        for lane in (self._of_grammars, self._of_long):
            lane.shutdown(wait=False, cancel_futures=True)
        self._grammars.stop()


def _is_long(prompt: str | tuple[int, ...] | Chat) -> bool:
    if isinstance(prompt, Chat):
        return sum(len(str(message.get("content") or "")) for message in prompt.messages) > LONG
    return isinstance(prompt, str) and len(prompt) > LONG


def _is_short(request: GenerationRequest) -> bool:
    return not isinstance(request.prompt, Chat) and len(request.prompt) <= SHORT and not request.bad_words
