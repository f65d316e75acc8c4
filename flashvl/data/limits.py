"""How large and how small an image may be."""

from typing import Annotated

from pydantic import Field, PositiveInt

from flashvl.config import StrictModel

PILLOW_MAX_PIXELS = 178_956_970
"""Pillow's own limit, twice `Image.MAX_IMAGE_PIXELS`, which is the whole process's to change."""


class ImageLimits(StrictModel):
    """What an image may be at most and at least; checked before its pixels are decoded."""

    max_image_bytes: PositiveInt = 32 * 2**20
    """Encoded size in bytes."""
    max_image_pixels: Annotated[int, Field(gt=0, le=PILLOW_MAX_PIXELS)] = 50_000_000
    """Width x height; bounds the memory of a decode, at 3 or 4 bytes a pixel for each copy."""
    max_image_side: PositiveInt = 16_384
    """The longer side in pixels."""
    min_image_side: PositiveInt = 2
    """The shorter side in pixels; 2 refuses the 1x1 images that web pages track readers with."""


DEFAULT_LIMITS = ImageLimits()
