"""The Hugging Face processor gives the same pixels as the engine, for images of every mode."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvl.data.images import decode_image
from flashvl.model import FlashVLImageProcessor
from flashvl.model.rgb import orientation_of, to_rgb
from tests.support.images import encode

RNG = np.random.default_rng(0)
RGBA = Image.fromarray(RNG.integers(0, 256, (31, 45, 4), np.uint8))
RGB = RGBA.convert("RGB")
GREY = RNG.integers(0, 65536, (31, 45)).astype(np.uint16)
PROCESSOR = FlashVLImageProcessor(size={"height": 32, "width": 32}, resample=2)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PICTURES: dict[str, bytes] = {
    "RGB": encode(RGB),
    "RGBA": encode(RGBA),
    "RGBA WebP": encode(RGBA, "WEBP", lossless=True),
    "RGBA AVIF": encode(RGBA, "AVIF"),
    "LA": encode(RGBA.convert("LA")),
    "1": encode(RGB.convert("1")),
    "1, one transparent": encode(RGB.convert("1"), transparency=0),
    "L, one transparent": encode(
        RGB.convert("L"), transparency=int(RGB.convert("L").getpixel((3, 3)))
    ),
    "RGB, one transparent": encode(RGB, transparency=RGB.getpixel((3, 3))),
    "P": encode(RGB.quantize(64)),
    "P, one transparent": encode(RGB.quantize(64), transparency=5),
    "P, all partly transparent": encode(RGB.quantize(64), transparency=bytes(range(64))),
    "P of RGBA": encode(RGBA.quantize(64)),
    "GIF": encode(RGB.quantize(64), "GIF", transparency=5),
    "16-bit": encode(Image.fromarray(GREY)),
    "16-bit, one transparent": encode(Image.fromarray(GREY), transparency=int(GREY[3, 3])),
    "16-bit, big-endian": encode(Image.fromarray(GREY.astype(">u2")), "TIFF"),
    "32-bit": encode(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "float": encode(Image.fromarray(GREY.astype(np.float32) / 65535), "TIFF"),
    "CMYK": encode(RGB.convert("CMYK"), "TIFF"),
    "CMYK JPEG": encode(RGB.convert("CMYK"), "JPEG"),
    "YCbCr": encode(RGB.convert("YCbCr"), "TIFF"),
    "LAB": encode(Image.merge("LAB", RGB.split()), "TIFF"),
    "turned PNG": encode(RGBA, exif=turned(5)),
    "turned WebP": encode(RGBA, "WEBP", exif=turned(7), lossless=True),
    "turned TIFF": encode(RGB, "TIFF", exif=turned(6)),
    "turned 16-bit": encode(Image.fromarray(GREY), exif=turned(8)),
    **{f"turned {n}": encode(RGB, "JPEG", exif=turned(n)) for n in range(1, 9)},
    "turned by nonsense": encode(RGB, "JPEG", exif=turned(77)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_pil_image_gives_the_engines_pixels(name: str, tmp_path: Path) -> None:
    data = PICTURES[name]
    expected = PROCESSOR.cut_tiles(decode_image(data))
    opened, loaded = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    loaded.load()
    path = tmp_path / "picture"
    path.write_bytes(data)
    for image in (opened, loaded, PROCESSOR.fetch_images([str(path)])[0]):
        pixels = PROCESSOR(image, do_rescale=False, do_normalize=False, return_tensors="np")
        np.testing.assert_array_equal(pixels["pixel_values"], expected)


MODES = "1 L P RGB RGBA RGBX CMYK YCbCr LAB HSV I F LA PA RGBa La I;16 I;16L I;16B I;16N".split()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (5, 3))
    image.info["exif"] = turned(6).tobytes()
    before = image.copy()
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size, rgb.info) == ("RGB", (3, 5), {})
    assert (image.mode, image.size, image.tobytes()) == (mode, (5, 3), before.tobytes())
    assert orientation_of(image) == 6
    # An empty picture is black wherever it is opaque and black is zero.
    seen = rgb.getpixel((0, 0))
    if mode in ("RGBA", "LA", "PA", "RGBa", "La", "CMYK"):
        assert seen == (255, 255, 255)
    elif mode not in ("YCbCr", "LAB"):
        assert seen == (0, 0, 0)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0garbage", b"\xff" * 40], ids=repr)
def test_exif_that_cannot_be_read_counts_as_absent(exif: bytes) -> None:
    image = RGB.copy()
    image.info["exif"] = exif
    assert orientation_of(image) == 1
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(RGB))
