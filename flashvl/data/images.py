"""Encoded bytes -> an upright RGB image within limits: the only place that decodes images.

It does not know where the bytes come from, nor what size the model wants.
"""

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image, UnidentifiedImageError
from pydantic import Field, PositiveInt

from flashvl.config import StrictModel
from flashvl.errors import ConfigError, DataError
from flashvl.model.rgb import orientation_of, to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""What is read. Each has a signature, runs no other program (EPS does), and gives its size before
it decodes a pixel (ICO and ICNS do not)."""

PILLOW_MAX_PIXELS = 178_956_970
"""Pillow's own limit, twice `Image.MAX_IMAGE_PIXELS`, which is the whole process's to change."""


Size = tuple[int, int]
"""(width, height)."""


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


def decode_image(data: bytes | None, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode one image of any of `FORMATS`; safe to call from many threads.

    EXIF orientation is applied, transparency lies on white, an animation gives its first frame, and
    16-bit, 32-bit and float grey is scaled to 8 bits. Colour profiles are not applied.

    Returns:
        A loaded RGB image without metadata.

    Raises:
        DataError: the bytes are missing, no such image, damaged, or outside `limits`.
    """
    return decode_reduced(data, lambda whole: whole, limits)[0]


def decode_reduced(
    data: bytes | None,
    least_size: Callable[[Size], Size],
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[Image.Image, Size]:
    """As `decode_image`, but a JPEG at a half, a quarter or an eighth of its size if that will do.

    A decoder that leaves out the finest frequencies is several times faster.

    Args:
        least_size: given the image's size, the least that it may be decoded at.

    Returns:
        The image, and the size that it has in full.
    """
    with _opened(data, limits) as image:
        size = _reduce_jpeg(image, least_size) if image.format == "JPEG" else None
        rgb = to_rgb(image)
    return rgb, size or rgb.size


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an encoded image says of itself."""

    media_type: str
    """As `image/jpeg`."""
    size: Size
    """Upright."""


def read_header(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> ImageHeader:
    """What can be known of an image before its pixels are decoded.

    Raises:
        DataError: as `decode_image`; but what is behind the header may be damaged all the same.
    """
    with _opened(data, limits) as image:
        size = image.size[::-1] if _lies_on_its_side(image) else image.size
        return ImageHeader(Image.MIME[image.format or ""], size)


@contextmanager
def _opened(data: bytes | None, limits: ImageLimits) -> Iterator[Image.Image]:
    """An image within limits, not decoded yet; what goes wrong with it is a DataError."""
    if not data:
        what = "null" if data is None else "empty"
        raise DataError(f"image is {what}; it must hold the bytes of an image file")
    if len(data) > limits.max_image_bytes:
        raise DataError(
            f"image has {len(data)} bytes, more than max_image_bytes={limits.max_image_bytes}; "
            "compress it or raise the limit"
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, limits)
            yield image
    except (DataError, MemoryError):  # out of memory is the machine's fault, not the row's
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"image is in no known format: its {len(data)} bytes begin with {data[:12]!r}; "
            f"give a whole file of {', '.join(FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"image is too large for Pillow ({_one_line(error)}); "
            f"shrink it to max_image_pixels={limits.max_image_pixels}"
        ) from error
    except Exception as error:  # bad bytes make Pillow raise nearly anything
        raise DataError(
            f"image cannot be decoded ({_one_line(error)}); replace the damaged file"
        ) from error


def read_image(path: Path) -> Image.Image:
    """The image in a file that a user named.

    Raises:
        ConfigError: the file cannot be read.
        DataError: it holds no image; see `decode_image`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"image {path} cannot be read ({error.strerror}); name an image file"
        ) from None
    return decode_image(data)


def make_thumbnail(image: Image.Image, side: int) -> str:
    """A small JPEG of the image as a data URI, for a page that needs no other file."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _reduce_jpeg(image: Image.Image, least_size: Callable[[Size], Size]) -> Size:
    """Have `image` decoded at a fraction of its size, if any; returns its whole, upright size."""
    width, height = image.size
    if _lies_on_its_side(image):
        least_height, least_width = least_size((height, width))
        size = (height, width)
    else:
        least_width, least_height = least_size((width, height))
        size = (width, height)
    image.draft(None, (least_width, least_height))
    return size


def _lies_on_its_side(image: Image.Image) -> bool:
    return orientation_of(image) in (5, 6, 7, 8)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    size = f"image is {width}x{height} pixels"
    if width * height > limits.max_image_pixels:
        raise DataError(
            f"{size}, {width * height} in all, "
            f"more than max_image_pixels={limits.max_image_pixels}; shrink it or raise the limit"
        )
    if max(width, height) > limits.max_image_side:
        raise DataError(
            f"{size}, longer than max_image_side={limits.max_image_side}; "
            "shrink it or raise the limit"
        )
    if min(width, height) < limits.min_image_side:
        raise DataError(
            f"{size}, shorter than min_image_side={limits.min_image_side}; "
            "leave it out or lower the limit"
        )


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
