"""An image file's bytes without its metadata, for files whose metadata cannot be read.

Viewers show such files, since their pixels are whole: image generators write megabytes of text into
a PNG, editors leave broken profiles, and disks and transfers damage any bytes. Whatever affects the
pixels is kept: sizes, palettes, transparency and, if it can be read, the orientation.

Nothing is decoded and no pixel judged here: the decoder refuses files with further damage.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL.PngImagePlugin import PngStream

JPEG_SIGNATURE = b"\xff\xd8"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


Info = dict[str | tuple[int, int], Any]
"""Metadata by Pillow's keys, as in `PIL.Image.Image.info`."""
ORIENTATION_INFO = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Keys of `Info` in which Pillow looks for the orientation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BareFile:
    """An image file without metadata."""

    data: bytes
    info: Info = field(default_factory=dict)
    """Metadata that was left out and may hold the orientation."""


def strip_metadata(data: bytes) -> BareFile | None:
    """The same picture without metadata; None if there is nothing to leave out.

    None is also returned for an unknown format, and for a file whose parts cannot be told apart.
    """
    for signature, strip in STRIPPERS:
        if re.match(signature, data, re.DOTALL):
            try:
                bare = strip(data)
            except (struct.error, ArithmeticError, LookupError, OSError, SyntaxError, ValueError):
                return None  # the file ends within a header, or the header is senseless
            return None if bare.data == data else bare
    return None


# PNG (https://www.w3.org/TR/png-3/): chunks of length, name, content, checksum

PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PNG_ORIENTATIONS = (
    b"eXIf",
    b"iTXtXML:com.adobe.xmp\0",
    b"tEXtRaw profile type exif\0",
    b"zTXtRaw profile type exif\0",
)
"""Beginnings, after the length, of the chunks that may hold the orientation."""


def _strip_png(data: bytes) -> BareFile:
    reader = PngStream(io.BytesIO(data))
    kept = [PNG_SIGNATURE]
    unread = set(PNG_ORIENTATIONS)  # only the first of each is read, so that many cost no more
    num_colors = 256
    for name, start, end in _png_chunks(data):
        whole = data[start : end + 4]
        if name in PNG_PIXELS:
            kept.append(whole)
            if name == b"IHDR":
                _read_png_chunk(reader, name, start, end)
            elif name == b"PLTE":
                num_colors = (end - start - 8) // 3
        elif whole[-4:] != struct.pack(">I", zlib.crc32(data[start + 4 : end])):
            continue
        elif name == b"tRNS":
            if end - start - 8 <= num_colors and _read_png_chunk(reader, name, start, end):
                kept.append(whole)
        else:
            for known in [each for each in unread if whole.startswith(each, 4)]:
                unread.remove(known)
                _read_png_chunk(reader, name, start, end)
    if not kept[-1].startswith(b"\0\0\0\0IEND"):
        kept.append(b"\0\0\0\0IEND\xae\x42\x60\x82")
    info: Info = {key: value for key, value in reader.im_info.items() if key in ORIENTATION_INFO}
    return BareFile(data=b"".join(kept), info=info)


def _read_png_chunk(reader: PngStream, name: bytes, start: int, end: int) -> bool:
    """Read a chunk into `reader.im_info`; returns whether Pillow can."""
    assert reader.fp is not None
    reader.fp.seek(start + 8)
    try:
        reader.call(name, start + 8, end - start - 8)
    except (SyntaxError, ValueError):
        return False
    return True


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start, and end without checksum of each chunk up to IEND or a chunk that is cut off."""
    start = len(PNG_SIGNATURE)
    while len(head := data[start : start + 8]) == 8:
        length, name = struct.unpack(">I4s", head)
        yield name, start, start + 8 + length
        if name == b"IEND":
            return
        start += 12 + length


# JPEG (ITU-T T.81, annex B): segments of marker, length, content, up to the first scan


def _strip_jpeg(data: bytes) -> BareFile:
    kept = [data[:2]]
    info: Info = {}
    at = 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in (0xDA, 0xD9):  # the scan: pixels to the end
            kept.append(data[at:])
            break
        if marker < 0xC0 or 0xD0 <= marker <= 0xD8:  # junk, or a marker without content
            at += 2
            continue
        # Like libjpeg, a length that is too short counts as no content.
        end = at + 2 + max(2, struct.unpack_from(">H", data, at + 2)[0])
        content = data[at + 4 : end]
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        elif _says_colors(marker, content):
            kept.append(data[at:end])
        elif marker == 0xE1 and content.startswith(b"Exif\0\0"):
            info.setdefault("exif", content)
        elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            info.setdefault("xmp", content.partition(b"\0")[2])
        at = end
    return BareFile(data=b"".join(kept), info=info)


def end_jpeg(data: bytes) -> tuple[bytes, bytes] | None:
    """Two copies of a JPEG that lacks its end mark, each with different noise and then the mark.

    Webcams and cut streams leave the mark out. If pixels are missing as well, the noise is decoded
    in their place, and the copies differ, as their noise has no bit in common. None if the file has
    a mark, or several scans or restarts, with which missing pixels need not show.
    """
    scans = [at.start() for at in re.finditer(rb"\xff\xda", data)]
    is_plain = re.search(rb"\xff[\xc0\xc1]", data) and not re.search(rb"\xff\xdd", data)
    if not data.startswith(JPEG_SIGNATURE) or len(scans) != 1 or not is_plain:
        return None
    if b"\xff\xd9" in data[scans[0] :]:
        return None
    whole = data.rstrip(b"\xff")  # half a mark
    return whole + b"\x55" * 64 + b"\xff\xd9", whole + b"\xaa" * 64 + b"\xff\xd9"


def _says_colors(marker: int, content: bytes) -> bool:
    """Whether libjpeg infers the coding of the pixels' colours from this segment."""
    if marker == 0xE0:
        return content.startswith(b"JFIF\0") and len(content) >= 14
    return marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12


# WebP (RFC 9649): RIFF chunks of name, length, content, padded to even lengths

WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
WEBP_METADATA = {b"EXIF": "exif", b"XMP ": "xmp"}
WEBP_ALPHA, WEBP_ANIMATION = 0x10, 0x02


def _strip_webp(data: bytes) -> BareFile:
    kept = []
    info: Info = {}
    start = 12
    while len(head := data[start : start + 8]) == 8:
        name, length = struct.unpack("<4sI", head)
        end = start + 8 + length + length % 2
        if name == b"VP8X":
            flags = data[start + 8] & (WEBP_ALPHA | WEBP_ANIMATION)
            kept.append(head + bytes([flags]) + data[start + 9 : end])
        elif name in WEBP_PIXELS:
            is_unpadded = length % 2 and end == len(data) + 1
            kept.append(data[start:end] + (b"\0" if is_unpadded else b""))
        elif name in WEBP_METADATA:
            info[WEBP_METADATA[name]] = data[start + 8 : start + 8 + length]
        start = end
    content = b"WEBP" + b"".join(kept)
    return BareFile(data=b"RIFF" + struct.pack("<I", len(content)) + content, info=info)


# GIF (GIF89a specification): extensions before an image


def _strip_gif(data: bytes) -> BareFile:
    """Keeps the first image only, since no other is decoded."""
    at = 13 + _gif_palette(data[10])
    kept = [data[:at]]
    while at < len(data) and data[at] != ord(";"):
        if data[at] == ord("!"):
            end = _end_of_gif_blocks(data, at + 2)
            if data[at + 1 : at + 3] == b"\xf9\x04" and end == at + 8:  # transparency
                kept.append(data[at:end])
            at = end
        elif data[at] == ord(","):
            pixels = at + 10 + _gif_palette(data[at + 9]) + 1
            kept.append(data[at : _end_of_gif_blocks(data, pixels)])
            break
        else:
            at += 1
    return BareFile(data=b"".join([*kept, b";"]))


def _gif_palette(flags: int) -> int:
    """The size of a palette in bytes."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _end_of_gif_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


# TIFF 6.0 and BigTIFF: a directory of tags, whose values may be anywhere in the file

TIFF_PIXELS = frozenset(
    (
        *(254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 274, 277, 278, 279, 284, 292, 293),
        *(317, 320, 322, 323, 324, 325, 332, 334, 338, 339, 340, 341, 347),  # tiles, palettes
        *(512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),  # JPEG, YCbCr
    )
)
"""Tags that decoding the pixels needs, and the orientation (274)."""
TIFF_SIZES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8), 1))
"""Bytes of one value, by the number of its type."""


def _strip_tiff(data: bytes) -> BareFile:
    """Appends a new directory of the first picture; everything else stays where it is."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = struct.unpack_from(order + "H", data, 2)[0] == 43
    offset, count_format, entry_format = ("Q", "Q", "HHQ8s") if is_big else ("L", "H", "HHL4s")
    place = 8 if is_big else 4
    (at,) = struct.unpack_from(order + offset, data, place)
    (count,) = struct.unpack_from(order + count_format, data, at)
    at += struct.calcsize(order + count_format)
    entry_size = struct.calcsize(order + entry_format)
    kept = []
    for start in range(at, min(at + count * entry_size, len(data) - entry_size + 1), entry_size):
        tag, kind, number, value = struct.unpack_from(order + entry_format, data, start)
        size = TIFF_SIZES.get(kind, 0) * number
        end = size if size <= len(value) else struct.unpack(order + offset, value)[0] + size
        if tag in TIFF_PIXELS and size and end <= len(data):
            kept.append(data[start : start + entry_size])
    directory = struct.pack(order + count_format, len(kept)) + b"".join(kept)
    directory += struct.pack(order + offset, 0)  # no next one
    whole = data + bytes(-len(data) % 8)
    header = data[:place] + struct.pack(order + offset, len(whole))
    return BareFile(data=header + whole[len(header) :] + directory)


# BMP: a palette's length, which some programs leave undefined


def _strip_bmp(data: bytes) -> BareFile:
    header_size, bits = struct.unpack_from("<I", data, 14)[0], struct.unpack_from("<H", data, 28)[0]
    colors = struct.unpack_from("<I", data, 46)[0] if header_size >= 40 else 0
    if bits <= 8 and colors > 1 << bits:
        data = data[:46] + bytes(4) + data[50:]  # 0: as many colours as the depth allows
    return BareFile(data=data)


# JPEG 2000 (ITU-T T.800, annex I): boxes of length, name, content

JP2_PIXELS = (b"jP  ", b"ftyp", b"jp2h", b"jp2c")
JP2_HEADER = (b"ihdr", b"bpcc", b"colr", b"pclr", b"cmap", b"cdef")


def _strip_jp2(data: bytes) -> BareFile:
    kept = []
    for name, start, content, end in _boxes(data, 0, len(data)):
        if name == b"jp2h":
            inner = [
                data[a:d]
                for label, a, b, d in _boxes(data, content, end)
                if label in JP2_HEADER and not (label == b"colr" and d - b < 7)
            ]
            header = b"".join(inner)
            kept.append(struct.pack(">I4s", 8 + len(header), name) + header)
        elif name in JP2_PIXELS:
            kept.append(data[start:end])
    return BareFile(data=b"".join(kept))


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, start, start of the content, and end of each box, up to one of a senseless length."""
    while start + 8 <= stop:
        length, name = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, content)
            content += 8
        end = start + length if length else stop
        if end < content:
            return
        yield name, start, content, min(end, stop)
        start = end


# AVIF and HEIF (ISO/IEC 23008-12): items, of which some are metadata

ITEM_METADATA = (b"Exif", b"mime", b"uri ")
ICC_PROFILES = (b"prof", b"rICC")


def _strip_items(data: bytes) -> BareFile:
    """Gives metadata a type that no reader knows; nothing moves, as offsets are absolute."""
    bare = bytearray(data)
    for start, name, content in _walk_items(data):
        if name == b"infe":
            version = data[content]
            place = content + (10 if version == 3 else 8)
            if version >= 2 and bytes(data[place : place + 4]) in ITEM_METADATA:
                bare[place : place + 4] = b"skip"
        elif name == b"colr" and data[content : content + 4] in ICC_PROFILES:
            bare[start + 4 : start + 8] = b"free"
    return BareFile(data=bytes(bare))


ITEM_HEADS = {b"meta": 4, b"iinf": 6, b"iprp": 0, b"ipco": 0}
"""Boxes that hold boxes -> bytes of their content before the first one."""


def _walk_items(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Start, name, and start of the content of each box, down to those of single items."""
    todo = [(0, len(data))]
    while todo:
        for name, start, content, end in _boxes(data, *todo.pop()):
            yield start, name, content
            if name in ITEM_HEADS:
                head = ITEM_HEADS[name]
                if name == b"iinf" and data[content]:
                    head += 2  # a count of 32 bits
                todo.append((content + head, end))


STRIPPERS: tuple[tuple[bytes, Callable[[bytes], BareFile]], ...] = (
    (re.escape(JPEG_SIGNATURE), _strip_jpeg),
    (re.escape(PNG_SIGNATURE), _strip_png),
    (rb"RIFF....WEBP", _strip_webp),
    (rb"GIF8[79]a", _strip_gif),
    (rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]", _strip_tiff),
    (rb"BM", _strip_bmp),
    (rb"\0\0\0\x0cjP  ", _strip_jp2),
    (rb"....ftyp", _strip_items),
)
"""Beginning of a file (a pattern) -> the function that leaves out its metadata."""
