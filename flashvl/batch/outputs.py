"""What a captioning job leaves behind in its output folder.

    _manifest.json                written first: see `flashvl.batch.manifest`
    captions/part-*.parquet       schema CAPTIONS
    dead_letters/part-*.parquet   schema DEAD_LETTERS
    _summary.json                 written last: a folder without it is not finished

One process writes, so a task that Ray runs twice cannot double a row. Each file is renamed into
place when it is whole, so that whatever reads the folder sees whole rows only, and a job that was
killed goes on behind what it holds.
"""

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flashvl.batch.manifest import has_begun
from flashvl.data.schema import CAPTIONS, DEAD_LETTERS
from flashvl.errors import ConfigError, FlashVLError

ROWS_PER_FILE = 4096
"""Some hundreds of kilobytes of captions."""
SECONDS_PER_FILE = 60.0
"""No row waits longer for its file: so much work a killed job loses, and what is in flight."""
SUMMARY = "_summary.json"


class OutputFolder:
    """An output folder that is being filled."""

    def __init__(self, folder: Path):
        """Make the folder and what is in it; what a killed job left unfinished is removed.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        self.folder = folder
        self._captions = _Parts(folder / "captions", CAPTIONS)
        self._dead_letters = _Parts(folder / "dead_letters", DEAD_LETTERS)
        try:
            for parts in (self._captions, self._dead_letters):
                parts.open()
        except OSError as error:
            raise ConfigError(
                f"output {folder} cannot be written ({error.strerror}); name another folder"
            ) from None

    def done(self, num_rows: int) -> npt.NDArray[np.bool_]:
        """(num_rows,): True for each row of the input that is in a file.

        Raises:
            FlashVLError: a row is in the files twice, or is none of the input's.
        """
        rows = np.concatenate([self._captions.rows(), self._dead_letters.rows()])
        is_done = np.zeros(num_rows, bool)
        if len(rows) and not 0 <= rows.min() <= rows.max() < num_rows:
            raise FlashVLError(
                f"audit failed: {self.folder} holds row {rows.max()}, the input {num_rows} rows;"
                " give --restart to begin anew"
            )
        is_done[rows] = True
        if is_done.sum() != len(rows):
            raise FlashVLError(
                f"audit failed: {self.folder} holds {len(rows)} rows, but {is_done.sum()} different"
                " ones; give --restart to begin anew"
            )
        return is_done

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
        unfinished = self.folder / f".{SUMMARY}"
        unfinished.write_text(summary, encoding="utf-8")
        os.replace(unfinished, self.folder / SUMMARY)


class _Parts:
    """One table in numbered files."""

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder = folder
        self._schema = schema
        self._pending = schema.empty_table()
        self._num_files = 0
        self._written_s = time.monotonic()

    def open(self) -> None:
        """Make the folder, or go on behind the files in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".part-*.parquet"):
            unfinished.unlink()
        numbers = [int(file.stem.removeprefix("part-")) for file in self._files()]
        self._num_files = max(numbers, default=-1) + 1

    def rows(self) -> npt.NDArray[np.int64]:
        """`row` of all rows in the files."""
        parts = [pq.read_table(file, columns=["row"])["row"].to_numpy() for file in self._files()]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def add(self, rows: pa.Table) -> None:
        rows = rows.select(self._schema.names).cast(self._schema)
        self._pending = pa.concat_tables([self._pending, rows])
        is_due = time.monotonic() - self._written_s > SECONDS_PER_FILE
        if self._pending.num_rows >= ROWS_PER_FILE or (self._pending.num_rows and is_due):
            self._write_file()

    def finish(self) -> int:
        """Write the rest, or an empty file for an empty table; the rows that the files hold."""
        if self._pending.num_rows or not self._num_files:
            self._write_file()
        return sum(pq.read_metadata(file).num_rows for file in self._files())

    def _write_file(self) -> None:
        name = f"part-{self._num_files:05d}.parquet"
        unfinished = self.folder / f".{name}"
        pq.write_table(self._pending.combine_chunks(), unfinished)
        os.replace(unfinished, self.folder / name)
        self._pending = self._schema.empty_table()
        self._num_files += 1
        self._written_s = time.monotonic()


def check_output(folder: Path) -> None:
    """Refuse an output folder that holds anything but a job's output; it need not exist.

    Raises:
        ConfigError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not has_begun(folder):
        raise ConfigError(
            f"output {folder} is not empty, and a job never overwrites; "
            "name another folder or remove it"
        )


def remove_rows(folder: Path) -> None:
    """Remove the rows of an earlier job; first what says that they are all there."""
    for pattern in (SUMMARY, "*/part-*.parquet", "*/.part-*.parquet"):
        for file in folder.glob(pattern):
            file.unlink()
