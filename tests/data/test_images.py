"""Decoding: pictures come back as they were made; bad bytes raise `DataError` and nothing else."""

import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from flashvl.data import images
from flashvl.data.images import decode_image
from flashvl.data.limits import PILLOW_MAX_PIXELS, ImageLimits
from flashvl.errors import DataError
from flashvl.model import FlashVLImageProcessor
from tests.support.damage import png_chunk
from tests.support.images import encode, noise

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def flat(mode: str, color: Any, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new(mode, size, color)


def color_of(data: bytes) -> tuple[int, ...]:
    """The only colour of a picture."""
    pixels = np.asarray(decode_image(data)).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(int(value) for value in pixels[0])


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """An 8-bit grey PNG with any chunks, written by the specification, without Pillow."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


# Orientation

CORNERS = np.zeros((32, 64, 3), np.uint8)
CORNERS[:16, :32], CORNERS[:16, 32:] = RED, GREEN
CORNERS[16:, :32], CORNERS[16:, 32:] = BLUE, YELLOW

# Where row 0 and column 0 of the stored picture are shown, by the EXIF standard's words.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("HEIF", {"quality": -1, "chroma": 444}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    ],
)
def test_orientation_is_applied_once(
    orientation: int, file_format: str, options: dict[str, Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](CORNERS))
    upright = decode_image(encode(stored, file_format, exif=exif.tobytes(), **options))
    assert upright.size == (64, 32)
    assert np.abs(np.asarray(upright).astype(int) - CORNERS).max() <= 8
    assert 0x0112 not in upright.getexif()


def test_orientation_of_a_transparent_palette() -> None:
    indices = Image.fromarray(np.array([[0, 1, 2]], np.uint8).repeat(2, 0), "P")
    indices.putpalette([*RED, *GREEN, *BLUE])
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = decode_image(encode(indices, transparency=1, exif=exif))
    assert [upright.getpixel((x, 0)) for x in range(3)] == [BLUE, WHITE, RED]


# Modes

MODES = {
    "RGB": (encode(flat("RGB", (10, 20, 30))), (10, 20, 30)),
    "RGB JPEG2000": (encode(flat("RGB", (10, 20, 30)), "JPEG2000"), (10, 20, 30)),
    "RGB HEIF": (encode(flat("RGB", (10, 20, 30)), "HEIF", quality=-1), (10, 20, 30)),
    "grey HEIF": (encode(flat("L", 77), "HEIF", quality=-1), (77, 77, 77)),
    "RGB BMP": (encode(flat("RGB", (10, 20, 30)), "BMP"), (10, 20, 30)),
    "grey": (encode(flat("L", 77)), (77, 77, 77)),
    "1-bit black": (encode(flat("1", 0)), BLACK),
    "1-bit white": (encode(flat("1", 1)), WHITE),
    "palette": (encode(flat("RGB", RED).quantize(4)), RED),
    # Over white: (color * alpha + 255 * (255 - alpha)) / 255
    "grey, alpha 0": (encode(flat("LA", (0, 0))), WHITE),
    "grey, alpha 51": (encode(flat("LA", (0, 51))), (204, 204, 204)),
    "grey, key": (encode(flat("L", 9), transparency=9), WHITE),
    "1-bit, key": (encode(flat("1", 0), transparency=0), WHITE),
    "RGB, key": (encode(flat("RGB", RED), transparency=RED), WHITE),
    "RGB, other key": (encode(flat("RGB", RED), transparency=BLUE), RED),
    "RGBA 0": (encode(flat("RGBA", (*RED, 0))), WHITE),
    "RGBA 51": (encode(flat("RGBA", (*RED, 51))), (255, 204, 204)),
    "RGBA 255": (encode(flat("RGBA", (*RED, 255))), RED),
    "RGBA WebP": (encode(flat("RGBA", (*RED, 51)), "WEBP", lossless=True), (255, 204, 204)),
    "RGBA HEIF": (encode(flat("RGBA", (*RED, 51)), "HEIF", quality=-1), (255, 204, 204)),
    "RGBA TIFF": (encode(flat("RGBA", (*RED, 51)), "TIFF"), (255, 204, 204)),
    "palette, index": (encode(flat("RGB", RED).quantize(4), transparency=0), WHITE),
    "palette, table": (encode(flat("RGB", RED).quantize(4), transparency=b"\x33"), (255, 204, 204)),
    "GIF": (encode(flat("RGB", GREEN), "GIF"), GREEN),
    "GIF, index": (encode(flat("P", 0), "GIF", transparency=0), WHITE),
    # 255 - min(255, ink + black), the naive inks that JPEG viewers show
    "CMYK TIFF": (encode(flat("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "CMYK TIFF black": (encode(flat("CMYK", (0, 0, 0, 255)), "TIFF"), BLACK),
    "CMYK JPEG": (encode(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "CMYK JPEG none": (encode(flat("CMYK", (0, 0, 0, 0)), "JPEG", quality=100), WHITE),
    "YCbCr": (encode(flat("YCbCr", (76, 85, 255)), "TIFF"), (254, 0, 0)),  # BT.601 red
}


@pytest.mark.parametrize("name", MODES)
def test_modes(name: str) -> None:
    data, expected = MODES[name]
    assert np.abs(np.subtract(color_of(data), expected)).max() <= 1


def test_lab() -> None:
    # CIE L*a*b* of sRGB red under D50, as TIFF stores it: L scaled to 255, a and b signed.
    red = np.full((4, 4, 3), [round(54.29 * 2.55), 81, 70], np.uint8)
    color = color_of(encode(Image.fromarray(red, "LAB"), "TIFF"))
    assert np.abs(np.subtract(color, RED)).max() <= 6
    white = np.full((4, 4, 3), [255, 0, 0], np.uint8)
    assert min(color_of(encode(Image.fromarray(white, "LAB"), "TIFF"))) >= 254


RAMP_16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)
RAMP_8 = ((2 * RAMP_16.astype(np.int64) + 257) // 514).astype(np.uint8)  # v / 257 to the nearest


@pytest.mark.parametrize(
    "data",
    [
        encode(RAMP_16),
        encode(RAMP_16, "TIFF"),
        encode(Image.frombytes("I;16B", (256, 256), RAMP_16.astype(">u2").tobytes()), "TIFF"),
        encode(RAMP_16.astype(np.int32), "TIFF"),
        encode((RAMP_16 / 65535).astype(np.float32), "TIFF"),
        encode(RAMP_16.astype(np.float32), "TIFF"),
        encode(RAMP_16.astype(np.float32) * 1000 - 7e6, "TIFF"),
        encode(RAMP_16.astype(np.int32) - 30000, "TIFF"),
    ],
    ids=["png", "tiff", "big-endian", "int32", "unit", "float", "wide", "negative"],
)
def test_deep_grey_is_scaled_not_clipped(data: bytes) -> None:
    decoded = np.asarray(decode_image(data)).astype(int)
    assert np.abs(decoded - RAMP_8[:, :, None]).max() <= 1  # 1: float32 may round differently
    assert (decoded[0, 0] == 0).all() and (decoded[-1, -1] == 255).all()


def test_16_bit_grey_is_exact_and_its_key_is_white() -> None:
    assert (np.asarray(decode_image(encode(RAMP_16))) == RAMP_8[:, :, None]).all()
    keyed = np.asarray(decode_image(encode(RAMP_16, transparency=1000)))
    assert (keyed[1000 // 256, 1000 % 256] == 255).all()
    assert (keyed != RAMP_8[:, :, None]).any(axis=2).sum() == 1


def test_float_grey_that_is_not_a_number() -> None:
    grey = np.array([[np.nan, -np.inf, np.inf], [0.0, 0.5, 1.0]], np.float32)
    decoded = np.asarray(decode_image(encode(grey, "TIFF")))[:, :, 0]
    assert decoded.tolist() == [[0, 0, 255], [0, 128, 255]]
    for value in (np.nan, np.inf, -3e38, 3e38):
        decode_image(encode(np.full((2, 2), value, np.float32), "TIFF"))
    decode_image(encode(np.array([[-3e38, 3e38]] * 2, np.float32), "TIFF"))


def test_16_bit_color_keeps_its_high_byte() -> None:
    row = b"\x00" + struct.pack(">3H", 0xFFFF, 0x8000, 0x1234) * 2
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(row * 2))
    data = b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b"")
    assert color_of(data) == (0xFF, 0x80, 0x12)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "HEIF"])
def test_first_frame(file_format: str) -> None:
    rest = [flat("RGB", BLUE), flat("RGB", GREEN)]
    data = encode(flat("RGB", RED), file_format, save_all=True, append_images=rest)
    assert np.abs(np.subtract(color_of(data), RED)).max() <= 4


def test_result_is_a_plain_image_without_metadata() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    options = {"exif": exif, "icc_profile": b"profile" * 99, "comment": b"c"}
    decoded = decode_image(encode(noise(size=(16, 12)), "JPEG", **options))
    assert type(decoded) is Image.Image
    assert (decoded.mode, decoded.size, decoded.info) == ("RGB", (16, 12), {})
    assert not dict(decoded.getexif())


# Limits


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP"])
@pytest.mark.parametrize(
    ("limits", "rule"),
    [
        (ImageLimits(max_image_pixels=64 * 48 - 1), "64x48 pixels, 3072 in all.*_pixels=3071"),
        (ImageLimits(max_image_side=63), "64x48 pixels.*max_image_side=63"),
        (ImageLimits(min_image_side=49), "64x48 pixels.*min_image_side=49"),
    ],
)
def test_limits_come_before_pixels(file_format: str, limits: ImageLimits, rule: str) -> None:
    whole = encode(noise(size=(64, 48)), file_format)
    half = whole[: len(whole) // 2]
    # Half a file has no pixels to decode, but the error names the limit.
    with pytest.raises(DataError, match=rule):
        decode_image(half, limits)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(half)


def test_limits_are_inclusive() -> None:
    data = encode(noise(size=(64, 48)))
    limits = ImageLimits(
        max_image_bytes=len(data), max_image_pixels=64 * 48, max_image_side=64, min_image_side=48
    )
    assert decode_image(data, limits).size == (64, 48)
    with pytest.raises(DataError, match=f"{len(data)} bytes.*max_image_bytes={len(data) - 1}"):
        decode_image(data, limits.model_copy(update={"max_image_bytes": len(data) - 1}))


@pytest.mark.parametrize("size", [(10_000, 6_000), (10_000, 10_000), (60_000, 60_000)])
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_bombs_are_refused_by_their_header(size: tuple[int, int], action: Any) -> None:
    # 60 megapixels; a size that Pillow warns of; a size that Pillow refuses.
    few_pixels = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(DataError, match="max_image_pixels=50000000"):
            decode_image(png(*size, few_pixels))
    assert time.perf_counter() - start < 0.5


def test_a_bomb_inside_an_animation_is_refused() -> None:
    data = bytearray(encode(flat("P", 0), "GIF"))
    frame = data.index(b"\x2c", 13)  # the first frame's descriptor: left, top, width, height
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(DataError, match="max_image_pixels"):
        decode_image(bytes(data))


def test_the_default_refuses_tracking_pixels_only() -> None:
    with pytest.raises(DataError, match="1x1 pixels.*min_image_side=2"):
        decode_image(encode(flat("RGB", RED, (1, 1)), "GIF"))
    assert decode_image(encode(flat("RGB", RED, (2, 2)))).size == (2, 2)


def test_limits_that_cannot_be_kept_are_refused() -> None:
    assert PILLOW_MAX_PIXELS == 2 * (Image.MAX_IMAGE_PIXELS or 0)
    for wrong in ({"max_image_pixels": PILLOW_MAX_PIXELS + 1}, {"max_image_side": 0}):
        with pytest.raises(ValidationError):
            ImageLimits(**wrong)


# HEIF


def test_heif_is_known_by_its_brands() -> None:
    data = encode(noise(size=(64, 48)), "HEIF", quality=90)
    assert data[4:12] == b"ftypheic"
    expected = decode_image(data).tobytes()
    for brand in (
        b"mif1",
        b"heix",
        b"msf1",
        b"miaf",
    ):  # the brand that the file begins with; others follow
        assert decode_image(data[:8] + brand + data[12:]).tobytes() == expected
    assert images.read_header(data) == images.ImageHeader("image/heif", (64, 48))
    avif = encode(noise(size=(64, 48)), "AVIF")
    assert images.read_header(avif[:8] + b"mif1" + avif[12:]).media_type == "image/avif"


def test_heif_with_more_bits_keeps_its_high_ones() -> None:
    grey = Image.frombytes("I;16", (4, 2), np.full((2, 4), 0x8000, "<u2").tobytes())
    assert color_of(encode(grey, "HEIF", quality=-1)) == (128, 128, 128)


def test_heif_is_refused_in_one_line_where_its_library_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode(noise(size=(64, 48)), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for use in (decode_image, images.read_header):
        with pytest.raises(DataError, match=r"HEIF.*pip install 'flashvl\[heif\]'$"):
            use(data)
    decode_image(encode(noise(size=(64, 48))))


def test_a_heif_whose_header_lies_about_its_size_is_refused() -> None:
    """The size that was checked and cut into tiles must be the size that is decoded."""
    data = encode(noise(size=(64, 48)), "HEIF", quality=90)
    size = data.index(b"ispe") + 8
    for width, height in ((32, 24), (640, 480), (65_535, 65_535)):
        lying = data[:size] + struct.pack(">II", width, height) + data[size + 8 :]
        with pytest.raises(DataError, match="pixels|size"):
            decode_image(lying)


# Bad bytes


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "null"),
        (b"", "empty"),
        (b"this is not an image", "no known format.*b'this is not '.*JPEG, PNG"),
        ("a\nstring", "cannot be decoded .TypeError"),
        (b"\n\r\0" * 9, "no known format"),
        (b"<!DOCTYPE html><html></html>", "no known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no known format"),
        (b"%PDF-1.7\n", "no known format"),
        (encode(flat("RGB", RED), "EPS"), "no known format"),  # Pillow would run ghostscript
        (
            encode(flat("RGB", RED), "ICO"),
            "no known format",
        ),  # Pillow decodes it before its size is known
        (encode(flat("RGB", RED))[:20], "cannot be decoded"),
        (png(8, 8), "cannot be decoded"),
        (png(0, 8, png_chunk(b"IDAT", zlib.compress(bytes(9)))), "no known format"),
        (png(8, 8, png_chunk(b"IDAT", b"not deflated")), "cannot be decoded"),
    ],
)
def test_bad_bytes(data: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_running_out_of_memory_is_not_the_image_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(image: Image.Image) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", exhausted)
    with pytest.raises(MemoryError):
        decode_image(encode(flat("RGB", RED)))


# Any bytes

PICTURE = noise(size=(24, 18))
EXIF = Image.Exif()
EXIF[0x0112] = 6
VALID = [
    encode(PICTURE, "JPEG", exif=EXIF),
    encode(PICTURE, "JPEG", progressive=True, icc_profile=b"profile"),
    encode(PICTURE.convert("CMYK"), "JPEG"),
    encode(PICTURE, "PNG", exif=EXIF),
    encode(PICTURE.quantize(8), "PNG", transparency=b"\0\x40"),
    encode(PICTURE.convert("I").convert("I;16"), "PNG", transparency=5),
    encode(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
    encode(PICTURE.convert("RGBA"), "WEBP", exif=EXIF),
    encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)]),
    encode(PICTURE, "BMP"),
    encode(PICTURE, "TIFF", exif=EXIF),
    encode(PICTURE.convert("F"), "TIFF", compression="tiff_lzw"),
    encode(PICTURE.convert("YCbCr"), "TIFF", compression="tiff_deflate"),
    encode(PICTURE, "AVIF", exif=EXIF),
    encode(PICTURE, "JPEG2000"),
    encode(PICTURE, "HEIF", exif=EXIF.tobytes()),
    encode(PICTURE.convert("RGBA"), "HEIF"),
]
LIMITS = ImageLimits(max_image_pixels=40_000, max_image_side=1_000)


def check_outcome(data: bytes) -> None:
    """An RGB image within the limits, or a `DataError` of one line, and nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata
        try:
            image = decode_image(data, LIMITS)
        except DataError as error:
            assert len(str(error).splitlines()) == 1
            return
    assert image.mode == "RGB"
    assert image.width * image.height <= LIMITS.max_image_pixels
    assert LIMITS.min_image_side <= min(image.size) <= max(image.size) <= LIMITS.max_image_side
    assert len(image.tobytes()) == 3 * image.width * image.height


def test_the_files_below_are_valid() -> None:
    for data in VALID:
        assert decode_image(data, LIMITS).size in ((24, 18), (18, 24))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), start=st.sampled_from(VALID), kept=st.integers(0, 64))
def test_arbitrary_bytes(data: bytes, start: bytes, kept: int) -> None:
    check_outcome(data)
    check_outcome(start[:kept] + data)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), valid=st.sampled_from(VALID))
def test_damaged_files(data: st.DataObject, valid: bytes) -> None:
    damaged = bytearray(valid)
    # Half of the damage goes to the first bytes, where sizes and offsets are.
    places = st.integers(0, len(valid) - 1) | st.integers(0, min(len(valid), 200) - 1)
    for place in data.draw(st.lists(places, max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    check_outcome(bytes(damaged[: data.draw(places) + 1 if data.draw(st.booleans()) else None]))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("valid", VALID[:6] + VALID[7:8] + VALID[9:11])
def test_a_truncated_file_is_never_half_an_image(valid: bytes) -> None:
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        with pytest.raises(DataError):
            decode_image(valid[: int(len(valid) * share)], LIMITS)


def test_threads_agree_with_one_after_another() -> None:
    expected = [decode_image(data, LIMITS).tobytes() for data in VALID]
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda data: decode_image(data, LIMITS).tobytes(), VALID * 10))
    assert decoded == expected * 10


# JPEGs at a fraction of their size


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture with edges, like a photograph."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(columns / 37), np.cos(rows / 23), np.sin((rows + columns) / 51)], -1)
    pixels = (127 + 100 * waves).astype(np.uint8)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = RED
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_at_the_least_fraction_that_will_do(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(1600, 1200), "JPEG", exif=exif)
    whole = (1600, 1200) if orientation == 1 else (1200, 1600)
    for least, factor in ((1.0, 1), (0.51, 1), (0.5, 2), (0.3, 2), (0.25, 4), (0.01, 8)):
        wanted = (round(whole[0] * least), round(whole[1] * least))
        image, size = images.decode_reduced(data, {whole: wanted}.__getitem__)
        assert size == whole
        assert image.size == (whole[0] // factor, whole[1] // factor)


def test_other_formats_are_decoded_whole() -> None:
    data = encode(photo(64, 48), "PNG")
    image, size = images.decode_reduced(data, lambda size: (1, 1))
    assert image.size == size == (64, 48)


def test_a_reduced_jpeg_gives_the_tiles_of_the_whole_one() -> None:
    """The tiles are cut alike, and pixels differ little more than JPEG has changed them."""
    processor = FlashVLImageProcessor(
        size={"height": 96, "width": 96}, patch_size=12, tiling={"mode": "iss", "margin": 12}
    )
    picture = photo(1600, 1210)
    data = encode(picture, "JPEG", quality=90)
    image, size = images.decode_reduced(data, processor.least_size)
    assert image.size == (400, 303)
    reduced = processor.cut_tiles(image, size).astype(int)
    whole = processor.cut_tiles(decode_image(data)).astype(int)
    original = processor.cut_tiles(picture).astype(int)
    assert reduced.shape == whole.shape == (5, 3, 96, 96)
    assert np.abs(reduced - whole).mean() < 1.5
    assert np.abs(whole - original).mean() < 1
    processor.reducing_gap = None
    assert images.decode_reduced(data, processor.least_size)[0].size == (1600, 1210)
