"""Reads a stage's rows from Parquet tables by their numbers, in any store.

The rows of several tables are numbered through. A damaged row group costs its rows; a store that
does not answer stops the run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from flashvl.data.inputs.listing import ListedFile, list_files
from flashvl.data.inputs.parquet import read_footers
from flashvl.data.inputs.row_groups import DamagedError, open_parquet, read_batches
from flashvl.data.plain import is_list, plain_type, repair_text
from flashvl.data.schema import CONVERSATIONS, PREFERENCES, PROMPTS, is_binary, is_text
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError, DataError

Kind = Literal["supervised", "cells", "dpo", "grpo"]
"""What is learnt from a row: its answers' tokens, what lies in the cells of its scene, which of two
answers is better, or to give an answer that is rewarded."""
TABLES = {
    "supervised": ("conversations", CONVERSATIONS),
    "dpo": ("preferences", PREFERENCES),
    "grpo": ("prompts", PROMPTS),
}
"""What the rows of a table for a kind are called, and their schema; scenes with cells are drawn."""
MAX_GROUP_ROWS = 2**14
"""Rows of a row group at most: each window of rows reads it from its beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The files of a table."""

    name: str
    """Its path, without the credentials that a URI may hold."""
    folder: Location
    files: list[ListedFile]
    rows_of_files: list[int]
    first_row: int
    """Number of its first row among the rows of all tables."""
    columns: tuple[str, ...]
    """Columns to read."""

    @property
    def num_rows(self) -> int:
        return sum(self.rows_of_files)

    def read(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
        """Some rows, by ascending numbers, each with its number, or why it cannot be read.

        Raises:
            FlashVLError: the table's store does not answer, or a file has changed.
        """
        ends = self.first_row + np.cumsum(self.rows_of_files)
        files = np.searchsorted(ends, rows, side="right")
        for number in np.unique(files).tolist():
            origin = int(ends[number]) - self.rows_of_files[number]
            location = Location(self.folder.store, self.files[number].path)
            places = rows[files == number] - origin
            for place, found in _read_file(
                location, places, self.rows_of_files[number], self.columns
            ):
                yield origin + place, found


def open_table(text: str, first_row: int, kind: Kind = "supervised") -> tuple[Table, list[int]]:
    """The table that `text` names, and the number of rows in each of its row groups.

    Raises:
        ConfigError: there is no such table, or its rows are not of this kind.
    """
    listing = list_files(text, "table", "name a Parquet file, or a folder or glob of them")
    files = [file for file in listing.files if _is_part(listing.name(file), listing.is_named)]
    footers = read_footers(listing.only(files))
    rows, wanted = TABLES[kind]
    for footer in footers:
        if not _holds(footer.schema, wanted):
            columns = ", ".join(f"{field.name} ({field.type})" for field in footer.schema)
            raise ConfigError(
                f"table {footer.path} has columns {columns or 'none'}, not those of {rows}"
                f" ({', '.join(wanted.names)}); make it by flashvl data convert"
            )
    sizes = [size for footer in footers for size in footer.row_groups]
    if not sum(sizes):
        raise ConfigError(f"table {text} has no row; give a folder of Parquet files with {rows}")
    if max(sizes) > MAX_GROUP_ROWS:
        raise ConfigError(
            f"table {text} has a row group of {max(sizes)} rows, more than {MAX_GROUP_ROWS}; write"
            " it with row_group_size=64, so that its rows can be shuffled"
        )
    table = Table(
        name=str(locate(text)),
        folder=listing.root,
        files=files,
        rows_of_files=[sum(footer.row_groups) for footer in footers],
        first_row=first_row,
        columns=tuple(name for name in wanted.names if name != "row"),
    )
    return table, sizes


def _is_part(name: str, is_named: bool) -> bool:
    """Whether a file of a folder is one of the table's, not a converter's record beside it."""
    parts = name.split("/")
    is_record = any(part.startswith("_") for part in parts) or "dead_letters" in parts[:-1]
    return is_named or (name.lower().endswith(".parquet") and not is_record)


def _holds(schema: pa.Schema, wanted: pa.Schema) -> bool:
    """Whether a table has the columns of `wanted`, in any of Arrow's layouts; `row` may lack."""
    return all(
        field.name in schema.names and _is_like(schema.field(field.name).type, field.type)
        for field in wanted
        if field.name != "row"
    )


def _is_like(found: pa.DataType, wanted: pa.DataType) -> bool:
    if is_text(wanted):
        return is_text(found)
    if not is_list(found):
        return False
    if is_binary(wanted.value_type):
        return is_binary(found.value_type)
    message = plain_type(found.value_type)
    return pa.types.is_struct(message) and all(
        message.get_field_index(name) >= 0 and is_text(message.field(name).type)
        for name in ("role", "content")
    )


def _read_file(
    location: Location, places: npt.NDArray[np.int64], num_rows: int, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Rows of a file, by their places in it."""
    with open_parquet(location, lambda footer: footer.num_rows == num_rows) as file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        groups = np.searchsorted(ends, places, side="right")
        for group in np.unique(groups).tolist():
            start = int(ends[group]) - sizes[group]
            wanted = places[groups == group] - start
            for place, found in _read_group(file, location, group, wanted, columns):
                yield start + place, found


def _read_group(
    file: pq.ParquetFile,
    location: Location,
    group: int,
    wanted: npt.NDArray[np.int64],
    columns: Sequence[str],
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Rows of a row group, by their places in it; from the first damage on, none can be read."""
    start = num_found = 0
    try:
        for batch in read_batches(file, location, group, columns):
            here = wanted[(wanted >= start) & (wanted < start + batch.num_rows)]
            for place, row in zip(here.tolist(), _to_python(batch, here - start), strict=True):
                yield place, row
            start += batch.num_rows
            num_found += len(here)
            if num_found == len(wanted):
                return
        reason = "it has fewer rows than its footer says"
    except DamagedError as error:
        reason = str(error)
    problem = DataError(f"{location}: row group {group} is damaged ({reason}); write the file anew")
    for place in wanted[num_found:].tolist():
        yield place, problem


def _to_python(batch: pa.RecordBatch, places: npt.NDArray[np.int64]) -> Sequence[dict[str, Any]]:
    rows = batch.take(pa.array(places))
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:  # Parquet does not ensure that texts are UTF-8
        repaired = [repair_text(column) for column in rows.columns]
        return pa.RecordBatch.from_arrays(repaired, names=rows.schema.names).to_pylist()
