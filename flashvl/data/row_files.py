"""Reads the files that a table's rows name, although the rows may say anything.

A path or URI in a row is untrusted text: any failure that it causes is a `DataError` of that row.
Only a store that fails for every path stops a job.
"""

import errno
import os
import posixpath
import re
import stat
import time

import pyarrow as pa
import pyarrow.fs
from fsspec import AbstractFileSystem

from flashvl.data.storage import Location, is_uri, locate
from flashvl.errors import ConfigError, DataError, FlashVLError

STORE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EIO ESTALE EREMOTEIO ENOTCONN EUCLEAN ENODEV ENOMEM EMFILE ENFILE ETIMEDOUT EHOSTDOWN"
        " EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET ECONNREFUSED ECONNRESET ECONNABORTED EPIPE"
    ).split()
)
"""Errors of a failing disk, network or machine; all other numbers are about one path."""
REFUSED = re.compile(
    r"ACCESS_DENIED|PERMISSION_DENIED|NO_SUCH|NOT_FOUND|INVALID|HTTP status 4(?!29)\d\d"
    r"|Not a regular file|[Nn]ot a directory|[Ii]s a directory|does not exist"
)
"""Words in the error of a store that answers but does not give this object."""
KERNEL = ("/proc/", "/sys/")
"""Folders of the kernel: their files have no size, and reading one may never end."""
PAUSE_S = 60.0
"""Seconds until a store that has never answered is asked again; each attempt takes seconds."""
SHOWN = 120
"""Characters of a path that an error shows: a path may be a whole file in base64."""

_last_read: dict[str, Location] = {}
"""Store, by the beginning of its URIs -> a file that was read, which proves that it answers."""
_silent: dict[str, tuple[float, str]] = {}
"""Store that has never answered, by the beginning of its URIs -> when it last failed, and why."""


def read_row_file(path: str, store: AbstractFileSystem, max_bytes: int) -> bytes:
    """The content of the file that a row names.

    Args:
        path: a path in `store`, or a URI.
        max_bytes: larger files are refused unread.

    Raises:
        DataError: the path cannot be read, whatever the reason.
        FlashVLError: a store that has answered before fails now, or its disk is broken.
    """
    shown = path if len(path) <= SHOWN else f"{path[:SHOWN]}..."
    root = _store_of(path)
    since_s, reason = _silent.get(root, (-PAUSE_S, ""))
    if time.monotonic() - since_s < PAUSE_S:
        raise DataError(f"file {shown!r} cannot be read ({reason}); repair its store")
    is_known = not root or root in _last_read
    try:
        location = locate(path) if is_uri(path) else Location(store, path)
        is_known = is_known or location.is_local or _is_same(location.store, store)
        read = _read_regular if location.is_local else _read_object
        data = read(location, max_bytes)
    except (OSError, ValueError, pa.ArrowException, ConfigError) as error:
        reason = _reason(error)
        if _is_of_store(error):
            if is_known:
                raise FlashVLError(
                    f"the store of {shown!r} cannot be read any more ({reason}); repair it, and"
                    " run the same command again for the rest"
                ) from error
            _silent[root] = time.monotonic(), reason
        elif "DENIED" in reason and root in _last_read and not _is_given(_last_read[root]):
            raise FlashVLError(
                f"the store of {shown!r} refuses every file now ({reason}); renew the credentials,"
                " and run the same command again for the rest"
            ) from error
        raise DataError(
            f"file {shown!r} cannot be read ({reason}); correct the path, or restore the file or"
            " its permissions"
        ) from error
    if not location.is_local:
        _last_read[root] = location
    return data


def _store_of(path: str) -> str:
    """The part of a URI that names its store; empty for a path.

    Raises:
        DataError: the URI names no file; some stores would search for it for minutes.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        return ""
    place, mark, query = rest.partition("?")
    host, _, key = place.partition("/")
    if not key or not (host or scheme in ("file", "hdfs", "viewfs")):
        raise DataError(f"URI {path[:SHOWN]!r} names no file; give its store and its path")
    return f"{scheme}://{host}{mark}{query}"


def _read_regular(location: Location, max_bytes: int) -> bytes:
    """The content of a regular file; opening a pipe or a device could wait for ever, or do harm.

    Raises:
        DataError: the file is not a regular one, or too large.
        OSError, ValueError: the file cannot be read.
    """
    path = os.path.realpath(location.path)
    kind = os.stat(path).st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(kind) or path.startswith(KERNEL):
        raise DataError(f"file {path[:SHOWN]!r} is not a regular file; name an image file")
    # Does not wait, even if the file has become a pipe meanwhile.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(size, max_bytes)
        return file.read(size)


def _read_object(location: Location, max_bytes: int) -> bytes:
    """The content of an object in a store.

    Raises:
        DataError: the object is too large.
        OSError, ValueError, ArrowException: the object cannot be read.
    """
    path = location.path
    if "\0" in path:  # where C would end the name
        raise ValueError("embedded null byte")
    if ".." in path.split("/"):
        path = posixpath.normpath(path)
    with Location(location.store, path).open() as file:
        _check_size(file.size(), max_bytes)
        return file.read()


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise DataError(
            f"file has {size} bytes, more than max_image_bytes={max_bytes}; "
            "compress it or raise max_image_bytes"
        )


def _is_of_store(error: Exception) -> bool:
    """Whether an error is about the store, not one path: a broken disk, a server that fails."""
    number = getattr(error, "errno", None)
    if number is not None:
        return number in STORE_ERRNOS
    if isinstance(error, ConfigError):  # a store that could not even be opened
        return "NETWORK_CONNECTION" in str(error)
    return not isinstance(error, ValueError) and REFUSED.search(str(error)) is None


def _is_same(store: AbstractFileSystem, other: AbstractFileSystem) -> bool:
    """Whether both are the same server, with the same credentials."""
    mine, others = getattr(store, "fs", None), getattr(other, "fs", None)
    if isinstance(mine, pa.fs.FileSystem) and isinstance(others, pa.fs.FileSystem):
        return mine.equals(others)
    return False


def _is_given(location: Location) -> bool:
    """Whether a file that could be read before can still be opened."""
    try:
        with location.open():
            return True
    except (OSError, pa.ArrowException):
        return False


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
