"""Files with damaged metadata but good pixels are decoded; no damage does any harm."""

import io
import json
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from flashvl.data.images import FORMATS, decode_image, decode_reduced, read_header
from flashvl.data.limits import ImageLimits
from flashvl.data.salvage import strip_metadata
from flashvl.errors import DataError
from tests.support import damage
from tests.support.damage import PICTURE, exif_of, png_chunk
from tests.support.images import encode

DAMAGED = {
    "PNG": lambda: damage.png_damages() | damage.kept_beside_png_damages(),
    "JPEG": damage.jpeg_damages,
    "WEBP": damage.webp_damages,
    "GIF": damage.gif_damages,
    "TIFF": damage.tiff_damages,
    "BMP": damage.bmp_damages,
    "JPEG2000": damage.jp2_damages,
    "AVIF": lambda: damage.item_damages("AVIF"),
    "HEIF": lambda: damage.item_damages("HEIF"),
}


def test_every_format_is_damaged_below() -> None:
    assert set(DAMAGED) == set(FORMATS)
    assert {name.split()[0] for name in damage.whole_files()} == set(FORMATS) | {"MPO", "APNG"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file_format", DAMAGED)
def test_bad_metadata_counts_as_absent(file_format: str) -> None:
    """The pixels equal those of the undamaged file."""
    wrong = []
    for name, (clean, damaged) in DAMAGED[file_format]().items():
        expected = decode_image(clean)
        try:
            image, header = decode_image(damaged), read_header(damaged)
        except DataError as error:
            wrong.append(f"{name}: {error}")
            continue
        if image.size != expected.size or image.tobytes() != expected.tobytes():
            wrong.append(f"{name}: other pixels")
        if header != read_header(clean):
            wrong.append(f"{name}: header says {header}")
    assert not wrong


@pytest.mark.parametrize("name", damage.whole_files())
def test_no_pixel_depends_on_metadata(name: str) -> None:
    """The file without metadata decodes to the same pixels."""
    data = damage.whole_files()[name]
    bare = strip_metadata(data)
    if bare is None:
        return
    upright, again = decode_image(data), decode_image(bare.data)
    if upright.size != again.size:  # turned by the orientation, which was left out and is passed on
        assert bare.info
        again = again.transpose(Image.Transpose.ROTATE_270)
    assert again.tobytes() == upright.tobytes()


TEXT = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 * 2**20)))


def with_text(data: bytes) -> bytes:
    return data[:33] + TEXT + data[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limits_hold_where_metadata_is_left_out() -> None:
    data = with_text(encode(PICTURE, "PNG"))
    with pytest.raises(DataError, match="40x30 pixels.*max_image_side=39"):
        decode_image(data, ImageLimits(max_image_side=39))
    for size, rule in ((10_000, "10000x10000 pixels"), (65_535, "max_image_pixels=50000000")):
        header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
        with pytest.raises(DataError, match=rule):
            decode_image(data[:8] + png_chunk(b"IHDR", header) + data[33:])


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_pixels_that_are_cut_off_stay_an_error(file_format: str) -> None:
    """The same for files with metadata."""
    options = {"exif": exif_of(6)} if file_format not in ("GIF", "BMP") else {}
    data = encode(PICTURE.quantize(16) if file_format == "GIF" else PICTURE, file_format, **options)
    for lost in (len(data) // 4, len(data) // 2):
        with pytest.raises(DataError):
            decode_image(data[:-lost])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_without_its_last_pixels_stays_an_error(options: dict[str, Any]) -> None:
    """A JPEG cut anywhere in its scan is refused, unless only its end mark is missing."""
    data = encode(PICTURE, "JPEG", **options)
    scan = data.index(b"\xff\xda")
    for end in range(scan, len(data) - 4):
        with pytest.raises(DataError):
            decode_image(data[:end])


def test_settings_of_the_process_stay_as_they_are() -> None:
    """Other code of the process may rely on Pillow's settings, while many threads decode."""
    before = (PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, dict(Image.OPEN))
    good, bad = encode(PICTURE, "PNG"), with_text(encode(PICTURE, "PNG"))
    heif = encode(PICTURE, "HEIF")
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda data: decode_image(data).tobytes(), [good, bad, heif] * 40))
    assert len(set(decoded[0::3] + decoded[1::3])) == len(set(decoded[2::3])) == 1
    assert (PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, dict(Image.OPEN)) == before
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(bad))


def test_a_header_is_read_without_pixels() -> None:
    """Pillow would decode a PNG's pixels to find an orientation that may come after them."""
    whole = encode(PICTURE, "PNG", exif=exif_of(6))
    pixels = whole.index(b"IDAT") + 4
    damaged = whole[:pixels] + bytes(20) + whole[pixels + 20 :]
    assert read_header(damaged).size == (30, 40)
    behind = png_chunk(b"eXIf", exif_of(6)[6:])
    plain = encode(PICTURE, "PNG")
    assert read_header(plain[:-12] + behind + plain[-12:]).size == (30, 40)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(damaged)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_header_says_the_upright_size(file_format: str, orientation: int) -> None:
    options = {} if file_format in ("GIF", "BMP", "JPEG2000") else {"exif": exif_of(orientation)}
    data = encode(PICTURE, file_format, **options)
    assert read_header(data).size == decode_image(data).size
    assert read_header(data).size == ((30, 40) if options and orientation == 6 else (40, 30))


def test_a_jpeg_of_several_pictures_is_one_to_be_reduced() -> None:
    """Telephones write such files: the first picture counts, and the file is a JPEG."""
    photo = PICTURE.resize((800, 600))
    data = encode(photo, "MPO", save_all=True, append_images=[photo.rotate(180)])
    assert read_header(data).media_type == "image/jpeg"
    image, size = decode_reduced(data, lambda size: (200, 150))
    assert (image.size, size) == ((200, 150), (800, 600))
    whole = np.asarray(decode_image(data)).astype(int)
    assert np.abs(whole - np.asarray(photo)).mean() < 4


# Files damaged anywhere

DECODE = """
import json, resource, sys, warnings
from pathlib import Path
from flashvl.data.images import decode_image, read_header
from flashvl.errors import DataError
from tests.support.damage import damaged_files

warnings.simplefilter("ignore")
number, progress = int(sys.argv[1]), Path(sys.argv[2])
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * 2**30,) * 2)
outcomes = []
for name, data in damaged_files(number):
    progress.write_text(name)
    try:
        image = decode_image(data)
    except DataError as error:
        outcomes.append((name, str(error)))
        continue
    assert image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height, name
    assert read_header(data).size == image.size, name
    outcomes.append((name, None))
print(json.dumps(outcomes))
"""


def decode_damaged(number: int, tmp_path: Path) -> list[tuple[str, str | None]]:
    """Decoding runs in a process with 3 GiB of memory; if it dies, the file is named."""
    progress = tmp_path / "progress"
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(number), str(progress)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=540,
    )
    assert done.returncode == 0, f"{progress.read_text()}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def check(outcomes: list[tuple[str, str | None]], number: int) -> None:
    assert len(outcomes) == number
    reasons = [reason for _, reason in outcomes if reason]
    assert number * 0.1 < len(reasons) < number * 0.9  # otherwise the damaged files prove little
    assert all(len(reason.splitlines()) == 1 and len(reason) < 400 for reason in reasons)


@pytest.mark.long
def test_damaged_files_are_an_image_or_an_error(tmp_path: Path) -> None:
    check(decode_damaged(400, tmp_path), 400)


@pytest.mark.slow
def test_many_damaged_files_are_an_image_or_an_error(tmp_path: Path) -> None:
    check(decode_damaged(20_000, tmp_path), 20_000)
