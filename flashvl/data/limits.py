"""How large and how small an image may be, encoded and decoded."""

from typing import Annotated

from pydantic import Field, PositiveInt

from flashvl.config import StrictModel

PILLOW_MAX_PIXELS = 178_956_970
"""Pillow's own limit, twice `Image.MAX_IMAGE_PIXELS`; changing it affects the whole process."""


class ImageLimits(StrictModel):
    """Bounds of an image's size, checked before its pixels are decoded."""

    max_image_bytes: PositiveInt = 32 * 2**20
    """Largest encoded size, in bytes."""
    max_image_pixels: Annotated[int, Field(gt=0, le=PILLOW_MAX_PIXELS)] = 50_000_000
    """Largest width x height; a decode takes 3 or 4 bytes of memory a pixel for each copy."""
    max_image_side: PositiveInt = 16_384
    """Longest side, in pixels."""
    min_image_side: PositiveInt = 2
    """Shortest side, in pixels; 2 refuses the 1x1 images by which web pages track readers."""


DEFAULT_LIMITS = ImageLimits()
