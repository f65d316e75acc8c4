"""Tools that an answer may call: their descriptions in the prompt, and their calls in the answer.

The form is that of Qwen2.5's chat template: the tools between `<tools>` in the system's message, a
call between `<tool_call>` in the assistant's, its result between `<tool_response>` in the user's.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flashvl.engine.grammar_check import JSON_STYLE
from flashvl.serve.protocol.answers import new_id
from flashvl.serve.protocol.chat import ChatCompletionRequest
from flashvl.serve.protocol.errors import RequestError
from flashvl.serve.protocol.messages import AssistantMessage, FunctionCall
from flashvl.serve.protocol.tools import AllowedToolChoice, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\n\{"name": "([^"]*)", "arguments": ')
TAIL = "}\n" + CLOSE
MAX_CALLS = 8
"""Calls in one answer at most, so that a model which repeats itself comes to an end."""
HOW_TO_CALL = f"""To call one, answer with
{OPEN}
{{"name": its name, "arguments": an object}}
{CLOSE}"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolUse:
    """The tools that an answer may call."""

    tools: list[Tool]
    is_must: bool = False
    """Whether the answer must call a tool."""
    is_single: bool = False
    """Whether the answer may call one tool at most."""

    @classmethod
    def of(cls, request: ChatCompletionRequest) -> "ToolUse | None":
        """The tools that the answer to `request` may call; None where it may call none.

        Raises:
            RequestError: the choice is not one of the tools, or two tools have the same name.
        """
        by_name = {tool.function.name: tool for tool in request.tools}
        if len(by_name) < len(request.tools):
            raise RequestError(400, "tools must have names of their own; rename one", param="tools")
        choice = request.tool_choice
        if choice == "none" or (choice == "auto" and not by_name):
            return None
        is_single = not request.parallel_tool_calls
        if isinstance(choice, str):
            names, is_must = list(by_name), choice == "required"
        elif isinstance(choice, AllowedToolChoice):
            names = [tool.function.name for tool in choice.allowed_tools.tools]
            is_must = choice.allowed_tools.mode == "required"
        else:
            names, is_must, is_single = [choice.function.name], True, True
        if not names or not by_name.keys() >= set(names):
            raise RequestError(
                400,
                "tool_choice must name tools that the request has, and it has"
                f" {', '.join(by_name) or 'none'}"[:300],
                param="tool_choice",
            )
        return cls(tools=[by_name[name] for name in names], is_must=is_must, is_single=is_single)

    @property
    def instructions(self) -> str:
        """Text that the system's message ends with: the tools, and the form of a call."""
        told = [
            tool.function.model_dump(exclude={"strict"}, exclude_defaults=True)
            for tool in self.tools
        ]
        lines = [json.dumps(each, ensure_ascii=False) for each in told]
        return "\n".join(["# Tools", "", "<tools>", *lines, "</tools>", "", HOW_TO_CALL])

    def grammar(self, answer: dict[str, Any] | None) -> str:
        """The grammar of an answer or of a text and then calls, in llguidance's form of Lark.

        Args:
            answer: JSON schema of an answer that calls no tool; None: any text.
        """
        calls = "call" if self.is_single else f"call (again call){{0,{MAX_CALLS - 1}}}"
        rules = ["%llguidance {}"]
        if self.is_must:
            rules += [f"start: {_quote(OPEN)} {calls}"]
        elif answer is not None:
            rules += [
                f"start: answer | {_quote(OPEN)} {calls}",
                f"answer: %json {in_json_style(answer)}",
            ]
        else:
            # A text that holds the mark is always followed by a call.
            rules += [
                f"start: TEXT | lead {calls}",
                f"TEXT: /(?s:.*)/ & ~/(?s:.*{OPEN}.*)/",
                f"lead[lazy]: /(?s:.*){OPEN}/",
            ]
        options = " | ".join(f"tool_{number}" for number in range(len(self.tools)))
        before = "\n{" + _quote("name") + ": "
        rules += [
            f"again: {_quote(chr(10) + OPEN)}",
            f"call: {_quote(before)} ({options}) {_quote(TAIL)}",
        ]
        for number, tool in enumerate(self.tools):
            head = f"{_quote(tool.function.name)}, {_quote('arguments')}: "
            schema = in_json_style(arguments_schema(tool.function.parameters))
            rules.append(f"tool_{number}: {_quote(head)} %json {schema}")
        return "\n".join(rules)


def arguments_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a tool's arguments: an object, even where the tool does not say so."""
    is_told = "type" in parameters or "$ref" in parameters
    return parameters if is_told else {**parameters, "type": "object"}


def in_json_style(schema: dict[str, Any]) -> str:
    """A schema for llguidance's Lark, with the white space of the engine's JSON answers."""
    return json.dumps({**schema, "x-guidance": JSON_STYLE})


def _quote(text: str) -> str:
    return json.dumps(text)


def calls_of(message: AssistantMessage) -> list[FunctionCall]:
    """The calls in an assistant's message, in OpenAI's older form or its newer one."""
    calls = [call.function for call in message.tool_calls]
    return calls if message.function_call is None else [message.function_call, *calls]


def write_call(call: FunctionCall) -> str:
    """The text of a call, as it is in an answer."""
    try:
        arguments = json.dumps(json.loads(call.arguments or "{}"), ensure_ascii=False)
    except (ValueError, RecursionError):
        arguments = call.arguments  # the model must see it, whatever it was
    return f'{OPEN}\n{{"name": {_quote(call.name)}, "arguments": {arguments}}}\n{CLOSE}'


def write_response(content: str) -> str:
    """The text of a tool's result, as it is in the user's turn."""
    return f"<tool_response>\n{content}\n</tool_response>"


@dataclass(kw_only=True, slots=True)
class Call:
    """A call in an answer."""

    name: str
    id: str = field(default_factory=lambda: new_id("call_")[:29])
    arguments: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What some characters of an answer add to it."""

    text: str = ""
    """Text that is added to the answer's content, or to the arguments of its call `call`."""
    call: int | None = None
    """Number of a call, which begins with the first piece that has this number; None: content."""


class AnswerReader:
    """An answer's text, piece by piece -> its content and calls, by the marks of the grammar."""

    def __init__(self, uses_tools: bool):
        self.uses_tools = uses_tools
        self.content = ""
        self.calls: list[Call] = []
        self._left = ""
        """Text that has been read and may still become a mark of a call."""
        self._is_call = self._has_head = False

    def read(self, text: str, is_last: bool = False) -> Iterator[Piece]:
        """The pieces that `text` adds, without an end that may still become a mark of a call."""
        self._left += text
        while True:
            if self._is_call and not self._has_head:
                head = HEAD.match(self._left)
                if head is None:
                    return
                self._left = self._left[head.end() :]
                self._has_head = True
                self.calls.append(Call(name=head[1]))
                yield Piece(call=len(self.calls) - 1)
            before, is_whole, after = self._split(is_last)
            self._left = after
            yield from self._take(before)
            if not is_whole:
                return
            self._is_call, self._has_head = not self._is_call, False

    def _split(self, is_last: bool) -> tuple[str, bool, str]:
        """The text before the next mark, whether the mark is there, and the text after it."""
        if not self.uses_tools:
            return self._left, False, ""
        mark = TAIL if self._is_call else OPEN
        before, found, after = self._left.partition(mark)
        if found or (is_last and not self._is_call):
            return before, bool(found), after
        end = len(before) - _overlap(before, mark)
        return before[:end], False, before[end:]

    def _take(self, text: str) -> Iterator[Piece]:
        if self._is_call and text:
            self.calls[-1].arguments += text
            yield Piece(text=text, call=len(self.calls) - 1)
        elif text and not self.calls:  # after a call, it is the line break before the next one
            self.content += text
            yield Piece(text=text)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` with which `mark` begins."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
