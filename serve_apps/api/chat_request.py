"""Body of POST /v1/chat/completions."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serve_apps.api.bounds import MESSAGES, TOOLS, VALUES, check_text_len
from serve_apps.api.chat_messages import CacheControl, Message, template_messages, without_nulls
from serve_apps.api.errors import ParameterError
from serve_apps.api.generation_fields import GenerationFields, openapi_limits
from serve_apps.api.grammar_fields import check_size
from serve_apps.api.json_text import count_values
from serve_apps.api.parsing import Body
from serve_apps.messages.generation_request import Chat, ToolUse
from tidar_core.config import MOST_LOGPROBS, SamplingConfig

__all__ = ["ChatFields", "ChatRequest", "Messages", "Tool"]

Choice = Literal["none", "auto", "required"]


class Part(BaseModel):
    """Base class of the parts of a tool."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Function(Part):
    """Function that a model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments."""
    strict: bool | None = None
    """Arguments follow the schema; with tool_choice `required` or a named function they always do."""
    cache_control: CacheControl = None


class Tool(Part):
    """OpenAI's wrapper of a function."""

    type: Literal["function"]
    function: Function
    cache_control: CacheControl = None


class FunctionName(Part):
    """Name of the function that must be called."""

    name: str


class NamedChoice(Part):
    """A tool_choice by which the named function must be called."""

    type: Literal["function"]
    function: FunctionName


class TypedChoice(Part):
    """A tool_choice that is written as an object."""

    type: Choice


def _type_alone(value: Any) -> Any:
    return value["type"] if isinstance(value, dict) and set(value) == {"type"} else value


TYPE_ALONE = BeforeValidator(_type_alone, json_schema_input_type=Choice | TypedChoice | NamedChoice)


def _bounded_messages(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MESSAGES:
        raise ParameterError(
            f"messages holds {len(value)} messages; at most {MESSAGES} are read; send fewer", "messages"
        )
    left = VALUES
    for text in _arguments(value):
        left -= count_values(text, left, "messages")
        if left < 0:
            raise ParameterError(
                f"arguments of calls in messages hold more than {VALUES} JSON values; send fewer", "messages"
            )
    return without_nulls(value)


def _arguments(messages: Any) -> Iterator[str]:
    """JSON texts within messages that are not validated yet."""
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict):
            continue
        calls = message.get("tool_calls")
        functions = [
            call.get("function") for call in (calls if isinstance(calls, list) else []) if isinstance(call, dict)
        ]
        for function in [*functions, message.get("function_call")]:
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                yield function["arguments"]


Messages = Annotated[
    list[Message],
    BeforeValidator(_bounded_messages, json_schema_input_type=list[Message]),
    Field(min_length=1, max_length=MESSAGES),
]


class ChatFields(Body):
    """Fields that determine the prompt of a conversation."""

    messages: Messages
    tools: Annotated[list[Tool], Field(max_length=TOOLS, default_factory=list)]
    add_generation_prompt: bool = True
    """The prompt ends with the tokens that begin an assistant's message."""
    continue_final_message: bool = False
    """The model continues the last message instead."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Variables of the model's chat template. A variable that the template does not read is refused."""

    def check_context(self, context_len: int) -> None:
        """Raise ParameterError if the messages cannot fit into the context."""
        check_text_len(sum(len(message.content or "") for message in self.messages), context_len, "messages")

    def chat(self, *, show_tools: bool = True) -> Chat:
        """The conversation, for a replica. Raises ParameterError."""
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ParameterError(
                "continue_final_message and add_generation_prompt are both true; a prompt has one end; drop one",
                "continue_final_message",
            )
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return Chat(
            messages=template_messages(self.messages),
            tools=tuple(tools) if tools and show_tools else None,
            add_generation_prompt=self.add_generation_prompt and not self.continue_final_message,
            leave_open=self.continue_final_message,
            variables=self.chat_template_kwargs,
        )


class ChatRequest(ChatFields, GenerationFields):
    """The body of POST /v1/chat/completions."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationFields.NEUTRAL,
        "add_special_tokens": (False,),
        "audio": (),
        "best_of": (1,),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "include_reasoning": (True,),
        "mm_processor_kwargs": ({},),
        "web_search_options": (),
    }

    max_tokens: Annotated[int, openapi_limits(minimum=1)] | None = None
    """Default: the room that the prompt leaves in the context."""
    max_completion_tokens: Annotated[int, openapi_limits(minimum=1)] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    tool_choice: Annotated[Choice | NamedChoice, TYPE_ALONE] | None = None
    """Default: `auto` if there are tools."""
    parallel_tool_calls: bool = True

    def check(self, given: set[str]) -> None:
        """Raise ParameterError if fields contradict each other."""
        if {"max_tokens", "max_completion_tokens"} <= given and self.max_tokens != self.max_completion_tokens:
            raise ParameterError(
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}; they mean "
                "the same; give one",
                "max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise ParameterError(
                "top_logprobs is given and logprobs is false; set logprobs to true or drop it", "top_logprobs"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise ParameterError(
                "prompt_logprobs of a chat cannot be streamed; set stream to false or drop it",
                "prompt_logprobs",
                "unsupported_parameter",
            )
        super().check(given)
        self.chat()
        self.tool_use()

    def sampling(self, seed: int) -> SamplingConfig:
        """Settings of the sampler. Raises RequestError, whose first word is the field's name."""
        most = self.most_tokens
        return self._sampling(
            max_tokens=max(self.min_tokens, 1) if most is None else most,
            seed=seed,
            logprobs=self.top_logprobs if self.logprobs else None,
            of_prompt=False,
        )

    def tool_use(self) -> ToolUse | None:
        """Functions that may or must be called; None without tools. Raises ParameterError."""
        choice = self.tool_choice
        if not self.tools:
            if choice not in (None, "none", "auto"):
                raise ParameterError("tool_choice requires a call and there are no tools; give some", "tool_choice")
            return None
        functions = [tool.function.model_dump() for tool in self.tools]
        if len({function["name"] for function in functions}) < len(functions):
            raise ParameterError("tools hold two functions of one name; rename one", "tools")
        required = choice == "required"
        if isinstance(choice, NamedChoice):
            required, name = True, choice.function.name
            functions = [function for function in functions if function["name"] == name]
            if not functions:
                raise ParameterError(f"tool_choice names {name!r}, which is not in tools; name a tool", "tool_choice")
        if required and (grammar := self.grammar()) is not None:
            raise ParameterError(
                f"tool_choice requires a call and {grammar.param} a grammar; a text can follow only one; drop one",
                "tool_choice",
            )
        if choice == "none":
            return None
        if required or any(function.get("strict") for function in functions):
            check_size([function.get("parameters") for function in functions], "tools")
        parallel = self.parallel_tool_calls and not isinstance(choice, NamedChoice)
        return ToolUse(functions=tuple(functions), required=required, parallel=parallel)

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of a text, under either name; None means all that fit into the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
