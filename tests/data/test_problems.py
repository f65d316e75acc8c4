"""Problems and pairs of captions: answers by other ways, and what differs, word by word."""

import re
from collections import Counter
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvl.data import synthetic
from flashvl.data.answers import final_answer
from flashvl.data.schema import CONVERSATIONS, PREFERENCES, PROMPTS
from flashvl.data.synthetic import REASONING_TASKS, Sample, Split, Task
from flashvl.data.synthetic.pairs import Change
from tests.support.reader import (
    CELL,
    PALETTE,
    SHAPES,
    SIDE,
    components,
    enlarged,
    ink_of,
    look,
    mask_of,
    name_glyph,
)

SEEDS = st.integers(0, 2**40)
INDICES = st.integers(0, 24_000_000)
SPLITS = st.sampled_from(["train", "heldout"])
TASKS = st.sampled_from(REASONING_TASKS)


# What a picture shows


def read_numbers(drawn: Sample) -> list[int]:
    """The numbers in a picture, from its pixels alone: bars from left to right, digits likewise,
    or the width and the height that are printed at a rectangle."""
    image = enlarged(drawn)
    if isinstance(drawn.scene, synthetic.ChartScene):
        return [value for _, value in look(image).values]
    if isinstance(drawn.scene, synthetic.TextScene):
        return [int(glyph) for _, glyph, _, _ in look(image).things]
    parts = components(ink_of(np.asarray(image).astype(int)))
    above = min(parts, key=lambda part: part[0].min())
    left = min(parts, key=lambda part: part[1].min())
    (rectangle,) = [part for part in parts if part is not above and part is not left]
    width, height = (int(name_glyph(mask_of(*part))) for part in (above, left))
    # The drawing has the printed proportions: a unit is 0.22 of the picture's side over nine.
    unit = 0.22 * SIDE / 9
    assert np.ptp(rectangle[1]) / unit == pytest.approx(width, abs=0.35)
    assert np.ptp(rectangle[0]) / unit == pytest.approx(height, abs=0.35)
    # It stands below the one number and to the right of the other.
    assert abs(above[1].mean() - rectangle[1].mean()) < CELL / 3
    assert abs(left[0].mean() - rectangle[0].mean()) < CELL / 3
    return [width, height]


def count_up(question: str, numbers: list[int]) -> int:
    """The answer by counting things, one at a time."""
    strokes = ["|" * number for number in numbers]
    if question in ("What is the sum of the digits?", "What is the total of the bars?"):
        return len("".join(strokes))
    if question == "What is the tallest bar minus the shortest?":
        return len(max(strokes).removeprefix(min(strokes)))
    width, height = numbers
    if question == "What is the area of the rectangle?":
        return sum(1 for _ in range(width) for _ in range(height))
    assert question == "What is the perimeter of the rectangle?"
    border = {(x, y) for x in range(width + 2) for y in range(height + 2)}
    inside = {(x, y) for x in range(1, width + 1) for y in range(1, height + 1)}
    corners = {(x, y) for x in (0, width + 1) for y in (0, height + 1)}
    return len(border - inside - corners)


@settings(deadline=None, max_examples=40)
@given(split=SPLITS, seed=SEEDS, index=INDICES, task=TASKS)
def test_answers_follow_from_the_pixels(split: Split, seed: int, index: int, task: Task) -> None:
    drawn = synthetic.sample(split, seed, index, (task,))
    (turn,) = drawn.turns
    assert turn.task == task
    assert turn.answer == str(count_up(turn.question, read_numbers(drawn)))


@settings(deadline=None)
@given(split=SPLITS, seed=SEEDS, index=INDICES, task=TASKS)
def test_a_solution_is_true_step_by_step_and_ends_in_the_answer(
    split: Split, seed: int, index: int, task: Task
) -> None:
    (turn,) = synthetic.sample(split, seed, index, (task,)).turns
    worked = synthetic.work_out(turn)
    solution, answer = re.fullmatch(r"(.+) <answer>(\d+)</answer>", worked).groups()  # type: ignore[union-attr]
    results = []
    for step in solution.split(", "):
        left, operator, right, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
        ways = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        assert ways[operator](int(left), int(right)) == int(result)
        if results:  # each step goes on from the one before
            assert left == results[-1]
        results.append(result)
    assert results[-1] == answer == turn.answer == final_answer(worked) == final_answer(answer)


def numbers_in(drawn: Sample) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", drawn.scene.describe()))


@pytest.mark.parametrize("task", ["sum", "total", "difference"])
def test_numbers_of_held_out_problems_are_in_no_training_problem(task: Task) -> None:
    """In their order: the same numbers in another order may be trained."""
    train = {numbers_in(drawn) for drawn in synthetic.samples("train", 1, 2500, (task,))}
    heldout = {numbers_in(drawn) for drawn in synthetic.samples("heldout", 2, 600, (task,))}
    assert not train & heldout
    assert len(heldout) > 80
    assert 0.05 < len(heldout) / len(train | heldout) < 0.2


def test_held_out_rectangles_are_in_no_training_problem() -> None:
    """Their numbers recur at other places and in other colours, as there are 64 pairs alone."""
    train = {drawn.scene for drawn in synthetic.samples("train", 1, 3000, ("area", "perimeter"))}
    heldout = {drawn.scene for drawn in synthetic.samples("heldout", 2, 600, ("area", "perimeter"))}
    assert not train & heldout
    assert len(heldout) > 200


def test_a_problem_stands_alone_among_reading_tasks() -> None:
    """So a chart whose total is held out is asked about in training, but never for its total."""
    tasks: tuple[Task, ...] = ("chart", "total", "total", "total")
    drawn = list(synthetic.samples("train", 3, 400, tasks))
    kinds = Counter(tuple({turn.task for turn in each.turns}) for each in drawn)
    assert set(kinds) == {("chart",), ("total",)}
    assert kinds["total",] == pytest.approx(300, abs=40)  # named three times in four


# Rows


def test_rows_have_their_schemas() -> None:
    drawn = synthetic.sample("train", 0, 0, ("sum",))
    for row, schema in (
        (synthetic.problem(drawn, 5), PROMPTS),
        (synthetic.preference(synthetic.pair("train", 0, 0), 5), PREFERENCES),
        (synthetic.conversation(drawn, 5, worked_share=1.0), CONVERSATIONS),
    ):
        assert pa.Table.from_pylist([row], schema).to_pylist() == [row]


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, index=INDICES, task=TASKS)
def test_rows_ask_the_samples_question(seed: int, index: int, task: Task) -> None:
    drawn = synthetic.sample("train", seed, index, (task,))
    (turn,) = drawn.turns
    problem = synthetic.problem(drawn, index)
    assert problem["prompt"] == [{"role": "user", "content": f"<image>\n{turn.question}"}]
    assert problem["answer"] == turn.answer
    assert len(problem["images"]) == 1
    worked, short = (synthetic.conversation(drawn, index, 0.0, share) for share in (1.0, 0.0))
    assert [row["messages"][1]["content"] for row in (worked, short)] == [
        synthetic.work_out(turn),
        turn.answer,
    ]
    told = synthetic.conversation(drawn, index, words_share=1.0)
    assert told["messages"][0]["content"] == f"{drawn.scene.describe()}\n{turn.question}"
    assert told["images"] == []


# Pairs


def parse(caption: str) -> list[tuple[str, str, str]]:
    shapes = [tuple(part.split()) for part in re.split(", a | and a ", caption[2:])]
    assert all(
        size in ("small", "large") and color in PALETTE and shape in SHAPES
        for size, color, shape in shapes
    )
    return shapes  # type: ignore[return-value]


@settings(deadline=None, max_examples=60)
@given(split=SPLITS, seed=SEEDS, index=INDICES)
def test_captions_of_a_pair_differ_in_exactly_the_stated_way(
    split: Split, seed: int, index: int
) -> None:
    pair = synthetic.pair(split, seed, index)
    (turn,) = pair.sample.turns
    right, wrong = parse(turn.answer), parse(pair.rejected)
    seen = [(size, color, shape) for _, shape, color, size in look(enlarged(pair.sample)).things]
    assert right == seen
    assert synthetic.split_of(pair.sample.scene) == split
    more, less = Counter(wrong) - Counter(right), Counter(right) - Counter(wrong)
    match pair.change:
        case "added":
            assert (more.total(), less.total()) == (1, 0)
            assert any(wrong[:place] + wrong[place + 1 :] == right for place in range(len(wrong)))
        case "left out":
            assert (more.total(), less.total()) == (0, 1)
            assert any(right[:place] + right[place + 1 :] == wrong for place in range(len(right)))
        case "attribute":
            changed = [
                (one, other)
                for before, after in zip(right, wrong, strict=True)
                for one, other in zip(before, after, strict=True)
                if one != other
            ]
            assert len(changed) == 1


def test_every_change_occurs_and_pairs_do_not_repeat() -> None:
    pairs = [synthetic.pair("train", 4, index) for index in range(300)]
    assert set(Counter(pair.change for pair in pairs)) == set(get_args(Change))
    assert min(Counter(pair.change for pair in pairs).values()) > 30
    assert len({pair.sample.scene for pair in pairs}) > 295
    heldout = {synthetic.pair("heldout", 4, index).sample.scene for index in range(300)}
    assert not heldout & {pair.sample.scene for pair in pairs}
