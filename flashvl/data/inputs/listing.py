"""The files that an input's text names, whatever they contain."""

import glob
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashvl.data.storage import Location, check_reachable, locate, walk
from flashvl.errors import ConfigError

REMEDY = "name a Parquet, tar, JSONL or image file, or a folder, glob or {000..099} pattern of them"


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of an input, with what shows whether it has changed."""

    path: str
    """Path from the root of its store."""
    size: int
    stamp: str
    """Time of the last change, or what else its store tells versions apart by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of an input, in the order of their rows."""

    root: Location
    """Folder that the input names, or in which its glob begins; ids are paths from there."""
    files: list[ListedFile]
    is_named: bool
    """Whether each file was asked for, by name or pattern, rather than found in a folder."""

    def name(self, file: ListedFile) -> str:
        """A file's path from the root."""
        return posixpath.relpath(file.path, self.root.path)

    def only(self, files: list[ListedFile]) -> "Listing":
        """The listing with some of its files, or with its files in another order."""
        return replace(self, files=files)

    def in_order_of(self, known: Sequence[ListedFile]) -> "Listing":
        """The listing with a job's known files first, so that their rows keep their numbers."""
        place = {file.path: number for number, file in enumerate(known)}
        last = len(place)
        files = sorted(self.files, key=lambda file: (place.get(file.path, last), file.path))
        return self.only(files)


def list_files(text: str, what: str = "input", remedy: str = REMEDY) -> Listing:
    """The files that `text` names: a file, or all of a folder, a glob or a brace pattern.

    Names that begin with a dot are left out, as is usual, unless they are spelt out.

    Args:
        what: what the files are to the user, for the error where there are none.
        remedy: what to name instead.

    Raises:
        ConfigError: `text` names no file.
    """
    location = locate(text)
    store = location.store
    check_reachable(location)
    if location.is_folder():
        found = walk(location, hidden=(".",))
        return Listing(root=location, files=[_listed(*each) for each in found], is_named=False)
    if location.is_file():
        paths = [location.path]
    else:
        paths = [path for pattern in _expand(location.path) for path in _match(location, pattern)]
    if not paths:
        raise ConfigError(f"{what} {text!r} does not exist, nor does it match a file; {remedy}")
    files = [_listed(path, store.info(path)) for path in dict.fromkeys(paths)]
    root = Location(store, _beginning(location.path))
    return Listing(root=root, files=sorted(files, key=lambda file: file.path), is_named=True)


def _listed(path: str, info: dict[str, Any]) -> ListedFile:
    return ListedFile(path, info["size"], str(info.get("mtime") or info.get("blob_id")))


def _match(location: Location, pattern: str) -> list[str]:
    """The files of a glob, or the one file of that name.

    Raises:
        ConfigError: the name is from a brace pattern, and its file does not exist.
    """
    store = location.store
    if not glob.has_magic(pattern):
        if store.isfile(pattern):
            return [pattern]
        if pattern == location.path:
            return []
        raise ConfigError(f"input {location}: {pattern} does not exist; correct the pattern")
    spelt_dot = posixpath.basename(pattern).startswith(".")
    return [
        path
        for path in store.glob(pattern)
        if store.isfile(path) and (spelt_dot or not posixpath.basename(path).startswith("."))
    ]


def _beginning(path: str) -> str:
    """The folder above the first part of a path that is a pattern, or above the file."""
    segments = path.split("/")
    first = next(
        (n for n, segment in enumerate(segments) if glob.has_magic(segment) or "{" in segment), -1
    )
    return "/".join(segments[:first]) or "/"


_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")


def _expand(pattern: str) -> Iterator[str]:
    """Expand `a{00..02}b` and `a{x,y}b` as the shell does, with leading zeros."""
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    for choice in _choices(braces[1]):
        yield from _expand(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _choices(inner: str) -> Iterator[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span is None:
        yield from inner.split(",")
        return
    first, last = int(span[1]), int(span[2])
    has_zeros = any(len(text) > 1 and text.startswith("0") for text in span.groups())
    width = max(map(len, span.groups())) if has_zeros else 0
    for number in range(first, last + 1) if first <= last else range(first, last - 1, -1):
        yield f"{number:0{width}d}"
