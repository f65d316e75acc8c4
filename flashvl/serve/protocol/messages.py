"""The messages of a conversation, and the parts of their contents.

Clients send answers back as messages, so every field that OpenAI's or vLLM's answers hold is taken.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from flashvl.serve.protocol.parts import Closed, Only, Text, form

MAX_MESSAGES = 256
"""Messages of a conversation at most."""
Detail = Literal["auto", "low", "high", "original"]


class Marked(Closed):
    """Base of parts and messages, which clients may mark for a cache to keep."""

    cache_control: dict[str, Any] | None = None
    """Taken and ignored: it changes no answer."""
    prompt_cache_breakpoint: dict[str, Any] | None = None
    """Taken and ignored."""


class TextPart(Marked):
    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: list[dict[str, Any]] = []
    """Taken and ignored, as are `logprobs` and `parsed`."""
    parsed: Any = None
    logprobs: list[dict[str, Any]] = []


class RefusalPart(Marked):
    type: Literal["refusal"]
    refusal: Text


class ImageURL(Closed):
    url: str
    """`data:image/...;base64,...`, or an https URL of a host that the service allows."""
    detail: Detail = "auto"
    """Taken and ignored: the model decides how an image is cut."""


def _as_image_url(sent: Any) -> Any:
    return {"url": sent} if isinstance(sent, str) else sent


AnyImageURL = Annotated[
    ImageURL,
    BeforeValidator(_as_image_url, json_schema_input_type=ImageURL | str),
]


class ImagePart(Marked):
    """An image, as OpenAI's two interfaces and vLLM write it."""

    type: Literal["image_url", "input_image"]
    image_url: AnyImageURL
    """The image's URL, alone or in an object."""
    detail: Detail = "auto"
    """Taken and ignored, as is `uuid`."""
    uuid: str | None = None
    file_id: Annotated[Any, Only(instead="send image_url")] = None


TextContent = Annotated[
    Annotated[Text, Tag("[text]")] | Annotated[list[TextPart], Tag("[parts]")],
    Discriminator(form),
]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[Text, Tag("[text]")] | Annotated[list[Part], Tag("[parts]")], Discriminator(form)
]
AnswerPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
AnswerContent = Annotated[
    Annotated[Text, Tag("[text]")] | Annotated[list[AnswerPart], Tag("[parts]")],
    Discriminator(form),
]


class MessageBase(Marked):
    """Base of all messages, whatever their role."""

    name: str | None = None
    """Taken and ignored, as is `id`."""
    id: str | None = None


class SystemMessage(MessageBase):
    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(MessageBase):
    role: Literal["user"]
    content: Content


class FunctionCall(Closed):
    name: str
    arguments: Text = "{}"
    """JSON object with the arguments, as text."""
    parsed_arguments: Any = None
    """Taken and ignored: OpenAI's client adds it."""


class ToolCall(Closed):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None
    """Taken and ignored: clients keep it from a stream."""


class AssistantMessage(MessageBase):
    role: Literal["assistant"]
    content: AnswerContent = ""
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] = []
    function_call: FunctionCall | None = None
    """OpenAI's older form of one tool call."""
    refusal: Text | None = None
    """Used in place of the content where that is empty."""
    annotations: list[dict[str, Any]] = []
    """Taken and ignored, as are the next seven fields."""
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: list[dict[str, Any]] = []
    thinking_blocks: list[dict[str, Any]] = []
    provider_specific_fields: dict[str, Any] | None = None
    parsed: Any = None
    token_ids: list[int] = []
    audio: Annotated[Any, Only()] = None
    images: Annotated[Any, Only([])] = None
    prefix: Annotated[Any, Only(False)] = None


class ToolMessage(MessageBase):
    """The result of a tool call."""

    role: Literal["tool", "function"]
    content: TextContent = ""
    tool_call_id: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]
