"""The check that a job's input and output lie apart.

Otherwise the next run would find its results in the input, or a restart would remove the input.
"""

import glob
import os
import posixpath
import re
from urllib.parse import parse_qs, urlsplit

from fsspec.utils import glob_translate

from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError

WRITTEN = ("dead_letters/part-00000.parquet", "report.html", "_summary.json")
"""One file of each kind that a job writes, other than its results."""

Segments = tuple[str, ...]
"""A path or URI by its parts, the store first."""


def check_apart(input: str, output: str, results: str) -> None:
    """Refuse an input and an output of which one lies in the other, whatever they are called.

    Args:
        results: name of the output's table of results.

    Raises:
        ConfigError: one lies in the other, or a glob matches files that the job writes.
    """
    source, target = locate(input), locate(output)
    if source.is_on_hub:
        return  # where no output can be
    inner, outer = _segments(output, target), _segments(input, source)
    if _is_below(outer, inner):
        raise ConfigError(
            f"input {input!r} lies in the output {output!r}, which belongs to a job; name another"
            " output"
        )
    if source.is_folder():
        is_found = _is_below(inner, outer)
    else:
        # Braces stand for fewer names than `*` does.
        pattern = re.compile(glob_translate(re.sub(r"\{[^{}]*\}", "*", "/".join(outer))))
        written = (f"{results}/part-00000.parquet", *WRITTEN)
        is_found = any(pattern.match("/".join((*inner, name))) for name in written)
    if is_found:
        raise ConfigError(
            f"output {output!r} lies in the input {input!r}, where the next run would find it; name"
            " a folder elsewhere"
        )


def _is_below(place: Segments, root: Segments) -> bool:
    return place[: len(root)] == root


def _segments(text: str, location: Location) -> Segments:
    """Links are followed, except those after the beginning of a glob."""
    if location.is_local:
        folder, pattern = _split(location)
        path = posixpath.join(os.path.realpath(folder), pattern).rstrip("/")
        return ("file:", *path.split("/"))
    uri = urlsplit(text, allow_fragments=False)
    (server,) = parse_qs(uri.query).get("endpoint_override", [""])[:1]
    path = posixpath.normpath(f"/{location.path}").rstrip("/")
    return (f"{uri.scheme}:{server.replace('/', '')}", *path.split("/"))


def _split(location: Location) -> tuple[str, str]:
    """The folder that a glob begins in, and the rest; the whole path where it is not a glob."""
    segments = location.path.split("/")
    is_there = location.is_folder() or location.is_file()
    first = next(
        (n for n, segment in enumerate(segments) if glob.has_magic(segment)), len(segments)
    )
    first = len(segments) if is_there else first
    return "/".join(segments[:first]) or "/", "/".join(segments[first:])
