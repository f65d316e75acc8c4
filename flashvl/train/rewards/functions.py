"""The reward functions that a recipe names without a path; their signature is TRL's."""

import re
from collections.abc import Callable
from typing import Any

from flashvl.data.answers import final_answer, is_exact, judge

Completions = list[list[dict[str, str]]]
"""For each completion its messages: one, of the assistant."""
RewardFunction = Callable[..., list[float | None]]
"""A function of `prompts`, `completions`, `completion_ids` and the row's columns, a list each with
a value for each completion; None: there is no telling."""

_FORMAT = re.compile(
    r"<think>((?:(?!</?think>).)*)</think>\s*<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL
)


def accuracy(completions: Completions, answer: list[str], **_: Any) -> list[float | None]:
    """1 where the final answer is right (`flashvl.data.answers.judge`), otherwise 0."""
    verdicts = [judge(text, gold) for text, gold in zip(_texts(completions), answer, strict=True)]
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def exact_match(completions: Completions, answer: list[str], **_: Any) -> list[float | None]:
    """1 where the final answer is the reference, character by character, otherwise 0."""
    pairs = zip(_texts(completions), answer, strict=True)
    return [float(is_exact(final_answer(text), gold.strip())) for text, gold in pairs]


def format(completions: Completions, **_: Any) -> list[float | None]:
    """1 where the completion is <think>...</think> <answer>...</answer>, once each, and nothing
    else; otherwise 0."""
    return [float(_FORMAT.fullmatch(text.strip()) is not None) for text in _texts(completions)]


def _texts(completions: Completions) -> list[str]:
    return [messages[-1]["content"] for messages in completions]


FUNCTIONS: dict[str, RewardFunction] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "format": format,
}
"""Reward functions by the names that recipes give them."""
