"""The translation of request bodies into messages for decoder replicas, and into the responses that they open."""

import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from serve_apps.api.chat_request import ChatRequest
from serve_apps.api.completion_request import CompletionRequest
from serve_apps.api.completion_response import ModelCard
from serve_apps.ingress.request_route import route_of
from serve_apps.messages.generation_request import GenerationRequest
from serve_apps.messages.version_routing import Route
from serve_apps.streaming.chat_stream import ChatReply
from serve_apps.streaming.completion_stream import CompletionReply, Reply

__all__ = ["GenerationBody", "generation_requests", "open_reply", "routed_requests"]

GenerationBody = CompletionRequest | ChatRequest
ANY_ROUTE = Route()
SEED_BITS = 63


def open_reply(body: GenerationBody, card: ModelCard) -> Reply:
    """A response without any text yet. Its id is the client's `request_id`, else a random one."""
    name = body.request_id or secrets.token_hex(12)
    if isinstance(body, ChatRequest):
        return ChatReply(
            reply_id=f"chatcmpl-{name}", card=card, n=body.n, options=body.stream_options, tools=body.tool_use()
        )
    return CompletionReply(reply_id=f"cmpl-{name}", card=card, n=body.n, options=body.stream_options)


def routed_requests(body: GenerationBody, headers: Mapping[str, str], reply_id: str) -> list[GenerationRequest]:
    """The messages of a body that came with these headers. Raises ParameterError for a wrong header."""
    name = f"{headers.get('x-request-id', '')}-{secrets.token_hex(4)}"  # a client may repeat its own
    return generation_requests(body, name, route_of(headers, body.user, reply_id))


def generation_requests(body: GenerationBody, name: str, route: Route = ANY_ROUTE) -> list[GenerationRequest]:
    """One message per choice: the n choices of the first prompt, then the choices of the next prompt.

    name  beginning of the requests' ids
    """
    return list(_chat_requests(body, name, route) if isinstance(body, ChatRequest) else _requests(body, name, route))


def _requests(body: CompletionRequest, name: str, route: Route) -> Iterator[GenerationRequest]:
    for place, prompt in enumerate(body.prompt):
        for choice in range(body.n):
            yield GenerationRequest(
                request_id=f"{name}-{place * body.n + choice}",
                prompt=prompt,
                sampling=body.sampling(_seed(body, choice)),
                framed=body.add_special_tokens,
                echo=body.echo,
                prompt_alone=body.max_tokens == 0,
                logprobs=body.logprobs,
                route=route,
                **_same_for_all(body),
            )


def _chat_requests(body: ChatRequest, name: str, route: Route) -> Iterator[GenerationRequest]:
    chat, tools = body.chat(show_tools=body.tool_choice != "none"), body.tool_use()
    for choice in range(body.n):
        yield GenerationRequest(
            request_id=f"{name}-{choice}",
            prompt=chat,
            sampling=body.sampling(_seed(body, choice)),
            to_the_end=body.most_tokens is None,
            tools=tools,
            logprobs=body.top_logprobs if body.logprobs else None,
            route=route,
            **_same_for_all(body),
        )


def _same_for_all(body: GenerationBody) -> dict[str, Any]:
    """Fields of a message that are the same for every choice of every prompt."""
    return {
        "ignore_eos": body.ignore_eos,
        "pieces": body.stream,
        "stop": tuple(body.stop),
        "include_stop": body.include_stop_str_in_output,
        "skip_special": body.skip_special_tokens,
        "bad_words": tuple(body.bad_words),
        "grammar": body.grammar(),
        "prompt_logprobs": body.prompt_logprobs,
        "token_ids": body.return_token_ids,
        "decoding": body.return_decoding,
        "speculative": body.speculative,
    }


def _seed(body: GenerationBody, choice: int) -> int:
    """Seed of a prompt's i-th choice: the body's seed plus i, as in vLLM; random if the body has none."""
    if body.seed is None:
        return secrets.randbits(SEED_BITS)
    seed = body.seed + choice
    return seed if seed < 2**SEED_BITS else seed - 2 ** (SEED_BITS + 1) + 1  # the first seed follows the last
