"""`/v1/chat/completions`."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, PositiveInt

from flashvl.engine.request import FinishReason
from flashvl.serve.protocol.messages import ChatMessage
from flashvl.serve.protocol.parts import (
    MAX_MESSAGES,
    ChoiceLogprobs,
    Closed,
    Stop,
    StreamOptions,
    Timings,
    Usage,
    new_id,
    now,
)


class ChatCompletionRequest(Closed):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    """The older name of `max_completion_tokens`."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0, the default: the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] = 0
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same request with the same seed has the same answer; with None, chance decides."""
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    """Answers; the i-th has the seed `seed + i`."""
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] = 0
    ignore_eos: bool = False
    include_timing: bool = False
    """Have the answer tell how long its parts took."""
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str = Field(default_factory=new_id)
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[Choice]
    usage: Usage
    timing: Timings | None = None
