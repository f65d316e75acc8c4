"""Where a job's files lie: on local disks, in whatever store Arrow knows (S3, GCS, Azure, HDFS), or
on the Hugging Face hub.

fsspec is the face of all; Arrow's and the hub's own clients are behind it, so that nothing more is
installed.
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
    """A file or a folder, there or not yet."""

    store: AbstractFileSystem
    path: str
    """Absolute in its store, without a scheme."""

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
        """The file for reading, by Arrow's own means."""
        if self.is_local:
            return pa.OSFile(os.fsencode(self.path), "rb")  # a name may be no text
        if self.is_on_hub:
            return pa.PythonFile(self.store.open(self.path, "rb"), mode="r")
        return self.store.fs.open_input_file(self.path)

    def write(self, data: bytes) -> None:
        """Have the file hold `data`: whoever reads it sees all of it or what was there before.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        if not self.is_local:
            self.store.pipe_file(self.path, data)  # an object is there when it is whole
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
        """Of the files and folders in this folder, in their order; none where there is none."""
        if not self.is_folder():
            return []
        return sorted(posixpath.basename(path) for path in self.store.ls(self.path, detail=False))

    def remove_unfinished(self) -> None:
        """Remove what a write left that was killed; nobody else may write here meanwhile."""
        for name in self.names():
            if name.startswith(UNFINISHED):
                (self / name).remove()


UNFINISHED = ".unfinished-"
GCS_RETRY_S = 30


def locate(text: str | os.PathLike[str]) -> Location:
    """The location that a path or a URI names; a store's path is taken as it is, without escapes.

    A path may begin with `~`. A local file's URI is taken as it is written where such a file is,
    else without its escapes: programs write both.

    Raises:
        ConfigError: it is another machine's file; nobody knows such a store, or it does not answer.
    """
    text = os.fspath(text)
    if paths := _local_paths(text):
        there = [path for path in paths if os.path.lexists(path)]
        return Location(LocalFileSystem(), (there or paths)[0])
    try:
        parts = urlsplit(text, allow_fragments=False)  # a key may hold any character
    except ValueError as error:
        raise ConfigError(f"{text[:200]!r} is no URI ({error}); correct it") from None
    store, root = _open_store(parts._replace(path="").geturl())
    return Location(store, posixpath.join(root, parts.path.lstrip("/")).rstrip("/"))


def is_uri(text: str) -> bool:
    """It names its store, and so is no path in another."""
    return "://" in text or _LOCAL_URI.match(text) is not None


_LOCAL_URI = re.compile(r"file:(?://(?P<host>[^/]*))?(?P<path>/.*)", re.IGNORECASE | re.DOTALL)


def _local_paths(text: str) -> list[str]:
    """What a local path, or a local file's URI, may mean; nothing where it is a store's URI.

    Raises:
        ConfigError: it is another machine's file.
    """
    uri = _LOCAL_URI.match(text)
    if uri is None:
        return [] if "://" in text else [os.path.abspath(os.path.expanduser(text))]
    if (uri["host"] or "localhost").lower() != "localhost":
        raise ConfigError(
            f"{text} is a file of the machine {uri['host']!r}; write file:///PATH for one of this"
        )
    return list(
        dict.fromkeys(os.path.abspath(path) for path in (uri["path"], unquote(uri["path"])))
    )


def is_below(text: str, roots: Sequence[str]) -> bool:
    """The path or URI, however it is read, lies in one of `roots`; neither links nor `..` help.

    A brace pattern does not: `{x,.}.` is `..` as well.
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
    """From the store down; a URI's query belongs to the store, for it may name another server."""
    if paths := _local_paths(text):
        return [("file", "", "", *os.path.realpath(path).rstrip("/").split("/")) for path in paths]
    parts = urlsplit(text, allow_fragments=False)
    path = posixpath.normpath("/" + parts.path.lstrip("/"))
    return [(parts.scheme, parts.netloc, parts.query, *path.rstrip("/").split("/"))]


@functools.lru_cache(maxsize=64)  # where a bucket lies is asked for over the network
def _open_store(uri: str) -> tuple[AbstractFileSystem, str]:
    if uri.startswith("hf://"):
        # Not by Arrow, which keeps to itself how the hub tells a file's versions apart.
        from huggingface_hub import HfFileSystem

        return HfFileSystem(), uri.removeprefix("hf://")
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        # Else it is tried for a quarter of an hour whether there is a network.
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
    """See that the hub answers; fsspec takes whatever goes wrong there for a file that is missing.

    Raises:
        ConfigError: it does not answer.
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
            f"{location} cannot be reached ({reason}); write hf://datasets/OWNER/NAME/PATH, and"
            " download it elsewhere where there is no network: hf download"
        ) from None


def walk(folder: Location, hidden: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files below `folder` and what the store says of them, in a stable order.

    Files and folders whose names begin with one of `hidden` are left out, as everywhere.
    """
    found: dict[str, dict[str, Any]] = folder.store.find(folder.path, detail=True)
    for path in sorted(found):
        parts = posixpath.relpath(path, folder.path).split("/")
        is_file = found[path]["type"] == "file" or folder.store.isfile(path)  # of a link: its end
        if is_file and not any(part.startswith(hidden) for part in parts):
            yield path, found[path]
