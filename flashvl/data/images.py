"""Encoded bytes -> an upright RGB image within limits: the only place that decodes images.

It does not know where the bytes come from, nor what size the model wants.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from flashvl.data.limits import DEFAULT_LIMITS, ImageLimits
from flashvl.data.salvage import JPEG_SIGNATURE, BareFile, Info, end_jpeg, strip_metadata
from flashvl.errors import ConfigError, DataError, one_line
from flashvl.model.rgb import orientation_of, to_rgb
from flashvl.model.tiling import Size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")
"""What is read. Each has a signature, runs no other program (EPS does), and gives its size before
it decodes a pixel (ICO and ICNS do not). HEIF takes the extra `heif`."""

HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
AVIF_BRANDS = frozenset((b"avif", b"avis"))

T = TypeVar("T")


def decode_image(data: bytes | None, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode one image of any of `FORMATS`; safe to call from many threads.

    EXIF orientation is applied, transparency lies on white, an animation gives its first frame, and
    16-bit, 32-bit and float grey is scaled to 8 bits. Colour profiles are not applied. Metadata
    that cannot be read counts as absent; pixels that are cut off or damaged are an error.

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

    def decode(image: Image.Image) -> tuple[Image.Image, Size]:
        size = _reduce_jpeg(image, least_size) if image.format == "JPEG" else None
        declared = image.size
        image.load()
        if image.size != declared:  # a HEIF's pixels need not be as many as its header says
            raise DataError(
                f"image has {image.width}x{image.height} pixels where its header says"
                f" {declared[0]}x{declared[1]}; replace the damaged file"
            )
        rgb = to_rgb(image)
        return rgb, size or rgb.size

    return _with_image(data, limits, decode)


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

    def read(image: Image.Image) -> ImageHeader:
        media_type = Image.MIME.get(image.format or "", "image/heif")
        if image.format == "PNG":
            # Its own `getexif` decodes all pixels, for what may come after them.
            told, bare = Image.new("L", (1, 1)), strip_metadata(data)
            told.info = image.info | (bare.info if bare else {})
            return ImageHeader(media_type, _turned(image.size, orientation_of(told)))
        return ImageHeader(media_type, _upright_size(image))

    return _with_image(data, limits, read)


def _with_image(data: bytes | None, limits: ImageLimits, use: Callable[[Image.Image], T]) -> T:
    """What `use` makes of an image that is within limits, and not decoded yet.

    If that fails, it is tried without the file's metadata: Pillow refuses a file for what no pixel
    depends on. Its limits, and whether it takes what is damaged, are settings of the process, which
    is not ours to change.

    Raises:
        DataError: whatever goes wrong with the image.
    """
    if not data:
        what = "null" if data is None else "empty"
        raise DataError(f"image is {what}; it must hold the bytes of an image file")
    if len(data) > limits.max_image_bytes:
        raise DataError(
            f"image has {len(data)} bytes, more than max_image_bytes={limits.max_image_bytes}; "
            "compress it or raise the limit"
        )
    try:
        return _use_image(data, {}, limits, use)
    except (DataError, MemoryError):  # out of memory is the machine's fault, not the row's
        raise
    except Exception as error:  # bad bytes make Pillow raise nearly anything
        try:
            if isinstance(data, bytes) and (mended := _mend(data, limits)):
                return _use_image(mended.data, mended.info, limits, use)
        except (DataError, MemoryError):
            raise
        except Exception:  # so it was not only the metadata
            pass
        raise _explain(error, data) from error


def _mend(data: bytes, limits: ImageLimits) -> BareFile | None:
    """A file that Pillow does not take, without its metadata and, if a JPEG's pixels are all there,
    with its end mark; None where there is nothing to be done."""
    bare = strip_metadata(data)
    ends = end_jpeg(bare.data if bare else data)
    if not ends:
        return bare
    pixels = [_use_image(end, {}, limits, lambda image: to_rgb(image).tobytes()) for end in ends]
    return BareFile(data=ends[0], info=bare.info if bare else {}) if len(set(pixels)) == 1 else None


def _use_image(data: bytes, info: Info, limits: ImageLimits, use: Callable[[Image.Image], T]) -> T:
    try:
        with _open(data) as image:
            _check_size(image.width, image.height, limits)
            image.info |= info
            return use(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"image is too large for Pillow ({type(error).__name__}: {one_line(error)}); "
            f"shrink it to max_image_pixels={limits.max_image_pixels}"
        ) from error


def _explain(error: Exception, data: bytes) -> DataError:
    if isinstance(error, UnidentifiedImageError):
        return DataError(
            f"image is in no known format: its {len(data)} bytes begin with {data[:12]!r}; "
            f"give a whole file of {', '.join(FORMATS)}"
        )
    reason = f"{type(error).__name__}: {one_line(error)}"
    return DataError(f"image cannot be decoded ({reason}); replace the damaged file")


def _open(data: bytes) -> Image.Image:
    """An image of which no pixel is decoded."""
    file = io.BytesIO(data)
    if data.startswith(JPEG_SIGNATURE):
        # Pillow's own opener reads an index of further pictures, and warns where it is damaged.
        return JpegImageFile(file)
    if _is_heif(data):
        return _open_heif(file)
    return Image.open(file, formats=[name for name in FORMATS if name != "HEIF"])


def _is_heif(data: bytes) -> bool:
    """Whether the brands that an ISO media file begins with say HEIF, and not AVIF."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    brands = {data[8:12], *(data[place : place + 4] for place in range(16, end, 4))}
    return bool(brands & HEIF_BRANDS) and not brands & AVIF_BRANDS


def _open_heif(file: io.BytesIO) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise DataError(
            "image is HEIF (HEIC), which takes pillow-heif; install it: pip install 'flashvl[heif]'"
        ) from None
    # Not registered with Pillow: what `Image.open` reads in this process is not ours to say.
    return HeifImageFile(file)


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
    size = _upright_size(image)
    least = least_size(size)
    image.draft(None, least if size == image.size else least[::-1])
    return size


def _upright_size(image: Image.Image) -> Size:
    if image.format in ("TIFF", "HEIF"):  # their readers turn the size before the pixels
        return image.size
    return _turned(image.size, orientation_of(image))


def _turned(size: Size, orientation: int) -> Size:
    return size[::-1] if orientation >= 5 else size


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
