"""Requests and answers of the service's other paths: models, tokens, tiles, captions, state."""

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flashvl.config import DEFAULT_PROMPT
from flashvl.engine.request import FinishReason
from flashvl.serve.protocol.answers import Timings, Usage
from flashvl.serve.protocol.completions import MAX_PROMPT_TOKENS
from flashvl.serve.protocol.messages import MAX_MESSAGES, ChatMessage
from flashvl.serve.protocol.parts import Answer, Closed, Only, Text, TokenId
from flashvl.serve.protocol.tools import Tools


class TokenizeRequest(Closed):
    """A conversation, or a prompt such as `/v1/completions` takes."""

    model: str | None = None
    """The service's model, by the id that `/v1/models` lists."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    """The conversation."""
    prompt: Text | None = None
    """The prompt, in place of `messages`."""
    tools: Tools = []
    """Tools that the conversation tells of."""
    return_token_strs: bool = False
    """Whether the answer holds the tokens' names too."""
    add_generation_prompt: Annotated[Any, Only(True)] = None
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own tokens to a prompt; a conversation has its template's."""
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
    """The service's model, by the id that `/v1/models` lists."""
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]


class TilesRequest(Closed):
    width: Annotated[int, Field(ge=1, le=100_000)]
    """Width of an image in pixels."""
    height: Annotated[int, Field(ge=1, le=100_000)]
    """Height of the image in pixels."""


class Model(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "flashvl"
    max_model_len: int
    """Tokens of a prompt and its answer at most."""


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokenized(Answer):
    count: int
    """Number of the tokens."""
    max_model_len: int
    """Tokens of a prompt and its answer at most."""
    tokens: list[int]
    """Token ids."""
    token_strs: list[str] | None = None
    """The tokens' names in the vocabulary."""


class Detokenized(Answer):
    prompt: str
    """The text of the tokens."""


class Version(Answer):
    version: str


class CaptionRequest(Closed):
    """The fields of a multipart form."""

    image: UploadFile
    """Image file: JPEG, PNG, WebP and others."""
    prompt: Text = DEFAULT_PROMPT
    """Question or instruction about the image."""
    max_tokens: PositiveInt | None = None
    """Tokens of the caption at most; by default, what the service is configured to give."""

    @field_validator("image", mode="before")
    @classmethod
    def _check_is_file(cls, sent: Any) -> Any:
        if isinstance(sent, str):
            raise PydanticCustomError(
                "not_a_file", "is a text and must be a file: curl -F image=@photo.jpg"
            )
        return sent


class Captioned(Answer):
    caption: str
    finish_reason: FinishReason
    usage: Usage
    timing: Timings


class Alive(Answer):
    status: Literal["alive"] = "alive"


class Ready(Answer):
    status: Literal["ready"] = "ready"
    running: int
    """Requests that one engine is answering."""
    waiting: int
    """Requests that wait for a slot of that engine."""
