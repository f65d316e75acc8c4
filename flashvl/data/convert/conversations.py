"""Turns as data sets write them -> the messages of a conversation, checked.

Roles and images must be as training needs them; a row that is not is refused, never repaired by a
guess, since a guess would teach the model something that the data do not say.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from flashvl.data.convert.family import Converted
from flashvl.data.schema import IMAGE_MARKER
from flashvl.errors import DataError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Roles by the names that data sets give them."""

Message = dict[str, str]


def build_conversation(
    turns: Any, images: Sequence[Any], source: Any, marker: str = IMAGE_MARKER
) -> Converted:
    """The values of a conversation's row.

    Answers before the first question are left out, as in LLaVA's own code: nothing was asked.

    Args:
        turns: a list of `{from, value}` or `{role, content}`.
        source: name of the set that the row is from, if it says so.
        marker: text that stands for an image.

    Raises:
        DataError: the turns are not question and answer in turn, or do not have a place for each
            image.
    """
    messages = [_read_turn(turn, marker) for turn in _as_list(turns)]
    if messages and messages[0] == {"role": "system", "content": ""}:
        del messages[0]
    start = 1 if messages and messages[0]["role"] == "system" else 0
    while len(messages) > start and messages[start]["role"] == "assistant":
        del messages[start]
    _check_roles([message["role"] for message in messages[start:]])
    for message in messages:
        if not message["content"].strip():
            raise DataError(f"turn of the {message['role']} is empty; leave the row out")
    check_places(messages, len(images))
    return {"messages": messages, "images": list(images), "source": as_source(source)}


def build_question(
    question: str, answer: str, images: Sequence[Any], source: Any = None
) -> Converted:
    """The values of a conversation's row: a question, about images if there are any, answered.

    Raises:
        DataError: the question or the answer is empty, or the question has other places for images
            than there are images.
    """
    turns = [
        {"from": "human", "value": with_places(question, len(images))},
        {"from": "gpt", "value": answer},
    ]
    return build_conversation(turns, images, source)


def with_places(text: str, num_images: int) -> str:
    """The text with a place for each image before it, unless it has places of its own."""
    return text if IMAGE_MARKER in text else f"{IMAGE_MARKER}\n" * num_images + text


def check_places(messages: Sequence[Message], num_images: int) -> None:
    """
    Raises:
        DataError: the questions do not have one place for each image, or an answer has one.
    """
    if any(IMAGE_MARKER in message["content"] for message in messages if message["role"] != "user"):
        raise DataError(f"{IMAGE_MARKER} is in a turn that is not the user's; leave it out there")
    num_places = sum(message["content"].count(IMAGE_MARKER) for message in messages)
    if num_places != num_images:
        raise DataError(
            f"conversation holds {num_places} {IMAGE_MARKER}, but has {num_images} images; write"
            f" one {IMAGE_MARKER} for each image"
        )


def as_text(value: Any, what: str) -> str:
    """A value as text, with half surrogate pairs replaced, which no file can hold.

    Raises:
        DataError: the value is not text.
    """
    if not isinstance(value, str):
        raise DataError(f"{what} is {_shown(value)}; it must be text")
    return value.encode(errors="replace").decode()


def as_source(value: Any) -> str | None:
    """The name of a row's source; other values are written as JSON."""
    if value is None:
        return None
    return as_text(value if isinstance(value, str) else json.dumps(value), "source")


def as_images(value: Any) -> list[Any]:
    """A field that holds an image, several, or none -> the images; lists keep their nulls."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list) else [value]


def as_rows(value: Any) -> list[Any]:
    """A list as it is; an object of lists, which `datasets` makes of a list of objects, as that.

    Raises:
        TypeError, ValueError: the value is neither.
    """
    if not isinstance(value, dict):
        return list(value)
    columns = [as_rows(column) for column in value.values()]
    return [dict(zip(value, values, strict=True)) for values in zip(*columns, strict=True)]


def _as_list(turns: Any) -> list[Any]:
    """
    Raises:
        DataError: the turns are not a list.
    """
    if isinstance(turns, list | dict):
        with contextlib.suppress(TypeError, ValueError):
            return as_rows(turns)
    raise DataError(f"conversation is {_shown(turns)}; it must be a list of turns")


def _read_turn(turn: Any, marker: str) -> Message:
    """
    Raises:
        DataError: the turn has no known role, or no text.
    """
    if not isinstance(turn, dict):
        raise DataError(f"turn is {_shown(turn)}; it must be an object of from and value")
    name = turn.get("from", turn.get("role"))
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise DataError(f"turn is from {_shown(name)}; it must be from one of {', '.join(ROLES)}")
    text = as_text(turn.get("value", turn.get("content")), f"turn of the {ROLES[name.lower()]}")
    return {"role": ROLES[name.lower()], "content": text.replace(marker, IMAGE_MARKER)}


def _check_roles(roles: Sequence[str]) -> None:
    """
    Raises:
        DataError: the roles are not user and assistant in turn.
    """
    if "assistant" not in roles:
        raise DataError("conversation has no answer to a question; there is nothing to learn")
    expected = ["user", "assistant"] * (len(roles) // 2 + 1)
    for place, role in enumerate(roles):
        if role != expected[place]:
            raise DataError(
                f"turn {place} is the {role}'s, where the {expected[place]}'s must come; user and"
                " assistant must take turns"
            )
    if roles[-1] != "assistant":
        raise DataError("conversation ends with a question; it must end with an answer")


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.60}"
