"""The demo's image table: 200 pictures of held-out scenes, stored in the ways that people use.

It has the formats, sizes and mistakes of a real collection: photos that are upright only by their
EXIF tag, print colours, transparency, 16-bit scans, and four files that cannot be captioned. The
same seed gives the same table.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image

from flashvl.data import synthetic
from flashvl.data.synthetic import PhotoScene, Sample, ShapesScene, TextScene

DEMO_TABLE = pa.schema([("id", pa.string()), ("image", pa.binary()), ("answer", pa.string())])
"""Columns of the demo's table; `answer` is the true caption, null for a broken file."""

SIDES = (96, 128, 160, 224, 256, 320, 400, 480, 512, 640, 768, 1024, 1200)
ASPECTS = (1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 16 / 9)
"""Width divided by height. The model sees every picture as a square, so its answer stays true."""

Encode = Callable[[Image.Image, random.Random], bytes]
"""Turns a picture into a file; may draw its settings at random."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to store a picture."""

    name: str
    count: int
    """Rows of the table that are stored in this way."""
    suffix: str
    encode: Encode
    scenes: tuple[type, ...] = (ShapesScene, TextScene, synthetic.ChartScene, PhotoScene)
    """Scenes whose caption stays true: in a way without colours, only scenes of written words."""
    max_side: int = SIDES[-1]
    """Longest side in pixels; short for formats that compress little."""


def _jpeg(image: Image.Image, rng: random.Random) -> bytes:
    return _save(image, "JPEG", quality=rng.randint(75, 95))


def _rotated(image: Image.Image, rng: random.Random) -> bytes:
    """A photo stored turned, with the tag that turns it upright, as phones store them."""
    orientation, back = rng.choice(
        (
            (3, Image.Transpose.ROTATE_180),
            # Tag 6 turns clockwise when the photo is shown; it is stored turned the other way.
            (6, Image.Transpose.ROTATE_90),
            (8, Image.Transpose.ROTATE_270),
        )
    )
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return _save(image.transpose(back), "JPEG", quality=90, exif=exif)


def _transparent(image: Image.Image, rng: random.Random) -> bytes:
    """A picture whose background is fully transparent, as a logo's."""
    pixels = np.asarray(image)
    alpha = np.where((pixels == pixels[0, 0]).all(-1), 0, 255).astype(np.uint8)
    return _save(Image.fromarray(np.dstack([pixels, alpha])), "PNG")


def _grey16(image: Image.Image, rng: random.Random) -> bytes:
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return _save(Image.fromarray(grey), "PNG")


def _save(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


KINDS = (
    Kind("photo", 84, "jpg", _jpeg),
    Kind("rotated", 8, "jpg", _rotated),
    Kind("cmyk", 5, "jpg", lambda image, rng: _save(image.convert("CMYK"), "JPEG", quality=92)),
    Kind("grey", 6, "jpg", lambda image, rng: _save(image.convert("L"), "JPEG"), (TextScene,)),
    Kind("screenshot", 34, "png", lambda image, rng: _save(image, "PNG"), max_side=640),
    Kind("palette", 7, "png", lambda image, rng: _save(image.quantize(64), "PNG"), max_side=640),
    Kind("transparent", 7, "png", _transparent, (ShapesScene,)),
    Kind("scan16", 4, "png", _grey16, (TextScene,)),
    Kind("web", 27, "webp", lambda image, rng: _save(image, "WEBP", quality=85), max_side=768),
    Kind("clip", 8, "gif", lambda image, rng: _save(image.quantize(128), "GIF"), max_side=480),
    Kind("bitmap", 6, "bmp", lambda image, rng: _save(image, "BMP"), max_side=320),
)


def bad_rows() -> dict[str, bytes]:
    """Name and bytes of each file that cannot be captioned."""
    whole = _jpeg(synthetic.sample("heldout", 0, 0).image(), random.Random(0))
    return {
        "truncated.jpg": whole[: len(whole) // 2],
        "text.jpg": b"This is not a picture but a text that somebody named .jpg.\n",
        "pixel.gif": _save(Image.new("P", (1, 1)), "GIF"),
        "bomb.png": blank_png(10_000, 6_000),
    }


def blank_png(width: int, height: int) -> bytes:
    """A black PNG of any size in a few kilobytes, compressed line by line to save memory."""
    deflate = zlib.compressobj(9)
    line = bytes(1 + -(-width // 8))  # filter type 0, then one bit for each pixel
    pixels = b"".join(deflate.compress(line) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # 1 bit of grey
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, data) for name, data in chunks)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def good_rows(seed: int) -> Iterator[tuple[str, Sample, bytes]]:
    """File name, scene and encoded picture of each row that can be captioned, kind by kind."""
    rng = random.Random(seed)
    index = 0
    for kind in KINDS:
        for number in range(kind.count):
            while True:
                drawn = synthetic.sample("heldout", seed, index, tasks=("caption",))
                index += 1
                if isinstance(drawn.scene, kind.scenes):
                    break
            image = _picture(drawn, kind.max_side, rng)
            name = f"{kind.name}-{number + 1:02d}.{kind.suffix}"
            yield name, drawn, kind.encode(image, rng)


def _picture(drawn: Sample, max_side: int, rng: random.Random) -> Image.Image:
    """The scene at a random size whose longer side is one of `SIDES`."""
    side = rng.choice([side for side in SIDES if side <= max_side])
    aspect = rng.choice(ASPECTS)
    image = replace(drawn, size=side).image()
    if aspect == 1:
        return image
    width, height = (side, round(side / aspect)) if aspect > 1 else (round(side * aspect), side)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def write_demo_table(path: Path, seed: int = 2024) -> None:
    """Write the table, good and bad rows mixed, to the Parquet file `path`."""
    rows = [
        {"id": name, "image": image, "answer": drawn.scene.caption()}
        for name, drawn, image in good_rows(seed)
    ]
    rows += [{"id": name, "image": image} for name, image in bad_rows().items()]
    random.Random(seed).shuffle(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=DEMO_TABLE), path)
