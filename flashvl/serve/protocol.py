"""What goes over HTTP: OpenAI's chat completions as far as a vision-language model has them.

A field that we do not know is refused, not ignored: who asks for it relies on it.
"""

import base64
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    StringConstraints,
    Tag,
)

from flashvl.engine import Completion, TokenLogprobs
from flashvl.engine.request import FinishReason

MAX_MESSAGES = 256
MAX_TEXT = 1_000_000
"""Characters of a text; the model's limit in tokens is far below."""

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]


class Closed(BaseModel):
    """Base of what clients send."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class TextPart(Closed):
    type: Literal["text"]
    text: Text


class ImageURL(Closed):
    url: str
    """`data:image/...;base64,...`, or an https URL of a host that the service allows."""
    detail: Literal["auto", "low", "high"] = "auto"
    """Taken and ignored: the model decides how an image is cut."""


class ImagePart(Closed):
    type: Literal["image_url"]
    image_url: ImageURL


def _form(content: Any) -> str:
    """Which of the two a client means, so that an error is of that one."""
    return "[parts]" if isinstance(content, list) else "[text]"


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


Content = Annotated[
    Annotated[Text, Tag("[text]")] | Annotated[list[Part], Tag("[parts]")], Discriminator(_form)
]
TextContent = Annotated[
    Annotated[Text, Tag("[text]")] | Annotated[list[TextPart], Tag("[parts]")],
    Discriminator(_form),
]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[StopString, Tag("[text]")]
    | Annotated[list[StopString], Field(max_length=16), Tag("[parts]")],
    Discriminator(_form),
]


class SystemMessage(Closed):
    role: Literal["system", "developer"]
    content: TextContent
    name: str | None = None


class UserMessage(Closed):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Closed):
    role: Literal["assistant"]
    content: TextContent | None = None
    name: str | None = None
    refusal: str | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Closed):
    include_usage: bool = False
    """A last chunk without choices tells the tokens of the whole request."""
    include_obfuscation: bool = False
    """Taken and ignored."""


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


class TokenizeRequest(Closed):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class TilesRequest(Closed):
    width: Annotated[int, Field(ge=1, le=100_000)]
    """Of an image, in pixels."""
    height: Annotated[int, Field(ge=1, le=100_000)]


# What comes back


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, completions: list[Completion]) -> "Usage":
        """Of the answers to one prompt."""
        prompt, new = completions[0].prompt_tokens, sum(len(each.token_ids) for each in completions)
        return cls(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


class Timings(BaseModel):
    """In milliseconds, since the engine had the request."""

    queue_ms: float
    """Until a slot was free."""
    ttft_ms: float
    """Until the first token."""
    tpot_ms: float
    """From token to token, on average; 0 for an answer of one."""
    total_ms: float

    @classmethod
    def of(cls, completion: Completion) -> "Timings":
        timing = completion.timing
        num_steps = max(len(completion.token_ids) - 1, 1)
        return cls(
            queue_ms=round(1e3 * timing.queue_s, 3),
            ttft_ms=round(1e3 * timing.first_token_s, 3),
            tpot_ms=round(1e3 * (timing.last_token_s - timing.first_token_s) / num_steps, 3),
            total_ms=round(1e3 * timing.last_token_s, 3),
        )


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, logprobs: list[TokenLogprobs], tokenizer: Any) -> "ChoiceLogprobs":
        def named(token_id: int, logprob: float) -> dict[str, Any]:
            token = tokenizer.decode([token_id])
            # JSON has no infinity; OpenAI's own floor.
            return {
                "token": token,
                "logprob": max(logprob, -9999.0),
                "bytes": list(token.encode()),
            }

        return cls(
            content=[
                TokenLogprob(
                    **named(each.token_id, each.logprob),
                    top_logprobs=[TopLogprob(**named(*top)) for top in each.top.items()],
                )
                for each in logprobs
            ]
        )


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


class ChatCompletion(BaseModel):
    id: str = Field(default_factory=new_id)
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[Choice]
    usage: Usage
    timing: Timings | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "flashvl"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Captioned(BaseModel):
    caption: str
    finish_reason: FinishReason
    usage: Usage
    timing: Timings


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    running: int
    """Requests that one engine answers now."""
    waiting: int


class APIError(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: APIError


class RequestError(Exception):
    """Whatever a client is told in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> ErrorResponse:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return ErrorResponse(
            error=APIError(message=self.message, type=kind, param=self.param, code=self.code)
        )


def decode_base64(text: str) -> bytes:
    """
    Raises:
        ValueError: it is not base64.
    """
    return base64.b64decode(text, validate=True)
