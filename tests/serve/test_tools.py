"""The form in which answers call tools: what its grammar admits, and how it is read."""

from itertools import product
from typing import Any

import llguidance.hf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from flashvl.model.loading import load_processor
from flashvl.serve.conversations import as_conversation
from flashvl.serve.protocol.chat import ChatCompletionRequest
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.tools import AnswerReader, ToolUse


def tool(name: str) -> dict[str, Any]:
    properties = {"a": {"type": "integer"}}
    parameters = {"properties": properties, "required": ["a"], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def request(**options: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": "tiny", "messages": messages, "tools": [tool("f"), tool("g")]}
    return ChatCompletionRequest.model_validate(body | options)


@pytest.fixture(scope="module")
def vocabulary() -> LLTokenizer:
    return llguidance.hf.from_tokenizer(load_processor("tiny").tokenizer, n_vocab=512)


def call(name: str, arguments: str = '{"a": 1}') -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ANSWER = {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"]}
TEXTS = {
    "text": "a red cross",
    "schema": '{"x": null}',
    "call": call("f"),
    "calls": call("g") + "\n" + call("f"),
    "text and call": "Let me see.\n" + call("f"),
    "call and text": call("f") + "done",
    "too many calls": "\n".join([call("f")] * 9),
    "no call": "<tool_call> is a mark",
    "no such tool": call("h"),
    "no such argument": call("f", '{"b": 1}'),
    "no object": call("f", "1"),
}


@pytest.mark.parametrize(
    ("choice", "is_parallel", "has_schema"), product(["auto", "required"], [True, False], [0, 1])
)
def test_grammar_admits_answers_and_calls_and_nothing_else(
    vocabulary: LLTokenizer,
    choice: str,
    is_parallel: bool,
    has_schema: int,
) -> None:
    tools = ToolUse.of(request(tool_choice=choice, parallel_tool_calls=is_parallel))
    assert tools is not None
    grammar = tools.grammar(ANSWER if has_schema else None)
    expected = {"call"} | ({"calls"} if is_parallel else set())
    if choice == "auto":
        expected |= {"schema"} if has_schema else {"schema", "text", "text and call"}
    admitted = set()
    for name, text in TEXTS.items():
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = vocabulary.tokenize_str(text)
        if matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting():
            admitted.add(name)
    assert admitted == expected


@given(
    content=st.text('a <{\n"}', max_size=12),
    calls=st.lists(
        st.tuples(st.sampled_from(["f", "get_it"]), st.text('a{}":, <', max_size=15)), max_size=3
    ),
    cuts=st.lists(st.integers(0, 200), max_size=20),
)
def test_an_answer_is_read_the_same_however_it_is_cut(
    content: str, calls: list[tuple[str, str]], cuts: list[int]
) -> None:
    text = content + "\n".join(call(*each) for each in calls)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    reader = AnswerReader(uses_tools=True)
    told_content, told_arguments = "", [""] * len(calls)
    for begin, end in zip(places, places[1:], strict=False):
        for piece in reader.read(text[begin:end]):
            if piece.call is None:
                told_content += piece.text
            else:
                told_arguments[piece.call] += piece.text
    told_content += "".join(piece.text for piece in reader.read("", is_last=True))
    assert told_content == reader.content == content
    assert [(each.name, each.arguments) for each in reader.calls] == calls
    assert told_arguments == [arguments for _, arguments in calls]
    assert len({each.id for each in reader.calls}) == len(calls)


def test_a_call_that_breaks_off_is_told_as_far_as_it_goes() -> None:
    whole = "Well. " + "\n".join([call("f", '{"a": [1, 2]}')] * 2)
    for end in range(len(whole) + 1):
        reader = AnswerReader(uses_tools=True)
        list(reader.read(whole[:end], is_last=True))
        assert "Well. ".startswith(reader.content) or reader.content.startswith("Well. <")
        assert not reader.calls or reader.content == "Well. "
        assert all('{"a": [1, 2]}'.startswith(each.arguments) for each in reader.calls)


def test_without_tools_the_mark_is_text() -> None:
    reader = AnswerReader(uses_tools=False)
    assert [piece.text for piece in reader.read(call("f"))] == [call("f")]
    assert not reader.calls


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
        ({"tools": [tool("f"), tool("f")]}, "tools"),
    ],
)
def test_a_choice_of_tools_that_are_not_there_is_refused(
    options: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        ToolUse.of(request(**options))
    assert caught.value.status == 400 and caught.value.param == param


def test_some_of_the_tools_may_be_allowed() -> None:
    tools = [{"type": "function", "function": {"name": "g"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}
    use = ToolUse.of(request(tool_choice=choice))
    assert use is not None and use.is_must
    assert [each.function.name for each in use.tools] == ["g"]
    assert ToolUse.of(request(tool_choice="none")) is None
    assert ToolUse.of(request(tools=[])) is None


def test_history_of_calls_is_told_in_qwens_form() -> None:
    def called(number: int) -> dict[str, Any]:
        function = {"name": "f", "arguments": f'{{"a":{number}}}'}
        return {"id": f"call_{number}", "type": "function", "function": function}

    body = request(
        messages=[
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": None, "tool_calls": [called(1), called(2)]},
            {"role": "tool", "tool_call_id": "call_1", "content": "one"},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "2"}]},
            {"role": "assistant", "function_call": {"name": "f", "arguments": "broken"}},
            {"role": "function", "name": "f", "content": "three"},
        ]
    )
    turns = [
        (turn["role"], "".join(part["text"] for part in turn["content"]))
        for turn in as_conversation(body.messages, ToolUse.of(body))
    ]
    system = turns.pop(0)
    assert system[0] == "system" and '<tools>\n{"name": "f"' in system[1]
    assert turns == [
        ("user", "Look."),
        ("assistant", call("f") + "\n" + call("f", '{"a": 2}')),
        (
            "user",
            "<tool_response>\none\n</tool_response>\n<tool_response>\n2\n</tool_response>",
        ),
        ("assistant", call("f", "broken")),
        ("user", "<tool_response>\nthree\n</tool_response>"),
    ]
