"""Reward functions, and what a scorer makes of functions that fail."""

import os
import sys
import time
from typing import Any

import numpy as np
import pytest

from flashvl.errors import ConfigError
from flashvl.train.rewards.scoring import Scorer, total_rewards

HERE = "tests.train.rewards.test_rewards"
PROMPT = [{"role": "user", "content": "<image>\nHow many?"}]
GOOD = "<think>3 and\n4</think>\n<answer>7</answer>"
NAN = float("nan")


def score(
    rewards: dict[str, float], completions: list[str], answer: str = "7"
) -> tuple[list[list[float]], list[float]]:
    scorer = Scorer(rewards, group_seconds=2.0 if HERE in str(rewards) else 60.0)
    ids = [[number] for number in range(len(completions))]
    columns = {"answer": answer, "solution": answer}
    parts = scorer.score(PROMPT, completions, ids, columns)
    return parts.tolist(), total_rewards(parts, scorer.weights).tolist()


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 1),
        (f"\n{GOOD}\n", 1),
        ("<think></think><answer></answer>", 1),
        (GOOD + " so it is 7", 0),
        ("Well: " + GOOD, 0),
        (GOOD + GOOD, 0),
        ("<answer>7</answer>", 0),
        ("<think>7</think>", 0),
        ("<think>7</think> it is <answer>7</answer>", 0),
        ("<answer>7</answer><think>7</think>", 0),
        ("<think><think>7</think></think><answer>7</answer>", 0),
        ("", 0),
    ],
)
def test_format_allows_nothing_else(text: str, reward: int) -> None:
    assert score({"format": 1.0}, [text]) == ([[reward]], [reward])


def test_rewards_are_weighted_and_kept_by_part() -> None:
    parts, totals = score({"accuracy": 2.0, "format": 0.5}, [GOOD, "7", "<think>7"])
    assert parts == [[1, 1], [1, 0], [0, 0]]
    assert totals == [2.5, 2, 0]


def test_exact_match_is_of_the_answer_part() -> None:
    assert score({"exact_match": 1.0}, [GOOD, "7", "7.0"])[1] == [1, 1, 0]


def test_rewards_of_trl_by_their_paths() -> None:
    paths = {
        "trl.rewards.think_format_reward": 1.0,
        "trl.rewards.accuracy_reward": 1.0,
        "trl.rewards.reasoning_accuracy_reward": 1.0,
    }
    Scorer(paths).check()
    boxed = r"<think>3 + 4</think> \boxed{7}"
    assert score(paths, [boxed, "8"])[0] == [[1, 1, 1], [0, 0, 0]]


def by_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [ids[0] / 2 for ids in completion_ids]


def undefined(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    values = [1.0, None, NAN, float("inf")]
    return [values[ids[0]] for ids in completion_ids]


def says_nothing(completions: list[Any], **_: Any) -> list[None]:
    return [None] * len(completions)


def raises(**_: Any) -> list[float]:
    raise RuntimeError("no judge\nanswers")


def too_few(**_: Any) -> list[float]:
    return [1.0]


def hangs(**_: Any) -> list[float]:
    while True:
        time.sleep(1)


def crashes(**_: Any) -> list[float]:
    os._exit(1)


def prints(completions: list[Any], **_: Any) -> list[float]:
    sys.stdout.write("a line that is no answer\n")
    return [1.0] * len(completions)


def same(got: list[float], wanted: list[float]) -> bool:
    return np.array_equal(got, wanted, equal_nan=True)


FOUR = ["7", "7", "8", "8"]


@pytest.mark.parametrize(
    ("name", "totals"),
    [
        ("by_ids", [1, 1.5, 1, 1.5]),
        ("undefined", [2, NAN, NAN, NAN]),
        ("says_nothing", [1, 1, 0, 0]),
        ("raises", [NAN] * 4),
        ("too_few", [NAN] * 4),
        ("hangs", [NAN] * 4),
        ("crashes", [NAN] * 4),
        ("prints", [2, 2, 1, 1]),
        ("no_such_function", [NAN] * 4),
    ],
)
def test_what_a_function_of_ones_own_does_to_the_totals(name: str, totals: list[float]) -> None:
    assert same(score({"accuracy": 1.0, f"{HERE}.{name}": 1.0}, FOUR)[1], totals)


def test_a_reward_that_says_nothing_alone_is_undefined() -> None:
    assert same(score({f"{HERE}.says_nothing": 1.0}, FOUR)[1], [NAN] * 4)


def test_a_function_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rewards: no\.such\.reward cannot be imported"):
        Scorer({"no.such.reward": 1.0}).check()


def test_names_for_figures_are_distinct() -> None:
    scorer = Scorer({"accuracy": 1.0, "a.b.reward": 1.0, "c.reward": 1.0})
    assert scorer.names == ("accuracy", "a_b_reward", "c_reward")
    assert Scorer({"trl.rewards.think_format_reward": 1.0}).names == ("think_format_reward",)
