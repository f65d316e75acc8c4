"""Samples: scenes with questions, in an endless series for each seed, as rows of tables."""

import io
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from flashvl.config import DEFAULT_PROMPT
from flashvl.data.schema import IMAGE_MARKER
from flashvl.data.synthetic.problems import REASONING_TASKS, ask, hash_problem, problem_scene
from flashvl.data.synthetic.scenes import (
    GRID,
    TASKS,
    ChartScene,
    Pen,
    PhotoScene,
    Scene,
    Task,
    Turn,
    draw_texture,
    scene_for,
)

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 10
"""One scene in this number is held out; of problems, see `problems.hash_problem`."""
LARGE_SIDE = 192
"""Side of a large picture, in pixels: two tiles of `tiny`'s tower, which meet in the middle."""
LARGE_GRID = 7
"""Cells on each side of a large picture, in any of which words and shapes lie."""
CELL_SIDE = 24
"""Side of these cells, in pixels, the size at which `tiny`'s tower knows them."""
MAX_INK = 150
"""Least of the three colour values of ink, at most; papers, grounds and grids are lighter."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A scene with its questions and answers, and how it is drawn."""

    scene: Scene
    turns: tuple[Turn, ...]
    style_seed: int
    size: int
    """Side of `GRID` cells, in pixels."""
    origin: tuple[float, float] | None = None
    """Place of the cells in a large picture, in pixels; None: they fill a picture of `size`."""

    def image(self) -> Image.Image:
        """The RGB picture, with sides of `size` pixels, or of `LARGE_SIDE`."""
        origin, side = ((0, 0), self.size) if self.origin is None else (self.origin, LARGE_SIDE)
        pen = Pen(size=self.size, rng=random.Random(self.style_seed), origin=origin)
        if isinstance(self.scene, PhotoScene):
            return draw_texture(self.scene.texture_seed, side)
        image = Image.new("RGB", (side, side), pen.paper())
        self.scene.draw(ImageDraw.Draw(image), pen)
        return image


def sample(
    split: Split,
    seed: int,
    index: int,
    tasks: tuple[Task, ...] = TASKS,
    is_large: bool = False,
) -> Sample:
    """Sample `index` of the endless series that `seed` gives for `split`.

    Args:
        tasks: the tasks that the sample's turns are about; the scene fits one of them, and a
            problem stands alone. A task that is named twice is drawn twice as often.
        is_large: the picture is large, and the tasks are reading tasks. Its cells begin at a
            multiple of half a cell, so that the seam of two tiles lies between cells, or cuts
            through some.
    """
    rng = random.Random(f"{split}/{seed}/{index}")
    grid = LARGE_GRID if is_large else GRID
    while True:
        scene, problem = _draw_scene(rng.choice(tasks), rng, grid)
        hash_of = _hash_content if problem is None else hash_problem
        if _split_by(hash_of(scene)) == split:
            break
    if problem is None:
        turns = [Turn("caption", DEFAULT_PROMPT, scene.caption()), *scene.turns(rng)]
        chosen = tuple(turn for turn in turns if turn.task in tasks)
    else:
        chosen = (problem,)
    style_seed = rng.getrandbits(32)
    if not is_large:
        return Sample(scene, chosen, style_seed, size=rng.randrange(96, 161, 8))
    # A chart has no cells beyond its own.
    used = CELL_SIDE * (GRID if isinstance(scene, ChartScene) else LARGE_GRID)
    left, top = (rng.randrange(0, LARGE_SIDE - used + 1, CELL_SIDE // 2) for _ in range(2))
    return Sample(scene, chosen, style_seed, size=GRID * CELL_SIDE, origin=(left, top))


def samples(
    split: Split,
    seed: int,
    count: int,
    tasks: tuple[Task, ...] = TASKS,
    is_large: bool = False,
) -> Iterator[Sample]:
    """The first `count` samples of the series, as `sample` makes them."""
    return (sample(split, seed, index, tasks, is_large) for index in range(count))


def is_cut(picture: Image.Image) -> bool:
    """Whether a seam of the two by two tiles of a large picture cuts through a thing's ink."""
    ink = np.asarray(picture).min(axis=2) < MAX_INK
    middle = picture.width // 2
    upright = ink[:, middle - 1] & ink[:, middle]
    level = ink[middle - 1] & ink[middle]
    return bool(upright.any() or level.any())


def split_of(scene: Scene) -> Split:
    """The split that `scene` belongs to, by a hash of its content; problems do not go by it."""
    return _split_by(_hash_content(scene))


def conversation(
    drawn: Sample, row: int, words_share: float = 0.0, worked_share: float = 0.0
) -> dict[str, Any]:
    """The sample as a row of `schema.CONVERSATIONS`: all its turns, in random order.

    Args:
        words_share: probability that the row holds the scene's description instead of its picture,
            a JPEG.
        worked_share: probability that a problem's answer is its solution with the answer in tags,
            instead of the answer alone.
    """
    rng = random.Random(drawn.style_seed)
    turns = rng.sample(drawn.turns, len(drawn.turns))
    is_shown = rng.random() >= words_share
    opening = IMAGE_MARKER if is_shown else drawn.scene.describe()
    messages = []
    for number, turn in enumerate(turns):
        question = f"{opening}\n{turn.question}" if number == 0 else turn.question
        is_worked = bool(turn.solution) and rng.random() < worked_share
        messages.append({"role": "user", "content": question})
        messages.append(
            {"role": "assistant", "content": work_out(turn) if is_worked else turn.answer}
        )
    images = [encode_jpeg(drawn.image(), rng.randint(75, 95))] if is_shown else []
    return {"row": row, "images": images, "messages": messages}


def work_out(turn: Turn) -> str:
    """The answer to a problem after its solution, in the tags that `data.answers` reads."""
    return f"{turn.solution} <answer>{turn.answer}</answer>"


def problem(drawn: Sample, row: int) -> dict[str, Any]:
    """The sample as a row of `schema.PROMPTS`: one of its questions, and the right answer."""
    rng = random.Random(drawn.style_seed)
    turn = rng.choice(drawn.turns)
    prompt = [{"role": "user", "content": f"{IMAGE_MARKER}\n{turn.question}"}]
    images = [encode_jpeg(drawn.image(), rng.randint(75, 95))]
    return {"row": row, "images": images, "prompt": prompt, "answer": turn.answer}


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """The bytes of a JPEG file of `image`."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _draw_scene(task: Task, rng: random.Random, grid: int) -> tuple[Scene, Turn | None]:
    """A scene that fits `task`, and the problem about it, if the task is one of problems."""
    if task in TASKS:
        return scene_for(task, rng, grid), None
    assert task in REASONING_TASKS
    scene = problem_scene(task, rng)
    return scene, ask(task, scene)


def _split_by(number: int) -> Split:
    return "heldout" if number % HELDOUT_SHARE == 0 else "train"


def _hash_content(scene: Scene) -> int:
    return zlib.crc32(repr(scene).encode())
