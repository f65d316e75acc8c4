"""Bases and types that several kinds of request and answer share."""

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_TEXT = 1_000_000
"""Characters of a text at most, before the model's own limit in tokens, which is far lower, is
checked."""

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]

NOTES = ("title", "description", "default")
"""What the JSON schema of a field holds besides its type."""


class Answer(BaseModel):
    """Base of what the service sends; the API's description has the strings below its fields."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Closed(BaseModel):
    """Base of what clients send: unknown fields are errors, and null fields count as absent."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _take_null_as_absent(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Describe the same to clients: each optional field may be null."""
        told = handler.resolve_ref_schema(handler(schema))
        for name, field in told.get("properties", {}).items():
            is_required = name in told.get("required", ())
            if not is_required and {"type": "null"} not in field.get("anyOf", ()):
                notes = {key: field.pop(key) for key in NOTES if key in field}
                told["properties"][name] = {"anyOf": [field, {"type": "null"}], **notes}
        return told


class Only:
    """Annotates a field that this service lacks: it may only have values that ask for nothing."""

    def __init__(self, *values: Any, instead: str = ""):
        """
        Args:
            values: values that ask for nothing; null always does.
            instead: what the client can do to get what it asks for.
        """
        self.values = values
        shown = " or ".join(map(repr, values))
        self.remedy = instead or "leave it out" + (f" or send {shown}" if values else "")

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": [*self.values, None]}

    def _check(self, value: Any) -> Any:
        if value not in self.values:
            raise PydanticCustomError(
                "unsupported", "this service has no such thing; {remedy}", {"remedy": self.remedy}
            )
        return value


def form(content: Any) -> str:
    """The tag of the form that a client means, so that an error is about that form."""
    return "[parts]" if isinstance(content, list) else "[text]"


class StreamOptions(Closed):
    include_usage: bool = False
    """Whether a last chunk without choices tells the tokens of the whole request."""
    include_obfuscation: bool = False
    """Taken and ignored."""
    continuous_usage_stats: Annotated[Any, Only(False)] = None
