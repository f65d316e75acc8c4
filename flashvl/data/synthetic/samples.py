"""Samples: scenes with questions, in an endless series for each seed, as rows of tables."""

import io
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
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
    cell_labels,
    crowd_scene,
    draw_texture,
    label_cells,
    scene_for,
)

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 10
"""One scene in this number is held out; of problems, see `problems.hash_problem`."""
LARGE_SIDE = 192
"""Side of a large picture, in pixels: two tiles of `tiny`'s tower, which meet in the middle."""
LABELS_ACROSS = 8
"""Labels across a large picture: a patch of `tiny`'s tower each, if it sees the picture as one."""
MAX_INK = 150
"""Least of the three colour values of ink, at most; papers, grounds and grids are lighter."""
CellsAcross = tuple[float, float]
"""Range of the number of cells across a large picture, at least `GRID`: things are the smaller, the
more cells there are. Words and shapes lie in any of the cells, and a chart's 4 x 4 cells anywhere,
so that the seam of two tiles may cut through each of them."""


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
    cells_across: CellsAcross | None = None,
) -> Sample:
    """Sample `index` of the endless series that `seed` gives for `split`.

    Args:
        tasks: the tasks that the sample's turns are about; the scene fits one of them, and a
            problem stands alone. A task that is named twice is drawn twice as often.
        cells_across: makes a large picture, with a reading task.
    """
    rng = random.Random(f"{split}/{seed}/{index}")
    cells = None if cells_across is None else rng.uniform(*cells_across)
    grid = GRID if cells is None else int(cells)
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
    if cells is None:
        return Sample(scene, chosen, style_seed, size=rng.randrange(96, 161, 8))
    return _place(scene, chosen, style_seed, cells, rng)


def crowd(split: Split, seed: int, index: int, cells_across: CellsAcross) -> Sample:
    """Sample `index` of a series of large pictures that are full of shapes and glyphs."""
    rng = random.Random(f"crowd/{split}/{seed}/{index}")
    cells = rng.uniform(*cells_across)
    while True:
        scene = crowd_scene(rng, int(cells))
        if split_of(scene) == split:
            return _place(scene, (), rng.getrandbits(32), cells, rng)


def _place(
    scene: Scene, turns: tuple[Turn, ...], style_seed: int, cells: float, rng: random.Random
) -> Sample:
    """A scene anywhere in a large picture with `cells` across."""
    size = int(GRID * LARGE_SIDE / cells)
    # A chart has no cells beyond its own.
    used = (GRID if isinstance(scene, ChartScene) else int(cells)) * size / GRID
    origin = rng.uniform(0, LARGE_SIDE - used), rng.uniform(0, LARGE_SIDE - used)
    return Sample(scene, turns, style_seed, size, origin)


def samples(
    split: Split,
    seed: int,
    count: int,
    tasks: tuple[Task, ...] = TASKS,
    cells_across: CellsAcross | None = None,
) -> Iterator[Sample]:
    """The first `count` samples of the series, as `sample` makes them."""
    return (sample(split, seed, index, tasks, cells_across) for index in range(count))


def patch_labels(drawn: Sample) -> npt.NDArray[np.int64]:
    """What is in the middle of each patch of a large picture, as from `cell_labels`: a thing counts
    for the patch where the centre of its cell lies, and a texture for all.

    Returns:
        (LABELS_ACROSS ** 2, 3), the patches in reading order.
    """
    assert drawn.origin is not None
    labels = np.zeros((LABELS_ACROSS, LABELS_ACROSS, 3), np.int64)
    if isinstance(drawn.scene, PhotoScene):
        labels[:] = cell_labels(drawn.scene)[0]
        return labels.reshape(-1, 3)
    left, top = drawn.origin
    for (row, column), label in label_cells(drawn.scene).items():
        x, y = (
            begin + (place + 0.5) * drawn.size / GRID
            for begin, place in ((left, column), (top, row))
        )
        labels[int(y * LABELS_ACROSS / LARGE_SIDE), int(x * LABELS_ACROSS / LARGE_SIDE)] = label
    return labels.reshape(-1, 3)


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
