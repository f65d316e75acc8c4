"""JSON Lines: each line an object, whose fields are the columns of an image table.

An image is a path, absolute or from the file's own folder; a URI; base64, in a data URL or bare;
`{"bytes": base64, "path": ...}`; or a list of these, which share one prompt.

Lines are counted once, before anything starts. The offsets at which pieces of the file begin are
kept, so that tasks can start to read there.
"""

import itertools
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from fsspec import AbstractFileSystem

from flashvl.data.fetching import is_data_url
from flashvl.data.inputs.compressed import is_damage, open_plain
from flashvl.data.inputs.json_array import BrokenArrayError, read_elements, starts_array
from flashvl.data.inputs.listing import ListedFile, Listing
from flashvl.data.inputs.rows import (
    BYTES_PER_READ,
    ROWS_PER_READ,
    as_blocks,
    as_name,
    as_table,
    as_text,
    resolve_path,
)
from flashvl.data.inputs.source import IMAGES, Done, Source, describe_columns
from flashvl.data.limits import ImageLimits
from flashvl.data.schema import ImageColumns, find_image_columns
from flashvl.data.storage import Location
from flashvl.errors import ConfigError, DataError

ROWS_PER_PIECE = 1024
"""Lines of a piece of a file, at most."""
BYTES_PER_PIECE = 8 * 2**20
"""Bytes after which a piece ends with its line."""
NUM_SAMPLED = 100
"""First lines of an input, whose fields are taken for the fields of all lines."""
IMAGE_COLUMNS = ("image", "file_name")
"""Columns of images by default; the second is the name in Hugging Face's image folders."""

_PIECE = pa.schema(
    [
        ("file", pa.int32()),
        ("begin", pa.int64()),
        ("end", pa.int64()),
        ("first_row", pa.int64()),
        ("first_line", pa.int64()),
        ("is_done", pa.binary()),
        ("problem", pa.string()),
        ("is_array", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lines:
    """The places of a file's lines, without blank ones, or of the elements of its one array."""

    offsets: npt.NDArray[np.int64]
    """(pieces + 1,): uncompressed offset at which each begins, and at which the last one ends."""
    firsts: npt.NDArray[np.int64]
    """(pieces + 1,): number of lines before each, and of all lines."""
    problem: str | None
    """Reason why the rest of the file is lost, which counts as one more row; None: all is there."""
    is_compressed: bool
    is_array: bool = False
    """Whether the file is one array, whose elements take the place of lines."""

    @property
    def num_rows(self) -> int:
        return int(self.firsts[-1]) + (self.problem is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLines(Source):
    """Files of JSON Lines."""

    lines: list[Lines]
    """The lines of each file, in the files' order."""
    columns: ImageColumns
    image_limits: ImageLimits

    @property
    def num_rows(self) -> int:
        return sum(lines.num_rows for lines in self.lines)

    @property
    def kept(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self.columns.kept])

    def describe(self) -> str:
        made_id = f"file below {self.listing.root} and line"
        return describe_columns("JSON Lines", self.columns, "field ", made_id=made_id)

    def read(self, is_done: Done) -> ray.data.Dataset:
        return ray.data.from_arrow(pieces_to_read(self.lines, is_done)).map_batches(
            _read_pieces,
            fn_kwargs={
                "store": self.store,
                "paths": [os.fsencode(file.path) for file in self.files],
                "names": [os.fsencode(self.listing.name(file)) for file in self.files],
                "columns": self.columns,
                "kept": self.kept,
                "image_limits": self.image_limits,
            },
            batch_size=None,
            batch_format="pyarrow",
        )


def pieces_to_read(files: Sequence[Lines], is_done: Done) -> list[pa.Table]:
    """The pieces of an input's files with rows that are not done, a table for each task."""
    return as_blocks(list(_pieces(files, is_done)), _PIECE)


def _pieces(files: Sequence[Lines], is_done: Done) -> Iterator[pa.Table]:
    """The pieces with rows that are not done, in tables of `_PIECE`.

    The pieces of a compressed file are one table, for one task, as it is read from its start.
    """
    first_row = 0
    for number, lines in enumerate(files):
        done = is_done[first_row : first_row + lines.num_rows]
        pieces = []
        for n, (first, last) in enumerate(zip(lines.firsts, lines.firsts[1:], strict=False)):
            piece = {"begin": lines.offsets[n], "end": lines.offsets[n + 1], "problem": None}
            pieces.append(piece | {"first_line": first, "done": done[first:last]})
        if lines.problem is not None:
            last_piece = {"begin": 0, "end": 0, "problem": lines.problem}
            pieces.append(last_piece | {"first_line": lines.firsts[-1], "done": done[-1:]})
        left = [
            piece
            | {
                "file": number,
                "first_row": first_row + piece["first_line"],
                "is_done": np.packbits(piece["done"]).tobytes(),
                "is_array": lines.is_array,
            }
            for piece in pieces
            if not piece["done"].all()
        ]
        size = len(left) if lines.is_compressed else 1
        for start in range(0, len(left), size or 1):
            yield pa.Table.from_pylist(left[start : start + size], schema=_PIECE)
        first_row += lines.num_rows


def find_lines(
    listing: Listing,
    *,
    image: str | None,
    id: str | None,
    prompt: str | None,
    kept: Sequence[str],
    follow_paths: bool,
    image_limits: ImageLimits,
) -> JsonLines:
    """The JSON Lines of a listing, with their lines counted and their columns chosen.

    Raises:
        ConfigError: a file is not readable, the first lines are not JSON objects, or they lack a
            field that is asked for.
    """
    store = listing.root.store

    def read(file: ListedFile) -> Lines:
        return count_lines(Location(store, file.path), image_limits)

    with ThreadPoolExecutor(max_workers=16) as pool:
        lines = list(pool.map(read, listing.files))
    number = next((n for n, each in enumerate(lines) if each.firsts[-1]), 0)
    first = Location(store, listing.files[number].path)
    fields = _find_fields(first, min(int(lines[number].firsts[-1]), NUM_SAMPLED), image_limits)
    if image is None:
        image = next((name for name in IMAGE_COLUMNS if name in fields), None)
    columns = find_image_columns(
        pa.schema([(name, pa.string()) for name in fields]),
        source=first.path,
        image=image,
        id=id,
        prompt=prompt,
        kept=kept,
    )
    columns = replace(columns, follows_paths=follow_paths)
    return JsonLines(listing=listing, lines=lines, columns=columns, image_limits=image_limits)


def _find_fields(location: Location, num_lines: int, image_limits: ImageLimits) -> list[str]:
    """The names of the fields in the first `num_lines` lines.

    Raises:
        ConfigError: the lines are not JSON objects.
    """
    fields: dict[str, None] = {}
    is_any, start = False, b""
    with open_plain(location) as (stream, _):
        for _, line in itertools.islice(_read_lines(stream, image_limits), num_lines):
            start = start or (line or b"")[:1]
            try:
                fields |= dict.fromkeys(parse_line(line))
                is_any = True
            except DataError:
                continue
    if start == b"[" or (start and not is_any):
        array = " (an array: `jq -c '.[]' FILE` makes lines of it)" if start == b"[" else ""
        raise ConfigError(
            f"{location} does not hold JSON objects, one a line{array}; write it as JSON Lines"
        )
    # An empty table is not an error: it counts as having the fields that are asked for.
    return [as_text(name) or "" for name in fields] if start else [IMAGE_COLUMNS[0]]


def count_lines(
    location: Location, image_limits: ImageLimits, *, may_be_array: bool = False
) -> Lines:
    """The places of a file's lines.

    Args:
        may_be_array: take a file that begins with `[` as one array, of elements on any lines.

    Raises:
        ConfigError: the file is compressed by another program than gzip, bzip2 or xz.
        OSError: the file cannot be read.
    """
    offsets, firsts = [0], [0]
    count = end = 0
    problem = None
    with open_plain(location) as (stream, is_compressed):
        is_array = may_be_array and starts_array(stream)
        try:
            for end, _ in read_items(stream, is_array, image_limits):
                count += 1
                if count - firsts[-1] >= ROWS_PER_PIECE or end - offsets[-1] >= BYTES_PER_PIECE:
                    offsets.append(end)
                    firsts.append(count)
        except Exception as error:
            if not isinstance(error, BrokenArrayError) and not is_damage(error):
                raise
            what = "element" if is_array else "line"
            problem = (
                f"{as_name(str(location))} is broken after {what} {count} ({error}): what it held"
                " from there on is lost; make it again"
            )
    if count > firsts[-1]:
        offsets.append(end)
        firsts.append(count)
    return Lines(
        offsets=np.array(offsets, np.int64),
        firsts=np.array(firsts, np.int64),
        problem=problem,
        is_compressed=is_compressed,
        is_array=is_array,
    )


def read_items(
    stream: BinaryIO, is_array: bool, image_limits: ImageLimits, end: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """A file's lines or elements, as `_read_lines` gives them."""
    if is_array:
        return read_elements(stream, _most_bytes(image_limits), end)
    return _read_lines(stream, image_limits, end)


def _most_bytes(image_limits: ImageLimits) -> int:
    """Bytes of a line at most: an image in base64 and the other fields."""
    return 2 * image_limits.max_image_bytes + 2**20


def _read_lines(
    stream: BinaryIO, image_limits: ImageLimits, end: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank, from the stream's position: the offset at which each ends, and
    its content, or None where that is longer than any image."""
    most = _most_bytes(image_limits)
    place = stream.tell()
    while end is None or place < end:
        line = stream.readline(most)
        if not line:
            return
        place += len(line)
        is_whole = len(line) < most or line.endswith(b"\n")
        rest = line
        while len(rest) == most and not rest.endswith(b"\n"):
            rest = stream.readline(most)
            place += len(rest)
        if not is_whole:
            yield place, None
        elif line.strip():
            yield place, line


def parse_line(line: bytes | None, what: str = "line") -> dict[str, Any]:
    """The object in a line.

    Args:
        what: name of what is parsed, for its errors.

    Raises:
        DataError: the line is not a JSON object.
    """
    if line is None:
        raise DataError(
            f"{what} is longer than an image of max_image_bytes; shorten it, or raise"
            " max_image_bytes"
        )
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8 ({error}); write it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not JSON ({error}); write an object in each {what}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{what} is not a JSON object; write one in each {what}")
    return fields


def _read_pieces(
    pieces: pa.Table,
    *,
    store: AbstractFileSystem,
    paths: list[bytes],
    names: list[bytes],
    columns: ImageColumns,
    kept: pa.Schema,
    image_limits: ImageLimits,
) -> Iterator[pa.Table]:
    """The rows that are not done in some pieces, a few at a time."""
    has_prompt = columns.prompt is not None
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for piece, path, line, place in left_lines(pieces, store, paths, image_limits):
        name = names[piece["file"]].decode(errors="replace")
        keys = {"row": piece["first_row"] + place, "id": f"{name}:{piece['first_line'] + place}"}
        if rows and (len(rows) == ROWS_PER_READ or num_bytes + len(line or b"") > BYTES_PER_READ):
            yield as_table(rows, kept, [IMAGES], has_prompt)
            rows, num_bytes = [], 0
        rows.append(keys | _as_row(piece["problem"], line, path, columns))
        num_bytes += len(line or b"")
    if rows:
        yield as_table(rows, kept, [IMAGES], has_prompt)


def left_lines(
    pieces: pa.Table, store: AbstractFileSystem, paths: list[bytes], image_limits: ImageLimits
) -> Iterator[tuple[dict[str, Any], str, bytes | None, int]]:
    """The lines that are not done, each with its piece, file, content and place in the piece."""
    for number, group in itertools.groupby(pieces.to_pylist(), key=lambda piece: piece["file"]):
        path = os.fsdecode(paths[number])
        with open_plain(Location(store, path)) as (stream, _):
            for piece in group:
                if piece["problem"] is not None:
                    yield piece, path, None, 0
                    continue
                is_done = np.unpackbits(np.frombuffer(piece["is_done"], np.uint8))
                stream.seek(piece["begin"])
                items = read_items(stream, piece["is_array"], image_limits, piece["end"])
                for place, (_, line) in enumerate(items):
                    if not is_done[place]:
                        yield piece, path, line, place


def _as_row(
    problem: str | None, line: bytes | None, file: str, columns: ImageColumns
) -> dict[str, Any]:
    """A row for `rows.as_table`, without its number; a `problem` makes it a dead letter."""
    if problem is not None:
        return {"problem": problem}
    row: dict[str, Any] = {}
    try:
        fields = parse_line(line)
        if columns.id is not None:
            row["id"] = as_text(fields.get(columns.id))
        row["kept"] = {name: as_text(fields.get(name)) for name in columns.kept}
        if columns.prompt is not None:
            row["prompt"] = as_text(fields.get(columns.prompt))
        value = fields.get(columns.image or "")
        row["images"] = [
            {"path": _path(each, posixpath.dirname(file), columns.follows_paths)}
            for each in (value if isinstance(value, list) else [value])
        ]
    except UnicodeEncodeError:
        row["problem"] = "image is a path with half a surrogate pair; correct it"
    except DataError as error:
        row["problem"] = str(error)
    return row


def _path(value: Any, folder: str, follows_paths: bool) -> bytes | None:
    """An image in JSON -> its path as `Source` has it; None: the value is null.

    Raises:
        DataError: the value is not an image, or is a path, where paths may not be followed.
        UnicodeEncodeError: the text is not valid as a path.
    """
    reference = read_image_field(value)
    if reference is None:
        return None
    if not follows_paths and not is_data_url(reference):
        raise DataError("image is a path, and paths are not followed here; write base64")
    return resolve_path(os.fsencode(reference), os.fsencode(folder))


_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK", "AAAA")
"""Beginnings of JPEG, PNG, GIF, WebP, BMP, TIFF, and AVIF or JPEG 2000 files in base64."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}={0,2}\s*")


def read_image_field(value: Any) -> str | None:
    """An image in JSON -> its path or URL; bare base64 becomes a data URL.

    Raises:
        DataError: the value is not an image.
    """
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), str):
            return f"data:;base64,{value['bytes']}"
        value = value.get("path") or value.get("url")
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f"image is of type {type(value).__name__}; it must be a path, a URL or base64"
        )
    is_base64 = value.startswith(_BASE64_STARTS) and _BASE64.fullmatch(value)
    return f"data:;base64,{value}" if is_base64 else value
