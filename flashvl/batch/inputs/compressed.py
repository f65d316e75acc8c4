"""Files that may be compressed whole, as their first bytes tell: gzip, bzip2 or xz."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from flashvl.data.storage import Location
from flashvl.errors import ConfigError

REMOTE_BUFFER_BYTES = 2**20
"""A store answers with so much for little more than it takes to answer at all."""

_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_ZSTD = b"\x28\xb5\x2f\xfd"


@contextmanager
def open_plain(location: Location) -> Iterator[tuple[BinaryIO, bool]]:
    """The content, uncompressed, to seek in; and whether it is compressed, so that seeking costs.

    Raises:
        ConfigError: it is compressed in a way that is not read.
        OSError: it cannot be read.
    """
    buffer_bytes = io.DEFAULT_BUFFER_SIZE if location.is_local else REMOTE_BUFFER_BYTES
    # Arrow's files have what it asks for, though not its type.
    with io.BufferedReader(cast(io.RawIOBase, location.open()), buffer_bytes) as file:
        magic = file.peek(8)
        if magic.startswith(_ZSTD):
            raise ConfigError(
                f"{location} is compressed by zstd; compress it by gzip, or not at all"
            )
        opener = next((each for start, each in _OPENERS.items() if magic.startswith(start)), None)
        if opener is None:
            yield file, False
        else:
            # Not buffered again: of a broken file, reading ahead would lose what is there.
            with opener(file, "rb") as stream:
                yield stream, True


def is_damage(error: Exception) -> bool:
    """It is of a damaged file, and not of the store that it is in."""
    return isinstance(
        error, (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    ) or error.args == ("Invalid data stream",)  # bzip2's, else a plain OSError
