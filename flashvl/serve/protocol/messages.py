"""The messages of a conversation, and the parts of their contents."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from flashvl.serve.protocol.parts import Closed, Text, form


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


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


Content = Annotated[
    Annotated[Text, Tag("[text]")] | Annotated[list[Part], Tag("[parts]")], Discriminator(form)
]
TextContent = Annotated[
    Annotated[Text, Tag("[text]")] | Annotated[list[TextPart], Tag("[parts]")],
    Discriminator(form),
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
