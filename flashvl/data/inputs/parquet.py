"""Image tables in Parquet, as their footers describe them."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from flashvl.data.inputs.listing import ListedFile, Listing
from flashvl.data.inputs.row_groups import PIECE, read_row_groups
from flashvl.data.inputs.rows import MAX_READ_TASKS
from flashvl.data.inputs.source import Done, Source, describe_columns
from flashvl.data.schema import ImageColumns, find_image_columns
from flashvl.data.storage import Location
from flashvl.errors import ConfigError, one_line

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetFile:
    """One file of an image table."""

    path: str
    name: str
    """Path from the input's folder, with which ids begin where the table has none."""
    row_groups: list[int]
    """Number of rows in each row group."""
    schema: pa.Schema
    """Schema of the file, with the partition's columns."""
    partition: dict[str, str | None]
    """Columns whose values are in the names of folders, as in `date=2026-01-31/`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetFiles(Source):
    """An image table, in one file or many."""

    tables: list[ParquetFile]
    """The table's files, in the order of their rows."""
    columns: ImageColumns

    @property
    def num_rows(self) -> int:
        return sum(sum(table.row_groups) for table in self.tables)

    @property
    def kept(self) -> pa.Schema:
        # Null in a row that cannot be read.
        fields = map(self.tables[0].schema.field, self.columns.kept)
        return pa.schema([field.with_nullable(True) for field in fields])

    def describe(self) -> str:
        made_id = f"file below {self.listing.root}, group and row"
        return describe_columns("Parquet", self.columns, "column ", made_id=made_id)

    def read(self, is_done: Done) -> ray.data.Dataset:
        pieces = list(self._pieces(is_done))
        # A block is read by one task.
        size = -(-len(pieces) // MAX_READ_TASKS)
        blocks = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        return ray.data.from_arrow(
            [pa.Table.from_pylist(block, schema=PIECE) for block in blocks]
        ).map_batches(
            read_row_groups,
            fn_kwargs={
                "store": self.store,
                "columns": self.columns,
                "schema": self.tables[0].schema,
            },
            batch_size=None,
            batch_format="pyarrow",
        )

    def _pieces(self, is_done: Done) -> Iterator[dict[str, Any]]:
        """The row groups with rows that are not done."""
        first_row = 0
        for file in self.tables:
            for number, count in enumerate(file.row_groups):
                skipped = is_done[first_row : first_row + count]
                if not skipped.all():
                    yield {
                        "path": os.fsencode(file.path),
                        "name": file.name,
                        "row_group": number,
                        "num_rows": count,
                        "first_row": first_row,
                        "is_done": np.packbits(skipped).tobytes(),
                        "partition": list(file.partition.items()),
                    }
                first_row += count


def read_footers(listing: Listing) -> list[ParquetFile]:
    """The files of a table, as their footers describe them.

    Raises:
        ConfigError: a file is not readable as Parquet.
    """

    def read(listed: ListedFile) -> ParquetFile:
        path = listed.path
        name = os.fsencode(listing.name(listed)).decode(errors="replace")
        try:
            with (
                Location(listing.root.store, path).open() as opened,
                pq.ParquetFile(opened) as file,
            ):
                footer = file.metadata
                row_groups = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
                schema = file.schema_arrow
                # Names that are not text and negative counts are found here.
                names = set(schema.names)
                if min(row_groups, default=0) < 0 or sum(row_groups) != footer.num_rows:
                    raise ValueError(f"its row groups have {row_groups} rows of {footer.num_rows}")
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = one_line(error)
            raise ConfigError(
                f"{path} is not a readable Parquet file ({reason}); replace or remove it"
            ) from None
        found = _partition(name)
        partition = {column: value for column, value in found.items() if column not in names}
        for column in partition:
            schema = schema.append(pa.field(column, pa.string()))
        return ParquetFile(
            path=path,
            name=name,
            row_groups=row_groups,
            schema=schema,
            partition=partition,
        )

    # A footer is a few small reads: mostly waiting.
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(read, listing.files))


def _partition(name: str) -> dict[str, str | None]:
    """The columns in the names of a file's folders, as Hive writes them."""
    segments = [segment.partition("=") for segment in name.split("/")[:-1]]
    return {
        unquote(column): None if value == HIVE_NULL else unquote(value)
        for column, separator, value in segments
        if column and separator
    }


def check_alike(files: list[ParquetFile], columns: ImageColumns) -> None:
    """Check that all files have the columns that are read, with the same types.

    Raises:
        ConfigError: a file lacks a column, or has it with another type.
    """
    for file in files:
        found = find_image_columns(
            file.schema,
            source=file.path,
            image=columns.image,
            id=columns.id,
            prompt=columns.prompt,
            kept=columns.kept,
        )
    check_types(files, found.names)


def check_types(files: list[ParquetFile], names: Sequence[str]) -> None:
    """Check that columns have the same types in all files.

    Raises:
        ConfigError: a file lacks a column, or has it with another type.
    """
    first = files[0]
    for file in files:
        for name in names:
            if name not in file.schema.names:
                raise ConfigError(
                    f"{file.path} has no column {name!r}, as {first.path} has; write all files"
                    " with one schema"
                )
            here, there = file.schema.field(name).type, first.schema.field(name).type
            if here != there:
                raise ConfigError(
                    f"{file.path}: column {name!r} has type {here}, but {there} in {first.path};"
                    " write all files with one schema"
                )
