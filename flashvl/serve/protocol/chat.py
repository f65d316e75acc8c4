"""Requests and answers of `/v1/chat/completions`."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from flashvl.serve.protocol.answers import ChoiceLogprobs, Timings, Usage, new_id, now
from flashvl.serve.protocol.messages import MAX_MESSAGES, ChatMessage
from flashvl.serve.protocol.parts import Answer, Only
from flashvl.serve.protocol.sampling import CompletionOptions, Lacking, Sampling
from flashvl.serve.protocol.tools import ToolChoice, Tools

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class LackingInChat(Lacking):
    """Fields of chats for OpenAI and vLLM that are taken only with values that ask for nothing."""

    add_generation_prompt: Annotated[Any, Only(True)] = None
    add_special_tokens: Annotated[Any, Only(False)] = None
    audio: Annotated[Any, Only()] = None
    chat_template: Annotated[Any, Only()] = None
    chat_template_kwargs: Annotated[Any, Only({}, {"enable_thinking": False})] = None
    continue_final_message: Annotated[Any, Only(False)] = None
    documents: Annotated[Any, Only([])] = None
    echo: Annotated[Any, Only(False)] = None
    function_call: Annotated[Any, Only("none", "auto", instead="send tool_choice")] = None
    functions: Annotated[Any, Only([], instead="send tools")] = None
    include_reasoning: bool | None = None
    """Taken and ignored: the model does not reason."""
    metadata: dict[str, str] | None = None
    """Taken and ignored: nothing is kept."""
    modalities: Annotated[Any, Only(["text"])] = None
    prediction: dict[str, Any] | None = None
    """Taken and ignored: it changes no answer."""
    reasoning_effort: Annotated[Any, Only("none")] = None
    store: Annotated[Any, Only(False)] = None
    verbosity: Annotated[Any, Only("medium")] = None
    web_search_options: Annotated[Any, Only()] = None


class ChatCompletionRequest(Sampling, CompletionOptions, LackingInChat):
    model: str
    """The service's model, by the id that `/v1/models` lists."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation; its last message must not be the assistant's."""
    max_completion_tokens: PositiveInt | None = None
    """Tokens of an answer at most; by default, what the service is configured to give."""
    max_tokens: PositiveInt | None = None
    """The older name of `max_completion_tokens`."""
    tools: Tools = []
    """Tools that the model may call."""
    tool_choice: ToolChoice = "auto"
    """Tools to call: `none`, `auto` (the model decides), `required` (at least one), or a tool."""
    parallel_tool_calls: bool = True
    """Whether the model may call several tools in one answer."""
    logprobs: bool = False
    """Whether the answer holds its tokens' log-probabilities."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Likeliest tokens at each place to report too, with `logprobs`."""


class AnswerFunction(Answer):
    name: str
    """Name of the tool."""
    arguments: str
    """JSON object with the arguments, as text."""


class AnswerToolCall(Answer):
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(Answer):
    role: Literal["assistant"] = "assistant"
    content: str | None
    """The answer's text; null where the answer only calls tools."""
    refusal: None = None
    tool_calls: list[AnswerToolCall] | None = None


class Choice(Answer):
    index: int
    """Number of the answer, from 0 to `n` - 1."""
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinishReason


class ChatCompletion(Answer):
    id: str = Field(default_factory=lambda: new_id("chatcmpl-"))
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[Choice]
    usage: Usage
    timing: Timings | None = None
