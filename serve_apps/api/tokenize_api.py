"""What may a client ask of /tokenize and /detokenize, and what comes back?

vLLM's shapes; a prompt is read here exactly as the completion routes read it.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from serve_apps.api.bounds import check_text_len
from serve_apps.api.chat_request import ChatFields, Messages
from serve_apps.api.errors import ParameterError
from serve_apps.api.generation_fields import Name
from serve_apps.api.parsing import Body
from serve_apps.messages.generation_request import Chat

__all__ = ["DetokenizeRequest", "Detokenized", "TokenizeRequest", "Tokenized", "TokenizerInfo"]

OF_CHATS = set(ChatFields.model_fields) - {"messages"}


class TokenizeRequest(ChatFields):
    """The body of POST /tokenize: a prompt or messages."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"chat_template": (), "mm_processor_kwargs": ({},)}

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None  # type: ignore[assignment]
    add_special_tokens: bool = False
    """A prompt is read with the special tokens that the tokenizer puts around texts."""
    return_token_strs: bool = False

    def check(self, given: set[str]) -> None:
        """Raise ParameterError if fields that are right alone do not go together."""
        if (self.prompt is None) == (self.messages is None):
            raise ParameterError("prompt and messages: one of them must be given, and one alone; give one", "prompt")
        if self.messages is None and (wrong := sorted(given & OF_CHATS)):
            raise ParameterError(f"{wrong[0]} is given and messages is not; drop it", wrong[0])
        if self.messages is not None and self.add_special_tokens:
            raise ParameterError(
                "add_special_tokens is true and the chat template says which there are; drop it",
                "add_special_tokens",
                "unsupported_parameter",
            )
        self.asked()

    def check_context(self, context_len: int) -> None:
        """Raise ParameterError if what is to be read is longer than any prompt."""
        if self.prompt is not None:
            check_text_len(len(self.prompt), context_len, "prompt")
        else:
            super().check_context(context_len)

    def asked(self) -> str | Chat:
        """What is to be read."""
        return self.chat() if self.prompt is None else self.prompt


class Tokenized(BaseModel):
    """The tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: Name | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class Detokenized(BaseModel):
    """The text of tokens, special ones by their names."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What the tokenizer's configuration says."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str | None = None
    chat_template: str | dict[str, str] | None = None
