"""VLFeedback: several models' answers to one question, each rated, -> the best one and the worst.

An answer's rate is the mean of its numeric ratings over all aspects; a rating in words is ignored,
and an answer without a number is not compared. Rows whose best and worst answer are rated alike say
nothing about what is better, and are refused.
"""

import math
import re
from statistics import fmean
from typing import Any

from flashvl.data.convert.conversations import (
    as_images,
    as_rows,
    as_text,
    check_places,
    with_places,
)
from flashvl.data.convert.family import PREFERENCES_TABLE, Converted, Family, Record
from flashvl.errors import DataError

CITATION = re.compile(r"\u3010[^\u3010\u3011]*\u2020[^\u3010\u3011]*\u3011")
"""Marks such as `[3 + source]` in lenticular brackets with a dagger, which GPT-4V left in texts."""


def convert(record: Record) -> Converted:
    """
    Raises:
        DataError: fewer than two answers have numeric ratings, or the best and the worst are alike.
    """
    fields = record.fields
    rated = [
        (rate, CITATION.sub("", as_text(answer, "response")).strip())
        for rate, answer in _answers(fields.get("completions"))
        if rate is not None
    ]
    if len(rated) < 2:
        raise DataError(f"{len(rated)} answers have numeric ratings; a pair needs two")
    best = max(rated, key=lambda each: each[0])
    worst = min(rated, key=lambda each: each[0])
    if best[0] == worst[0]:
        raise DataError(f"all answers are rated {best[0]:g}: none is better")
    if best[1] == worst[1] or not best[1] or not worst[1]:
        raise DataError("the best and the worst answer are the same, or one of them is empty")
    images = as_images(fields.get("image") or fields.get("img_path"))
    if not images:
        raise DataError("row has no image; give it one")
    question = as_text(fields.get("prompt"), "prompt")
    prompt = [{"role": "user", "content": with_places(question, len(images))}]
    answers = {
        "chosen": [{"role": "assistant", "content": best[1]}],
        "rejected": [{"role": "assistant", "content": worst[1]}],
    }
    for answer in answers.values():
        check_places([*prompt, *answer], len(images))
    return {"prompt": prompt, **answers, "images": images, "source": None}


def _answers(completions: Any) -> list[tuple[float | None, Any]]:
    """Each answer's rate, None without a numeric rating, and its text.

    Raises:
        DataError: the completions are not a list of answers.
    """
    try:
        answers = as_rows(completions)
        return [(_rate(answer.get("annotations")), answer.get("response")) for answer in answers]
    except (ValueError, TypeError, AttributeError):
        raise DataError(
            "completions must be a list of answers, each with annotations and a response"
        ) from None


def _rate(annotations: Any) -> float | None:
    """The mean of the numeric ratings; None: there is none."""
    if not isinstance(annotations, dict):
        return None
    ratings = [_number(one.get("Rating")) for one in annotations.values() if isinstance(one, dict)]
    numbers = [rating for rating in ratings if rating is not None]
    return fmean(numbers) if numbers else None


def _number(rating: Any) -> float | None:
    try:
        number = float(rating)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


FAMILY = Family(
    table=PREFERENCES_TABLE,
    kinds=("json", "parquet"),
    needed=("prompt", "completions"),
    used=("id", "image", "img_path"),
    convert=convert,
)
