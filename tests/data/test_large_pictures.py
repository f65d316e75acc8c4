"""Large pictures: exact answers, and things on the seams of tiles."""

import dataclasses
import io
import random

import numpy as np
import pytest
from PIL import Image

from flashvl.config import validate
from flashvl.data import synthetic
from flashvl.data.synthetic import (
    LARGE_SIDE,
    Sample,
    Shape,
    ShapesScene,
    TextScene,
    is_cut,
)
from flashvl.errors import ConfigError
from flashvl.model.tiling import Tiling
from flashvl.train.feed.documents import draw
from flashvl.train.feed.mixture import SyntheticData, TrainingData
from tests.support.reader import answer, components, enlarged, ink_of, look


def large(task: synthetic.Task, count: int, seed: int = 4) -> list[Sample]:
    return list(synthetic.samples("heldout", seed, count, (task,), is_large=True))


@pytest.mark.parametrize("task", ["chart", "read", "arithmetic"])
def test_answers_are_what_the_reader_of_small_pictures_sees(task: synthetic.Task) -> None:
    """The scene is moved into four by four cells of its own, which the reader knows."""
    for drawn in large(task, 12):
        scene = drawn.scene
        if isinstance(scene, TextScene):
            scene = dataclasses.replace(scene, start=(0, 0))
        seen = look(enlarged(dataclasses.replace(drawn, scene=scene, origin=None)))
        for turn in drawn.turns:
            assert turn.answer == answer(turn.question, seen)


def test_a_scene_is_drawn_at_its_origin_as_it_is_drawn_alone() -> None:
    for task in ("chart", "read", "arithmetic", "count"):
        (small,) = synthetic.samples("train", 1, 1, (task,))
        small = dataclasses.replace(small, size=80)
        moved = dataclasses.replace(small, origin=(50, 61)).image()
        assert moved.size == (LARGE_SIDE, LARGE_SIDE)
        cut_out = moved.crop((50, 61, 130, 141))
        np.testing.assert_array_equal(np.asarray(cut_out), np.asarray(small.image()))
        paper = moved.getpixel((0, 0))
        moved.paste(paper, (46, 57, 134, 145))
        assert moved.getcolors() == [(LARGE_SIDE**2, paper)]


def test_shapes_lie_anywhere_and_are_as_many_as_the_answer_says() -> None:
    centres = []
    for drawn in large("count", 60):
        found = components(ink_of(np.asarray(drawn.image())))
        assert isinstance(drawn.scene, ShapesScene)
        assert len(found) == len(drawn.scene.shapes)
        totals = [turn for turn in drawn.turns if turn.question == "How many shapes are there?"]
        assert all(turn.answer == str(len(found)) for turn in totals)
        centres += [(rows.mean(), columns.mean()) for rows, columns in found]
    spread = np.histogram2d(*np.array(centres).T, bins=3, range=[[0, LARGE_SIDE]] * 2)[0]
    assert spread.min() > 5


def shape_at(x: float, y: float) -> Sample:
    """A picture of a large square, 20 pixels wide, around a point."""
    scene = ShapesScene((((0, 0), Shape("large", "blue", "square")),))
    return Sample(scene, (), style_seed=4, size=112, origin=(x - 14, y - 14))


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(96, 40, True), (40, 96, True), (96, 96, True), (60, 60, False), (120, 130, False)],
)
def test_a_seam_cuts_what_lies_across_the_middle(x: float, y: float, expected: bool) -> None:
    picture = shape_at(x, y).image()
    assert is_cut(picture) == expected
    # The tiles themselves say so: the blue square is in more than one of them.
    (_, grid) = Tiling(mode="dynamic", tile_size=96, patch_size=12).views(picture.size)
    tiles = [picture.crop(box) for box in grid.boxes]
    assert (sum(bool(ink_of(np.asarray(tile)).any()) for tile in tiles) > 1) == expected


def test_a_grid_line_or_a_ground_on_the_seam_is_no_cut_thing() -> None:
    sign = Sample(TextScene("sign", "AB", (0, 0), "red"), (), 1, size=96, origin=(96 - 24, 20))
    assert not is_cut(sign.image())  # the seam lies between the letters


def test_large_pictures_have_things_on_seams_and_others() -> None:
    for task in ("caption", "count", "read"):
        cut = sum(is_cut(drawn.image()) for drawn in large(task, 100))
        assert 10 < cut < 75


def test_cells_keep_their_size_and_begin_at_half_cells() -> None:
    origins = set()
    for drawn in large("read", 60):
        assert drawn.size == 4 * 24
        assert drawn.origin is not None
        origins.add(drawn.origin)
    assert origins == {(left, top) for left in (0, 12, 24) for top in (0, 12, 24)}


def test_small_pictures_are_as_they_were() -> None:
    """Large pictures draw random numbers in another order; small ones must not."""
    state = random.Random("train/3/5")
    (drawn,) = list(synthetic.samples("train", 3, 6))[5:]
    again = synthetic.scenes.scene_for(state.choice(synthetic.TASKS), state)
    while synthetic.split_of(again) != "train":
        again = synthetic.scenes.scene_for(state.choice(synthetic.TASKS), state)
    assert drawn.scene == again
    assert drawn.origin is None


def test_training_rows_are_large_if_the_recipe_says_so() -> None:
    row = draw(SyntheticData(count=1, tasks=("read",), is_large=True), 0, "supervised")
    assert isinstance(row, dict)
    with Image.open(io.BytesIO(row["images"][0])) as image:
        assert image.size == (LARGE_SIDE, LARGE_SIDE)
    # The manifests of runs that are older than the setting are those of today.
    assert "is_large" not in SyntheticData(count=1).model_dump_json(exclude_none=True)


def test_large_pictures_have_no_problems() -> None:
    data = {"synthetic": {"count": 1, "is_large": True, "tasks": ["sum"]}}
    with pytest.raises(ConfigError, match="reading tasks, not sum"):
        validate(TrainingData, data, source="recipe")
