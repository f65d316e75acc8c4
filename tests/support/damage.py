"""Image files with damaged metadata and whole pixels, and image files damaged anywhere."""

import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from pillow_heif import as_plugin

from tests.support.images import encode

Damaged = dict[str, tuple[bytes, bytes]]
"""By the name of a damage: the whole file, and the same file with the damage."""

BLOBS = np.random.default_rng(5).integers(0, 256, (3, 4, 3), dtype=np.uint8)
PICTURE = Image.fromarray(BLOBS).resize((40, 30), Image.Resampling.BICUBIC)
ORIENTATION, MAKE, EXIF_IFD, GPS_IFD = 0x0112, 0x010F, 0x8769, 0x8825
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="1"/></x:xmpmeta>'
ZERO_GARBAGE = b"\0" * 50
GARBAGE = random.Random(1).randbytes(300)


# Only for writing: reading HEIF must not depend on a registered plugin.
Image.register_save("HEIF", as_plugin._save_heif)
Image.register_save_all("HEIF", as_plugin._save_all_heif)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[MAKE] = "a camera's maker, in more than four bytes"
    return exif.tobytes()


def exif_damages() -> dict[str, bytes]:
    """EXIF blocks without anything readable in them, and without the leading `Exif`."""
    whole = exif_of(1)[6:]
    entry = struct.pack("<HHI", ORIENTATION, 3, 1) + struct.pack("<HH", 1, 0)

    def directory(*entries: bytes) -> bytes:
        return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4)

    return {
        "nothing": b"",
        "noise": GARBAGE,
        "zeros": ZERO_GARBAGE,
        "half": whole[: len(whole) // 2],
        "header": whole[:8],
        "an offset beyond the end": b"II*\0\xff\xff\xff\x7f",
        "an endless ring": directory(entry)[:-4] + struct.pack("<I", 8),
        "more entries than bytes": struct.pack("<2sHIH", b"II", 42, 8, 65535) + entry,
        "a value beyond the end": directory(struct.pack("<HHII", MAKE, 2, 2**31, 2**31)),
        "a type that does not exist": directory(struct.pack("<HHII", ORIENTATION, 99, 1, 1)),
        "an orientation in words": directory(struct.pack("<HHI4s", ORIENTATION, 2, 4, b"top\0")),
        "an orientation that does not exist": directory(
            struct.pack("<HHIHH", ORIENTATION, 3, 1, 77, 0)
        ),
        "two orientations": directory(struct.pack("<HHIHH", ORIENTATION, 3, 2, 1, 8)),
        "no orientation": directory(struct.pack("<HHII", ORIENTATION, 3, 0, 0)),
        "a fraction of nothing": directory(struct.pack("<HHII", ORIENTATION, 5, 1, 26)) + bytes(8),
        "directories nowhere": directory(
            struct.pack("<HHII", EXIF_IFD, 4, 1, 2**31), struct.pack("<HHII", GPS_IFD, 4, 1, 3)
        ),
        "directories in words": directory(
            struct.pack("<HHI4s", EXIF_IFD, 2, 4, b"abc\0"),
            struct.pack("<HHI4s", GPS_IFD, 7, 4, b"abcd"),
        ),
    }


def png_chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    if checksum is None:
        checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_damages() -> Damaged:
    """Every damage once before the pixels and once after them."""
    big = zlib.compress(bytes(3 * 2**20))
    fctl = struct.pack(">IIIIIHHBB", 0, 40, 30, 0, 0, 1, 10, 0, 0)
    damages = {
        "zTXt of 3 MiB": png_chunk(b"zTXt", b"workflow\0\0" + big),
        "iTXt of 3 MiB": png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + big),
        "XMP of 3 MiB": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + big),
        "iCCP of 3 MiB": png_chunk(b"iCCP", b"profile\0\0" + big),
        "many texts": png_chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(2**20 - 1))) * 70,
        "zTXt method": png_chunk(b"zTXt", b"Comment\0\7" + GARBAGE),
        "zTXt noise": png_chunk(b"zTXt", b"Comment\0\0" + GARBAGE),
        "zTXt without end": png_chunk(b"zTXt", GARBAGE.replace(b"\0", b"")),
        "iTXt without ends": png_chunk(b"iTXt", b"Comment\0\0\0en"),
        "iTXt bad UTF-8": png_chunk(b"iTXt", b"Comment\0\0\0en\0\xff\0\xff\xfe"),
        "iCCP method": png_chunk(b"iCCP", b"profile\0\7" + GARBAGE),
        "iCCP noise": png_chunk(b"iCCP", b"profile\0\0" + GARBAGE),
        "iCCP name": png_chunk(b"iCCP", b"profile"),
        "raw profile": png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nnot hexadecimal"),
        "raw profile zTXt": png_chunk(
            b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n\n\n123")
        ),
        "unknown": png_chunk(b"prVt", GARBAGE),
        "unknown, checksum": png_chunk(b"prVt", GARBAGE, 1),
        "acTL short": png_chunk(b"acTL", b"\0\0"),
        "acTL, no frames": png_chunk(b"acTL", bytes(8)),
        "acTL twice": png_chunk(b"acTL", struct.pack(">II", 2, 0)) * 2,
        "fcTL short": png_chunk(b"fcTL", b"\0"),
        "fcTL order": png_chunk(b"acTL", struct.pack(">II", 2, 0)) + png_chunk(b"fcTL", fctl) * 2,
        "fcTL size": png_chunk(b"fcTL", fctl[:4] + b"\0\0\xff\xff" + fctl[8:]),
        "fdAT short": png_chunk(b"fdAT", b"\0"),
        **{f"eXIf {name}": png_chunk(b"eXIf", content) for name, content in exif_damages().items()},
        **{
            f"{name.decode()} {kind}": png_chunk(name, content, checksum)
            for name in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"sBIT", b"bKGD", b"hIST")
            + (b"sPLT", b"cICP", b"mDCV", b"cLLI", b"tRNS", b"tEXt", b"zTXt", b"iTXt", b"iCCP")
            + (b"eXIf",)
            for kind, content, checksum in (
                ("empty", b"", None),
                ("short", b"\1", None),
                ("checksum", struct.pack(">III", 1, 1, 1) * 4, 1),
            )
        },
    }
    clean = encode(PICTURE, "PNG")
    pixels, end = clean.index(b"IDAT") - 4, clean.index(b"IEND") - 4
    damaged = {}
    for name, chunk in damages.items():
        if not name.startswith("fdAT"):
            damaged[name] = (clean, clean[:pixels] + chunk + clean[pixels:])
        damaged[f"{name}, behind"] = (clean, clean[:end] + chunk + clean[end:])
    palette = encode(PICTURE.quantize(8), "PNG")
    at = palette.index(b"IDAT") - 4
    longer = png_chunk(b"tRNS", bytes(range(256)) + GARBAGE)
    damaged["tRNS of more colours"] = (palette, palette[:at] + longer + palette[at:])
    text = png_chunk(b"tEXt", b"Comment\0" + GARBAGE)
    damaged["cut off in a text"] = (clean, clean[:end] + text[:100])
    damaged["cut off in a length"] = (clean, clean[:end] + text[:2])
    damaged["no end"] = (clean, clean[:end])
    damaged["more behind the end"] = (clean, clean + GARBAGE)
    return damaged


def kept_beside_png_damages() -> Damaged:
    """Chunks that decide about pixels, beside a damaged one, which they must survive."""
    damage = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3 * 2**20)))
    palette = PICTURE.quantize(8)
    key = PICTURE.convert("L").getpixel((3, 3))
    raw = b"\nexif\n%8d\n" % len(exif_of(6)) + exif_of(6).hex().encode()
    xmp = XMP.replace(b'"1"', b'"6"')
    clean = {
        "orientation": encode(PICTURE, "PNG", exif=exif_of(6)),
        "palette": encode(palette, "PNG"),
        "palette, one transparent": encode(palette, "PNG", transparency=2),
        "palette, all transparent": encode(palette, "PNG", transparency=bytes(range(0, 240, 30))),
        "key": encode(PICTURE.convert("L"), "PNG", transparency=key),
        "RGB key": encode(PICTURE, "PNG", transparency=PICTURE.getpixel((0, 0))),
        "16 bits": encode(PICTURE.convert("I").convert("I;16"), "PNG", transparency=key),
        "alpha": encode(PICTURE.convert("RGBA").rotate(30), "PNG"),
        "APNG": encode(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)]),
        "APNG, default": encode(
            PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(9)], default_image=True
        ),
    }
    plain = encode(PICTURE, "PNG")
    behind = png_chunk(b"eXIf", exif_of(8)[6:])
    clean["orientation, behind"] = plain[:-12] + behind + plain[-12:]
    for name, content in (
        ("XMP", png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        ("raw profile", png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))),
        ("raw text", png_chunk(b"tEXt", b"Raw profile type exif\0" + raw)),
    ):
        clean[name] = plain[:33] + content + plain[33:]
    return {
        f"{name}, {place}": (data, data[:at] + damage + data[at:])
        for name, data in clean.items()
        for place, at in (("before", 33), ("last", len(data) - 12))
    }


def segment(marker: int, content: bytes, length: int | None = None) -> bytes:
    length = len(content) + 2 if length is None else length
    return struct.pack(">BBH", 0xFF, marker, length) + content


def jpeg_damages() -> Damaged:
    icc, mpf = b"ICC_PROFILE\0", b"MPF\0"
    index = struct.pack(">2sHIH", b"MM", 42, 8, 3)
    whole_mpf = index + struct.pack(
        ">HHI4sHHIIHHIII", 0xB000, 7, 4, b"0100", 0xB001, 4, 1, 2, 0xB002, 7, 32, 50, 0
    )
    damages = {
        "JFIF short": segment(0xE0, b"JFIF\0"),
        "JFIF twice": segment(0xE0, b"JFIF\0\1\1\3" + bytes(6)) * 2,
        "JFXX": segment(0xE0, b"JFXX\0\x10" + GARBAGE),
        "ICC short": segment(0xE2, icc),
        "ICC without number": segment(0xE2, icc + b"\1"),
        "ICC noise": segment(0xE2, icc + b"\1\1" + GARBAGE),
        "ICC parts": segment(0xE2, icc + b"\7\2" + GARBAGE),
        "MPF empty": segment(0xE2, mpf),
        "MPF noise": segment(0xE2, mpf + GARBAGE),
        "MPF half": segment(0xE2, mpf + whole_mpf[:20]),
        "MPF without pictures": segment(0xE2, mpf + whole_mpf),
        "MPF nothing": segment(0xE2, mpf + index[:8] + bytes(10)),
        "FPXR": segment(0xE2, b"FPXR\0" + GARBAGE),
        "XMP noise": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + GARBAGE),
        "XMP orientation": segment(
            0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="0"/>'
        ),
        "XMP extension": segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + GARBAGE),
        "APP1 unknown": segment(0xE1, GARBAGE),
        "APP1 empty": segment(0xE1, b""),
        "Photoshop noise": segment(0xED, b"Photoshop 3.0\0" + GARBAGE),
        "Photoshop cut": segment(0xED, b"Photoshop 3.0\0" + b"8BIM"),
        "Photoshop name": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed"),
        "Photoshop resolution": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\2\0\0"),
        "Adobe short": segment(0xEE, b"Adobe"),
        "comment": segment(0xFE, GARBAGE),
        "comment empty": segment(0xFE, b""),
        "length 0": segment(0xFE, b"", 0),
        "length 1": segment(0xE5, b"", 1),
        "length too short": segment(0xFE, b"ten bytes.", 6),
        "junk": b"junk",
        "junk and stuffing": b"ju\xff\0nk",
        "fill bytes": b"\xff\xff\xff",
        "reserved marker": b"\xff\x02",
        "restart marker": b"\xff\xd3",
        **{f"APP{number}": segment(0xE0 + number, GARBAGE) for number in range(16)},
        **{
            f"EXIF {name}": segment(0xE1, b"Exif\0\0" + content)
            for name, content in exif_damages().items()
        },
        "EXIF twice": segment(0xE1, exif_of(1)) + segment(0xE1, exif_of(1)),
        "EXIF and its noise": segment(0xE1, exif_of(1)) + segment(0xE1, b"Exif\0\0" + GARBAGE),
    }
    clean = encode(PICTURE, "JPEG", quality=90)
    tables = clean.index(b"\xff\xdb")
    damaged = {}
    for name, damage in damages.items():
        damaged[name] = (clean, clean[:2] + damage + clean[2:])
        damaged[f"{name}, later"] = (clean, clean[:tables] + damage + clean[tables:])
    damaged["more behind the end"] = (clean, clean + GARBAGE)
    thumbnail = segment(0xE1, b"Exif\0\0" + exif_of(1)[6:] + clean)
    damaged["no end"] = (clean, clean[:-2])
    damaged["half an end"] = (clean, clean[:-1])
    damaged["no end, and a thumbnail"] = (clean, clean[:2] + thumbnail + clean[2:-2])
    damaged["no end, and a bad profile"] = (clean, clean[:2] + damages["ICC short"] + clean[2:-2])
    kept = {
        "orientation": encode(PICTURE, "JPEG", exif=exif_of(6)),
        "CMYK": encode(PICTURE.convert("CMYK"), "JPEG"),
        "RGB": encode(PICTURE, "JPEG", keep_rgb=True),
        "progressive": encode(PICTURE, "JPEG", progressive=True, xmp=XMP.replace(b"1", b"8")),
        "grey": encode(PICTURE.convert("L"), "JPEG"),
    }
    for name, data in kept.items():
        at = data.index(b"\xff\xdb")
        for damage in ("ICC short", "MPF noise", "reserved marker"):
            damaged[f"{name} beside {damage}"] = (data, data[:at] + damages[damage] + data[at:])
    return damaged


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    content = b"WEBP" + b"".join(
        name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for name, body in chunks
    )
    return b"RIFF" + struct.pack("<I", len(content)) + content


def webp_damages() -> Damaged:
    clean = encode(PICTURE, "WEBP", lossless=True)
    pixels = (clean[12:16], clean[20 : 20 + struct.unpack_from("<I", clean, 16)[0]])
    canvas = struct.pack("<I", 39)[:3] + struct.pack("<I", 29)[:3]

    def extended(flags: int, *chunks: tuple[bytes, bytes]) -> bytes:
        return riff((b"VP8X", bytes([flags, 0, 0, 0]) + canvas), *chunks)

    damaged = {
        "EXIF promised": extended(0x08, pixels),
        "XMP promised": extended(0x04, pixels),
        "ICC promised": extended(0x20, pixels),
        "ICC noise": extended(0x20, (b"ICCP", GARBAGE), pixels),
        "ICC empty": extended(0x20, (b"ICCP", b""), pixels),
        "ICC behind": extended(0x20, pixels, (b"ICCP", GARBAGE)),
        "XMP noise": extended(0x04, pixels, (b"XMP ", GARBAGE)),
        "XMP early": extended(0x04, (b"XMP ", GARBAGE), pixels),
        "not promised": extended(0, pixels, (b"EXIF", GARBAGE)),
        "unknown": extended(0, (b"abcd", GARBAGE), pixels, (b"efgh", GARBAGE)),
        "all flags": extended(0x2C, pixels),
        "reserved flags": extended(0xC1, pixels),
        "more behind the end": clean + GARBAGE,
        "cut off in XMP": extended(0x04, pixels, (b"XMP ", GARBAGE))[:-100],
        "cut off in EXIF": extended(0x08, pixels, (b"EXIF", GARBAGE))[:-299],
        "a length beyond the end": clean[:4] + struct.pack("<I", len(clean) + 99) + clean[8:],
        "a length too short": clean[:4] + struct.pack("<I", 12) + clean[8:],
        **{
            f"EXIF {name}": extended(0x08, pixels, (b"EXIF", content))
            for name, content in exif_damages().items()
        },
    }
    turned = encode(PICTURE, "WEBP", lossless=True, exif=exif_of(6))
    moving = encode(
        PICTURE, "WEBP", lossless=True, save_all=True, append_images=[PICTURE.rotate(5)]
    )
    alpha = encode(PICTURE.convert("RGBA").rotate(30), "WEBP")
    cut = encode(PICTURE, "WEBP", lossless=True, exif=exif_of(6), xmp=XMP + GARBAGE)
    odd = next(
        data
        for width in range(30, 40)
        if (data := encode(PICTURE.resize((width, 30)), "WEBP", lossless=True))[16] % 2
    )
    kept = {
        "no padding": (odd, odd[:-1]),
        "orientation": (turned, cut[:-100]),
        "animation": (moving, moving + b"XMP \xff\xff\0\0"),
        "animation, length": (moving, moving[:4] + b"\xff\xff\0\0" + moving[8:]),
        "alpha": (alpha, alpha[:4] + b"\xff\xff\0\0" + alpha[8:]),
    }
    return {name: (clean, data) for name, data in damaged.items()} | kept


def gif_damages() -> Damaged:
    damages = {
        "comment": b"!\xfe\x05abcde\0",
        "comment empty": b"!\xfe\0",
        "application short": b"!\xff\x03abc\0",
        "application loop short": b"!\xff\x0bNETSCAPE2.0\x01\x01\0",
        "application loop empty": b"!\xff\x0bNETSCAPE2.0\0",
        "application noise": b"!\xff\x0bICCRGBG1012\xff" + (GARBAGE * 2)[:255] + b"\0",
        "control empty": b"!\xf9\0",
        "control short": b"!\xf9\1\0\0",
        "control without delay": b"!\xf9\2\0\0\0",
        "control short and transparent": b"!\xf9\3\1\0\0\0",
        "plain text": b"!\x01\x0c" + bytes(12) + b"\x02hi\0",
        "unknown": b"!\x42\x04abcd\0",
        "zeros": b"\0\0\0",
    }
    first = PICTURE.quantize(16)
    damaged = {}
    for kind, clean in (
        ("plain", encode(first, "GIF")),
        ("transparent", encode(first, "GIF", transparency=3)),
        ("moving", encode(first, "GIF", save_all=True, append_images=[first.rotate(90)])),
    ):
        at = 13 + (3 << ((clean[10] & 7) + 1))
        for name, damage in damages.items():
            damaged[f"{kind}: {name}"] = (clean, clean[:at] + damage + clean[at:])
    plain = encode(first, "GIF")
    damaged["cut off in a comment"] = (plain, plain[:-1] + b"!\xfe\xffabc")
    damaged["more behind the end"] = (plain, plain + GARBAGE)
    return damaged


def with_tags(data: bytes, *entries: tuple[int, int, int, bytes]) -> bytes:
    """A little-endian classic TIFF with more tags: number, type, count, value or offset."""
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    old = [data[at + 2 + 12 * n : at + 14 + 12 * n] for n in range(count)]
    new = [struct.pack("<HHI4s", *entry) for entry in entries]
    all_entries = sorted(old + new, key=lambda entry: struct.unpack_from("<H", entry)[0])
    directory = struct.pack("<H", len(all_entries)) + b"".join(all_entries) + bytes(4)
    whole = data + bytes(len(data) % 2)
    return whole[:4] + struct.pack("<I", len(whole)) + whole[8:] + directory


def tiff_damages() -> Damaged:
    nowhere = struct.pack("<I", 2**31)
    damages: dict[str, tuple[int, int, int, bytes]] = {
        f"{name} {kind}": (tag, tag_type, count, value)
        for name, tag in {
            "make": 271,
            "description": 270,
            "resolution": 282,
            "unit": 296,
            "software": 305,
            "date": 306,
            "white point": 318,
            "subdirectories": 330,
            "XMP": 700,
            "IPTC": 33723,
            "Photoshop": 34377,
            "EXIF": 34665,
            "ICC": 34675,
            "GPS": 34853,
            "interoperability": 40965,
            "private": 65000,
        }.items()
        for kind, tag_type, count, value in (
            ("beyond the end", 2, 2**31, nowhere),
            ("nowhere", 1, 200, nowhere),
            ("empty", 2, 0, bytes(4)),
            ("of no type", 77, 1, bytes(4)),
            ("word", 2, 4, b"abc\0"),
            ("number", 4, 1, b"\1\0\0\0"),
            ("fractions", 5, 2, struct.pack("<I", 4)),
            ("float", 11, 1, b"\xff\xff\xff\xff"),
            ("far", 4, 1, nowhere),
        )
    }
    damaged = {}
    for compression in ("raw", "tiff_lzw"):
        clean = encode(PICTURE, "TIFF", compression=compression)
        for name, tag in damages.items():
            damaged[f"{compression}: {name}"] = (clean, with_tags(clean, tag))
    turned = encode(PICTURE, "TIFF", exif=exif_of(6))
    palette = encode(PICTURE.quantize(16), "TIFF")
    for kind, clean in (("turned", turned), ("palette", palette)):
        for name in ("ICC beyond the end", "EXIF far", "GPS word"):
            damaged[f"{kind}: {name}"] = (clean, with_tags(clean, damages[name]))
    clean = encode(PICTURE, "TIFF")
    (at,) = struct.unpack_from("<I", clean, 4)
    (count,) = struct.unpack_from("<H", clean, at)
    following = at + 2 + 12 * count
    damaged["next one nowhere"] = (
        clean,
        clean[:following] + b"\xff\xff\xff\x7f" + clean[following + 4 :],
    )
    return damaged


def bmp_damages() -> Damaged:
    plain, palette = encode(PICTURE, "BMP"), encode(PICTURE.quantize(256), "BMP")

    def patch(data: bytes, at: int, value: int) -> tuple[bytes, bytes]:
        return data, data[:at] + struct.pack("<I", value) + data[at + 4 :]

    return {
        "file size": patch(plain, 2, 2**32 - 1),
        "reserved": patch(plain, 6, 2**32 - 1),
        "pixels' size": patch(plain, 34, 2**32 - 1),
        "resolution": patch(plain, 38, 2**32 - 1),
        "colours": patch(plain, 46, 2**32 - 1),
        "important colours": patch(plain, 50, 2**32 - 1),
        "palette's colours": patch(palette, 46, 2**31),
        "more colours than bits": patch(palette, 46, 300),
        "more behind the end": (plain, plain + GARBAGE),
    }


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def jp2_damages() -> Damaged:
    clean = encode(PICTURE, "JPEG2000", irreversible=False)
    stream = clean.index(b"jp2c") - 4
    header = clean.index(b"jp2h") - 4
    (length,) = struct.unpack_from(">I", clean, header)
    end = header + length
    damages = {
        "uuid": box(b"uuid", GARBAGE),
        "uuid short": box(b"uuid", b"abc"),
        "xml": box(b"xml ", b"<not closed"),
        "unknown": box(b"\0\xff\0\xff", GARBAGE),
        "empty": box(b"free", b""),
        "uinf": box(b"uinf", GARBAGE),
        "jp2i": box(b"jp2i", b""),
        "asoc": box(b"asoc", GARBAGE),
    }
    damaged = {
        name: (clean, clean[:stream] + damage + clean[stream:]) for name, damage in damages.items()
    }
    inner = {
        "res short": box(b"res ", b"abc"),
        "res noise": box(b"res ", GARBAGE),
        "resc short": box(b"res ", box(b"resc", b"ab")),
        "resc exponent": box(b"res ", box(b"resc", struct.pack(">HHHHbb", 1, 1, 1, 1, -1, 127))),
        "second colr": box(b"colr", b"\2\0\0" + GARBAGE),
        "colr short": box(b"colr", b"\2"),
        "unknown inside": box(b"abcd", GARBAGE),
    }
    for name, damage in inner.items():
        longer = struct.pack(">I", length + len(damage))
        inside = clean[:header] + longer + clean[header + 4 : end] + damage + clean[end:]
        damaged[name] = (clean, inside)
    damaged["more behind the end"] = (clean, clean + GARBAGE)
    return damaged


def item_damages(file_format: str) -> Damaged:
    """AVIF or HEIF files whose EXIF, XMP or profile is damaged in its place."""
    whole = encode(PICTURE, file_format, exif=exif_of(1), xmp=XMP * 5, icc_profile=GARBAGE)
    damaged = {}
    exif = whole.rindex(b"MM\0*")
    for name, content in exif_damages().items():
        size = len(exif_of(1)) - 6
        filled = (content + GARBAGE)[:size]
        damaged[f"EXIF {name}"] = (whole, whole[:exif] + filled + whole[exif + size :])
    for offset in (0, 1, 2**31, 2**32 - 1):
        start = exif - len(b"Exif\0\0") - 4  # it says that there are 6 bytes to TIFF's header
        patched = whole[:start] + struct.pack(">I", offset) + whole[start + 4 :]
        damaged[f"EXIF offset {offset}"] = (whole, patched)
    for name, start in (("EXIF", exif - 10), ("XMP", whole.index(XMP))):
        place = struct.pack(">I", start)
        assert whole.count(place) == 1
        damaged[f"{name} beyond the end"] = (whole, whole.replace(place, struct.pack(">I", 2**31)))
        damaged[f"{name} partly there"] = (
            whole,
            whole.replace(place, struct.pack(">I", len(whole) - 20)),
        )
    at = whole.rindex(XMP)
    damaged["XMP noise"] = (whole, whole[:at] + GARBAGE[: len(XMP)] + whole[at + len(XMP) :])
    turned = whole.replace(b'tiff:Orientation="1"', b'tiff:Orientation="0"')
    damaged["XMP orientation"] = (whole, turned)
    at = whole.index(GARBAGE)
    damaged["profile"] = (whole, whole[:at] + bytes(len(GARBAGE)) + whole[at + len(GARBAGE) :])
    damaged["more behind the end"] = (whole, whole + GARBAGE)
    return damaged


def damaged_metadata() -> dict[str, Damaged]:
    return {
        "PNG": png_damages() | kept_beside_png_damages(),
        "JPEG": jpeg_damages(),
        "WEBP": webp_damages(),
        "GIF": gif_damages(),
        "TIFF": tiff_damages(),
        "BMP": bmp_damages(),
        "JPEG2000": jp2_damages(),
        "AVIF": item_damages("AVIF"),
        "HEIF": item_damages("HEIF"),
    }


# Files damaged anywhere


def whole_files() -> dict[str, bytes]:
    """Small files of every format and many kinds, with metadata wherever the format takes any."""
    told: dict[str, Any] = {"exif": exif_of(6), "icc_profile": GARBAGE, "xmp": XMP}
    rgba, palette = PICTURE.convert("RGBA").rotate(30), PICTURE.quantize(16)

    def frames() -> dict[str, Any]:
        return {"save_all": True, "append_images": [PICTURE.rotate(90)]}

    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(GARBAGE))
    png = encode(PICTURE, "PNG", **told)
    return {
        "JPEG": encode(PICTURE, "JPEG", comment=b"a comment", **told),
        "JPEG progressive": encode(PICTURE, "JPEG", progressive=True, **told),
        "JPEG CMYK": encode(PICTURE.convert("CMYK"), "JPEG"),
        "MPO": encode(PICTURE, "MPO", **frames()),
        "PNG": png[:33] + text + png[33:-12] + text + png[-12:],
        "PNG palette": encode(palette, "PNG", transparency=b"\0\x40", **told),
        "PNG 16 bits": encode(PICTURE.convert("I").convert("I;16"), "PNG", transparency=5),
        "PNG alpha": encode(rgba, "PNG"),
        "APNG": encode(PICTURE, "PNG", **frames()),
        "GIF": encode(palette, "GIF", transparency=3, comment=b"a comment"),
        "GIF moving": encode(palette, "GIF", loop=0, **frames()),
        "WEBP": encode(PICTURE, "WEBP", **told),
        "WEBP lossless": encode(rgba, "WEBP", lossless=True, **told),
        "WEBP moving": encode(PICTURE, "WEBP", **frames()),
        "BMP": encode(PICTURE, "BMP"),
        "BMP palette": encode(palette, "BMP"),
        "TIFF": encode(PICTURE, "TIFF", **told),
        "TIFF LZW": encode(PICTURE.convert("F"), "TIFF", compression="tiff_lzw"),
        "TIFF JPEG": encode(PICTURE, "TIFF", compression="jpeg"),
        "TIFF deflate": encode(PICTURE.convert("YCbCr"), "TIFF", compression="tiff_deflate"),
        "TIFF G4": encode(PICTURE.convert("1"), "TIFF", compression="group4"),
        "TIFF big": encode(palette, "TIFF", big_tiff=True),
        "TIFF pages": encode(PICTURE, "TIFF", **frames()),
        "AVIF": encode(PICTURE, "AVIF", **told),
        "AVIF moving": encode(PICTURE, "AVIF", **frames()),
        "JPEG2000": encode(PICTURE, "JPEG2000"),
        "JPEG2000 stream": encode(rgba, "JPEG2000", no_jp2=True, irreversible=True),
        "HEIF": encode(PICTURE, "HEIF", quality=50, **told),
        "HEIF alpha": encode(rgba, "HEIF", quality=50),
    }


EXTREMES = (0, 1, 2, 12, 255, 256, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def damage(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """The data with one to four damages, half of them in the first 200 bytes, the headers."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(max(1, min(len(data), chance.choice((200, len(data))))))
        end = at + chance.choice((1, 2, 4, 8, 40, 400))
        kind = chance.randrange(9)
        if kind == 0:  # a bit
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif kind == 1:  # noise
            data = data[:at] + chance.randbytes(end - at) + data[end:]
        elif kind in (2, 3):  # a length or an offset
            width = chance.choice((2, 4))
            value = chance.choice(EXTREMES) % 256**width
            field = value.to_bytes(width, chance.choice(("big", "little")))
            data = data[:at] + field + data[at + width :]
        elif kind == 4:  # something lost
            data = data[:at] + data[end:]
        elif kind == 5:  # something twice
            data = data[:end] + data[at:]
        elif kind == 6:  # something foreign
            other = chance.choice(others)
            place = chance.randrange(len(other))
            data = data[:at] + other[place : place + end - at] + data[at:]
        elif kind == 7:  # the rest of another file
            other = chance.choice(others)
            data = data[:at] + other[chance.randrange(len(other)) :]
        elif kind == 8 and chance.random() < 0.5:  # the end lost
            data = data[: chance.randrange(len(data))]
        data = data or b"\0"
    return data


def damaged_files(number: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`number` files of each format in turn; a seed always gives the same ones."""
    files = whole_files()
    chance = random.Random(seed)
    for index in range(number):
        name, data = list(files.items())[index % len(files)]
        yield f"{index} {name}", damage(data, list(files.values()), chance)
