"""The evaluation: an oracle gets everything right, and random weights next to nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from flashvl.data import synthetic
from flashvl.engine import Completion, Engine, Request, Timing
from flashvl.eval.scenes import average, evaluate_scenes, held_out_items


class Oracle:
    """Answers like an engine, from a table of items; every third answer is wrong."""

    def __init__(self, items: int):
        self.answers = {
            (item.question, item.image.tobytes()): item.answer
            for task in synthetic.TASKS
            for item in held_out_items(task, items)
        }
        self.asked = 0

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion:
        question = request.messages[0]["content"].removeprefix("<image>\n")
        answer = self.answers[question, request.images[0].tobytes()]
        self.asked += 1
        text = answer + " " if self.asked % 3 == 0 else answer
        return Completion(
            text=text,
            token_ids=[],
            prompt_tokens=0,
            finish_reason="stop",
            timing=Timing(queue_s=0, first_token_s=0, last_token_s=0),
        )


def test_exact_match_is_exact() -> None:
    progress: list[tuple[int, int]] = []
    scores = evaluate_scenes(
        cast(Engine, Oracle(60)), 60, lambda done, total, note="": progress.append((done, total))
    )
    assert set(scores) == set(synthetic.TASKS)
    assert all(score.items == 60 for score in scores.values())
    assert average(scores) == pytest.approx(2 / 3)
    assert progress == [(each, 300) for each in (50, 60, 110, 120, 170, 180, 230, 240, 290, 300)]


def test_items_are_held_out_and_of_their_task() -> None:
    for task in synthetic.TASKS:
        items = list(held_out_items(task, 40))
        assert {item.task for item in items} == {task}
        assert len({(item.question, item.image.tobytes()) for item in items}) == 40


def test_random_weights_know_nothing(tiny_random: Path) -> None:
    assert average(evaluate_scenes(Engine.from_pretrained(tiny_random), 5)) <= 0.1
