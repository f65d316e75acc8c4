"""Files and folders: on local disks, in Arrow's stores (S3, GCS, Azure, HDFS), or on the hub.

fsspec is the interface to all of them; it calls the clients of Arrow and of huggingface_hub, so
that no further library is needed.
"""

import functools
import os
import posixpath
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs
from fsspec import AbstractFileSystem
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from flashvl.errors import ConfigError, one_line


@dataclass(frozen=True, slots=True)
class Location:
    """A file or a folder, which need not exist."""

    store: AbstractFileSystem
    path: str
    """Absolute path within the store, without a scheme."""

    def __truediv__(self, name: str) -> "Location":
        return Location(self.store, posixpath.join(self.path, name))

    def __str__(self) -> str:
        if self.is_local:
            return self.path
        return f"hf://{self.path}" if self.is_on_hub else f"{self.store.fs.type_name}:{self.path}"

    @property
    def is_local(self) -> bool:
        return isinstance(self.store, LocalFileSystem)

    @property
    def is_on_hub(self) -> bool:
        return not isinstance(self.store, LocalFileSystem | ArrowFSWrapper)

    def is_file(self) -> bool:
        return self.store.isfile(self.path)

    def is_folder(self) -> bool:
        return self.store.isdir(self.path)

    def read(self) -> bytes:
        return self.store.cat_file(self.path)

    def open(self) -> pa.NativeFile:
        """The file, opened for reading by Arrow."""
        if self.is_local:
            return pa.OSFile(os.fsencode(self.path), "rb")  # a name need not be UTF-8
        if self.is_on_hub:
            return pa.PythonFile(self.store.open(self.path, "rb"), mode="r")
        return self.store.fs.open_input_file(self.path)

    def write(self, data: bytes) -> None:
        """Make `data` the content of the file; readers see all of it or the content before.

        Raises:
            OSError: the file cannot be written; nothing of `data` is left.
        """
        if not self.is_local:
            self.store.pipe_file(self.path, data)  # an object appears when it is complete
            return
        folder, name = os.path.split(self.path)
        unfinished = os.path.join(folder, f"{UNFINISHED}{uuid.uuid4().hex[:8]}-{name}")
        try:
            with open(unfinished, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a name must not outlive its content when power fails
            os.replace(unfinished, self.path)
        except OSError:
            if os.path.exists(unfinished):
                os.unlink(unfinished)
            raise

    def remove(self) -> None:
        if self.is_file():
            self.store.rm_file(self.path)

    def make_folder(self) -> None:
        self.store.makedirs(self.path, exist_ok=True)

    def names(self) -> list[str]:
        """Sorted names of the files and folders in this folder; empty if it does not exist."""
        if not self.is_folder():
            return []
        return sorted(posixpath.basename(path) for path in self.store.ls(self.path, detail=False))

    def remove_unfinished(self) -> None:
        """Remove what killed writes have left; nothing else may write to the folder meanwhile."""
        for name in self.names():
            if name.startswith(UNFINISHED):
                (self / name).remove()


UNFINISHED = ".unfinished-"
GCS_RETRY_S = 30


def locate(text: str | os.PathLike[str]) -> Location:
    """The location that a path or a URI names; escapes in a store's path are not decoded.

    A path may begin with `~`. The URI of a local file is read literally if that file exists, else
    with its escapes decoded: programs write both.

    Raises:
        ConfigError: the file is another machine's, the store is unknown, or it does not answer.
    """
    text = os.fspath(text)
    if paths := _local_paths(text):
        there = [path for path in paths if os.path.lexists(path)]
        return Location(LocalFileSystem(), (there or paths)[0])
    try:
        parts = urlsplit(text, allow_fragments=False)  # a key may hold any character
    except ValueError as error:
        raise ConfigError(f"{text[:200]!r} is not a valid URI ({error}); correct it") from None
    store, root = _open_store(parts._replace(path="").geturl())
    return Location(store, posixpath.join(root, parts.path.lstrip("/")).rstrip("/"))


def is_uri(text: str) -> bool:
    """Whether `text` names its own store, and so is not a path in another one."""
    return "://" in text or _LOCAL_URI.match(text) is not None


_LOCAL_URI = re.compile(r"file:(?://(?P<host>[^/]*))?(?P<path>/.*)", re.IGNORECASE | re.DOTALL)


def _local_paths(text: str) -> list[str]:
    """Paths that a local path or a local file's URI may mean; empty for the URI of a store.

    Raises:
        ConfigError: the URI names another machine's file.
    """
    uri = _LOCAL_URI.match(text)
    if uri is None:
        return [] if "://" in text else [os.path.abspath(os.path.expanduser(text))]
    if (uri["host"] or "localhost").lower() != "localhost":
        raise ConfigError(
            f"{text} is a file of the machine {uri['host']!r}; write file:///PATH for a local one"
        )
    return list(
        dict.fromkeys(os.path.abspath(path) for path in (uri["path"], unquote(uri["path"])))
    )


def is_below(text: str, roots: Sequence[str]) -> bool:
    """Whether a path or URI lies in one of `roots`, once its links and `..` are resolved.

    A brace pattern never does, since `{x,.}.` may become `..`.
    """
    if "{" in text:
        return False
    try:
        places = _steps(text)
    except ConfigError:
        return False
    steps_of_roots = [steps for root in roots for steps in _steps(root)]
    return all(any(place[: len(steps)] == steps for steps in steps_of_roots) for place in places)


def _steps(text: str) -> list[tuple[str, ...]]:
    """The path's parts, from the store down; a URI's query is one, as it may name a server."""
    if paths := _local_paths(text):
        return [("file", "", "", *os.path.realpath(path).rstrip("/").split("/")) for path in paths]
    parts = urlsplit(text, allow_fragments=False)
    path = posixpath.normpath("/" + parts.path.lstrip("/"))
    return [(parts.scheme, parts.netloc, parts.query, *path.rstrip("/").split("/"))]


@functools.lru_cache(maxsize=64)  # finding a bucket's region takes a request
def _open_store(uri: str) -> tuple[AbstractFileSystem, str]:
    if uri.startswith("hf://"):
        # Not by Arrow, which does not pass on the hub's identifiers of a file's versions.
        from huggingface_hub import HfFileSystem

        return HfFileSystem(), uri.removeprefix("hf://")
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        # Otherwise Arrow retries for a quarter of an hour where there is no network.
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_RETRY_S}"
    try:
        filesystem, root = pa.fs.FileSystem.from_uri(uri)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = one_line(error)
        raise ConfigError(
            f"{uri[:200]} cannot be opened ({reason}); name a local path or a URI that Arrow knows"
            " (s3://, gs://, abfs://, hdfs://), or hf://"
        ) from None
    return ArrowFSWrapper(filesystem), root


def check_reachable(location: Location) -> None:
    """Check that the hub answers; fsspec takes any error there for a missing file.

    Raises:
        ConfigError: the hub does not answer.
    """
    if not location.is_on_hub:
        return
    try:
        location.store.info(location.path)
    except FileNotFoundError:
        return
    except Exception as error:  # of the hub's own kinds, of its HTTP library's, of its parser's
        from huggingface_hub import is_offline_mode

        reason = one_line(error)
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else reason
        raise ConfigError(
            f"{location} cannot be reached ({reason}); write hf://datasets/OWNER/NAME/PATH, or"
            " without a network download it elsewhere: hf download"
        ) from None


def walk(folder: Location, hidden: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths of the files below `folder`, sorted, each with what the store tells about it.

    Files and folders whose names begin with one of `hidden` are left out.
    """
    found: dict[str, dict[str, Any]] = folder.store.find(folder.path, detail=True)
    for path in sorted(found):
        parts = posixpath.relpath(path, folder.path).split("/")
        is_file = found[path]["type"] == "file" or folder.store.isfile(path)  # follows a link
        if is_file and not any(part.startswith(hidden) for part in parts):
            yield path, found[path]
