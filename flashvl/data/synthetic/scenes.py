"""Scenes: what a picture shows, its caption and questions, and how it is drawn.

A scene lies on a grid of 4 x 4 cells. There are coloured shapes, a sign with a word, a board with a
sum or with digits, a bar chart, a rectangle with its sides printed, and a texture like a
photograph's, about which the right answer is that it is not a drawing.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ReadingTask = Literal["caption", "count", "read", "chart", "arithmetic"]
ReasoningTask = Literal["sum", "total", "difference", "area", "perimeter"]
Task = ReadingTask | ReasoningTask
TASKS: tuple[ReadingTask, ...] = ("caption", "count", "read", "chart", "arithmetic")
"""Tasks whose answer stands in the picture, or is one step away; `tiny` is trained on them."""

GRID = 4
"""Cells on each side of a picture; one visual token of `tiny` covers one cell. A large picture has
more of them (`samples.LARGE_GRID`)."""
COLORS = {
    "red": (208, 36, 40),
    "green": (40, 150, 60),
    "blue": (36, 78, 204),
    "yellow": (232, 204, 32),
    "purple": (136, 48, 164),
    "orange": (240, 132, 24),
    "black": (24, 24, 24),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
SIZES = {"small": 0.058, "large": 0.105}
"""Radius of a shape, as a share of the image's side."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_SHAPES = 6
MAX_LISTED = 3
"""Shapes that a caption lists; it counts them if there are more."""
MAX_BAR = 7
MAX_SIDE = 9
"""Longest side of a rectangle; a cell holds one digit."""
UNKNOWN = "not a drawing that I know"

Cell = tuple[int, int]
"""(row, column)."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its exact answer."""

    task: Task
    question: str
    answer: str
    solution: str = ""
    """Steps that lead to the answer, for a question that takes more than reading."""


@dataclass(frozen=True, slots=True)
class Shape:
    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class ShapesScene:
    """One to six shapes, each in a cell of its own, in reading order."""

    shapes: tuple[tuple[Cell, Shape], ...]

    def caption(self) -> str:
        names = [f"a {shape}" for _, shape in self.shapes]
        if len(names) > MAX_LISTED:
            return f"{len(names)} shapes"
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))

    def describe(self) -> str:
        return ", ".join(str(shape) for _, shape in self.shapes)

    def turns(self, rng: random.Random) -> list[Turn]:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        if rng.random() < 0.7:  # mostly ask about something that is there
            present = rng.choice(self.shapes)[1]
            color, shape = present.color, present.shape
        of_color = sum(s.color == color for _, s in self.shapes)
        of_shape = sum(s.shape == shape for _, s in self.shapes)
        counts = [
            Turn("count", "How many shapes are there?", str(len(self.shapes))),
            Turn("count", f"How many {color} shapes are there?", str(of_color)),
            Turn("count", f"How many {PLURALS[shape]} are there?", str(of_shape)),
        ]
        return rng.sample(counts, 2)

    def draw(self, draw: ImageDraw.ImageDraw, pen: "Pen") -> None:
        for cell, shape in self.shapes:
            x, y = pen.center(cell)
            _draw_shape(draw, shape.shape, x, y, SIZES[shape.size] * pen.size, pen.ink(shape.color))

    def cells(self) -> dict[Cell, tuple[str, str, str]]:
        return {cell: (s.shape, s.color, s.size) for cell, s in self.shapes}


@dataclass(frozen=True, slots=True)
class TextScene:
    """A word on a sign, or a sum of two digits or three digits alone on a board.

    The glyphs lie in one row, one in each cell.
    """

    kind: Literal["sign", "board"]
    text: str
    start: Cell
    color: str

    def caption(self) -> str:
        return f"a {self.kind} that says {self.text}"

    def describe(self) -> str:
        return f"{self.kind} {' '.join(self.text)}"

    def turns(self, rng: random.Random) -> list[Turn]:
        if self.kind == "sign":
            return [Turn("read", "What does the sign say?", self.text)]
        if self.text.isdigit():
            return []
        left, operator, right = tuple(self.text)
        result = int(left) + int(right) if operator == "+" else int(left) - int(right)
        return [Turn("arithmetic", "What is the result?", str(result))]

    def draw(self, draw: ImageDraw.ImageDraw, pen: "Pen") -> None:
        row, column = self.start
        font = ImageFont.load_default(0.23 * pen.size)
        ink = pen.ink(self.color)
        (x0, y0), (x1, y1) = (
            pen.center((row, column)),
            pen.center((row, column + len(self.text) - 1)),
        )
        frame = 0.12 * pen.size
        paper = (255, 255, 255) if self.kind == "sign" else (214, 226, 214)
        draw.rectangle((x0 - frame, y0 - frame, x1 + frame, y1 + frame), fill=paper)
        for offset, glyph in enumerate(self.text):
            x, y = pen.center((row, column + offset))
            draw.text((x, y), glyph, fill=ink, font=font, anchor="mm", stroke_width=pen.size / 160)

    def cells(self) -> dict[Cell, tuple[str, str, str]]:
        row, column = self.start
        return {
            (row, column + i): (glyph, self.color, self.kind) for i, glyph in enumerate(self.text)
        }


@dataclass(frozen=True, slots=True)
class ChartScene:
    """Two to four bars of different colours and heights 1..7, left to right."""

    bars: tuple[tuple[str, int], ...]
    first_column: int

    def caption(self) -> str:
        return f"a bar chart: {self.describe().removeprefix('chart ')}"

    def describe(self) -> str:
        return "chart " + ", ".join(f"{color} {value}" for color, value in self.bars)

    def turns(self, rng: random.Random) -> list[Turn]:
        color, value = rng.choice(self.bars)
        by_value = sorted(self.bars, key=lambda bar: bar[1])
        turns = [Turn("chart", f"What is the value of the {color} bar?", str(value))]
        if rng.random() < 0.5:
            turns.append(Turn("chart", "Which bar is the tallest?", by_value[-1][0]))
        else:
            turns.append(Turn("chart", "Which bar is the shortest?", by_value[0][0]))
        return turns

    def draw(self, draw: ImageDraw.ImageDraw, pen: "Pen") -> None:
        left, top = pen.origin
        right = left + pen.size
        unit = pen.size / (MAX_BAR + 1)
        base = top + pen.size - 0.25 * unit
        for value in range(1, MAX_BAR + 1):
            y = base - value * unit
            draw.line((left, y, right, y), fill=(176, 176, 176), width=max(1, pen.size // 160))
        for offset, (color, value) in enumerate(self.bars):
            x, _ = pen.center((0, self.first_column + offset))
            half = 0.09 * pen.size
            draw.rectangle((x - half, base - value * unit, x + half, base), fill=pen.ink(color))
        draw.line((left, base, right, base), fill=(0, 0, 0), width=max(1, pen.size // 80))

    def cells(self) -> dict[Cell, tuple[str, str, str]]:
        labels = {}
        for offset, (color, value) in enumerate(self.bars):
            for row in range(GRID):
                # A cell is two units high: empty, half full or full.
                full = min(max(value - 2 * (GRID - 1 - row), 0), 2)
                if full:
                    labels[row, self.first_column + offset] = (
                        "bar",
                        color,
                        ("half", "full")[full - 1],
                    )
        return labels


@dataclass(frozen=True, slots=True)
class PhotoScene:
    """A texture that no drawing has; it stands for all pictures outside this world."""

    texture_seed: int

    def caption(self) -> str:
        return UNKNOWN

    def describe(self) -> str:
        return "photograph"

    def turns(self, rng: random.Random) -> list[Turn]:
        return []

    def cells(self) -> dict[Cell, tuple[str, str, str]]:
        return {(row, col): ("photo", "none", "none") for row in range(GRID) for col in range(GRID)}


@dataclass(frozen=True, slots=True)
class RectangleScene:
    """A rectangle whose width is printed above it, and its height to its left."""

    width: int
    height: int
    corner: Cell
    """Cell between the two numbers, above and left of the rectangle's own; it is empty."""
    color: str

    def caption(self) -> str:
        return f"a rectangle of {self.width} by {self.height}"

    def describe(self) -> str:
        return f"rectangle {self.width} {self.height}"

    def turns(self, rng: random.Random) -> list[Turn]:
        return []

    def draw(self, draw: ImageDraw.ImageDraw, pen: "Pen") -> None:
        row, column = self.corner
        for side in self._sides():
            side.draw(draw, pen)
        x, y = pen.center((row + 1, column + 1))
        unit = 0.11 * pen.size / MAX_SIDE
        draw.rectangle(
            (
                x - self.width * unit,
                y - self.height * unit,
                x + self.width * unit,
                y + self.height * unit,
            ),
            outline=pen.ink(self.color),
            width=max(1, pen.size // 60),
        )

    def cells(self) -> dict[Cell, tuple[str, str, str]]:
        above, left = self._sides()
        return above.cells() | left.cells()

    def _sides(self) -> tuple[TextScene, TextScene]:
        row, column = self.corner
        return (
            TextScene("board", str(self.width), (row, column + 1), self.color),
            TextScene("board", str(self.height), (row + 1, column), self.color),
        )


Scene = ShapesScene | TextScene | ChartScene | RectangleScene | PhotoScene


CELL_CLASSES = (
    ("none", *SHAPES, *LETTERS, *"0123456789+-", "bar", "photo"),
    ("none", *COLORS),
    ("none", *SIZES, "sign", "board", "half", "full"),
)
"""Values of the three labels of a cell: what lies in it, its colour, and its size or ground."""


def cell_labels(scene: Scene) -> npt.NDArray[np.int64]:
    """(GRID * GRID, 3): the cells in reading order, each as indices into `CELL_CLASSES`."""
    labels = np.zeros((GRID, GRID, len(CELL_CLASSES)), np.int64)
    for cell, names in scene.cells().items():
        labels[cell] = [classes.index(n) for classes, n in zip(CELL_CLASSES, names, strict=True)]
    return labels.reshape(GRID * GRID, -1)


def scene_for(task: ReadingTask, rng: random.Random, grid: int = GRID) -> Scene:
    """A scene that fits a reading task.

    Args:
        grid: cells on each side, among which words and shapes lie anywhere.
    """
    if task == "caption":
        kind = rng.choices(("shapes", "read", "arithmetic", "chart", "photo"), (8, 2, 1, 2, 1))[0]
        if kind == "photo":
            return PhotoScene(rng.getrandbits(32))
        if kind == "shapes":
            return shapes_scene(rng.choice((1, 2, 2, 3, 3, 4, 5, 6)), rng, grid)
        return scene_for(kind, rng, grid)  # type: ignore[arg-type]
    if task == "count":
        return shapes_scene(rng.randint(1, MAX_SHAPES), rng, grid)
    if task == "read":
        text = "".join(rng.choices(LETTERS, k=rng.randint(2, 4)))
        return TextScene("sign", text, start_of(len(text), rng, grid), rng.choice(list(COLORS)))
    if task == "arithmetic":
        left, right, operator = rng.randint(0, 9), rng.randint(0, 9), rng.choice("+-")
        if operator == "-" and left < right:
            left, right = right, left
        return TextScene(
            "board", f"{left}{operator}{right}", start_of(3, rng, grid), rng.choice(list(COLORS))
        )
    return chart_scene(rng)


def chart_scene(rng: random.Random) -> ChartScene:
    """A chart of two to four bars, all of different colours and heights."""
    count = rng.randint(2, GRID)
    bars = zip(
        rng.sample(list(COLORS), count), rng.sample(range(1, MAX_BAR + 1), count), strict=True
    )
    return ChartScene(tuple(bars), first_column=rng.randint(0, GRID - count))


def shapes_scene(count: int, rng: random.Random, grid: int = GRID) -> ShapesScene:
    """`count` shapes in as many cells."""
    places = sorted(rng.sample([(row, col) for row in range(grid) for col in range(grid)], count))
    # A scene has few colours and shapes, so that there is something to count.
    colors = rng.sample(list(COLORS), min(count, 3))
    shapes = rng.sample(SHAPES, min(count, 3))
    drawn = [Shape(rng.choice(list(SIZES)), rng.choice(colors), rng.choice(shapes)) for _ in places]
    return ShapesScene(tuple(zip(places, drawn, strict=True)))


def start_of(length: int, rng: random.Random, grid: int = GRID) -> Cell:
    """A cell where a text of `length` glyphs can begin."""
    return rng.randrange(grid), rng.randint(0, grid - length)


@dataclass(slots=True)
class Pen:
    """The random style of a drawing: its paper, its tints, and the place of a thing in its cell."""

    size: int
    """Side of `GRID` cells, in pixels."""
    rng: random.Random
    origin: tuple[float, float] = (0, 0)
    """Pixels to the left of the cells, and above them."""
    _inks: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def paper(self) -> tuple[int, ...]:
        return tuple(self.rng.randint(226, 255) for _ in range(3))

    def ink(self, color: str) -> tuple[int, ...]:
        if color not in self._inks:
            tint = (min(max(c + self.rng.randint(-14, 14), 0), 255) for c in COLORS[color])
            self._inks[color] = tuple(tint)
        return self._inks[color]

    def center(self, cell: Cell) -> tuple[float, float]:
        row, column = cell
        x, y = (column + 0.5) / GRID, (row + 0.5) / GRID
        left, top = self.origin
        return (
            left + (x + self.rng.uniform(-0.016, 0.016)) * self.size,
            top + (y + self.rng.uniform(-0.016, 0.016)) * self.size,
        )


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, ink: tuple[int, ...]
) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif shape == "square":
        side = 0.86 * r
        draw.rectangle((x - side, y - side, x + side, y + side), fill=ink)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=ink)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=ink)
    else:  # cross
        arm = 0.33 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=ink)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=ink)


def draw_texture(seed: int, size: int) -> Image.Image:
    """Smooth noise over a colour gradient, like sky, grass, a wall or blur."""
    rng = np.random.default_rng(seed)
    grains = int(rng.integers(3, 24))
    noise = Image.fromarray(rng.integers(0, 256, (grains, grains, 3), dtype=np.uint8), "RGB")
    noise = noise.resize((size, size), Image.Resampling.BICUBIC)
    corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8), "RGB")
    gradient = corners.resize((size, size), Image.Resampling.BICUBIC)
    blend = Image.blend(gradient, noise, float(rng.uniform(0.25, 0.8)))
    return blend.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))
