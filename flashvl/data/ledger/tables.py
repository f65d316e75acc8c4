"""The tables of a job's output, in numbered Parquet files that appear when they are complete."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from flashvl.data.schema import DEAD_LETTERS
from flashvl.data.storage import Location

BYTES_PER_FILE = 64 * 2**20
"""Bytes in memory of the rows that make a file; as Parquet they are fewer."""
SECONDS_PER_FILE = 60.0
"""Seconds for which a row waits for its file at most; a killed job loses the rows that wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableSpec:
    """A table of an output, before it is written."""

    name: str
    """Folder of its files, within the output's."""
    schema: pa.Schema
    """Columns, among them `row`, the number of the input's row, and `id`."""
    parquet_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `pyarrow.parquet.write_table`."""


DEAD_LETTERS_TABLE = TableSpec(name="dead_letters", schema=DEAD_LETTERS)
"""Table of the rows without a result."""


class OutputTable:
    """One table of the output, in numbered files."""

    def __init__(self, folder: Location):
        self.folder = folder

    def count_rows(self) -> int:
        """The number of rows in the files, by their footers."""
        return sum(footer.num_rows for footer in self.footers())

    def names(self) -> list[str]:
        """The files' names, in the order of their numbers."""
        return [name for name in self.folder.names() if name.startswith("part-")]

    def footers(self) -> Iterator[pq.FileMetaData]:
        """The files' footers; `written_between` says when a file's rows came."""
        for name in self.names():
            with (self.folder / name).open() as file:
                yield pq.read_metadata(file)

    def read(self, file_name: str, *names: str) -> list[npt.NDArray[Any]]:
        """Some columns of a file."""
        with (self.folder / file_name).open() as file:
            table = pq.read_table(file, columns=list(names))
        return [table[name].to_numpy() for name in names]

    def columns(self, *names: str) -> Iterator[list[npt.NDArray[Any]]]:
        """Some columns, file by file."""
        for file_name in self.names():
            yield self.read(file_name, *names)

    def column(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """A column, file by file."""
        for (column,) in self.columns(name):
            yield column


class OutputTableWriter(OutputTable):
    """Collects the rows of a table and writes them as files."""

    def __init__(self, folder: Location, schema: pa.Schema, parquet_options: Mapping[str, Any]):
        super().__init__(folder)
        self.num_rows = 0
        """Rows in the files: those that `OutputFolder.audit` found, and those written since."""
        self._schema, self._parquet_options = schema, parquet_options
        self._pending: list[pa.Table] = []
        self._num_pending_bytes = 0
        self._pending_since_s = 0.0
        self._next_number = 0
        self._written_s = time.time()

    def open(self) -> None:
        """Make the folder; where it has files already, number further ones from there."""
        self.folder.make_folder()
        self.folder.remove_unfinished()
        numbers = [int(name.removeprefix("part-").split(".")[0]) for name in self.names()]
        self._next_number = max(numbers, default=-1) + 1

    def add(self, rows: pa.Table) -> None:
        """Keep rows until their file is written, when they are many or have waited long."""
        if rows.num_rows:
            if not self._pending:
                self._pending_since_s = time.time()
            rows = rows.select(self._schema.names).cast(self._schema)
            self._pending.append(rows)
            self._num_pending_bytes += rows.nbytes
        is_due = time.time() - self._pending_since_s > SECONDS_PER_FILE
        if self._num_pending_bytes >= BYTES_PER_FILE or is_due:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are kept."""
        if self._pending:
            self._write_file(pa.concat_tables(self._pending))
            self._pending, self._num_pending_bytes = [], 0

    def finish(self) -> None:
        """Give a table without rows one empty file, which has the columns."""
        if not self.names():
            self._write_file(self._schema.empty_table())

    def _write_file(self, rows: pa.Table) -> None:
        now_s = time.time()
        span = json.dumps({"start_s": self._written_s, "end_s": now_s})
        rows = rows.combine_chunks().replace_schema_metadata({SPAN: span})
        data = pa.BufferOutputStream()
        pq.write_table(rows, data, **self._parquet_options)
        (self.folder / f"part-{self._next_number:05d}.parquet").write(data.getvalue().to_pybytes())
        self._next_number += 1
        self.num_rows += rows.num_rows
        self._written_s = now_s


SPAN = "flashvl.span"
"""Key in a file's metadata: when the previous file was written, and when this one."""


def written_between(footer: pq.FileMetaData) -> tuple[float, float]:
    """The time in which the rows of a file came, from and to, in seconds since 1970."""
    span = json.loads(footer.metadata[SPAN.encode()])
    return span["start_s"], span["end_s"]
