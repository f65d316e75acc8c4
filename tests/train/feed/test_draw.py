"""Rows of the procedural world as the kinds of training read them."""

from typing import Any

import pyarrow as pa
import pytest

from flashvl.data import synthetic
from flashvl.data.schema import CONVERSATIONS, PREFERENCES, PROMPTS
from flashvl.train.feed.documents import draw
from flashvl.train.feed.mixture import SyntheticData
from flashvl.train.feed.tables import Kind

COUNT = 400
PROBLEMS = synthetic.REASONING_TASKS


def rows(kind: Kind, **fields: Any) -> list[dict[str, Any]]:
    data = SyntheticData(count=COUNT, seed=11, **fields)
    drawn = [draw(data, row, kind) for row in range(COUNT)]
    assert all(isinstance(row, dict) for row in drawn)
    return drawn  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "schema"), [("supervised", CONVERSATIONS), ("dpo", PREFERENCES), ("grpo", PROMPTS)]
)
def test_a_row_has_the_schema_of_its_kind(kind: Kind, schema: pa.Schema) -> None:
    data = SyntheticData(count=1, tasks=PROBLEMS)
    row = draw(data, 0, kind)
    assert isinstance(row, dict)
    assert pa.Table.from_pylist([row], schema).to_pylist() == [row]


def test_shares_are_those_asked_for() -> None:
    found = rows("supervised", tasks=PROBLEMS, words_share=0.5, worked_share=0.3, replay_share=0.4)
    answers = [row["messages"][1]["content"] for row in found]
    questions = [row["messages"][0]["content"].splitlines()[-1] for row in found]
    is_problem = [question in synthetic.problems.QUESTIONS.values() for question in questions]
    assert sum(is_problem) / COUNT == pytest.approx(0.6, abs=0.07)
    of_problems = [row for row, holds in zip(found, is_problem, strict=True) if holds]
    replayed = [row for row, holds in zip(found, is_problem, strict=True) if not holds]
    assert all(row["images"] for row in replayed)  # a picture, whatever the share of words
    shown = sum(bool(row["images"]) for row in of_problems)
    assert shown / len(of_problems) == pytest.approx(0.5, abs=0.1)
    worked = sum("</answer>" in answer for answer in answers)
    assert worked / len(of_problems) == pytest.approx(0.3, abs=0.1)


def test_prompts_are_replayed_too() -> None:
    found = rows("grpo", tasks=PROBLEMS, replay_share=0.3)
    questions = [row["prompt"][0]["content"].splitlines()[-1] for row in found]
    is_problem = [question in synthetic.problems.QUESTIONS.values() for question in questions]
    assert sum(is_problem) / COUNT == pytest.approx(0.7, abs=0.07)


def test_splits_share_no_problem_and_no_pair() -> None:
    for kind in ("grpo", "dpo"):
        found = [
            {image for row in rows(kind, tasks=PROBLEMS, split=split) for image in row["images"]}
            for split in ("train", "heldout")
        ]
        assert not found[0] & found[1]
        assert all(len(each) > 0.9 * COUNT for each in found)


def test_what_was_read_before_is_still_read() -> None:
    """The new fields change nothing of a recipe that does not name them."""
    data = SyntheticData(count=8, seed=4)
    for row in range(8):
        expected = synthetic.conversation(synthetic.sample("train", 4, row), row)
        assert draw(data, row, "supervised") == expected
