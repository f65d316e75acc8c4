"""The rows of Parquet's row groups, a few at a time, in Ray's tasks.

Rows of a damaged row group become dead letters here. A store that does not answer is not damage: it
stops the job.
"""

import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from flashvl.data.inputs.columns import as_rows
from flashvl.data.inputs.rows import BYTES_PER_READ, ROWS_PER_READ
from flashvl.data.schema import ImageColumns
from flashvl.data.storage import Location
from flashvl.errors import FlashVLError, one_line

PIECE = pa.schema(
    [
        ("path", pa.binary()),
        ("name", pa.string()),
        ("row_group", pa.int64()),
        ("num_rows", pa.int64()),
        ("first_row", pa.int64()),
        ("is_done", pa.binary()),
        ("partition", pa.map_(pa.string(), pa.string())),
    ]
)
"""A row group with rows to read."""


def read_row_groups(
    pieces: pa.Table, *, store: AbstractFileSystem, columns: ImageColumns, schema: pa.Schema
) -> Iterator[pa.Table]:
    """The rows of some row groups that are not done, a few at a time.

    Args:
        schema: schema of the table's files, with the partition's columns.

    Raises:
        FlashVLError: a file has changed, or its store does not answer.
    """
    for piece in pieces.to_pylist():
        is_done = np.unpackbits(np.frombuffer(piece["is_done"], np.uint8)).astype(bool)
        for first, table, damage in _read_piece(piece, store, columns, schema):
            places = np.arange(first, first + table.num_rows)
            rows = as_rows(
                table,
                columns,
                folder=posixpath.dirname(os.fsdecode(piece["path"])),
                made_ids=[f"{piece['name']}:{piece['row_group']}:{n}" for n in places.tolist()],
                damage=damage,
            )
            rows = rows.add_column(1, "row", pa.array(piece["first_row"] + places, pa.int64()))
            yield rows.filter(pa.array(~is_done[places]))


class DamagedError(Exception):
    """The row group's bytes could be read, but do not decode to rows."""


def _read_piece(
    piece: dict[str, Any], store: AbstractFileSystem, columns: ImageColumns, schema: pa.Schema
) -> Iterator[tuple[int, pa.Table, str | None]]:
    """Tables of rows, each with its first row's place in the row group and its damage, if any.

    From the first damage on, all rows are damaged, and keep the columns that can still be read.
    """
    row_group, num_rows = piece["row_group"], piece["num_rows"]
    file_columns = [name for name in columns.names if name not in dict(piece["partition"])]
    location = Location(store, os.fsdecode(piece["path"]))
    start = 0

    def is_same(footer: pq.FileMetaData) -> bool:
        return (
            row_group < footer.num_row_groups and footer.row_group(row_group).num_rows == num_rows
        )

    with open_parquet(location, is_same) as file:
        try:
            for batch in read_batches(file, location, row_group, file_columns):
                yield start, _with_partition(pa.Table.from_batches([batch]), piece, columns), None
                start += batch.num_rows
            if start < num_rows:
                raise DamagedError(f"it has {start} rows of {num_rows}")
        except DamagedError as error:
            damage = (
                f"{_name(location)}: row group {row_group} is damaged ({error});"
                " replace the file and run again with --restart"
            )
            rest = _read_around(file, location, row_group, file_columns, schema, columns.image)
            yield start, _with_partition(rest, piece, columns).slice(start), damage


@contextmanager
def open_parquet(
    location: Location, is_same: Callable[[pq.FileMetaData], bool]
) -> Iterator[pq.ParquetFile]:
    """The file, opened.

    Args:
        is_same: whether a footer is that of the file whose rows were counted.

    Raises:
        FlashVLError: the file has changed since its rows were counted, or cannot be read.
    """
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(location.open())
            # A page with a wrong checksum might decode, to another picture.
            file = stack.enter_context(pq.ParquetFile(opened, page_checksum_verification=True))
            if not is_same(file.metadata):
                raise ValueError("its rows have changed")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise FlashVLError(
                f"{_name(location)} cannot be read any more ({one_line(error)}); restore it, and"
                " run the same command again for the rest"
            ) from error
        yield file


def read_batches(
    file: pq.ParquetFile, location: Location, row_group: int, names: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """The rows of a row group, a few at a time.

    Raises:
        DamagedError: the file's bytes do not decode to the next rows.
        FlashVLError: the store does not answer.
    """
    footer = file.metadata.row_group(row_group)
    bytes_per_row = footer.total_byte_size / max(footer.num_rows, 1)
    batch_size = max(min(ROWS_PER_READ, int(BYTES_PER_READ / max(bytes_per_row, 1))), 1)
    batches = file.iter_batches(batch_size=batch_size, row_groups=[row_group], columns=names)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError, pa.ArrowException) as error:
            _check_bytes(location, footer)
            raise DamagedError(one_line(error)) from None
        if batch is None:
            return
        yield batch


def _check_bytes(location: Location, footer: pq.RowGroupMetaData) -> None:
    """Check that the store returns the row group's bytes, so that Arrow's error means damage.

    Raises:
        FlashVLError: the store does not answer.
    """
    try:
        with location.open() as file:
            for number in range(footer.num_columns):
                chunk = footer.column(number)
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                end = min(start + chunk.total_compressed_size, file.size())
                for offset in range(max(start, 0), end, BYTES_PER_READ):
                    file.read_at(min(BYTES_PER_READ, end - offset), offset)
    except OSError as error:
        raise FlashVLError(
            f"{_name(location)} cannot be read any more ({one_line(error)}); repair its store, and"
            " run the same command again for the rest"
        ) from error


def _read_around(
    file: pq.ParquetFile,
    location: Location,
    row_group: int,
    names: Sequence[str],
    schema: pa.Schema,
    image: str | None,
) -> pa.Table:
    """A damaged row group's columns, null where they cannot be read; the images are not read."""
    num_rows = file.metadata.row_group(row_group).num_rows
    found = {
        name: pa.chunked_array([pa.nulls(num_rows, schema.field(name).type)]) for name in names
    }
    for name in names:
        if name != image:
            try:
                batches = list(read_batches(file, location, row_group, [name]))
            except DamagedError:
                continue
            column = pa.Table.from_batches(batches)[name] if batches else []
            if len(column) == num_rows:
                found[name] = column
    return pa.table(found)


def _with_partition(table: pa.Table, piece: dict[str, Any], columns: ImageColumns) -> pa.Table:
    for name, value in piece["partition"]:
        if name in columns.names:
            table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def _name(location: Location) -> str:
    return os.fsencode(str(location)).decode(errors="replace")
