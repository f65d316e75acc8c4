"""The form that an answer must have: JSON under a schema, or one of vLLM's other forms."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from flashvl.engine.request import StructuredOutputs
from flashvl.serve.protocol.parts import Closed, Only

MAX_SCHEMA = 100_000
"""Characters of a schema, as JSON, or of a grammar at most."""
MAX_DEPTH = 64
"""Levels of objects and lists in a schema at most."""


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
    """JSON schema under which the answer is valid."""
    strict: bool = False
    """Taken and ignored: the answer is always valid under the schema."""


class JSONSchemaFormat(Closed):
    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")
]


class StructuredOutputsRequest(Closed):
    """The form of an answer, by exactly one of the first five fields."""

    json_: Schema | GrammarText | None = Field(alias="json", default=None)
    """JSON schema, as an object or as text, under which the answer is valid."""
    regex: GrammarText | None = None
    """Regular expression, in the syntax of Rust's `regex`, that the whole answer matches."""
    choice: Annotated[list[GrammarText], Field(min_length=1, max_length=1000)] | None = None
    """Texts of which the answer is one."""
    grammar: GrammarText | None = None
    """Context-free grammar of the answer, in the syntax of Lark or of GBNF."""
    json_object: bool = False
    """Whether the answer is a JSON object."""
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
        """The same for the engine."""
        schema = json.dumps(self.json_) if isinstance(self.json_, dict) else self.json_
        return StructuredOutputs(
            json=schema,
            json_object=self.json_object,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
        )
