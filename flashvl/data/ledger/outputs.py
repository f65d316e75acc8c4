"""The output folder of a job that answers every row of its input with a result or a dead letter.

    _manifest.json, _files-*      written first: see `flashvl.data.ledger.manifest`
    RESULTS/part-*.parquet        the job's own table, under its own name
    dead_letters/part-*.parquet   schema DEAD_LETTERS
    _summary.json                 written last: a folder without it is not finished

Both tables also have the columns that are copied from the input. One process writes, and writes
each row once, whatever Ray runs twice. A file gets its name when it is complete: readers of the
folder see whole rows only, and a killed job resumes after the rows that are there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from flashvl.data.inputs.kept import unbundle
from flashvl.data.inputs.source import Done
from flashvl.data.ledger import manifest
from flashvl.data.ledger.lock import LOCK
from flashvl.data.ledger.manifest import FILES, has_begun
from flashvl.data.ledger.tables import DEAD_LETTERS_TABLE, OutputTableWriter, TableSpec
from flashvl.data.storage import UNFINISHED, Location
from flashvl.errors import ConfigError, FlashVLError

SUMMARY = "_summary.json"
REPORT = "report.html"


class OutputFolder:
    """An output folder while a job writes to it."""

    def __init__(self, folder: Location, num_rows: int, results: TableSpec, kept: pa.Schema):
        """Make the folder with its two tables, and remove files that a killed job left unfinished.

        Args:
            num_rows: rows of the input.
            results: the table of results.
            kept: columns that are copied from the input.

        Raises:
            ConfigError: the folder cannot be made or written to.
            FlashVLError: the folder holds a row twice, or one that the input does not have.
        """
        self.folder, self.kept = folder, kept
        self.results, self.dead_letters = self._tables = tuple(
            OutputTableWriter(
                folder / spec.name, pa.schema([*spec.schema, *kept]), spec.parquet_options
            )
            for spec in (results, DEAD_LETTERS_TABLE)
        )
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
        self.num_done = self.results.num_rows + self.num_dead

    def count_duplicate_ids(self) -> int:
        """Number of rows with the id of an earlier row, by a 64-bit hash; takes 8 bytes a row."""
        hashes = [
            pd.util.hash_array(ids[pd.notna(ids)], categorize=False)
            for table in self._tables
            for ids in table.column("id")
        ]
        return sum(map(len, hashes)) - len(np.unique(np.concatenate(hashes)))

    def write(self, rows: pa.Table) -> pa.Table:
        """Take answered rows; returns those that were not taken before.

        They are on disk after `flush` at the latest.

        Args:
            rows: columns of the results, `source.FAILURE`, and `kept` where columns are copied.
                A row with a `step` is a dead letter.

        Raises:
            FlashVLError: the disk is full, or the folder can no longer be written.
        """
        places = rows["row"].to_numpy()
        _, firsts = np.unique(places, return_index=True)
        fresh = np.sort(firsts[~self.is_done[places[firsts]]])
        if len(fresh) < rows.num_rows:  # else they need not be copied
            rows = rows.take(fresh)
        self.is_done[places] = True
        is_well = pc.is_null(rows["step"])
        dead = rows.filter(pc.invert(is_well))
        self.num_done += rows.num_rows
        self.num_dead += dead.num_rows
        with self._told_when_full():
            self.results.add(self._with_kept(rows.filter(is_well)))
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

    def finish(self, summary: str, report: str | None = None) -> None:
        """Write the report, if any, and then the summary, which marks the folder as finished."""
        with self._told_when_full():
            if report is not None:
                (self.folder / REPORT).write(report.encode())
            (self.folder / SUMMARY).write(summary.encode())

    @contextmanager
    def _told_when_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            on_disk = self.results.num_rows + self.dead_letters.num_rows
            raise FlashVLError(
                f"output {self.folder} cannot be written any more ({error.strerror or error}); it"
                f" holds {on_disk} rows: make room, and run the same command again for the rest"
            ) from error


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


def remove_rows(folder: Location, results: str) -> None:
    """Remove what an earlier job wrote, first the summary that marks it as finished.

    Args:
        results: name of the table of results.
    """
    for name in (SUMMARY, REPORT):
        (folder / name).remove()
    for table in (results, DEAD_LETTERS_TABLE.name):
        for name in (folder / table).names():
            (folder / table / name).remove()
    manifest.remove(folder)
