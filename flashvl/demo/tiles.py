"""Drawings of how an image is cut into tiles, in the manner of the paper's Figures 3 and 4.

They have no geometry of their own: they show the tiles of `Tiling.views`, which the image processor
cuts, and the patches of `Tiling.dropped_patches`, which the model drops.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from flashvl.data.images import read_image
from flashvl.errors import ConfigError
from flashvl.model.tiling import Box, Size, Tiling, View, describe_tiles

Color = tuple[int, int, int]

TITLES = {
    "static": "Static",
    "dynamic": "Dynamic tiling",
    "overlap": "Overlapping tiles",
    "iss": "Implicit Semantic Stitching",
}
PAPER: Color = (250, 250, 248)
INK: Color = (28, 32, 40)
FAINT: Color = (104, 110, 122)
WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)
KEPT: Color = (18, 170, 80)
REPEATED: Color = (255, 150, 0)
VEIL: Color = (202, 202, 202)
OVERVIEW: Color = (72, 78, 92)
GRID: tuple[Color, ...] = (
    (38, 106, 246),
    (232, 62, 62),
    (150, 66, 214),
    (0, 150, 170),
    (214, 64, 150),
    (120, 100, 20),
)
"""Colours of the grid's tiles in their order, repeated after the last."""

MARGIN, GAP = 44, 28
OUTLINE = 4
TILE_SIDE = 288
"""Longest side of a tile drawn by itself; its patches have whole pixels."""
TILES_A_ROW = 5
SHEET: Size = (900, 704)
"""Largest width and height of the framed image."""
LEGEND_WIDTH = 560


def write_tiles(image: Path, output: Path, rule: Tiling, image_seq_length: int) -> dict[str, Any]:
    """Draw the tiles of an image file into the PNG file `output`.

    Returns:
        The numbers of `describe_tiles`.

    Raises:
        ConfigError: `image` cannot be read, or `output` cannot be written.
        DataError: `image` is not an image.
    """
    decoded = read_image(image)
    try:
        draw_tiles(decoded, rule, image_seq_length).save(output, "PNG")
    except OSError as error:
        raise ConfigError(
            f"output {output} cannot be written ({error.strerror}); name another file"
        ) from None
    return describe_tiles(decoded.size, rule, image_seq_length)


def draw_tiles(image: Image.Image, rule: Tiling, image_seq_length: int) -> Image.Image:
    """Draw the framed image with its tiles, a legend, and each tile with the patches that are kept.

    An image of one tile becomes that tile, drawn large, and the legend.

    Args:
        image: RGB.
        image_seq_length: tokens that the LLM gets for each tile.

    Returns:
        An RGB picture; with a grid of up to four tiles it is at most 1,640 pixels wide.
    """
    sheet = _draw_sheet(image, rule, image_seq_length)
    legend = _draw_legend(image, rule, image_seq_length, sheet.height)
    top_width = sheet.width + 2 * GAP + legend.width
    top_height = max(sheet.height, legend.height)
    strip = _draw_strip(_draw_tiles(image, rule, image_seq_length))
    size = max(top_width, strip.width), top_height + strip.height
    page = Image.new("RGB", (size[0] + 2 * MARGIN, size[1] + 2 * MARGIN), PAPER)
    page.paste(sheet, (MARGIN, MARGIN))
    page.paste(legend, (MARGIN + sheet.width + 2 * GAP, MARGIN))
    page.paste(strip, (MARGIN, MARGIN + top_height))
    return page


def draw_tile(tile: Image.Image, rule: Tiling, image_seq_length: int) -> Image.Image:
    """Draw a tile: kept patches in colour and grouped into tokens, dropped patches in grey.

    Args:
        tile: RGB; its side is a multiple of the patches on it.
        image_seq_length: tokens that the LLM gets for the tile.
    """
    cell = tile.width * rule.patch_size // rule.tile_size
    drawn = _veil(tile)
    _draw_lines(drawn, (0, 0, *tile.size), cell, WHITE, 0.4)
    first, last = rule.dropped_patches * cell, (rule.dropped_patches + rule.kept_patches) * cell
    kept = (first, first, last, last)
    drawn.paste(tile.crop(kept), kept)
    _draw_lines(drawn, kept, cell, WHITE, 0.25)
    _draw_lines(drawn, kept, cell * _patches_a_token(rule, image_seq_length), KEPT, 0.6)
    _draw_outline(drawn, kept, KEPT, 2)
    return drawn


def _patches_a_token(rule: Tiling, image_seq_length: int) -> int:
    """Patches along each side of a token, which is a square of patches."""
    return rule.kept_patches // math.isqrt(image_seq_length)


def _grid_views(size: Size, rule: Tiling) -> tuple[View, ...]:
    """The views of the grid, without the overview."""
    cols, rows = rule.grid(size)
    views = rule.views(size)
    return views[1:] if rule.num_tiles(size) > cols * rows else views


def _draw_sheet(image: Image.Image, rule: Tiling, image_seq_length: int) -> Image.Image:
    """Draw the resized and framed image, its patches, and the outlines of the grid's tiles."""
    cols, rows = rule.grid(image.size)
    views = _grid_views(image.size, rule)
    if rule.tile_fit == "center_crop":
        return _draw_parts(image, views)
    (view,) = views
    width, height = ((side + 2 * view.frame) // rule.patch_size for side in view.resized)
    cell = max(min(SHEET[0] // width, SHEET[1] // height), 1)
    sheet, boxes = _framed(image, view, rule, cell)
    if cols * rows == 1:
        return draw_tile(sheet, rule, image_seq_length)
    if rule.mode == "overlap":
        _hatch(sheet, _overlaps(boxes))
    _draw_lines(sheet, (0, 0, *sheet.size), cell, WHITE, 0.2)
    dropped = rule.dropped_patches * cell
    for left, top, right, bottom in boxes if dropped else ():
        kept = (left + dropped, top + dropped, right - dropped, bottom - dropped)
        _draw_outline(sheet, kept, KEPT, 2)
    for index, (left, top, right, bottom) in enumerate(boxes):
        # Edges of overlapping tiles lie on one line: every second tile's is drawn beside it.
        is_inner = rule.stride < rule.tile_size and (index % cols + index // cols) % 2
        inset = OUTLINE if is_inner else 0
        inner = (left + inset, top + inset, right - inset, bottom - inset)
        _draw_outline(sheet, inner, _color(index), OUTLINE)
    for index, box in enumerate(boxes):
        _draw_number(sheet, box, index)
    return sheet


def _draw_parts(image: Image.Image, views: tuple[View, ...]) -> Image.Image:
    """Draw the image with the squares that become tiles, and the rest of it in grey."""
    scale = min(SHEET[0] / image.width, SHEET[1] / image.height)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    sheet = _veil(resized)
    for index, view in enumerate(views):
        left, top, right, bottom = (round(side * scale) for side in view.source)
        box = (left, top, max(right, left + 1), max(bottom, top + 1))
        sheet.paste(resized.crop(box), box)
        _draw_outline(sheet, box, _color(index), OUTLINE)
        _draw_number(sheet, box, index)
    return sheet


def _draw_strip(tiles: list[Image.Image]) -> Image.Image:
    """Draw the tiles in rows under a heading; one tile alone makes an empty picture."""
    if len(tiles) == 1:
        return Image.new("RGB", (0, 0))
    step_x, step_y = tiles[0].width + GAP, tiles[0].height + GAP
    num_rows, num_cols = math.ceil(len(tiles) / TILES_A_ROW), min(len(tiles), TILES_A_ROW)
    top = 3 * GAP
    strip = Image.new("RGB", (num_cols * step_x - GAP, top + num_rows * step_y - GAP), PAPER)
    heading = "What the LLM gets, in this order"
    _write(strip, (0, 2 * GAP - 4), heading, 24, bold=True, anchor="lm")
    for index, tile in enumerate(tiles):
        row, col = divmod(index, TILES_A_ROW)
        strip.paste(tile, (col * step_x, top + row * step_y))
    return strip


def _draw_tiles(image: Image.Image, rule: Tiling, image_seq_length: int) -> list[Image.Image]:
    """Draw each tile by itself, in the LLM's order, with its number of tokens below it."""
    cell = max(TILE_SIDE * rule.patch_size // rule.tile_size, 1)
    cols, rows = rule.grid(image.size)
    index = cols * rows - rule.num_tiles(image.size)  # -1 for the overview
    pictures = []
    for view in rule.views(image.size):
        framed, boxes = _framed(image, view, rule, cell)
        if rule.mode == "overlap":
            _hatch(framed, _overlaps(boxes))
        for box in boxes:
            name = "overview" if index < 0 else f"tile {index + 1}"
            color = OVERVIEW if index < 0 else _color(index)
            tile = ImageOps.expand(
                draw_tile(framed.crop(box), rule, image_seq_length), border=OUTLINE, fill=color
            )
            picture = ImageOps.expand(tile, border=(0, 0, 0, 36), fill=PAPER)
            middle = tile.height + 22
            _write(picture, (0, middle), name, 20, color, bold=True, anchor="lm")
            tokens = f"{image_seq_length:,} tokens"
            _write(picture, (tile.width, middle), tokens, 20, anchor="rm")
            pictures.append(picture)
            index += 1
    return pictures


def _draw_legend(
    image: Image.Image, rule: Tiling, image_seq_length: int, height: int
) -> Image.Image:
    """Draw a title, the number of tokens, sizes, the meaning of the marks, and the original image.

    Args:
        height: least height in pixels.
    """
    num_tiles, (cols, rows) = rule.num_tiles(image.size), rule.grid(image.size)
    view = rule.views(image.size)[-1]
    num_patches, group = rule.tile_size // rule.patch_size, _patches_a_token(rule, image_seq_length)
    tokens = f"{num_tiles * image_seq_length:,}"

    overview = "an overview and " if num_tiles > cols * rows else ""
    grid = f"{cols} x {rows} tiles" if cols * rows > 1 else "one tile"
    width, resized_height = view.resized if rule.tile_fit == "resize" else (0, 0)
    facts = [
        f"{overview}{grid}, {num_tiles} x {image_seq_length:,} tokens",
        f"image of {image.width:,} x {image.height:,} px"
        + (f", resized to {width:,} x {resized_height:,} px" if width else ""),
        f"tiles of {rule.tile_size} px ({num_patches} x {num_patches} patches)"
        + (f", one every {rule.stride} px" if cols * rows > 1 else ""),
    ]
    each = "each a token" if group == 1 else f"{group} x {group} of them a token"
    marks = [("kept", f"{rule.kept_patches} x {rule.kept_patches} patches kept, {each}")]
    if rule.dropped_patches:
        each_side = f"{rule.dropped_patches} on each side"
        marks.append(("dropped", f"patches dropped after the tower, {each_side}"))
    if view.frame and len(view.boxes) > 1:
        marks.append(("frame", f"black frame of {view.frame} px"))
    if len(view.boxes) > 1 and rule.stride < rule.tile_size and not rule.dropped_patches:
        marks.append(("repeated", "patches of several tiles, repeated"))

    marks_top = 176 + 30 * len(facts)
    bottom = marks_top + 42 * len(marks)
    legend = Image.new("RGB", (LEGEND_WIDTH, max(height, bottom)), PAPER)
    _write(legend, (0, 18), TITLES[rule.mode], 36, bold=True, anchor="lm")
    end = _write(legend, (0, 118), tokens, 76, KEPT, bold=True, anchor="ls")
    _write(legend, (end + 14, 118), "image tokens", 28, anchor="ls")
    for index, fact in enumerate(facts):
        _write(legend, (0, 156 + 30 * index), fact, 20, FAINT, anchor="lm")
    for index, (mark, text) in enumerate(marks):
        y = marks_top + 42 * index
        legend.paste(_draw_mark(mark), (0, y - 15))
        _write(legend, (46, y), text, 20, anchor="lm")

    room = legend.height - bottom - 36
    if room >= 100:
        original = image.copy()
        original.thumbnail((LEGEND_WIDTH, room), Image.Resampling.LANCZOS)
        legend.paste(original, (0, bottom))
        _write(legend, (0, legend.height - 14), "the image", 20, FAINT, anchor="lm")
    return legend


def _draw_mark(mark: str) -> Image.Image:
    """Draw the sample of a mark for the legend."""
    sample = Image.new("RGB", (31, 31), {"frame": BLACK, "dropped": VEIL}.get(mark, WHITE))
    if mark == "repeated":
        _hatch(sample, [(0, 0, *sample.size)])
    _draw_lines(sample, (0, 0, *sample.size), 10, WHITE if mark == "dropped" else FAINT, 0.4)
    if mark == "kept":
        _draw_lines(sample, (0, 0, *sample.size), 10, KEPT, 0.6)
    _draw_outline(sample, (0, 0, *sample.size), KEPT if mark == "kept" else FAINT, 2)
    return sample


# Pieces of a drawing


def _framed(
    image: Image.Image, view: View, rule: Tiling, cell: int
) -> tuple[Image.Image, list[Box]]:
    """The view's framed image and its boxes, with `cell` pixels for each patch's side."""

    def scaled(*pixels: int) -> Any:
        return tuple(value * cell // rule.patch_size for value in pixels)

    resized = image.resize(scaled(*view.resized), Image.Resampling.BICUBIC, box=view.source)
    framed = ImageOps.expand(resized, border=scaled(view.frame)[0], fill=BLACK)
    return framed, [scaled(*box) for box in view.boxes]


def _overlaps(boxes: list[Box]) -> list[Box]:
    """The boxes in which two of `boxes` overlap."""
    both = [
        (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
        for index, a in enumerate(boxes)
        for b in boxes[:index]
    ]
    return [box for box in both if box[0] < box[2] and box[1] < box[3]]


def _color(index: int) -> Color:
    return GRID[index % len(GRID)]


def _veil(image: Image.Image) -> Image.Image:
    """The image in pale grey."""
    return Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, VEIL), 0.65)


def _hatch(image: Image.Image, boxes: Iterable[Box]) -> None:
    """Draw slanted stripes over the boxes."""
    stripes = Image.new("L", image.size)
    draw = ImageDraw.Draw(stripes)
    for x in range(-image.height, image.width, 12):
        draw.line((x, image.height, x + image.height, 0), fill=150, width=3)
    mask = Image.new("L", image.size)
    for box in boxes:
        mask.paste(stripes.crop(box), box)
    image.paste(REPEATED, mask=mask)


def _draw_lines(image: Image.Image, box: Box, step: int, color: Color, opacity: float) -> None:
    """Draw lines between the box's cells, each of `step` pixels."""
    left, top, right, bottom = box
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    for x in range(left + step, right, step):
        draw.line((x, top, x, bottom - 1), fill=round(255 * opacity))
    for y in range(top + step, bottom, step):
        draw.line((left, y, right - 1, y), fill=round(255 * opacity))
    image.paste(color, mask=mask)


def _draw_outline(image: Image.Image, box: Box, color: Color, width: int) -> None:
    left, top, right, bottom = box
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), outline=color, width=width)


def _draw_number(image: Image.Image, box: Box, index: int) -> None:
    """Draw a disc with the tile's number in the middle of the box."""
    x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    draw = ImageDraw.Draw(image)
    draw.circle((x, y), 21, fill=_color(index), outline=WHITE, width=3)
    _write(image, (x, y), str(index + 1), 24, WHITE, bold=True, anchor="mm")


def _write(
    image: Image.Image,
    place: tuple[float, float],
    text: str,
    size: int,
    color: Color = INK,
    *,
    bold: bool = False,
    anchor: str = "la",
) -> float:
    """Write `text` with its `anchor`, by Pillow's names, at `place`; returns its width."""
    font = ImageFont.load_default(size)
    stroke = size / 40 if bold else 0
    ImageDraw.Draw(image).text(
        place, text, fill=color, font=font, anchor=anchor, stroke_width=stroke
    )
    return font.getlength(text)
