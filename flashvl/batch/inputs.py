"""What a captioning job reads, found, counted and checked before anything starts.

A source knows its rows' number from Parquet footers or from the file list, never from the pipeline,
so that the closing audit compares two independent counts.
"""

import glob
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from flashvl.data.schema import check_image_table
from flashvl.errors import ConfigError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
)
"""Files of a folder with one of these suffixes are its images; what is in them is read later."""

MAX_READ_TASKS = 512
"""Row groups are read by so many tasks at most, several in one where there are more."""
ROWS_PER_READ = 256

Done = npt.NDArray[np.bool_]
"""(rows of the input,): True where the output holds the row."""

REMEDY = "name a Parquet file, a folder or glob of *.parquet, or a folder of images"


class Source(Protocol):
    """Rows to caption."""

    @property
    def num_rows(self) -> int: ...

    @property
    def files(self) -> list[Path]: ...

    def read(self, is_done: Done) -> ray.data.Dataset:
        """The rows that are not done yet: `row`, `id` and `image`, encoded, or its file's `path`.

        `row` is the row's place in the input, from 0.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetFiles:
    """Image tables, one or many."""

    files: list[Path]
    row_groups: list[list[int]]
    """Rows of each row group of each file."""

    @property
    def num_rows(self) -> int:
        return sum(map(sum, self.row_groups))

    def read(self, is_done: Done) -> ray.data.Dataset:
        pieces = list(self._pieces(is_done))
        # A block is read by one task.
        size = -(-len(pieces) // MAX_READ_TASKS)
        blocks = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        return ray.data.from_arrow(
            [pa.Table.from_pylist(block, schema=_PIECE) for block in blocks]
        ).map_batches(_read_pieces, batch_size=None, batch_format="pyarrow")

    def _pieces(self, is_done: Done) -> Iterator[dict[str, Any]]:
        """The row groups in which a row is not done yet."""
        first_row = 0
        for file, counts in zip(self.files, self.row_groups, strict=True):
            for number, count in enumerate(counts):
                skipped = is_done[first_row : first_row + count]
                if not skipped.all():
                    yield {
                        "path": os.fsencode(file.absolute()),
                        "row_group": number,
                        "first_row": first_row,
                        "is_done": np.packbits(skipped).tobytes(),
                    }
                first_row += count


_PIECE = pa.schema(
    [
        ("path", pa.binary()),
        ("row_group", pa.int64()),
        ("first_row", pa.int64()),
        ("is_done", pa.binary()),
    ]
)


def _read_pieces(pieces: pa.Table) -> Iterator[pa.Table]:
    """The rows of some row groups that are not done, a few at a time."""
    for piece in pieces.to_pylist():
        is_done = np.unpackbits(np.frombuffer(piece["is_done"], np.uint8)).astype(bool)
        start = 0
        with pq.ParquetFile(os.fsdecode(piece["path"])) as file:
            for batch in file.iter_batches(
                batch_size=ROWS_PER_READ,
                row_groups=[piece["row_group"]],
                columns=["id", "image"],
            ):
                places = np.arange(start, start + batch.num_rows)
                start += batch.num_rows
                rows = pa.Table.from_batches([batch]).select(["id", "image"])
                rows = rows.append_column("row", pa.array(piece["first_row"] + places, pa.int64()))
                yield rows.filter(pa.array(~is_done[places]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder:
    """Image files below a folder; the id is the path from there."""

    folder: Path
    files: list[Path]

    @property
    def num_rows(self) -> int:
        return len(self.files)

    def read(self, is_done: Done) -> ray.data.Dataset:
        rows = np.flatnonzero(~is_done)
        # A file's name may be no valid text: the path keeps its bytes, the id is made readable.
        names = [os.fsencode(self.files[row].relative_to(self.folder)) for row in rows]
        table = pa.table(
            {
                "row": pa.array(rows, pa.int64()),
                "id": pa.array([name.decode(errors="replace") for name in names], pa.string()),
                "path": [os.fsencode(self.files[row].absolute()) for row in rows],
            }
        )
        return ray.data.from_arrow(table)


def find_source(text: str) -> Source:
    """The rows that `text` names: a Parquet file, a folder or glob of them, or a folder of images.

    A folder with a `*.parquet` anywhere below it is a folder of Parquet; else its image files are
    the rows. Names that begin with a dot (and, for Parquet, `_`) are left out, as everywhere.

    Raises:
        ConfigError: there is nothing, or not an image table.
    """
    path = Path(text)
    if path.is_dir():
        files = list(_walk(path, hidden=(".", "_"), suffixes=frozenset((".parquet",))))
        if not files:
            return _find_images(path, text)
    elif path.exists():
        files = [path]
    else:
        files = sorted(Path(match) for match in glob.glob(text, recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise ConfigError(f"input {text!r} does not exist, nor does it match a file; {REMEDY}")
    for file in files:
        if file.suffix.lower() != ".parquet":
            raise ConfigError(f"input {text!r}: {file} does not end in .parquet; {REMEDY}")
    return ParquetFiles(files=files, row_groups=_read_footers(files))


def _find_images(folder: Path, text: str) -> ImageFolder:
    files = list(_walk(folder, hidden=(".",), suffixes=IMAGE_SUFFIXES))
    if not files:
        known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise ConfigError(
            f"input {text!r} holds no *.parquet and no image file ({known}); {REMEDY}"
        )
    return ImageFolder(folder=folder, files=files)


def _walk(folder: Path, hidden: tuple[str, ...], suffixes: frozenset[str]) -> Iterator[Path]:
    """Files below `folder` with one of `suffixes`, in a stable order."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(hidden))
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in suffixes and not name.startswith(hidden) and path.is_file():
                yield path


def _read_footers(files: list[Path]) -> list[list[int]]:
    """Rows of each row group of each of `files`, whose schemas are checked."""
    with ThreadPoolExecutor(
        max_workers=16
    ) as pool:  # a footer is a few small reads: mostly waiting
        footers = list(pool.map(_read_footer, files))
    first = footers[0][1]
    for file, (_, schema) in zip(files, footers, strict=True):
        check_image_table(schema, source=str(file))
        for name in ("id", "image"):
            if schema.field(name).type != first.field(name).type:
                raise ConfigError(
                    f"{file}: column {name!r} has type {schema.field(name).type}, but "
                    f"{first.field(name).type} in {files[0]}; write all files with one schema"
                )
    return [row_groups for row_groups, _ in footers]


def _read_footer(file: Path) -> tuple[list[int], pa.Schema]:
    try:
        with pq.ParquetFile(file) as table:
            footer = table.metadata
            row_groups = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
            return row_groups, table.schema_arrow
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{file} is not a readable Parquet file ({reason}); replace or remove it"
        ) from None
