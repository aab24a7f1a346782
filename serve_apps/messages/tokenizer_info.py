"""The configuration of a model's tokenizer, from the process that has it to the response of /tokenizer_info."""

from pydantic import BaseModel, ConfigDict

__all__ = ["TokenizerInfo"]


class TokenizerInfo(BaseModel):
    """Configuration of the tokenizer."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str | None = None
    chat_template: str | dict[str, str] | None = None
