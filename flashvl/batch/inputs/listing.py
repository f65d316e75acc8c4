"""The files that an input's text names, whatever is in them."""

import glob
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashvl.data.storage import Location, check_reachable, locate, walk
from flashvl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of an input, and what tells whether it is still the same."""

    path: str
    """Absolute in its store."""
    size: int
    stamp: str
    """When it was changed, or what else its store tells versions apart by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The files of an input, in the order of their rows."""

    root: Location
    """The folder that the input names, or where its glob begins: what is above it is no part of the
    input, and an id tells the way from there."""
    files: list[ListedFile]
    is_named: bool
    """Each file was asked for, by its name or by a pattern: none of them is there by chance."""

    def name(self, file: ListedFile) -> str:
        """From the root."""
        return posixpath.relpath(file.path, self.root.path)

    def only(self, files: list[ListedFile]) -> "Listing":
        return replace(self, files=files)

    def in_order_of(self, known: Sequence[ListedFile]) -> "Listing":
        """With the files that a job knows first, in its order: rows keep their places."""
        place = {file.path: number for number, file in enumerate(known)}
        last = len(place)
        files = sorted(self.files, key=lambda file: (place.get(file.path, last), file.path))
        return self.only(files)


def list_files(text: str) -> Listing:
    """The files that `text` names: one, those of a folder, or those of a glob or a brace pattern.

    Names that begin with a dot are left out, as everywhere, unless they are spelt out.

    Raises:
        ConfigError: there is none.
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
        raise ConfigError(f"input {text!r} does not exist, nor does it match a file; {REMEDY}")
    files = [_listed(path, store.info(path)) for path in dict.fromkeys(paths)]
    root = Location(store, _beginning(location.path))
    return Listing(root=root, files=sorted(files, key=lambda file: file.path), is_named=True)


REMEDY = "name a Parquet, tar, JSONL or image file, or a folder, glob or {000..099} pattern of them"


def _listed(path: str, info: dict[str, Any]) -> ListedFile:
    return ListedFile(path, info["size"], str(info.get("mtime") or info.get("blob_id")))


def _match(location: Location, pattern: str) -> list[str]:
    """The files of a glob, or the one file of that name.

    Raises:
        ConfigError: the name is one of a brace pattern's, and there is no such file.
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
    """The folder above the first step that is a pattern, or above the file."""
    segments = path.split("/")
    first = next(
        (n for n, segment in enumerate(segments) if glob.has_magic(segment) or "{" in segment), -1
    )
    return "/".join(segments[:first]) or "/"


_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")


def _expand(pattern: str) -> Iterator[str]:
    """`a{0..2}b` and `a{x,y}b` as the shell has them, zeros in front and all."""
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
