"""The service's own questions and answers: its models, tokens, tiles, captions and state."""

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flashvl.config import DEFAULT_PROMPT
from flashvl.engine.request import FinishReason
from flashvl.serve.protocol.answers import Timings, Usage
from flashvl.serve.protocol.completions import MAX_PROMPT_TOKENS
from flashvl.serve.protocol.messages import MAX_MESSAGES, ChatMessage
from flashvl.serve.protocol.parts import Closed, Only, Text, TokenId
from flashvl.serve.protocol.tools import Tools


class TokenizeRequest(Closed):
    """A conversation, or a prompt as `/v1/completions` takes it."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    prompt: Text | None = None
    tools: Tools = []
    return_token_strs: bool = False
    add_generation_prompt: Annotated[Any, Only(True)] = None
    add_special_tokens: bool = True
    """Those of the tokenizer, to a prompt; a conversation has its template's."""
    chat_template: Annotated[Any, Only()] = None
    chat_template_kwargs: Annotated[Any, Only({}, {"enable_thinking": False})] = None
    continue_final_message: Annotated[Any, Only(False)] = None
    media_io_kwargs: Annotated[Any, Only({})] = None
    mm_processor_kwargs: Annotated[Any, Only({})] = None

    @model_validator(mode="after")
    def _check_only_one(self) -> "TokenizeRequest":
        if (self.messages is None) == (self.prompt is None):
            raise PydanticCustomError("not_one", "send exactly one of messages and prompt")
        return self


class DetokenizeRequest(Closed):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]


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
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str


class Version(BaseModel):
    version: str


class CaptionRequest(Closed):
    """A multipart form."""

    image: UploadFile
    """JPEG, PNG, WebP and others."""
    prompt: Text = DEFAULT_PROMPT
    max_tokens: PositiveInt | None = None

    @field_validator("image", mode="before")
    @classmethod
    def _check_is_file(cls, sent: Any) -> Any:
        if isinstance(sent, str):
            raise PydanticCustomError(
                "not_a_file", "is a text and must be a file: curl -F image=@photo.jpg"
            )
        return sent


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
