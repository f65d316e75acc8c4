"""How large and how small an image may be, encoded and decoded."""

from typing import Annotated

from pydantic import Field, PositiveInt

from flashvl.config import StrictModel

PILLOW_MAX_PIXELS = 178_956_970
"""Pillow's own limit, twice `Image.MAX_IMAGE_PIXELS`; changing it affects the whole process."""


class ImageLimits(StrictModel):
    """Bounds of an image's size, checked before its pixels are decoded."""

    max_image_bytes: PositiveInt = 32 * 2**20
    """Size of an encoded image in bytes, at most."""
    max_image_pixels: Annotated[int, Field(gt=0, le=PILLOW_MAX_PIXELS)] = 50_000_000
    """Width x height of an image in pixels, at most; a decoded copy takes 3 or 4 bytes a pixel."""
    max_image_side: PositiveInt = 16_384
    """Longer side of an image in pixels, at most."""
    min_image_side: PositiveInt = 2
    """Shorter side of an image in pixels, at least; 2 refuses the 1x1 images that web pages track
    readers with."""


DEFAULT_LIMITS = ImageLimits()
