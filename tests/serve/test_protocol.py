"""What clients send, against the schemas of others: OpenAI's own types, and vLLM's fields."""

from collections.abc import Iterator
from typing import Any, get_type_hints

import openai.types.chat as openai_chat
import openai.types.responses as openai_responses
import pytest
from openai.types import completion_create_params
from openai.types.chat import ChatCompletion as OpenAIChatCompletion
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params, response_input_item_param
from pydantic import BaseModel, ValidationError

from flashvl.serve.batches import BatchRequest
from flashvl.serve.protocol import Closed, chat, messages, responses, service, tools
from flashvl.serve.protocol.chat import ChatCompletionRequest
from flashvl.serve.protocol.completions import CompletionRequest
from flashvl.serve.protocol.parts import Only, StreamOptions
from flashvl.serve.protocol.responses import ResponseRequest
from flashvl.serve.protocol.sampling import CompletionOptions, Lacking, Sampling
from flashvl.serve.protocol.structured import (
    JSONObjectFormat,
    JSONSchema,
    JSONSchemaFormat,
    StructuredOutputsRequest,
    TextFormat,
)

USER = {"role": "user", "content": "Hi"}
IMAGE = {"url": "data:image/png;base64,AAAA"}
CALL = {"name": "f"}
NAMED = {"type": "function", "function": CALL}
LEAST: dict[type[Closed], dict[str, Any]] = {
    # The shortest object of each kind that clients send.
    BatchRequest: {"input": "/a", "output": "/b"},
    ChatCompletionRequest: {"model": "tiny", "messages": [USER]},
    CompletionOptions: {},
    CompletionRequest: {"model": "tiny", "prompt": "Hi"},
    JSONObjectFormat: {"type": "json_object"},
    JSONSchema: {"schema": {}},
    JSONSchemaFormat: {"type": "json_schema", "json_schema": {"schema": {}}},
    Lacking: {},
    ResponseRequest: {"model": "tiny", "input": "Hi"},
    Sampling: {},
    StreamOptions: {},
    StructuredOutputsRequest: {"regex": "a"},
    TextFormat: {"type": "text"},
    chat.LackingInChat: {},
    messages.AssistantMessage: {"role": "assistant"},
    messages.FunctionCall: CALL,
    messages.ImagePart: {"type": "image_url", "image_url": IMAGE},
    messages.ImageURL: IMAGE,
    messages.Marked: {},
    messages.MessageBase: {},
    messages.RefusalPart: {"type": "refusal", "refusal": "No."},
    messages.SystemMessage: {"role": "system", "content": "Hi"},
    messages.TextPart: {"type": "text", "text": "Hi"},
    messages.ToolCall: {"function": CALL},
    messages.ToolMessage: {"role": "tool"},
    messages.UserMessage: USER,
    responses.AllowedFunctions: {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "f"}],
    },
    responses.AssistantItem: {"role": "assistant", "content": "Hi"},
    responses.FunctionCallItem: {
        "type": "function_call",
        "call_id": "1",
        "name": "f",
        "arguments": "{}",
    },
    responses.FunctionOutputItem: {"type": "function_call_output", "output": "Hi"},
    responses.FunctionTool: {"type": "function", "name": "f"},
    responses.Item: {},
    responses.JSONSchemaTextFormat: {"type": "json_schema", "schema": {}},
    responses.NamedFunction: {"type": "function", "name": "f"},
    responses.Reasoning: {},
    responses.ReasoningItem: {"type": "reasoning"},
    responses.ResponseStreamOptions: {},
    responses.SystemItem: {"role": "system", "content": "Hi"},
    responses.TextConfig: {},
    responses.UserItem: USER,
    service.DetokenizeRequest: {"tokens": [1]},
    service.TilesRequest: {"width": 1, "height": 1},
    service.TokenizeRequest: {"prompt": "Hi"},
    tools.AllowedToolChoice: {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [NAMED]},
    },
    tools.AllowedTools: {"mode": "auto", "tools": [NAMED]},
    tools.Function: CALL,
    tools.FunctionName: CALL,
    tools.NamedTool: NAMED,
    tools.Tool: NAMED,
}
UNLIKE = {responses.ItemReference, service.CaptionRequest}
"""Kinds without null fields: one is always refused, and one is a form."""


def kinds(base: type[Closed] = Closed) -> Iterator[type[Closed]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def names(model: type[BaseModel]) -> set[str]:
    """The names of the fields as they are sent."""
    return {field.alias or name for name, field in model.model_fields.items()}


def test_every_kind_of_object_is_here() -> None:
    assert set(kinds()) - UNLIKE == set(LEAST)


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_null_is_absent(kind: type[Closed]) -> None:
    """Null counts as absent for every field; a required field that is null is missing."""
    least = LEAST[kind]
    expected = kind.model_validate(least)
    for name in names(kind) - least.keys():
        assert kind.model_validate(least | {name: None}) == expected, name
    assert kind.model_validate(least | dict.fromkeys(names(kind) - least.keys())) == expected
    required = {
        field.alias or name for name, field in kind.model_fields.items() if field.is_required()
    }
    for name in required:
        with pytest.raises(ValidationError, match="missing"):
            kind.model_validate(least | {name: None})


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_what_this_service_lacks_is_refused_by_name_and_taken_where_it_asks_for_nothing(
    kind: type[Closed],
) -> None:
    for name, field in kind.model_fields.items():
        sent = field.alias or name
        for only in (each for each in field.metadata if isinstance(each, Only)):
            for value in only.values:
                kind.model_validate(LEAST[kind] | {sent: value})
            with pytest.raises(ValidationError) as caught:
                kind.model_validate(LEAST[kind] | {sent: "something"})
            (problem,) = caught.value.errors()
            assert problem["loc"][-1] == sent
            assert any(word in problem["msg"] for word in ("leave it out", "send", "use"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (chat_create_params.CompletionCreateParamsNonStreaming, ChatCompletionRequest),
        (chat_create_params.CompletionCreateParamsStreaming, ChatCompletionRequest),
        (completion_create_params.CompletionCreateParamsNonStreaming, CompletionRequest),
        (response_create_params.ResponseCreateParamsNonStreaming, ResponseRequest),
        (response_create_params.StreamOptions, responses.ResponseStreamOptions),
        (openai_chat.ChatCompletionStreamOptionsParam, StreamOptions),
        (openai_chat.ChatCompletionAssistantMessageParam, messages.AssistantMessage),
        (openai_chat.ChatCompletionDeveloperMessageParam, messages.SystemMessage),
        (openai_chat.ChatCompletionFunctionMessageParam, messages.ToolMessage),
        (openai_chat.ChatCompletionSystemMessageParam, messages.SystemMessage),
        (openai_chat.ChatCompletionToolMessageParam, messages.ToolMessage),
        (openai_chat.ChatCompletionUserMessageParam, messages.UserMessage),
        (openai_chat.ChatCompletionContentPartImageParam, messages.ImagePart),
        (openai_chat.chat_completion_content_part_image_param.ImageURL, messages.ImageURL),
        (openai_chat.ChatCompletionContentPartTextParam, messages.TextPart),
        (openai_chat.ChatCompletionContentPartRefusalParam, messages.RefusalPart),
        (openai_chat.ChatCompletionMessageFunctionToolCallParam, messages.ToolCall),
        (openai_chat.ChatCompletionFunctionToolParam, tools.Tool),
        (openai_chat.ChatCompletionNamedToolChoiceParam, tools.NamedTool),
        (openai_chat.ChatCompletionAllowedToolChoiceParam, tools.AllowedToolChoice),
        (openai_responses.EasyInputMessageParam, responses.UserItem),
        (openai_responses.ResponseInputImageParam, messages.ImagePart),
        (openai_responses.ResponseInputTextParam, messages.TextPart),
        (openai_responses.ResponseOutputTextParam, messages.TextPart),
        (openai_responses.ResponseOutputMessageParam, responses.AssistantItem),
        (openai_responses.ResponseFunctionToolCallParam, responses.FunctionCallItem),
        (response_input_item_param.FunctionCallOutput, responses.FunctionOutputItem),
        (openai_responses.FunctionToolParam, responses.FunctionTool),
        (openai_responses.ResponseReasoningItemParam, responses.ReasoningItem),
        (openai_responses.ResponseTextConfigParam, responses.TextConfig),
        (
            openai_responses.ResponseFormatTextJSONSchemaConfigParam,
            responses.JSONSchemaTextFormat,
        ),
    ],
)
def test_every_field_of_openais_is_known(theirs: Any, ours: type[Closed]) -> None:
    """Each field of vLLM is taken, or refused by an error that says what to do."""
    assert get_type_hints(theirs).keys() - names(ours) == set()


NOTHING = {
    "allowed_token_ids": [],
    "bad_words": [],
    "best_of": 1,
    "chat_template_kwargs": {},
    "documents": [],
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "length_penalty": 1.0,
    "logit_bias": {},
    "logprobs": False,
    "min_p": 0,
    "min_tokens": 0,
    "mm_processor_kwargs": {},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "prompt_cache_key": "k",
    "reasoning_effort": "none",
    "repetition_penalty": 1,
    "response_format": {"type": "text"},
    "safety_identifier": "s",
    "service_tier": "auto",
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "stop": [],
    "stop_token_ids": [],
    "store": False,
    "stream": False,
    "stream_options": {},
    "tool_choice": "none",
    "tools": [],
    "top_k": -1,
    "top_p": 1,
    "use_beam_search": False,
    "verbosity": "medium",
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_asks_for_nothing_is_taken(name: str) -> None:
    ChatCompletionRequest.model_validate(LEAST[ChatCompletionRequest] | {name: NOTHING[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "alloy", "format": "mp3"}),
        ("bad_words", ["red"]),
        ("best_of", 3),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("continue_final_message", True),
        ("functions", [{"name": "f"}]),
        ("guided_regex", "a"),
        ("modalities", ["text", "audio"]),
        ("prompt_logprobs", 1),
        ("reasoning_effort", "high"),
        ("service_tier", "priority"),
        ("store", True),
        ("use_beam_search", True),
        ("web_search_options", {}),
        ("what_is_this", 1),
    ],
)
def test_what_would_change_the_answer_and_is_not_there_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate(LEAST[ChatCompletionRequest] | {name: value})
    assert caught.value.errors()[0]["loc"] == (name,)


def test_answers_come_back_as_history() -> None:
    """Answers of OpenAI's client, as it dumps them, and of vLLM, with all their empty fields."""
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
            }
        ],
    }
    message = OpenAIChatCompletion.model_validate(body).choices[0].message
    for dumped in (message.model_dump(), message.to_dict(), message.model_dump(exclude_none=True)):
        taken = messages.AssistantMessage.model_validate(dumped)
        assert [call.function.name for call in taken.tool_calls] == ["f"]
    vllm = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": [],
        "reasoning": None,
        "reasoning_content": "",
        "id": "msg_1",
        "name": None,
    }
    assert messages.AssistantMessage.model_validate(vllm).content == "Hi"


def test_pictures_come_in_every_form() -> None:
    url = IMAGE["url"]
    for part in (
        {"type": "image_url", "image_url": {"url": url, "detail": "original"}},
        {"type": "image_url", "image_url": {"url": url, "detail": None}},
        {"type": "image_url", "image_url": url, "uuid": "u"},
        {"type": "input_image", "image_url": url, "detail": "auto", "file_id": None},
        {"type": "image_url", "image_url": url, "cache_control": {"type": "ephemeral"}},
    ):
        assert messages.ImagePart.model_validate(part).image_url.url == url


def test_a_schema_too_deep_or_too_long_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"items": deep}
    for schema in (deep, {"description": "x" * 200_000}):
        with pytest.raises(ValidationError, match="schema is"):
            JSONSchema.model_validate({"schema": schema})
