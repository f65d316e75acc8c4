"""The output folder of a captioning job.

    _manifest.json, _files-*      written first: see `flashvl.data.ledger.manifest`
    captions/part-*.parquet       schema CAPTIONS, and the columns that are kept
    dead_letters/part-*.parquet   schema DEAD_LETTERS, and the columns that are kept
    report.html                   see `flashvl.batch.report`
    _summary.json                 written last: a folder without it is not finished

One process writes, and writes each row once, whatever Ray runs twice. A file gets its name when it
is complete: readers of the folder see whole rows only, and a killed job resumes after the rows that
are there.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flashvl.data.inputs.kept import unbundle
from flashvl.data.inputs.source import Done
from flashvl.data.ledger import manifest
from flashvl.data.ledger.lock import LOCK
from flashvl.data.ledger.manifest import FILES, has_begun
from flashvl.data.schema import CAPTIONS, DEAD_LETTERS
from flashvl.data.storage import UNFINISHED, Location
from flashvl.errors import ConfigError, FlashVLError

BYTES_PER_FILE = 64 * 2**20
"""Bytes in memory of the rows that make a file; as Parquet they are fewer."""
SECONDS_PER_FILE = 60.0
"""Seconds for which a row waits for its file at most; a killed job loses the rows that wait."""
SUMMARY = "_summary.json"
REPORT = "report.html"
TABLES = ("captions", "dead_letters")
"""Folders of the two tables."""


class OutputFolder:
    """An output folder while a job writes to it."""

    def __init__(self, folder: Location, num_rows: int, kept: pa.Schema):
        """Make the folder with its two tables, and remove files that a killed job left unfinished.

        Args:
            num_rows: rows of the input.
            kept: columns that are copied from the input.

        Raises:
            ConfigError: the folder cannot be made or written to.
            FlashVLError: the folder holds a row twice, or one that the input does not have.
        """
        self.folder, self.kept = folder, kept
        self.captions = OutputTableWriter(folder / "captions", pa.schema([*CAPTIONS, *kept]))
        self.dead_letters = OutputTableWriter(
            folder / "dead_letters", pa.schema([*DEAD_LETTERS, *kept])
        )
        self._tables = (self.captions, self.dead_letters)
        try:
            folder.remove_unfinished()
            for table in self._tables:
                table.open()
        except OSError as error:
            raise ConfigError(
                f"output {folder} cannot be written ({error.strerror or error}); name another"
                " folder"
            ) from None
        self.is_done: Done = np.zeros(num_rows, bool)
        self.num_done = self.num_dead = 0
        """Rows that are done, and dead letters among them; on disk or waiting for their file."""
        self.audit()

    def audit(self) -> None:
        """Count the rows in the files.

        Raises:
            FlashVLError: the files hold a row twice, or one that the input does not have.
        """
        num_rows = len(self.is_done)
        self.is_done[:] = False
        for table in self._tables:
            table.num_rows = 0
            for rows in table.column("row"):
                if len(rows) and not 0 <= rows.min() <= rows.max() < num_rows:
                    raise FlashVLError(
                        f"audit failed: {table.folder} holds row {rows.max()}, the input"
                        f" {num_rows} rows; give --restart to begin anew"
                    )
                places, counts = np.unique(rows, return_counts=True)
                twice = places[(counts > 1) | self.is_done[places]]
                if len(twice):
                    raise FlashVLError(
                        f"audit failed: {table.folder} holds row {twice[0]} twice;"
                        " give --restart to begin anew"
                    )
                self.is_done[rows] = True
                table.num_rows += len(rows)
        self.num_dead = self.dead_letters.num_rows
        self.num_done = self.captions.num_rows + self.num_dead

    def count_duplicate_ids(self) -> int:
        """Number of rows with the id of an earlier row, by a 64-bit hash; takes 8 bytes a row."""
        hashes = [
            pd.util.hash_array(ids[pd.notna(ids)], categorize=False)
            for table in self._tables
            for ids in table.column("id")
        ]
        return sum(map(len, hashes)) - len(np.unique(np.concatenate(hashes)))

    def write(self, rows: pa.Table) -> pa.Table:
        """Take rows of `captioner.CAPTIONED`; returns those that were not taken before.

        They are on disk after `flush` at the latest.

        Raises:
            FlashVLError: the disk is full, or the folder can no longer be written.
        """
        places = rows["row"].to_numpy()
        _, firsts = np.unique(places, return_index=True)
        rows = rows.take(np.sort(firsts[~self.is_done[places[firsts]]]))
        self.is_done[places] = True
        is_well = pc.is_null(rows["step"])
        dead = rows.filter(pc.invert(is_well))
        self.num_done += rows.num_rows
        self.num_dead += dead.num_rows
        with self._told_when_full():
            self.captions.add(self._with_kept(rows.filter(is_well)))
            self.dead_letters.add(self._with_kept(dead))
        return rows

    def _with_kept(self, rows: pa.Table) -> pa.Table:
        """The rows with their kept columns, added last as Arrow cannot `take` every type."""
        if "kept" not in rows.column_names:
            return rows
        kept = unbundle(rows["kept"], self.kept)
        for field, column in zip(kept.schema, kept.columns, strict=True):
            rows = rows.append_column(field, column)
        return rows

    def flush(self) -> None:
        """Write the rows that wait for their file.

        Raises:
            FlashVLError: the disk is full, or the folder can no longer be written.
        """
        with self._told_when_full():
            for table in self._tables:
                table.flush()

    def finish_rows(self) -> None:
        """Write the last rows, and count those in the files again.

        Raises:
            FlashVLError: as from `write` and `audit`.
        """
        self.flush()
        with self._told_when_full():
            for table in self._tables:
                table.finish()
        self.audit()

    def finish(self, report: str, summary: str) -> None:
        """Write the report, and then the summary, which marks the folder as finished."""
        with self._told_when_full():
            (self.folder / REPORT).write(report.encode())
            (self.folder / SUMMARY).write(summary.encode())

    @contextmanager
    def _told_when_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            on_disk = self.captions.num_rows + self.dead_letters.num_rows
            raise FlashVLError(
                f"output {self.folder} cannot be written any more ({error.strerror or error}); it"
                f" holds {on_disk} rows: make room, and run the same command again for the rest"
            ) from error


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

    def __init__(self, folder: Location, schema: pa.Schema):
        super().__init__(folder)
        self.num_rows = 0
        """Rows in the files: those that `OutputFolder.audit` found, and those written since."""
        self._schema = schema
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
        pq.write_table(rows, data)
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


def check_output(folder: Location) -> None:
    """Refuse an output that is a file, or a folder with anything other than a job's output.

    Raises:
        ConfigError: the output cannot be used; a folder that does not exist can.
    """
    if folder.is_file():
        raise ConfigError(f"output {folder} is a file; name a folder")
    ours = (LOCK, UNFINISHED, FILES)  # may be left by a job that was killed before its manifest
    names = [name for name in folder.names() if not name.startswith(ours)]
    if names and not has_begun(folder):
        raise ConfigError(
            f"output {folder} is not empty, and a job never overwrites; "
            "name another folder or remove it"
        )


def remove_rows(folder: Location) -> None:
    """Remove what an earlier job wrote, first the summary that marks it as finished."""
    for name in (SUMMARY, REPORT):
        (folder / name).remove()
    for table in TABLES:
        for name in (folder / table).names():
            (folder / table / name).remove()
    manifest.remove(folder)
