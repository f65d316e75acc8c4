"""A reader of the procedural world's pictures, from their pixels alone.

`look` knows the palette, the font and the grid, and nothing of the code that drew the picture.
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flashvl.data.synthetic import Sample

SIDE = 240
"""Size at which pictures are read; shapes in neighbouring cells do not touch at it."""
CELL = SIDE // 4

PALETTE = {
    "red": (208, 36, 40),
    "green": (40, 150, 60),
    "blue": (36, 78, 204),
    "yellow": (232, 204, 32),
    "purple": (136, 48, 164),
    "orange": (240, 132, 24),
    "black": (24, 24, 24),
}
SHAPES = ["circle", "square", "triangle", "diamond", "cross"]
GRID_LINE = (176, 176, 176)
BOARD = (214, 226, 214)
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"


@dataclass
class Seen:
    """Contents of a picture; `things` are ((row, column), what, colour, size or ground)."""

    kind: str
    things: list[tuple[tuple[int, int], str, str, str]]
    values: list[tuple[str, int]] = dataclasses.field(default_factory=list)


def ink_of(pixels: np.ndarray) -> np.ndarray:
    """Paper, boards and grid lines have no dark channel; every ink has one."""
    return pixels.min(-1) < 130


def color_name(pixels: np.ndarray) -> str:
    middle = np.median(pixels, axis=0)
    return min(PALETTE, key=lambda name: float(np.abs(middle - PALETTE[name]).sum()))


def components(ink: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows, columns) of the pixels of every 8-connected component, by flood filling."""
    height, width = ink.shape
    unseen = set(np.flatnonzero(ink).tolist())
    found = []
    while unseen:
        pixels = [unseen.pop()]
        for pixel in pixels:
            row, column = divmod(pixel, width)
            for near_row in range(max(row - 1, 0), min(row + 2, height)):
                for near_column in range(max(column - 1, 0), min(column + 2, width)):
                    near = near_row * width + near_column
                    if near in unseen:
                        unseen.remove(near)
                        pixels.append(near)
        found.append(np.divmod(np.array(pixels), width))
    return found


def mask_of(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The pixels of one component, in its bounding box."""
    mask = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), bool)
    mask[rows - rows.min(), columns - columns.min()] = True
    return mask


def shape_name(mask: np.ndarray) -> str:
    """The name of a shape, by its widths at a quarter, half and nine tenths of its height."""
    profiles = {
        "square": (1, 1, 1),
        "circle": (0.87, 1, 0.6),
        "triangle": (0.25, 0.5, 0.9),
        "diamond": (0.5, 1, 0.2),
        "cross": (0.33, 1, 0.33),
    }
    height, width = mask.shape
    widths = [mask[int(height * at)].sum() / width for at in (0.25, 0.5, 0.9)]
    return min(
        profiles,
        key=lambda name: sum(abs(w - p) for w, p in zip(widths, profiles[name], strict=True)),
    )


@cache
def printed_glyphs() -> dict[str, np.ndarray]:
    font = ImageFont.load_default(0.23 * SIDE)
    glyphs = {}
    for glyph in GLYPHS:
        page = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(page).text((SIDE / 2, SIDE / 2), glyph, 255, font, "mm", stroke_width=1.5)
        glyphs[glyph] = mask_of(*np.nonzero(np.asarray(page) > 127))
    return glyphs


def difference(mask: np.ndarray, glyph: np.ndarray) -> int:
    """Number of pixels that differ when the two are aligned best."""
    page = np.zeros((2, CELL + 20, CELL + 20), bool)
    for layer, part in zip(page, (mask, glyph), strict=True):
        top, left = (
            (whole - side) // 2 for whole, side in zip(layer.shape, part.shape, strict=True)
        )
        layer[top : top + part.shape[0], left : left + part.shape[1]] = part
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return min(int((np.roll(page[0], shift, (0, 1)) ^ page[1]).sum()) for shift in shifts)


def name_glyph(mask: np.ndarray) -> str:
    """The printed glyph that is most like a component."""
    return min(printed_glyphs(), key=lambda glyph: difference(mask, printed_glyphs()[glyph]))


def look(image: Image.Image) -> Seen:
    pixels = np.asarray(image).astype(int)
    packed = np.unique(pixels @ [65536, 256, 1])
    colors = {(color >> 16, color >> 8 & 255, color & 255) for color in packed.tolist()}
    if len(colors) > 1000:
        return Seen("photo", [])
    if GRID_LINE in colors:
        return look_at_bars(pixels)
    if len(colors) <= 1 + 3:  # hard edges: paper and at most three inks
        return look_at_shapes(pixels)
    return look_at_text(pixels, ground="board" if BOARD in colors else "sign")


def cell_of(rows: np.ndarray, columns: np.ndarray) -> tuple[int, int]:
    center_row = (rows.min() + rows.max()) / 2
    center_column = (columns.min() + columns.max()) / 2
    return int(center_row / CELL), int(center_column / CELL)


def look_at_shapes(pixels: np.ndarray) -> Seen:
    things = []
    for rows, columns in components(ink_of(pixels)):
        mask = mask_of(rows, columns)
        size = "large" if max(mask.shape) > 0.15 * SIDE else "small"
        color = color_name(pixels[rows, columns])
        things.append((cell_of(rows, columns), shape_name(mask), color, size))
    return Seen("shapes", sorted(things))


def look_at_text(pixels: np.ndarray, ground: str) -> Seen:
    things = []
    for rows, columns in components(ink_of(pixels)):
        mask = mask_of(rows, columns)
        glyph = name_glyph(mask)
        color = color_name(pixels[rows, columns])
        things.append((cell_of(rows, columns), glyph, color, ground))
    return Seen(ground, sorted(things))


def look_at_bars(pixels: np.ndarray) -> Seen:
    ink = ink_of(pixels)
    base = np.flatnonzero(ink[:, 0]).mean()  # no bar reaches the edge, only the axis does
    axis = ink[:, 0].sum()
    seen = Seen("chart", [])
    for column in range(4):
        line = int((column + 0.5) * CELL)
        rows = np.flatnonzero(ink[:, line])
        if len(rows) <= axis:
            continue
        color = color_name(pixels[rows[: -axis or None], line])
        seen.values.append((color, round((base - rows[0]) / (SIDE / 8))))
        for row in range(4):
            share = ink[row * CELL : (row + 1) * CELL, line].mean()
            if share > 0.25:
                size = "full" if share > 0.75 else "half"
                seen.things.append(((row, column), "bar", color, size))
    seen.things.sort()
    return seen


def describe(seen: Seen) -> str:
    if seen.kind == "photo":
        return "not a drawing that I know"
    if seen.kind == "chart":
        return "a bar chart: " + ", ".join(f"{color} {value}" for color, value in seen.values)
    if seen.kind in ("sign", "board"):
        return f"a {seen.kind} that says {''.join(glyph for _, glyph, _, _ in seen.things)}"
    names = [f"a {size} {color} {shape}" for _, shape, color, size in seen.things]
    match names:
        case [one]:
            return one
        case [one, two]:
            return f"{one} and {two}"
        case [one, two, three]:
            return f"{one}, {two} and {three}"
    return f"{len(names)} shapes"


def count(seen: Seen, what: str) -> int:
    singular = {"crosse": "cross"}.get(what.removesuffix("s"), what.removesuffix("s"))
    if what.endswith(" shapes"):
        return sum(f"{color} shapes" == what for _, _, color, _ in seen.things)
    assert what == "shapes" or singular in SHAPES
    return sum(what == "shapes" or shape == singular for _, shape, _, _ in seen.things)


def answer(question: str, seen: Seen) -> str:
    if question == "Describe the image.":
        return describe(seen)
    if asked := re.fullmatch(r"How many (.+) are there\?", question):
        assert seen.kind == "shapes"
        return str(count(seen, asked[1]))
    text = "".join(glyph for _, glyph, _, _ in seen.things)
    if question == "What does the sign say?":
        assert seen.kind == "sign"
        return text
    if question == "What is the result?":
        assert seen.kind == "board"
        left, right = int(text[0]), int(text[2])
        return str({"+": left + right, "-": left - right}[text[1]])
    assert seen.kind == "chart"
    if asked := re.fullmatch(r"What is the value of the (\w+) bar\?", question):
        return str(dict(seen.values)[asked[1]])
    heights = [value for _, value in seen.values]
    extreme = {"Which bar is the tallest?": max, "Which bar is the shortest?": min}[question]
    assert heights.count(extreme(heights)) == 1
    return next(color for color, value in seen.values if value == extreme(heights))


def enlarged(drawn: Sample) -> Image.Image:
    return dataclasses.replace(drawn, size=SIDE).image()
