"""The service's own questions and answers: its models, tokens, tiles, captions and state."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from flashvl.engine.request import FinishReason
from flashvl.serve.protocol.messages import ChatMessage
from flashvl.serve.protocol.parts import MAX_MESSAGES, Closed, Timings, Usage


class TokenizeRequest(Closed):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class TilesRequest(Closed):
    width: Annotated[int, Field(ge=1, le=100_000)]
    """Of an image, in pixels."""
    height: Annotated[int, Field(ge=1, le=100_000)]


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
