"""Tars of images, as WebDataset writes them: the members with one key are a sample.

    0001.jpg  0001.txt  0001.json  0002.jpg  ...

The key is a member's path up to the first dot of its name, and what follows the dot is its column:
`jpg`, `txt`, `json`, `left.jpg`. Each image is a row, so a sample with several is several rows.

The headers are read once, before anything starts; rows are then read by their offsets. Nothing can
be found after a break in a tar: images before it are rows, and one more row stands for the rest.
"""

import itertools
import json
import os
import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import ray.data
from fsspec import AbstractFileSystem

from flashvl.data.inputs.compressed import is_damage, open_plain
from flashvl.data.inputs.images import IMAGE_SUFFIXES
from flashvl.data.inputs.listing import ListedFile, Listing
from flashvl.data.inputs.rows import (
    BYTES_PER_READ,
    ROWS_PER_READ,
    as_blocks,
    as_name,
    as_table,
    as_text,
)
from flashvl.data.inputs.source import IMAGE, Done, Source, describe_columns
from flashvl.data.limits import ImageLimits
from flashvl.data.schema import ImageColumns, find_image_columns
from flashvl.data.storage import Location
from flashvl.errors import ConfigError, DataError

ROWS_PER_TASK = 1024
"""Rows of a tar that one task reads; one task reads all of a compressed tar, from its beginning."""
GAP_BYTES = 2**16
"""Bytes between two members that are still read at once."""
MAX_TEXT_BYTES = 2**20
"""Bytes of a member that is read as text, at most."""
NUM_JSON = 20
"""A tar's first JSON members, whose fields are taken for the fields of all."""
ANY_IMAGE = "image"
"""Name of the images' column where none is given: all members with an image's ending."""

_Span = tuple[int, int]
"""(offset, size) of a member's content, in bytes of the uncompressed tar."""

_MEMBER = pa.schema(
    [
        ("id", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        (
            "texts",
            pa.list_(
                pa.struct([("column", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
            ),
        ),
        ("problem", pa.string()),
    ]
)
_PIECE = pa.schema([*_MEMBER, ("row", pa.int64()), ("file", pa.int32())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Tar:
    """A tar as its headers describe it."""

    rows: pa.Table
    """Rows of `_MEMBER`: the tar's images, and a last row for what is lost after a break."""
    columns: frozenset[str]
    """Columns other than images; `json.url` is a field of `json`."""
    is_compressed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TarFiles(Source):
    """Tars of images."""

    tars: list[Tar]
    """The input's tars, in the order of its files."""
    columns: ImageColumns
    image_limits: ImageLimits

    @property
    def num_rows(self) -> int:
        return sum(tar.rows.num_rows for tar in self.tars)

    @property
    def kept(self) -> pa.Schema:
        return pa.schema([(name, pa.string()) for name in self.columns.kept])

    def describe(self) -> str:
        is_any = self.columns.image == ANY_IMAGE
        images = "images" if is_any else f"images from members .{self.columns.image}"
        return describe_columns("tars", self.columns, ".", made_id="the key", images=images)

    def read(self, is_done: Done) -> ray.data.Dataset:
        return ray.data.from_arrow(as_blocks(list(self._pieces(is_done)), _PIECE)).map_batches(
            _read_members,
            fn_kwargs={
                "store": self.store,
                "paths": [os.fsencode(file.path) for file in self.files],
                "columns": self.columns,
                "kept": self.kept,
                "image_limits": self.image_limits,
            },
            batch_size=None,
            batch_format="pyarrow",
        )

    def _pieces(self, is_done: Done) -> Iterator[pa.Table]:
        """The rows that are not done, in tables of `_PIECE`, each with rows of one tar."""
        first_row = 0
        for number, tar in enumerate(self.tars):
            rows = np.flatnonzero(~is_done[first_row : first_row + tar.rows.num_rows])
            left = tar.rows.take(pa.array(rows))
            left = left.append_column("row", pa.array(first_row + rows, pa.int64()))
            left = left.append_column("file", pa.array(np.full(len(rows), number), pa.int32()))
            size = len(rows) if tar.is_compressed else ROWS_PER_TASK
            for start in range(0, len(rows), size or 1):
                yield left.slice(start, size)
            first_row += tar.rows.num_rows


def find_tars(
    listing: Listing,
    *,
    image: str | None,
    id: str | None,
    prompt: str | None,
    kept: Sequence[str],
    image_limits: ImageLimits,
) -> TarFiles:
    """The tars of a listing, with their members found and their columns chosen.

    Raises:
        ConfigError: a tar is not readable, no tar holds an image, or no tar has a column that is
            asked for.
    """
    wanted = frozenset(
        head for column in (id or "id", prompt, *kept) if column for head in _heads(column)
    )

    def read(file: ListedFile) -> Tar:
        return read_headers(Location(listing.root.store, file.path), image, wanted)

    # A header is a small read: in a store, mostly waiting.
    with ThreadPoolExecutor(max_workers=16) as pool:
        tars = list(pool.map(read, listing.files))
    image = image or ANY_IMAGE
    if not any(tar.rows.num_rows for tar in tars):
        ends = f".{image}" if image != ANY_IMAGE else ", ".join(IMAGE_SUFFIXES)
        raise ConfigError(
            f"{listing.root}: no member of the {len(tars)} tars is an image ({ends}); name the"
            " right tars, or their images by --image-column"
        )
    names = frozenset().union(*(tar.columns for tar in tars)) - {image}
    columns = find_image_columns(
        pa.schema([(image, pa.binary()), *((name, pa.string()) for name in sorted(names))]),
        source=listing.files[0].path,
        image=image,
        id=id,
        prompt=prompt,
        kept=kept,
    )
    return TarFiles(listing=listing, tars=tars, columns=columns, image_limits=image_limits)


def _heads(column: str) -> list[str]:
    """The members that may hold a column: `json.url` is a member, or a field of member `json`."""
    segments = column.split(".")
    ends = [n for n, segment in enumerate(segments[:-1], 1) if segment == "json"]
    return [column, *(".".join(segments[:end]) for end in ends)]


def read_headers(location: Location, image: str | None, wanted: frozenset[str]) -> Tar:
    """A tar's images and columns.

    Args:
        image: column of the images; None: all members with an image's ending.
        wanted: columns whose members are to be found, too.

    Raises:
        ConfigError: the file is not a tar.
    """
    index, problem, is_compressed = index_tar(location, image, wanted)
    rows = index.rows()
    if problem is not None:
        name = as_name(posixpath.basename(location.path))
        rows.append({"id": name, "offset": 0, "size": 0, "texts": [], "problem": problem})
    return Tar(
        rows=pa.Table.from_pylist(rows, schema=_MEMBER),
        columns=frozenset(index.columns),
        is_compressed=is_compressed,
    )


def index_tar(
    location: Location, image: str | None, wanted: frozenset[str]
) -> tuple["Index", str | None, bool]:
    """A tar's members, the reason why the rest of it is lost, if it is, and whether it is
    compressed; for the arguments and errors see `read_headers`."""
    with open_plain(location) as (stream, is_compressed):
        index = Index(image, wanted, stream)
        try:
            tar = tarfile.open(fileobj=stream, mode="r:")
        except Exception as error:
            if not _is_break(error):
                raise
            raise ConfigError(
                f"{location} is not a readable tar ({error}); replace or remove it"
            ) from None
        problem = _read_all(tar, stream, index)
    if problem is not None:
        problem = (
            f"{as_name(str(location))} is broken {problem}: what it held from there on is lost;"
            " make it again"
        )
    return index, problem, is_compressed


def _read_all(tar: tarfile.TarFile, stream: BinaryIO, index: "Index") -> str | None:
    """Give `index` the complete members; returns the place where the tar is broken, if it is."""
    last: tarfile.TarInfo | None = None
    try:
        while (member := tar.next()) is not None:
            cast(Any, tar).members.clear()  # tarfile would keep them all in memory
            if member.size < 0 or (last is not None and member.offset <= last.offset):
                raise tarfile.ReadError("a header leads backwards")
            if last is not None:
                index.add(last)
            last = member
        stream.seek(tar.offset)
        # Where there is no valid header, tarfile behaves as if the tar ended there.
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("neither a header nor the mark of the end")
    except Exception as error:
        if not _is_break(error):
            raise
        if last is not None and _is_whole(last, stream):
            index.add(last)
            return f"after member {last.name!r} ({error})"
        return f"at member {last.name!r} ({error})" if last is not None else f"({error})"
    if last is not None:
        index.add(last)
    return None


def _is_whole(member: tarfile.TarInfo, stream: BinaryIO) -> bool:
    try:
        stream.seek(member.offset_data)
        return len(stream.read(member.size)) == member.size
    except Exception as error:
        if not is_damage(error):
            raise
        return False


def _is_break(error: Exception) -> bool:
    """Whether an error is due to the tar, whose headers may hold nonsense, and not to its store."""
    return isinstance(error, (tarfile.TarError, ValueError, OverflowError)) or is_damage(error)


class Index:
    """The members of a tar that are images or wanted columns, by sample."""

    def __init__(self, image: str | None, wanted: frozenset[str], stream: BinaryIO):
        self.columns: set[str] = set()
        self._image, self._wanted, self._stream = image, wanted, stream
        self._images: list[tuple[str, str, _Span, str | None]] = []
        """Key, column, place and problem of each image."""
        self._texts: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        """Wanted columns by key, each with its name and place."""
        self._places: dict[str, _Span] = {}
        """Places of members by name, to resolve links."""
        self._num_json = 0

    def add(self, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name).lstrip("/")
        stem, _, column = posixpath.basename(name).partition(".")
        column = as_name(column).lower()
        if not stem or not column or not (member.isreg() or member.islnk() or member.issym()):
            return
        key = posixpath.join(posixpath.dirname(name), stem)
        place, problem = self._place(member, name)
        if self._is_image(column):
            self._images.append((key, column, place, problem))
            return
        self.columns.add(column)
        if column in self._wanted and problem is None:
            self._texts[key].append({"column": column, "offset": place[0], "size": place[1]})
            if column.endswith("json") and self._num_json < NUM_JSON:
                self._num_json += 1
                self._add_fields(column, place)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of `_MEMBER`; an image's id is its full name where its key has several images."""
        counts = Counter(key for key, *_ in self._images)
        return [
            {
                "id": as_name(key if counts[key] == 1 else f"{key}.{column}"),
                "offset": offset,
                "size": size,
                "texts": self._texts.get(key, []),
                "problem": problem,
            }
            for key, column, (offset, size), problem in self._images
        ]

    def samples(self) -> list[dict[str, Any]]:
        """The keys that have images or wanted columns, by their places, each with those."""
        found: dict[str, dict[str, Any]] = {}
        for key, _, (offset, size), problem in self._images:
            sample = found.setdefault(key, {"id": as_name(key), "texts": [], "images": []})
            sample["images"].append({"offset": offset, "size": size, "problem": problem})
        for key, texts in self._texts.items():
            found.setdefault(key, {"id": as_name(key), "images": []})["texts"] = texts
        return sorted(
            found.values(),
            key=lambda sample: min(
                member["offset"] for member in (*sample["texts"], *sample["images"])
            ),
        )

    def _is_image(self, column: str) -> bool:
        if self._image is not None:
            return column == self._image
        return f".{column.rpartition('.')[2]}" in IMAGE_SUFFIXES

    def _place(self, member: tarfile.TarInfo, name: str) -> tuple[_Span, str | None]:
        """The place of a member's content, for a link that of its target; or why there is none."""
        if member.issparse():
            return (0, 0), "member is stored sparsely; make the tar without --sparse"
        if member.isreg():
            self._places[name] = place = member.offset_data, member.size
            return place, None
        folder = posixpath.dirname(name) if member.issym() else ""
        target = posixpath.normpath(posixpath.join(folder, member.linkname)).lstrip("/")
        if target not in self._places:
            return (0, 0), f"member is a link to {target!r}, which is not before it in the tar"
        return self._places[target], None

    def _add_fields(self, column: str, place: _Span) -> None:
        self._stream.seek(place[0])
        try:
            fields = json.loads(self._stream.read(min(place[1], MAX_TEXT_BYTES)))
        except (ValueError, RecursionError):
            return
        if isinstance(fields, dict):
            self.columns |= {as_name(f"{column}.{name}") for name in fields}


def _read_members(
    pieces: pa.Table,
    *,
    store: AbstractFileSystem,
    paths: list[bytes],
    columns: ImageColumns,
    kept: pa.Schema,
    image_limits: ImageLimits,
) -> Iterator[pa.Table]:
    """The rows of some pieces, a few at a time."""
    for number, members in itertools.groupby(pieces.to_pylist(), key=lambda row: row["file"]):
        with open_plain(Location(store, os.fsdecode(paths[number]))) as (stream, _):
            for chunk in _chunks(members):
                spans = {span for member in chunk for span in _spans(member, image_limits)}
                contents = read_spans(stream, spans)
                rows = [_as_row(member, contents, columns, image_limits) for member in chunk]
                yield as_table(rows, kept, IMAGE, columns.prompt is not None)


def _chunks(members: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    num_bytes = 0
    for member in members:
        if chunk and (len(chunk) == ROWS_PER_READ or num_bytes + member["size"] > BYTES_PER_READ):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(member)
        num_bytes += member["size"]
    if chunk:
        yield chunk


def _spans(member: dict[str, Any], image_limits: ImageLimits) -> list[_Span]:
    """The spans to read for a row, without those that are too large."""
    spans = [
        (text["offset"], text["size"]) for text in member["texts"] if text["size"] <= MAX_TEXT_BYTES
    ]
    if member["problem"] is None and member["size"] <= image_limits.max_image_bytes:
        spans.append((member["offset"], member["size"]))
    return spans


def read_spans(stream: BinaryIO, spans: Iterable[_Span]) -> dict[_Span, bytes]:
    """The content of each span that can be read, in the order of their offsets."""
    found = {}
    for run in _runs(sorted(spans)):
        begin = run[0][0]
        try:
            stream.seek(begin)
            data = stream.read(max(offset + size for offset, size in run) - begin)
        except Exception as error:
            if not is_damage(error):
                raise
            continue
        for offset, size in run:
            content = data[offset - begin : offset - begin + size]
            if len(content) == size:
                found[offset, size] = content
    return found


def _runs(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Spans that are near each other, to be read at once."""
    run: list[_Span] = []
    for span in spans:
        if run and span[0] - sum(run[-1]) > GAP_BYTES:
            yield run
            run = []
        run.append(span)
    if run:
        yield run


def _as_row(
    member: dict[str, Any],
    contents: dict[_Span, bytes],
    columns: ImageColumns,
    image_limits: ImageLimits,
) -> dict[str, Any]:
    """A row for `rows.as_table`; a `problem` makes it a dead letter."""
    row = {"id": member["id"], "row": member["row"], "problem": member["problem"]}
    if member["problem"] is not None:
        return row
    try:
        if member["size"] > image_limits.max_image_bytes:
            raise DataError(
                f"image has {member['size']} bytes, more than"
                f" max_image_bytes={image_limits.max_image_bytes}; compress it or raise"
                " max_image_bytes"
            )
        row["image"] = read_content((member["offset"], member["size"]), contents)
        texts = {text["column"]: (text["offset"], text["size"]) for text in member["texts"]}
        row["kept"] = {name: _value(name, texts, contents) for name in columns.kept}
        if columns.prompt is not None:
            prompt = _value(columns.prompt, texts, contents)
            row["prompt"] = None if prompt is None else prompt.rstrip("\r\n")
        if columns.id is not None:
            row["id"] = _value(columns.id, texts, contents)
    except DataError as error:
        row["problem"] = str(error)
    return row


def read_content(span: _Span, contents: dict[_Span, bytes]) -> bytes:
    if span not in contents:
        raise DataError("member cannot be read any more: did the tar change? Restore it")
    return contents[span]


def _value(name: str, texts: dict[str, _Span], contents: dict[_Span, bytes]) -> str | None:
    """A sample's value of a column: a member's text, or a field of its JSON; None: it has none.

    Raises:
        DataError: the member is not UTF-8, not JSON, or too large.
    """
    head = next((head for head in _heads(name) if head in texts), None)
    if head is None:
        return None
    if texts[head][1] > MAX_TEXT_BYTES:
        raise DataError(f"member .{head} has more than {MAX_TEXT_BYTES} bytes; shorten it")
    try:
        text = read_content(texts[head], contents).decode()
        if head == name:
            return text
        fields = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"member .{head} is not UTF-8 ({error}); write it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"member .{head} is not JSON ({error}); correct it") from None
    return as_text(fields.get(name.removeprefix(f"{head}."))) if isinstance(fields, dict) else None
