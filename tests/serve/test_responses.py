"""`/v1/responses` by OpenAI's own client: the same answers as a chat's."""

from typing import Any, Literal

import openai
import pytest
import requests
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel

from flashvl.data import synthetic
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.responses import ResponseRequest
from flashvl.serve.responses import as_chat
from tests.support.images import data_url, encode
from tests.support.serving import ask

PICTURE = encode(synthetic.sample("heldout", 0, 3, tasks=("caption",)).image())
INPUT: Any = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": data_url(PICTURE), "detail": "auto"},
            {"type": "input_text", "text": "Describe the image."},
        ],
    }
]
TOOL: Any = {
    "type": "function",
    "name": "find",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"color": {"enum": ["red", "green"]}},
        "required": ["color"],
        "additionalProperties": False,
    },
}
NAMED: Any = {"type": "function", "name": "find"}


class Scene(BaseModel):
    color: Literal["red", "green", "blue"]


def chat(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def test_answers_as_a_chat_does(client: openai.OpenAI) -> None:
    expected = chat(client, ask("Describe the image.", PICTURE))
    found = client.responses.create(model="tiny", input=INPUT, store=False)
    assert found.output_text == expected.choices[0].message.content
    assert found.status == "completed" and found.error is None
    assert found.usage is not None
    assert found.usage.input_tokens == expected.usage.prompt_tokens
    assert found.usage.output_tokens == expected.usage.completion_tokens
    system = {"role": "system", "content": "Be brief."}
    expected = chat(client, [system, *ask("Describe the image.", PICTURE)], max_tokens=4)
    short = client.responses.create(
        model="tiny", input=INPUT, instructions="Be brief.", max_output_tokens=4
    )
    assert short.output_text == expected.choices[0].message.content
    assert short.status == "incomplete" and short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"


def test_the_answer_is_of_openais_type(url: str) -> None:
    """Against OpenAI's types, which its client does not check itself."""
    for options in ({}, {"tools": [TOOL], "tool_choice": NAMED}, {"include": None}):
        body = {"model": "tiny", "input": INPUT} | options
        answer = requests.post(f"{url}/v1/responses", json=body, timeout=60)
        Response.model_validate(answer.json(), strict=True)


def test_streams_the_events_of_openai(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input=INPUT)
    events = list(client.responses.create(model="tiny", input=INPUT, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"} and len(kinds) > 12
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    with client.responses.stream(model="tiny", input=INPUT) as stream:
        stream.until_done()
        final = stream.get_final_response()
    assert final.output_text == whole.output_text and final.usage == whole.usage


def test_a_model_of_pydantics_is_filled_in(client: openai.OpenAI) -> None:
    found = client.responses.parse(model="tiny", input=INPUT, text_format=Scene)
    assert isinstance(found.output_parsed, Scene)


def test_tools_are_called_and_the_conversation_goes_on(client: openai.OpenAI) -> None:
    found = client.responses.create(
        model="tiny", input=INPUT, tools=[TOOL], tool_choice=NAMED, instructions="Look."
    )
    (call,) = found.output
    assert isinstance(call, ResponseFunctionToolCall) and call.name == "find"
    assert call.arguments in ('{"color": "red"}', '{"color": "green"}')
    with client.responses.stream(
        model="tiny", input=INPUT, tools=[TOOL], tool_choice=NAMED, instructions="Look."
    ) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert isinstance(streamed, ResponseFunctionToolCall)
    assert streamed.arguments == call.arguments
    assert "response.function_call_arguments.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    history = [
        *INPUT,
        *(item.model_dump() for item in found.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "at the left"},
    ]
    answer = client.responses.create(
        model="tiny", input=history, tools=[TOOL], tool_choice="none", max_output_tokens=10
    )
    again = client.responses.create(
        model="tiny",
        input=[*history, *(item.model_dump() for item in answer.output), INPUT[0]],
        max_output_tokens=3,
    )
    assert again.output_text


def test_logprobs_are_told_where_they_are_asked_for(client: openai.OpenAI) -> None:
    found = client.responses.create(
        model="tiny", input=INPUT, include=["message.output_text.logprobs"], top_logprobs=2
    )
    part = found.output[0].content[0]  # type: ignore[union-attr]
    assert part.type == "output_text" and found.usage is not None
    assert len(part.logprobs or []) == found.usage.output_tokens
    assert b"".join(bytes(each.bytes) for each in part.logprobs or []).decode() == part.text


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.id"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input.0.role"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}},
            "text.format",
        ),
        (
            {
                "instructions": "x",
                "input": [
                    {"role": "user", "content": "a"},
                    {
                        "role": "user",
                        "content": [{"type": "input_image", "image_url": "data:,x"}],
                    },
                ],
            },
            "input.1.content.0.image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input.0.content.0.file_id",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({"model": "tiny", "input": "Hi"} | options))
    assert caught.value.param == param, caught.value.body


def test_reasoning_alone_is_refused() -> None:
    request = ResponseRequest.model_validate({"model": "tiny", "input": [{"type": "reasoning"}]})
    with pytest.raises(RequestError, match="must hold a message") as refusal:
        as_chat(request)
    assert (refusal.value.status, refusal.value.param) == (400, "input")
