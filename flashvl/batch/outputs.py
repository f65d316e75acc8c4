"""What a captioning job leaves behind in its output folder.

    captions/part-*.parquet       schema CAPTIONS
    dead_letters/part-*.parquet   schema DEAD_LETTERS
    _summary.json                 written last: a folder without it is not finished

One process writes, so a task that Ray runs twice cannot double a row. Each file is renamed into
place when it is whole.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flashvl.data.schema import CAPTIONS, DEAD_LETTERS
from flashvl.errors import ConfigError

ROWS_PER_FILE = 4096
"""Some hundreds of kilobytes of captions."""


class OutputFolder:
    """An output folder that is being filled."""

    def __init__(self, folder: Path):
        """Make the folder and what is in it.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        self.folder = folder
        self._captions = _Parts(folder / "captions", CAPTIONS)
        self._dead_letters = _Parts(folder / "dead_letters", DEAD_LETTERS)
        try:
            self._captions.folder.mkdir(parents=True)
            self._dead_letters.folder.mkdir()
        except OSError as error:
            raise ConfigError(
                f"output {folder} cannot be written ({error.strerror}); name another folder"
            ) from None

    def write(self, rows: pa.Table) -> None:
        """Take rows of `stages.CAPTIONED`; they are on disk at the latest after `finish_rows`."""
        is_well = pc.is_null(rows["stage"])
        self._captions.add(rows.filter(is_well))
        self._dead_letters.add(rows.filter(pc.invert(is_well)))

    def finish_rows(self) -> tuple[int, int]:
        """Write what is left; the rows in the files of captions and of dead letters."""
        return self._captions.finish(), self._dead_letters.finish()

    def finish(self, summary: str) -> None:
        """Write the summary, which says that the folder is whole."""
        unfinished = self.folder / "._summary.json"
        unfinished.write_text(summary, encoding="utf-8")
        os.replace(unfinished, self.folder / "_summary.json")


class _Parts:
    """One table in numbered files."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder = folder
        self._schema = schema
        self._pending = schema.empty_table()
        self._num_files = 0

    def add(self, rows: pa.Table) -> None:
        rows = rows.select(self._schema.names).cast(self._schema)
        self._pending = pa.concat_tables([self._pending, rows])
        if self._pending.num_rows >= ROWS_PER_FILE:
            self._write_file()

    def finish(self) -> int:
        """Write the rest, or an empty file for an empty table; the rows that the files hold."""
        if self._pending.num_rows or not self._num_files:
            self._write_file()
        return sum(pq.read_metadata(file).num_rows for file in self.folder.glob("*.parquet"))

    def _write_file(self) -> None:
        name = f"part-{self._num_files:05d}.parquet"
        unfinished = self.folder / f".{name}"
        pq.write_table(self._pending.combine_chunks(), unfinished)
        os.replace(unfinished, self.folder / name)
        self._pending = self._schema.empty_table()
        self._num_files += 1


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds anything; it need not exist.

    Raises:
        ConfigError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"output {folder} is not empty, and a job never overwrites; "
            "name another folder or remove it"
        )
