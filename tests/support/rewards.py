"""Reward functions of one's own, in a module that imports nothing slow."""

from typing import Any

Ids = list[list[int]]


def length(completion_ids: Ids, **_: Any) -> list[float]:
    return [0.3 * len(ids) for ids in completion_ids]


def parity(completion_ids: Ids, **_: Any) -> list[float]:
    return [float(ids[0] % 2) for ids in completion_ids]


def undefined(completion_ids: Ids, **_: Any) -> list[float | None]:
    """Random models differ in it; undefined for completions of three tokens."""
    return [None if len(ids) == 3 else 0.1 * len(ids) + ids[0] % 7 for ids in completion_ids]
