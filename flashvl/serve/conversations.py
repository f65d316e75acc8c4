"""OpenAI's messages -> a conversation for the chat template, with its tools and tool calls."""

from collections.abc import Sequence

from flashvl.data.features import Message
from flashvl.serve.protocol.messages import (
    AssistantMessage,
    ChatMessage,
    ImagePart,
    RefusalPart,
    TextPart,
    ToolMessage,
)
from flashvl.serve.tools import ToolUse, calls_of, write_call, write_response

DEFAULT_SYSTEM = "You are a helpful assistant."
"""System message that the chat template gives to a conversation without one."""

TemplateParts = list[dict[str, str]]
"""A content as the chat template takes it: texts and places of images."""


def as_conversation(messages: list[ChatMessage], tools: ToolUse | None) -> list[Message]:
    """The turns in order; the results of one or several tool calls are one turn of the user."""
    turns: list[tuple[str, TemplateParts]] = []
    is_tools = False
    for message in messages:
        role, parts = _as_turn(message)
        if isinstance(message, ToolMessage) and is_tools:
            turns[-1][1].extend([_text("\n"), *parts])
        else:
            turns.append((role, parts))
        is_tools = isinstance(message, ToolMessage)
    if tools is not None:
        if turns[0][0] != "system":
            turns.insert(0, ("system", [_text(DEFAULT_SYSTEM)]))
        turns[0][1].append(_text(f"\n\n{tools.instructions}"))
    return [{"role": role, "content": parts} for role, parts in turns]


def _as_turn(message: ChatMessage) -> tuple[str, TemplateParts]:
    parts = _as_parts(message.content)
    if isinstance(message, ToolMessage):
        return "user", [_text(write_response("".join(part["text"] for part in parts)))]
    if isinstance(message, AssistantMessage):
        if not any(part["text"] for part in parts):
            parts = [_text(message.refusal or "")]
        for call in calls_of(message):
            is_first = not any(part["text"] for part in parts)
            parts.append(_text(("" if is_first else "\n") + write_call(call)))
    return "system" if message.role == "developer" else message.role, parts


def _as_parts(content: str | Sequence[TextPart | ImagePart | RefusalPart]) -> TemplateParts:
    """The parts of a content; images after all of its text are moved before it.

    The model was trained on questions that follow their image.
    """
    if isinstance(content, str):
        return [_text(content)]
    images = [index for index, part in enumerate(content) if isinstance(part, ImagePart)]
    parts: list[TextPart | ImagePart | RefusalPart] = list(content)
    if images and images[0] == len(parts) - len(images):
        parts = parts[images[0] :] + parts[: images[0]]
    return [_as_part(part) for part in parts]


def _as_part(part: TextPart | ImagePart | RefusalPart) -> dict[str, str]:
    if isinstance(part, ImagePart):
        return {"type": "image"}
    return _text(part.text if isinstance(part, TextPart) else part.refusal)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
