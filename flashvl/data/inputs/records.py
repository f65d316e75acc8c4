"""Records of any fields: JSON Lines, JSON arrays, Parquet tables, and samples in tars.

A captioning job reads an image table, with roles for its columns, by `flashvl.data.inputs.find`; a
conversion knows the fields of its own set of data.
"""

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from fsspec import AbstractFileSystem

from flashvl.data.inputs.compressed import open_plain
from flashvl.data.inputs.find import NAMED_SUFFIXES, SUFFIXES
from flashvl.data.inputs.jsonl import (
    NUM_SAMPLED,
    Lines,
    count_lines,
    left_lines,
    parse_line,
    pieces_to_read,
    read_items,
)
from flashvl.data.inputs.listing import ListedFile, Listing, list_files
from flashvl.data.inputs.parquet import ParquetFiles, check_types, read_footers
from flashvl.data.inputs.rows import BYTES_PER_READ, ROWS_PER_READ
from flashvl.data.inputs.samples import RECORD, find_samples
from flashvl.data.inputs.source import FAILURE, KEYS, Done, Source
from flashvl.data.limits import ImageLimits
from flashvl.data.schema import ImageColumns
from flashvl.data.storage import Location
from flashvl.errors import ConfigError, DataError

KINDS = {
    "parquet": SUFFIXES["parquet"],
    "tar": SUFFIXES["tar"],
    "json": (*SUFFIXES["jsonl"], *NAMED_SUFFIXES),
}
"""Names' endings of each kind of file that holds records."""

RECORDS = pa.schema([*KEYS, RECORD, *FAILURE])


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonRecords(Source):
    """JSON Lines or arrays; `read` gives the columns `RECORDS`."""

    lines: list[Lines]
    """The lines or elements of each file, in the files' order."""
    image_limits: ImageLimits

    @property
    def num_rows(self) -> int:
        return sum(lines.num_rows for lines in self.lines)

    @property
    def kept(self) -> pa.Schema:
        return pa.schema([])

    def describe(self) -> str:
        return "JSON: a row for each line, or each element of an array"

    def read(self, is_done: Done) -> ray.data.Dataset:
        return ray.data.from_arrow(pieces_to_read(self.lines, is_done)).map_batches(
            _read_records,
            fn_kwargs={
                "store": self.store,
                "paths": [os.fsencode(file.path) for file in self.files],
                "names": [os.fsencode(self.listing.name(file)) for file in self.files],
                "image_limits": self.image_limits,
            },
            batch_size=None,
            batch_format="pyarrow",
        )


def find_records(
    text: str,
    *,
    kinds: Collection[str],
    needed: Sequence[str],
    used: Sequence[str],
    image_limits: ImageLimits,
    known: Sequence[ListedFile] = (),
) -> Source:
    """The records of the input that `text` names: a file, a folder, a glob or a brace pattern.

    A folder is read as the first of `kinds` of which it holds a file, at any depth. Names that
    begin with a dot or with `_` are left out. A Parquet table's fields are in the column `kept`.

    Args:
        needed: fields that records have, without which the input is another set's.
        used: further fields to read from a Parquet table, where it has them.
        known: files whose rows come first, in this order, where they still exist.

    Raises:
        ConfigError: `text` names no input of these kinds, or its records lack a needed field.
    """
    listing = list_files(text).in_order_of(known)
    kind, listing = _choose(text, listing, kinds)
    if kind == "tar":
        return find_samples(listing, image_limits)
    if kind == "parquet":
        return _find_table(listing, needed, used)
    store = listing.root.store

    def count(file: ListedFile) -> Lines:
        return count_lines(Location(store, file.path), image_limits, may_be_array=True)

    with ThreadPoolExecutor(max_workers=16) as pool:
        lines = list(pool.map(count, listing.files))
    for file, each in zip(listing.files, lines, strict=True):
        if each.firsts[-1]:
            _check_fields(Location(store, file.path), each, needed, image_limits)
            break
    return JsonRecords(listing=listing, lines=lines, image_limits=image_limits)


def _choose(text: str, listing: Listing, kinds: Collection[str]) -> tuple[str, Listing]:
    for kind in kinds:
        files = [
            file
            for file in listing.files
            if file.path.lower().endswith(KINDS[kind])
            and (listing.is_named or "/_" not in f"/{listing.name(file)}")
        ]
        if files:
            return kind, listing.only(files)
    endings = ", ".join(f"*{KINDS[kind][0]}" for kind in kinds)
    if "json" in kinds:
        endings += ", *.json"
    raise ConfigError(
        f"input {text!r} holds no {endings}; name such files, or a folder, glob or"
        " {000..099} pattern of them"
    )


def _find_table(listing: Listing, needed: Sequence[str], used: Sequence[str]) -> ParquetFiles:
    """
    Raises:
        ConfigError: a file is not readable, lacks a needed column, or has it with another type.
    """
    tables = read_footers(listing)
    names = set(tables[0].schema.names)
    chosen = tuple(name for name in dict.fromkeys((*needed, *used)) if name in names)
    for table in tables:
        _check_has(table.path, table.schema.names, needed)
    check_types(tables, chosen)
    columns = ImageColumns(image=None, id=None, kept=chosen)
    return ParquetFiles(listing=listing, tables=tables, columns=columns)


def _check_fields(
    location: Location, lines: Lines, needed: Sequence[str], image_limits: ImageLimits
) -> None:
    """
    Raises:
        ConfigError: none of the first records has the needed fields.
    """
    fields: dict[str, None] = {}
    with open_plain(location) as (stream, _):
        items = read_items(stream, lines.is_array, image_limits)
        for _, line in itertools.islice(items, min(int(lines.firsts[-1]), NUM_SAMPLED)):
            try:
                fields |= dict.fromkeys(parse_line(line))
            except DataError:
                continue
    _check_has(location.path, fields, needed)


def _check_has(path: str, names: Collection[str], needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in names]:
        raise ConfigError(
            f"{path}: no record has the field {missing[0]!r}; fields: {', '.join(names) or 'none'}."
            " Name another input, or another family of data"
        )


def _read_records(
    pieces: pa.Table,
    *,
    store: AbstractFileSystem,
    paths: list[bytes],
    names: list[bytes],
    image_limits: ImageLimits,
) -> Iterator[pa.Table]:
    """The rows that are not done in some pieces, a few at a time."""
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for piece, _, line, place in left_lines(pieces, store, paths, image_limits):
        if rows and (len(rows) == ROWS_PER_READ or num_bytes + len(line or b"") > BYTES_PER_READ):
            yield pa.Table.from_pylist(rows, schema=RECORDS)
            rows, num_bytes = [], 0
        rows.append(_as_row(piece, names[piece["file"]], line, place))
        num_bytes += len(line or b"")
    if rows:
        yield pa.Table.from_pylist(rows, schema=RECORDS)


def _as_row(piece: dict[str, Any], name: bytes, line: bytes | None, place: int) -> dict[str, Any]:
    row = {
        "id": f"{name.decode(errors='replace')}:{piece['first_line'] + place}",
        "row": piece["first_row"] + place,
    }
    if piece["problem"] is not None:
        return row | {"step": "read", "error": "DataError", "reason": piece["problem"]}
    if line is None:
        reason = "record is longer than an image of max_image_bytes; shorten it"
        return row | {"step": "read", "error": "DataError", "reason": reason}
    return row | {"record": line}
