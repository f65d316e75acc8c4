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
"""Formats that are read. Each has a signature, runs no other program (EPS does), and gives its size
before a pixel is decoded (ICO and ICNS do not). HEIF needs the extra `heif`."""

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
        DataError: the bytes are missing, damaged, not an image of `FORMATS`, or outside `limits`.
    """
    return decode_reduced(data, lambda whole: whole, limits)[0]


def decode_reduced(
    data: bytes | None,
    least_size: Callable[[Size], Size],
    limits: ImageLimits = DEFAULT_LIMITS,
) -> tuple[Image.Image, Size]:
    """Like `decode_image`, but a JPEG may be decoded at a half, a quarter or an eighth of its size.

    Leaving out the finest frequencies makes decoding several times faster.

    Args:
        least_size: upright size of the whole image -> the least size that suffices.

    Returns:
        The image, and its whole size.
    """

    def decode(image: Image.Image) -> tuple[Image.Image, Size]:
        size = _reduce_jpeg(image, least_size) if image.format == "JPEG" else None
        declared = image.size
        image.load()
        if image.size != declared:  # a HEIF may have other pixels than its header says
            raise DataError(
                f"image has {image.width}x{image.height} pixels where its header says"
                f" {declared[0]}x{declared[1]}; replace the damaged file"
            )
        rgb = to_rgb(image)
        return rgb, size or rgb.size

    return _with_image(data, limits, decode)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an encoded image says about itself."""

    media_type: str
    """Media type, such as `image/jpeg`."""
    size: Size
    """Size in pixels, turned upright."""


def read_header(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> ImageHeader:
    """What can be known of an image before its pixels are decoded.

    Raises:
        DataError: as in `decode_image`, except for damage that only decoding would find.
    """

    def read(image: Image.Image) -> ImageHeader:
        media_type = Image.MIME.get(image.format or "", "image/heif")
        if image.format == "PNG":
            # Pillow's `getexif` of a PNG decodes all pixels, as EXIF may come after them.
            told, bare = Image.new("L", (1, 1)), strip_metadata(data)
            told.info = image.info | (bare.info if bare else {})
            return ImageHeader(media_type, _turned(image.size, orientation_of(told)))
        return ImageHeader(media_type, _upright_size(image))

    return _with_image(data, limits, read)


def _with_image(data: bytes | None, limits: ImageLimits, use: Callable[[Image.Image], T]) -> T:
    """What `use` returns for the opened image, which is within `limits` and not decoded yet.

    If `use` fails, it is called again without the file's metadata: Pillow refuses files for damage
    that no pixel depends on. Pillow's own limits and its tolerance of damage are settings of the
    whole process, so they are left alone.

    Raises:
        DataError: anything goes wrong with the image.
    """
    if not data:
        what = "null" if data is None else "empty"
        raise DataError(f"image is {what}; it must hold the bytes of an image file")
    if len(data) > limits.max_image_bytes:
        raise DataError(
            f"image has {len(data)} bytes, more than max_image_bytes={limits.max_image_bytes}; "
            "compress it or raise max_image_bytes"
        )
    try:
        return _use_image(data, {}, limits, use)
    except (DataError, MemoryError):  # out of memory is the machine's fault, not the row's
        raise
    except Exception as error:  # bad bytes make Pillow raise nearly anything
        try:
            if isinstance(data, bytes) and (repaired := _repair(data, limits)):
                return _use_image(repaired.data, repaired.info, limits, use)
        except (DataError, MemoryError):
            raise
        except Exception:  # not only the metadata is damaged
            pass
        raise _explain(error, data) from error


def _repair(data: bytes, limits: ImageLimits) -> BareFile | None:
    """The file without its metadata and, if it is a JPEG whose pixels are complete, with its end
    mark; None if neither changes it."""
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
    """The opened image, none of its pixels decoded."""
    file = io.BytesIO(data)
    if data.startswith(JPEG_SIGNATURE):
        # `Image.open` would read an index of further pictures, and warn if that is damaged.
        return JpegImageFile(file)
    if _is_heif(data):
        return _open_heif(file)
    return Image.open(file, formats=[name for name in FORMATS if name != "HEIF"])


def _is_heif(data: bytes) -> bool:
    """Whether the brands at the beginning of an ISO media file say HEIF, and not AVIF."""
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
            "image is HEIF (HEIC), which needs pillow-heif; pip install 'flashvl[heif]'"
        ) from None
    # Not registered with Pillow, which would change `Image.open` for the whole process.
    return HeifImageFile(file)


def read_image(path: Path) -> Image.Image:
    """The image in a file that a user named.

    Raises:
        ConfigError: the file cannot be read.
        DataError: it holds no usable image, as in `decode_image`.
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
    """Make `image` decode at a fraction of its size if possible; returns its whole upright size."""
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
            f"more than max_image_pixels={limits.max_image_pixels}; "
            "shrink it or raise max_image_pixels"
        )
    if max(width, height) > limits.max_image_side:
        raise DataError(
            f"{size}, longer than max_image_side={limits.max_image_side}; "
            "shrink it or raise max_image_side"
        )
    if min(width, height) < limits.min_image_side:
        raise DataError(
            f"{size}, shorter than min_image_side={limits.min_image_side}; "
            "leave it out or lower min_image_side"
        )
