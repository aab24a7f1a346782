"""Bodies and responses of /tokenize, /detokenize and /tokenizer_info, in vLLM's shapes.

A prompt is encoded exactly as the completion routes encode it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field

from serve_apps.api.bounds import check_text_len
from serve_apps.api.chat_request import ChatFields, Messages
from serve_apps.api.errors import ParameterError
from serve_apps.api.generation_fields import Name
from serve_apps.api.parsing import Body
from serve_apps.messages.generation_request import Chat

__all__ = ["DetokenizeRequest", "Detokenized", "TokenizeRequest", "Tokenized"]

CHAT_FIELDS = set(ChatFields.model_fields) - {"messages"}


class TokenizeRequest(ChatFields):
    """Body of POST /tokenize: a prompt or messages."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"chat_template": (), "mm_processor_kwargs": ({},)}

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None  # pyrefly: ignore[bad-override]
    add_special_tokens: bool = False
    """A prompt is encoded with the special tokens that the tokenizer adds around texts."""
    return_token_strs: bool = False

    def check(self, given: set[str]) -> None:
        """Raise ParameterError if fields contradict each other."""
        if (self.prompt is None) == (self.messages is None):
            state = "missing" if self.prompt is None else "given"
            raise ParameterError(f"prompt and messages are both {state}; exactly one is needed; give one", "prompt")
        if self.messages is None and (wrong := sorted(given & CHAT_FIELDS)):
            raise ParameterError(f"{wrong[0]} is given and messages is not; drop it", wrong[0])
        if self.messages is not None and self.add_special_tokens:
            raise ParameterError(
                "add_special_tokens is true, and the chat template alone adds special tokens; drop it",
                "add_special_tokens",
                "unsupported_parameter",
            )
        self.prompt_or_chat()

    def check_context(self, context_len: int) -> None:
        """Raise ParameterError if the prompt or the messages cannot fit into the context."""
        if self.prompt is not None:
            check_text_len(len(self.prompt), context_len, "prompt")
        else:
            super().check_context(context_len)

    def prompt_or_chat(self) -> str | Chat:
        """Prompt to encode: a text, or a conversation."""
        return self.chat() if self.prompt is None else self.prompt


class Tokenized(BaseModel):
    """Tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: Name | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class Detokenized(BaseModel):
    """Text of tokens; special tokens appear by their names."""

    prompt: str
