"""A picture of some rows of a table: each row's first image, question and answer."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from flashvl.data.images import decode_image
from flashvl.data.inspection import whole_conversation
from flashvl.data.schema import IMAGE_MARKER
from flashvl.errors import ConfigError, DataError

NUM_COLUMNS, NUM_LINES = 4, 3
"""Rows of the table side by side, and one below the other."""
WIDTH, PICTURE_HEIGHT, TEXT_HEIGHT, MARGIN = 300, 220, 150, 12
"""Pixels of a cell: its width, the heights of its two parts, and the space around it."""
FONT_SIZE, LINE_HEIGHT, NUM_CHARACTERS = 14, 18, 42
"""Pixels of the letters and of a line of them, and characters that fit into a line."""
INK, QUIET, PAPER, CARD = (32, 33, 36), (95, 99, 104), (255, 255, 255), (241, 243, 244)


def draw_sheet(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """The sheet of rows at even distances among `rows`, those with images first.

    Args:
        rows: rows of a table that training reads.
    """
    pictured = [row for row in rows if row["images"]] or list(rows)
    most = NUM_COLUMNS * NUM_LINES
    chosen = [pictured[n * len(pictured) // most] for n in range(min(most, len(pictured)))]
    if len(pictured) <= most:
        chosen = pictured
    num_lines = max(-(-len(chosen) // NUM_COLUMNS), 1)
    height = PICTURE_HEIGHT + TEXT_HEIGHT
    size = (
        NUM_COLUMNS * (WIDTH + MARGIN) + MARGIN,
        num_lines * (height + MARGIN) + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    for number, row in enumerate(chosen):
        left = MARGIN + number % NUM_COLUMNS * (WIDTH + MARGIN)
        top = MARGIN + number // NUM_COLUMNS * (height + MARGIN)
        _draw_row(sheet, row, left, top)
    return sheet


def write_sheet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the sheet as a PNG file.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        draw_sheet(rows).save(path, "PNG")
    except OSError as error:
        raise ConfigError(
            f"sheet {path} cannot be written ({error.strerror}); name another file"
        ) from None


def _draw_row(sheet: Image.Image, row: dict[str, Any], left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left, top, left + WIDTH, top + PICTURE_HEIGHT + TEXT_HEIGHT), fill=CARD)
    images = row["images"]
    if images:
        try:
            picture = decode_image(images[0])
        except DataError as error:
            _write(draw, f"unusable: {error}", left, top + MARGIN, QUIET, 6)
        else:
            picture.thumbnail((WIDTH, PICTURE_HEIGHT), Image.Resampling.LANCZOS)
            place = (
                left + (WIDTH - picture.width) // 2,
                top + (PICTURE_HEIGHT - picture.height) // 2,
            )
            sheet.paste(picture, place)
    else:
        _write(draw, "no image", left, top + PICTURE_HEIGHT // 2, QUIET, 1)
    messages = whole_conversation(row)
    question = next((each["content"] for each in messages if each["role"] == "user"), "")
    answer = next((each["content"] for each in messages if each["role"] == "assistant"), "")
    more = f", {len(images)} images" if len(images) > 1 else ""
    more += f", {len(messages)} turns" if len(messages) > 2 else ""
    top += PICTURE_HEIGHT + MARGIN // 2
    top = _write(draw, f"row {row['row']}{more}", left, top, QUIET, 1)
    top = _write(draw, question.replace(IMAGE_MARKER, " ").strip(), left, top, QUIET, 3)
    _write(draw, answer, left, top, INK, 3)


def _write(
    draw: ImageDraw.ImageDraw,
    text: str,
    left: int,
    top: int,
    color: tuple[int, int, int],
    num_lines: int,
) -> int:
    """Write some lines of a text; returns the place below them."""
    font = ImageFont.load_default(FONT_SIZE)
    text = " ".join(text.split())[: NUM_CHARACTERS * (num_lines + 1)]
    lines = textwrap.wrap(text, NUM_CHARACTERS, max_lines=num_lines, placeholder=" ...")
    for line in lines:
        draw.text((left + MARGIN // 2, top), line, fill=color, font=font)
        top += LINE_HEIGHT
    return top
