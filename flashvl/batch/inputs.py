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
from typing import Protocol

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray.data

from flashvl.data.schema import check_image_table
from flashvl.errors import ConfigError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
)
"""Files of a folder with one of these suffixes are its images; what is in them is read later."""

REMEDY = "name a Parquet file, a folder or glob of *.parquet, or a folder of images"


class Source(Protocol):
    """Rows to caption."""

    @property
    def num_rows(self) -> int: ...

    def read(self) -> ray.data.Dataset:
        """Columns `id` and either `image`, encoded, or `path`, the file that holds it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetFiles:
    """Image tables, one or many."""

    files: list[Path]
    num_rows: int

    def read(self) -> ray.data.Dataset:
        # With the file system given, a path is a path: no part of it is taken for a URL's.
        paths = [str(file.absolute()) for file in self.files]
        local = pyarrow.fs.LocalFileSystem()
        rows = ray.data.read_parquet(paths, filesystem=local, partitioning=None)
        return rows.select_columns(["id", "image"])


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder:
    """Image files below a folder; the id is the path from there."""

    folder: Path
    files: list[Path]

    @property
    def num_rows(self) -> int:
        return len(self.files)

    def read(self) -> ray.data.Dataset:
        # A file's name may be no valid text: the path keeps its bytes, the id is made readable.
        names = [os.fsencode(file.relative_to(self.folder)) for file in self.files]
        table = pa.table(
            {
                "id": pa.array([name.decode(errors="replace") for name in names], pa.string()),
                "path": [os.fsencode(file.absolute()) for file in self.files],
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
    return ParquetFiles(files=files, num_rows=_count_rows(files))


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


def _count_rows(files: list[Path]) -> int:
    """Rows of all `files`, after a look at every footer."""
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
    return sum(num_rows for num_rows, _ in footers)


def _read_footer(file: Path) -> tuple[int, pa.Schema]:
    try:
        with pq.ParquetFile(file) as table:
            return table.metadata.num_rows, table.schema_arrow
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{file} is not a readable Parquet file ({reason}); replace or remove it"
        ) from None
