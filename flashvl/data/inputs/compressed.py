"""Files that may be compressed as a whole by gzip, bzip2 or xz, as their first bytes show."""

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
"""Bytes of a read from a store, where a larger read takes little longer than a smaller one."""

_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_ZSTD = b"\x28\xb5\x2f\xfd"


@contextmanager
def open_plain(location: Location) -> Iterator[tuple[BinaryIO, bool]]:
    """The content, uncompressed, and whether the file is compressed, so that seeking is slow.

    Raises:
        ConfigError: the file is compressed by another program.
        OSError: the file cannot be read.
    """
    buffer_bytes = io.DEFAULT_BUFFER_SIZE if location.is_local else REMOTE_BUFFER_BYTES
    # Arrow's files have RawIOBase's methods, though not its type.
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
            # Without another buffer: reading ahead in a broken file would lose its last good bytes.
            with opener(file, "rb") as stream:
                yield stream, True


def is_damage(error: Exception) -> bool:
    """Whether an error is due to a damaged file rather than to its store."""
    return isinstance(
        error, (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    ) or error.args == ("Invalid data stream",)  # bzip2's, else a plain OSError
