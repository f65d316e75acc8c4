"""Confidence intervals: as wide as theory says, and wider where answers hang together."""

import math
import random

import pytest

from flashvl.eval.tasks.catalogue import TASKS
from flashvl.eval.tasks.score import Score, score
from flashvl.eval.tasks.task import Marked, Task, Verdict
from flashvl.eval.tasks.tsv import Fields


def marked(rights: list[bool], **columns: list[str]) -> list[Marked]:
    found = []
    for number, is_right in enumerate(rights):
        fields: Fields = {"index": str(number)}
        fields |= {name: values[number] for name, values in columns.items()}
        verdict = Verdict(mark=is_right, extracted=None, by="rule")
        found.append(Marked(fields=fields, verdict=verdict))
    return found


def score_of(task: Task, answers: list[Marked]) -> Score:
    return score(task, answers, num_lost=0, num_left_out=0, judge=None)


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    rng = random.Random(0)
    found = score_of(TASKS["mmstar"], marked([rng.random() < 0.6 for _ in range(1500)]))
    error = 100 * math.sqrt(0.6 * 0.4 / 1500)
    assert found.low == pytest.approx(found.figure - 1.96 * error, abs=0.3)
    assert found.high == pytest.approx(found.figure + 1.96 * error, abs=0.3)


def test_answers_about_one_question_count_as_one() -> None:
    rng = random.Random(0)
    rights = [rng.random() < 0.6 for _ in range(150)]
    qids = [str(number // 10) for number in range(1500)]
    once = score_of(TASKS["mmstar"], marked(rights))
    ten_times = [is_right for is_right in rights for _ in range(10)]
    many = score_of(TASKS["dynamath"], marked(ten_times, qid=qids))
    assert many.figure == once.figure
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.05)


def test_sums_of_categories_and_scores_out_of_a_thousand() -> None:
    rights = [True, False] * 100
    images = [str(number // 2) for number in range(200)]
    kinds = ["OCR", "OCR", "count", "count"] * 50
    found = score_of(TASKS["mme"], marked(rights, category=kinds, image_path=images))
    assert (found.figure, found.low, found.high) == (100, 100, 100)  # each image has one right
    found = score_of(TASKS["ocrbench"], marked(rights))
    assert found.figure == 500 and 400 < found.low < 500 < found.high < 600
