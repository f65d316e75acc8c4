"""An image of Pillow in any mode -> the upright 8-bit RGB image on white that the model is shown.

It does not know where an image comes from, nor what size the model wants.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that turns such an image upright."""

_GREY_16_TO_8 = np.rint(np.arange(65536) / 257).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image without metadata; `image` itself is loaded, but not changed.

    EXIF orientation is applied, transparency is laid on white, an animation gives its current
    frame, and 16-bit, 32-bit and float grey is scaled to 8 bits. Colour profiles are not applied.
    """
    image.load()  # first, since a PNG may have its EXIF after the pixels
    turn = _TURNS.get(orientation_of(image))
    rgb = _convert(image)
    rgb.info.clear()  # EXIF, XMP and profiles would be pickled with every copy
    return rgb if turn is None else rgb.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if none can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # invalid EXIF makes Pillow raise nearly anything
        return 1
    return orientation if orientation in _TURNS else 1


def _convert(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_8bit(image).convert("RGB")
    if image.mode == "LAB":  # Image.convert cannot convert it
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is None only after a conversion in place
        return converted
    if image.has_transparency_data:
        # Image.convert cannot convert La to RGBA.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba)
        return canvas
    return image.convert("RGB")


def _grey_to_8bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled to 8; `Image.convert` would clip it at 255."""
    values: npt.NDArray[Any] = np.asarray(image)
    if image.mode in ("I", "F"):
        return Image.fromarray(_scale(values))
    grey = _GREY_16_TO_8[values]
    if "transparency" in image.info:  # a PNG's one grey that means transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _scale(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """int32 or float32 grey -> 8 bits, although no file format defines its white.

    White is the least of 1, 255 and 65535 that no value exceeds. If a value is negative or greater,
    the range from the least to the greatest value is stretched instead. NaN is black.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    black, white = low, high
    if low >= 0 and high <= 65535:
        black, white = 0.0, next(nominal for nominal in (1.0, 255.0, 65535.0) if high <= nominal)
    # float64 holds the difference of any two float32
    scaled = np.nan_to_num(values.astype(np.float64), nan=black, posinf=white, neginf=black)
    scaled = (scaled - black) * (255 / ((white - black) or 1))
    return np.rint(scaled).astype(np.uint8)
