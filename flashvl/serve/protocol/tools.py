"""The tools that a model may call, and the choice among them."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from flashvl.serve.protocol.parts import Closed, Only, Text
from flashvl.serve.protocol.structured import Schema

MAX_TOOLS = 128
"""Tools of a request at most."""

ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class Function(Closed):
    name: ToolName
    """Name of the tool, by which the model calls it."""
    description: Text = ""
    """What the tool does, for the model."""
    parameters: Schema = {"type": "object", "properties": {}}
    """JSON schema of the arguments; those of a call are always valid under it."""
    strict: bool = False
    """Taken and ignored."""


class Tool(Closed):
    type: Literal["function"]
    function: Function
    cache_control: dict[str, Any] | None = None
    """Taken and ignored."""
    defer_loading: Annotated[Any, Only(False)] = None


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class FunctionName(Closed):
    name: str


class NamedTool(Closed):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Closed):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolChoice(Closed):
    """A choice among some of the request's tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolMode = Literal["none", "auto", "required"]


def _form(choice: Any) -> str:
    return "[text]" if isinstance(choice, str) else "[tool]"


ToolChoice = Annotated[
    Annotated[ToolMode, Tag("[text]")]
    | Annotated[
        Annotated[NamedTool | AllowedToolChoice, Field(discriminator="type")], Tag("[tool]")
    ],
    Discriminator(_form),
]
"""`none`, `auto` (the model may call tools), `required` (it must), or the tool or tools to call."""
