"""In which order are prompts read, so that short ones never wait for long ones?

Reading a prompt is work of the processor. Grammars have a thread of their own, long prompts another, and all else the
threads of asyncio. What waits for its turn is dropped when its client has left.
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
"""Characters from which on a prompt is a long one; fewer are read in some 30 ms."""


class PromptLanes:
    """Reads what is asked of one engine. Belongs to an event loop."""

    def __init__(self, prompts: PromptEncoder, grammars: GrammarPool) -> None:
        self._prompts, self._grammars = prompts, grammars
        self._of_grammars = ThreadPoolExecutor(1, "grammars")
        self._of_long = ThreadPoolExecutor(1, "long-prompts")

    async def request(self, asked: GenerationRequest) -> Request:
        """What is asked, in tokens. Raises RequestError."""
        loop = asyncio.get_running_loop()
        grammar = self._prompts.grammar(asked)
        lane = self._of_long if _is_long(asked.prompt) or sum(map(len, asked.bad_words)) > LONG else None
        if grammar is not None:
            lane = self._of_grammars
            await loop.run_in_executor(lane, self._grammars.check, grammar)
        return await loop.run_in_executor(lane, self._prompts.request, asked)

    async def tokens(self, prompt: str | Chat, *, framed: bool) -> tuple[int, ...]:
        """The ids of a prompt, to be told. Raises RequestError, also for more than can be told."""
        lane = self._of_long if _is_long(prompt) else None
        read = partial(self._prompts.tokens, prompt, framed=framed)
        tokens = await asyncio.get_running_loop().run_in_executor(lane, read)
        if len(tokens) > VALUES:
            param = "messages" if isinstance(prompt, Chat) else "prompt"
            raise ParameterError(f"{param} has {len(tokens)} tokens; at most {VALUES} are told; send less", param)
        return tokens

    def stop(self) -> None:
        """End the threads as soon as they are idle, and the process that tries grammars."""
        for lane in (self._of_grammars, self._of_long):
            lane.shutdown(wait=False, cancel_futures=True)
        self._grammars.stop()


def _is_long(prompt: str | tuple[int, ...] | Chat) -> bool:
    if isinstance(prompt, Chat):
        return sum(len(str(message.get("content") or "")) for message in prompt.messages) > LONG
    return isinstance(prompt, str) and len(prompt) > LONG
