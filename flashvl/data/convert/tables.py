"""Tables of questions about images (ChartQA, DocVQA, TextVQA, AI2D ...), by a short mapping.

    image: image
    question: query
    answer: label
    prompt: "{question}\\nAnswer with a single word or number."

Where a row has several answers, the most frequent one is taken, and among equals the first.
"""

import functools
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from flashvl.config import StrictModel, load_config
from flashvl.data.convert.conversations import as_images, as_text, build_question
from flashvl.data.convert.family import CONVERSATIONS_TABLE, Converted, Family, Record
from flashvl.errors import DataError


class TableMapping(StrictModel):
    """What the columns of a table mean."""

    image: str | tuple[str, ...] = "image"
    """Column of the image or of a list of images, or several such columns, in their order."""
    question: str = "question"
    """Column of the question."""
    answer: str = "answer"
    """Column of the answer, or of a list of answers."""
    choices: str | None = None
    """Column with a list of answers to choose from. The answer is then one of them, its letter or
    its number from 0, and becomes its letter."""
    prompt: str = "{question}"
    """Text that is asked, in which {question} stands for the question and {choices} for the
    choices, one a line, each after its letter."""
    id: str = "id"
    """Column of ids, which need not exist."""
    source: str | None = None
    """Name of the set, for the column `source`."""
    is_image_optional: bool = False
    """Take rows without an image as text alone; otherwise they become dead letters."""

    @model_validator(mode="after")
    def _uses_what_it_names(self) -> Self:
        names = {name for _, name, _, _ in string.Formatter().parse(self.prompt) if name}
        if "question" not in names or names - {"question", "choices"}:
            raise ValueError("prompt must hold {question}, and nothing else but {choices}")
        if ("choices" in names) != (self.choices is not None):
            raise ValueError("prompt must hold {choices} if choices names a column, and only then")
        return self

    @property
    def images(self) -> tuple[str, ...]:
        """The columns of images."""
        return (self.image,) if isinstance(self.image, str) else self.image


def build_family(mapping_file: str) -> Family:
    """The family of the tables that a mapping's file describes.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping.
    """
    mapping = load_config(TableMapping, Path(mapping_file))
    needed = [*mapping.images, mapping.question, mapping.answer]
    return Family(
        table=CONVERSATIONS_TABLE,
        kinds=("parquet", "json"),
        needed=(*needed, mapping.choices) if mapping.choices else tuple(needed),
        used=(mapping.id,),
        convert=functools.partial(convert, mapping=mapping),
    )


def convert(record: Record, *, mapping: TableMapping) -> Converted:
    """
    Raises:
        DataError: the row lacks its image, its question or its answer.
    """
    fields = record.fields
    # Where columns are called image_1, image_2 ..., those without an image are null.
    images = [
        image
        for column in mapping.images
        for image in as_images(fields.get(column))
        if image is not None
    ]
    if not images and not mapping.is_image_optional:
        raise DataError(f"row has no image in {', '.join(mapping.images)}; restore it")
    question = as_text(fields.get(mapping.question), mapping.question)
    if not question.strip():
        raise DataError(f"{mapping.question} is empty; leave the row out")
    texts = {"question": question}
    answer = fields.get(mapping.answer)
    if mapping.choices is None:
        answer = _most_frequent(answer, mapping.answer)
    else:
        choices = _as_choices(fields.get(mapping.choices), mapping.choices)
        texts["choices"] = "\n".join(
            f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)
        )
        answer = _letter_of(answer, choices, mapping.answer)
    converted = build_question(_fill(mapping.prompt, texts), answer, images, mapping.source)
    return converted | {"id": fields.get(mapping.id)}


_LETTERS = string.ascii_uppercase


def _fill(prompt: str, texts: dict[str, str]) -> str:
    """The prompt with its texts, which may hold braces of their own."""
    parts = string.Formatter().parse(prompt)
    return "".join(literal + (texts[name] if name else "") for literal, name, _, _ in parts)


def _most_frequent(answer: Any, column: str) -> str:
    answers = [each for each in answer if each not in (None, "")] if _is_list(answer) else [answer]
    if not answers or answers[0] is None:
        raise DataError(f"{column} is empty; there is nothing to learn")
    texts = [_as_answer(each, column) for each in answers]
    return Counter(texts).most_common(1)[0][0]  # among equals the one that came first


def _as_choices(choices: Any, column: str) -> list[str]:
    if not _is_list(choices) or not 2 <= len(choices) <= len(_LETTERS):
        raise DataError(f"{column} must be a list of 2 to {len(_LETTERS)} answers")
    return [_as_answer(choice, column) for choice in choices]


def _letter_of(answer: Any, choices: Sequence[str], column: str) -> str:
    """The letter of a choice, which is given by its text, its letter or its number from 0."""
    letters = _LETTERS[: len(choices)]
    if _is_list(answer) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, str):
        if answer in choices:
            return letters[choices.index(answer)]
        if answer.upper() in tuple(letters):
            return answer.upper()
        answer = int(answer) if answer.isdecimal() else None
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return letters[answer]
    raise DataError(f"{column} is none of the {len(choices)} choices; correct it")


def _as_answer(value: Any, column: str) -> str:
    """A text as it is, and a number as it is written."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return as_text(value, column)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
