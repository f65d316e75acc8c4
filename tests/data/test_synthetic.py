"""The procedural world: its answers are those that a reader of the pixels alone would give."""

import dataclasses
import io
import os
import re
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flashvl.data import synthetic
from flashvl.data.schema import CONVERSATIONS, IMAGE_MARKER
from flashvl.data.synthetic import (
    CELL_CLASSES,
    TASKS,
    Sample,
    Split,
    Task,
    cell_labels,
    conversation,
    sample,
    samples,
)
from tests.support.reader import (
    GLYPHS,
    PALETTE,
    SHAPES,
    Seen,
    answer,
    describe,
    enlarged,
    ink_of,
    look,
)

SEEDS = st.integers(0, 2**40)
INDICES = st.integers(0, 24_000_000)
SPLITS = st.sampled_from(["train", "heldout"])


# Answers agree with the pictures


def check(drawn: Sample) -> Seen:
    seen = look(enlarged(drawn))
    for turn in drawn.turns:
        assert turn.answer == answer(turn.question, seen), (turn, seen)
    names = [np.zeros((4, 4), int) for _ in CELL_CLASSES]
    if seen.kind == "photo":
        names[0][:] = CELL_CLASSES[0].index("photo")
    for cell, *what in seen.things:
        for name, classes, table in zip(what, CELL_CLASSES, names, strict=True):
            table[cell] = classes.index(name)
    expected = np.stack(names, axis=-1).reshape(16, 3)
    np.testing.assert_array_equal(cell_labels(drawn.scene), expected)
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_answers_and_cell_labels_are_in_the_picture(task: Task) -> None:
    kinds = Counter(check(drawn).kind for drawn in samples("train", 5, 12, (task,)))
    expected = {"count": "shapes", "read": "sign", "chart": "chart", "arithmetic": "board"}
    if task in expected:
        assert set(kinds) == {expected[task]}


@settings(deadline=None, max_examples=25)
@given(split=SPLITS, seed=SEEDS, index=INDICES)
def test_answers_are_in_the_picture_whatever_the_seed(split: Split, seed: int, index: int) -> None:
    check(sample(split, seed, index))


def test_the_reader_is_not_easily_pleased() -> None:
    """The reader tells pictures apart, so that mixed-up answers would be noticed."""
    drawn = list(samples("train", 6, 16, ("caption",)))
    captions = [turn.answer for one in drawn for turn in one.turns]
    others = [describe(look(enlarged(one))) for one in drawn[1:] + drawn[:1]]
    agreements = sum(a == b for a, b in zip(captions, others, strict=True))
    assert agreements <= 4


@settings(deadline=None)
@given(split=SPLITS, seed=SEEDS, index=INDICES)
def test_captions_and_descriptions_parse_back_to_the_scene(
    split: Split, seed: int, index: int
) -> None:
    scene = sample(split, seed, index, ("caption",)).scene
    caption, description = scene.caption(), scene.describe()
    match scene:
        case synthetic.ShapesScene(shapes):
            listed = [tuple(part.split()) for part in description.split(", ")]
            assert listed == [(s.size, s.color, s.shape) for _, s in shapes]
            if len(shapes) > 3:
                assert caption == f"{len(shapes)} shapes"
            else:
                assert [tuple(part.split()) for part in re.split(", a | and a ", caption[2:])] == (
                    listed
                )
            cells = [cell for cell, _ in shapes]
            assert cells == sorted(set(cells))
        case synthetic.TextScene(kind, text):
            assert re.fullmatch(r"a (\w+) that says (\S+)", caption).groups() == (kind, text)  # type: ignore[union-attr]
            assert description.split() == [kind, *text]
        case synthetic.ChartScene(bars):
            for words, start in ((caption, "a bar chart: "), (description, "chart ")):
                parts = words.removeprefix(start).split(", ")
                assert [(p.split()[0], int(p.split()[1])) for p in parts] == list(bars)
            assert len(dict(bars)) == len({value for _, value in bars}) == len(bars)
        case synthetic.PhotoScene():
            assert (caption, description) == ("not a drawing that I know", "photograph")


def test_every_colour_shape_letter_and_number_occurs() -> None:
    labels = np.concatenate([cell_labels(drawn.scene) for drawn in samples("train", 0, 3000)])
    for axis, classes in enumerate(CELL_CLASSES):
        found = {classes[label] for label in np.unique(labels[:, axis])}
        assert found == set(classes)
    turns = [turn for drawn in samples("train", 1, 3000) for turn in drawn.turns]
    answers = {task: {turn.answer for turn in turns if turn.task == task} for task in TASKS}
    assert answers["count"] == set("0123456")
    assert answers["chart"] == set("1234567") | set(PALETTE)
    assert answers["arithmetic"] == {str(number) for number in range(19)}
    assert {len(word) for word in answers["read"]} == {2, 3, 4}
    assert {f"{number} shapes" for number in (4, 5, 6)} <= answers["caption"]


def test_every_class_of_cell_has_a_name_of_its_own() -> None:
    assert CELL_CLASSES[0] == ("none", *SHAPES, *GLYPHS, "bar", "photo")
    assert CELL_CLASSES[1] == ("none", *PALETTE)
    assert all(len(set(classes)) == len(classes) for classes in CELL_CLASSES)


# Drawing


@pytest.mark.parametrize("size", range(96, 257, 16))
def test_draws_at_every_size(size: int) -> None:
    """The centre of a cell has ink if and only if the cell has a shape."""
    for drawn in samples("heldout", size, 6, ("count",)):
        image = dataclasses.replace(drawn, size=size).image()
        assert (image.size, image.mode) == ((size, size), "RGB")
        ink = ink_of(np.asarray(image))
        middles = [int((k + 0.5) * size / 4) for k in range(4)]
        inked = [bool(ink[row, column]) for row in middles for column in middles]
        assert inked == (cell_labels(drawn.scene)[:, 0] > 0).tolist()
    for task in TASKS:
        drawn = sample("train", size, 0, (task,))
        image = dataclasses.replace(drawn, size=size).image()
        assert (image.size, image.mode) == ((size, size), "RGB")
        assert len(image.getcolors(size * size)) > 1


def test_sizes_vary_and_pictures_have_the_size_they_say() -> None:
    drawn = list(samples("train", 2, 200))
    sizes = {one.size for one in drawn}
    assert len(sizes) > 4
    assert min(sizes) >= 96
    assert all(one.image().size == (one.size, one.size) for one in drawn[:20])


# Splits and seeds


def test_splits_share_no_scene_whatever_the_seeds() -> None:
    train = {drawn.scene for seed in (0, 1) for drawn in samples("train", seed, 1500)}
    heldout = {drawn.scene for seed in (0, 7) for drawn in samples("heldout", seed, 1500)}
    assert not train & heldout
    # Both sets are large, so that being disjoint means something.
    assert len(train) > 2500
    assert len(heldout) > 2000
    for kind in (
        synthetic.ShapesScene,
        synthetic.TextScene,
        synthetic.ChartScene,
        synthetic.PhotoScene,
    ):
        for scenes in (train, heldout):
            assert sum(isinstance(scene, kind) for scene in scenes) > 20


def test_one_scene_in_ten_is_held_out() -> None:
    scenes = {drawn.scene for split in ("train", "heldout") for drawn in samples(split, 3, 1000)}
    assert {synthetic.split_of(scene) for scene in scenes} == {"train", "heldout"}
    boards = {
        synthetic.TextScene("board", f"{a}{op}{b}", (row, column), color)
        for a in range(10)
        for b in range(10)
        for op in "+-"
        for row in range(4)
        for column in range(2)
        for color in ("red", "blue")
    }
    heldout = sum(synthetic.split_of(board) == "heldout" for board in boards)
    assert heldout / len(boards) == pytest.approx(0.1, abs=0.03)


@settings(deadline=None, max_examples=30)
@given(split=SPLITS, seed=SEEDS, index=INDICES)
def test_a_sample_follows_from_its_number(split: Split, seed: int, index: int) -> None:
    first, again = sample(split, seed, index), sample(split, seed, index)
    assert first == again
    assert first.image().tobytes() == again.image().tobytes()
    assert synthetic.split_of(first.scene) == split
    for other in (sample(split, seed, index + 1), sample(split, seed + 1, index)):
        assert (other.scene, other.style_seed) != (first.scene, first.style_seed)
        assert other.image().tobytes() != first.image().tobytes()


DIGEST = """
import zlib
from flashvl.data.synthetic import samples
for drawn in samples("heldout", 4, 20):
    print(drawn.turns, drawn.size, zlib.crc32(drawn.image().tobytes()))
"""


def test_another_process_draws_the_same() -> None:
    """Nothing depends on Python's `hash`, which differs between processes."""
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [
        f"{drawn.turns} {drawn.size} {zlib.crc32(drawn.image().tobytes())}"
        for drawn in samples("heldout", 4, 20)
    ]
    assert done.stdout.splitlines() == here


def test_samples_is_sample_by_sample() -> None:
    series = list(samples("train", 8, 5, ("read", "chart")))
    assert series == [sample("train", 8, index, ("read", "chart")) for index in range(5)]
    assert len(set(series)) == 5


# Tasks


@settings(deadline=None)
@given(task=st.sampled_from(TASKS), split=SPLITS, seed=SEEDS, index=INDICES)
def test_a_task_yields_its_own_turns_only(task: Task, split: Split, seed: int, index: int) -> None:
    turns = sample(split, seed, index, (task,)).turns
    assert {turn.task for turn in turns} == {task}
    assert len({turn.question for turn in turns}) == len(turns)


def test_all_tasks_together_yield_all_kinds_of_turns() -> None:
    turns = Counter(turn.task for drawn in samples("train", 9, 500) for turn in drawn.turns)
    assert set(turns) == set(TASKS)
    assert min(turns.values()) > 50
    counted = Counter(len(drawn.turns) for drawn in samples("train", 9, 500, ("count", "read")))
    assert set(counted) == {1, 2}  # a word to read, or two numbers to count


# Rows for training


@settings(deadline=None, max_examples=30)
@given(split=SPLITS, seed=SEEDS, index=INDICES)
def test_a_conversation_asks_every_turn_of_the_picture(split: Split, seed: int, index: int) -> None:
    drawn = sample(split, seed, index)
    row = conversation(drawn, index)
    pa.Table.from_pylist([row], schema=CONVERSATIONS).validate(full=True)
    assert row["row"] == index
    messages = row["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * len(drawn.turns)
    questions = [m["content"] for m in messages[::2]]
    assert questions[0].startswith(f"{IMAGE_MARKER}\n")
    questions[0] = questions[0].removeprefix(f"{IMAGE_MARKER}\n")
    assert not any(IMAGE_MARKER in m["content"] for m in messages[1:])
    asked = zip(questions, [m["content"] for m in messages[1::2]], strict=True)
    assert sorted(asked) == sorted((turn.question, turn.answer) for turn in drawn.turns)
    (data,) = row["images"]
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(drawn.image()))
    assert difference.mean() < 6
    assert conversation(drawn, index) == row


def test_a_conversation_in_words_has_the_description_for_the_picture() -> None:
    for index, drawn in enumerate(samples("train", 10, 50)):
        row = conversation(drawn, index, words_share=1.0)
        assert row["images"] == []
        contents = [message["content"] for message in row["messages"]]
        assert contents[0].startswith(drawn.scene.describe() + "\n")
        assert not any(IMAGE_MARKER in content for content in contents)
        in_picture = conversation(drawn, index)["messages"]
        assert [m["content"] for m in in_picture][1:] == contents[1:]
