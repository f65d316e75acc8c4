"""Images for tests of every part, and their forms: files, base64, data URLs."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def noise(seed: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """An RGB image of random pixels; `size` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def blobs(seed: int) -> Image.Image:
    """Sixteen blobs of colour, 60 to 89 x 50 pixels: no two seeds look alike to a model."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((60 + seed % 30, 50))


def encode(image: Image.Image | np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file; `options` are Pillow's for the format."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    # A copy, as an image that was saved keeps its encoder's settings.
    image.copy().save(file, file_format, **options)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64_of(data)}"
