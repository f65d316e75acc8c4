"""Answers of a given form, and calls of tools, by OpenAI's own client."""

import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from flashvl.data import synthetic
from tests.support.images import encode
from tests.support.serving import ask

PICTURE = encode(synthetic.sample("heldout", 0, 3, tasks=("caption",)).image())
MESSAGES: Any = ask("Describe the image.", PICTURE)


class Scene(BaseModel):
    """A schema such as a pipeline uses; with bounds, as `tiny` would not end a number by itself."""

    model_config = ConfigDict(extra="forbid")
    count: int = Field(ge=0, le=99)
    color: Literal["red", "green", "blue"]
    is_small: bool


def test_a_model_of_pydantics_is_filled_in(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Scene)
    choice = found.choices[0]
    assert isinstance(choice.message.parsed, Scene) and choice.finish_reason == "stop"
    tokens = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        logprobs=True,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "scene", "schema": Scene.model_json_schema()},
        },
    )
    assert tokens.choices[0].message.content == choice.message.content
    assert tokens.choices[0].logprobs is not None and found.usage is not None
    assert len(tokens.choices[0].logprobs.content or []) == found.usage.completion_tokens


def test_a_json_object(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}
    )
    assert isinstance(json.loads(found.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "(red|blue) [0-9]{2}"}, "(red|blue) [0-9]{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "a" "b"+ "."'}, "ab+[.]"),
        ({"grammar": 'root ::= "x" | "y"'}, "x|y"),
        ({"json": {"enum": ["left", "right"]}}, '"(left|right)"'),
        ({"json": '{"type": "boolean"}'}, "true|false"),
        ({"json_object": True}, "[{].*[}]"),
    ],
)
def test_vllms_forms(client: openai.OpenAI, form: dict[str, Any], pattern: str) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_body={"structured_outputs": form}
    )
    assert re.fullmatch(pattern, found.choices[0].message.content or "")
    if form == {"json_object": True}:
        return  # without a picture, `tiny` would not end it
    continued = client.completions.create(
        model="tiny", prompt="It is", max_tokens=100, extra_body={"structured_outputs": form}
    )
    assert re.fullmatch(pattern, continued.choices[0].text)


def parameters(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = {
    "count": parameters({"n": {"type": "integer", "minimum": 0, "maximum": 9}}),
    "find": parameters({"color": {"enum": ["red", "green"]}, "is_small": {"type": "boolean"}}),
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
NAMED: Any = {"type": "function", "function": {"name": "find"}}


def check_call(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_tools_are_called(client: openai.OpenAI, choice: Any) -> None:
    found = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
    )
    (answer,) = found.choices
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls or []
    assert call.type == "function" and call.id
    assert choice != NAMED or call.function.name == "find"
    check_call(call.function.name, call.function.arguments)


def test_tools_may_be_called_or_not(client: openai.OpenAI) -> None:
    """`tiny` was not trained on tools and answers as without; the form of calls has other tests."""
    for choice in ("auto", "none"):
        found = client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=60
        )
        message = found.choices[0].message
        assert message.content or message.tool_calls
        assert "tool_calls" not in message.to_dict() or message.tool_calls


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_calls_are_streamed_as_openai_does(client: openai.OpenAI, choice: Any) -> None:
    """OpenAI's helper accumulates the events to the same as the whole answer."""
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }
    whole = client.chat.completions.create(**options).choices[0]
    with client.chat.completions.stream(
        **options, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    (streamed,) = final.choices[0].message.tool_calls or []
    (expected,) = whole.message.tool_calls or []
    assert streamed.function.name == expected.function.name
    assert streamed.function.arguments == expected.function.arguments
    assert final.choices[0].finish_reason == whole.finish_reason == "tool_calls"
    assert final.usage is not None and final.usage.completion_tokens > 0


def test_a_conversation_goes_on_behind_a_call(client: openai.OpenAI) -> None:
    messages = list(MESSAGES)
    found = client.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, tool_choice=NAMED
    )
    message = found.choices[0].message
    assert message.tool_calls
    messages.append(message.model_dump())
    messages.append(
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "at the left"}
    )
    found = client.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=20
    )
    assert found.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"regex": "a"}, "tools": TOOLS}, "structured_outputs"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strng"}},
                }
            },
            "response_format",
        ),
        (
            {
                "tools": [
                    TOOLS[0],
                    {
                        "type": "function",
                        "function": {"name": "bad", "parameters": {"type": "strng"}},
                    },
                ]
            },
            "tools.1.function.parameters",
        ),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_forms_that_cannot_be_are_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=is_streamed, extra_body=options
            )
        assert caught.value.param == param, caught.value.body
