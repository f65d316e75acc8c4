"""What an answer must look like: JSON by a schema, or vLLM's other forms."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from flashvl.engine.request import StructuredOutputs
from flashvl.serve.protocol.parts import Closed, Only

MAX_SCHEMA = 100_000
"""Characters of a schema or grammar, as JSON."""
MAX_DEPTH = 64
"""Objects and lists within each other in a schema."""


def _check_schema(schema: dict[str, Any] | bool) -> dict[str, Any] | bool:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [inner for node in level for inner in _inner(node)]
        if not level:
            break
    else:
        raise PydanticCustomError(
            "too_deep", "schema is deeper than {most} levels; make it flatter", {"most": MAX_DEPTH}
        )
    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise PydanticCustomError(
            "too_long", "schema is longer than {most} characters", {"most": MAX_SCHEMA}
        )
    return schema


def _inner(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


Schema = Annotated[dict[str, Any], AfterValidator(_check_schema)]
"""A JSON schema."""
GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_SCHEMA)]


class TextFormat(Closed):
    type: Literal["text"]


class JSONObjectFormat(Closed):
    type: Literal["json_object"]


class JSONSchema(Closed):
    name: str = "answer"
    """Taken and ignored."""
    description: str | None = None
    """Taken and ignored."""
    schema_: Schema = Field(alias="schema", default={"type": "object"})
    strict: bool = False
    """Taken and ignored: the answer always obeys."""


class JSONSchemaFormat(Closed):
    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")
]


class StructuredOutputsRequest(Closed):
    """Exactly one of the first five."""

    json_: Schema | GrammarText | None = Field(alias="json", default=None)
    """A JSON schema."""
    regex: GrammarText | None = None
    choice: Annotated[list[GrammarText], Field(min_length=1, max_length=1000)] | None = None
    grammar: GrammarText | None = None
    """In Lark's form, or in GBNF."""
    json_object: bool = False
    disable_any_whitespace: Annotated[Any, Only(False)] = None
    disable_additional_properties: Annotated[Any, Only(False)] = None
    whitespace_pattern: Annotated[Any, Only()] = None
    structural_tag: Annotated[Any, Only(instead="send tools")] = None
    backend: Annotated[Any, Only("auto")] = None

    @model_validator(mode="after")
    def _check_only_one(self) -> "StructuredOutputsRequest":
        forms = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(each is not None for each in forms) != 1:
            raise PydanticCustomError(
                "not_one", "set exactly one of json, regex, choice, grammar and json_object"
            )
        return self

    def structured(self) -> StructuredOutputs:
        """As the engine has it."""
        schema = json.dumps(self.json_) if isinstance(self.json_, dict) else self.json_
        return StructuredOutputs(
            json=schema,
            json_object=self.json_object,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
        )
