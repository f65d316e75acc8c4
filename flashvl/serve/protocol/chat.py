"""`/v1/chat/completions`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from flashvl.serve.protocol.answers import ChoiceLogprobs, Timings, Usage, new_id, now
from flashvl.serve.protocol.messages import MAX_MESSAGES, ChatMessage
from flashvl.serve.protocol.parts import Only
from flashvl.serve.protocol.sampling import CompletionOptions, Lacking, Sampling
from flashvl.serve.protocol.tools import ToolChoice, Tools

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class LackingInChat(Lacking):
    """OpenAI's and vLLM's fields of a chat that may be sent where they ask for nothing."""

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
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    """The older name of `max_completion_tokens`."""
    tools: Tools = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    """Whether the model may call several tools at once."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0


class AnswerFunction(BaseModel):
    name: str
    arguments: str
    """A JSON object, as text."""


class AnswerToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    """None where the answer is calls of tools alone."""
    refusal: None = None
    tool_calls: list[AnswerToolCall] | None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinishReason


class ChatCompletion(BaseModel):
    id: str = Field(default_factory=lambda: new_id("chatcmpl-"))
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[Choice]
    usage: Usage
    timing: Timings | None = None
