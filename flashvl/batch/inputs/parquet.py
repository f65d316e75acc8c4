"""Image tables in Parquet: their footers, and their rows a few at a time."""

import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray.data
from fsspec import AbstractFileSystem

from flashvl.batch.inputs.source import Done, hash_stats
from flashvl.data.schema import ImageColumns, find_image_columns, is_binary
from flashvl.data.storage import Location
from flashvl.errors import ConfigError

MAX_READ_TASKS = 512
"""Row groups are read by so many tasks at most, several in one where there are more."""
ROWS_PER_READ = 64
"""Rows that a task holds at once, at most; fewer where they are large."""
BYTES_PER_READ = 32 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetFile:
    """One file of an image table."""

    path: str
    name: str
    """From the table's folder: what an id begins with where the table has none."""
    size: int
    mtime: str
    row_groups: list[int]
    """Rows of each."""
    schema: pa.Schema
    partition: dict[str, str | None]
    """Columns that the folders' names tell, as in `date=2026-01-31/`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetFiles:
    """An image table, in one file or many."""

    store: AbstractFileSystem
    files: list[ParquetFile]
    columns: ImageColumns

    @property
    def num_rows(self) -> int:
        return sum(sum(file.row_groups) for file in self.files)

    @property
    def kept(self) -> pa.Schema:
        return pa.schema([self.files[0].schema.field(name) for name in self.columns.kept])

    def describe(self) -> str:
        columns = self.columns
        parts = [f"image from column {columns.image}"]
        parts.append(f"id from {f'column {columns.id}' if columns.id else 'file, group and row'}")
        if columns.prompt:
            parts.append(f"prompt from column {columns.prompt}")
        if columns.kept:
            parts.append(f"kept {', '.join(columns.kept)}")
        return f"{len(self.files)} Parquet files: {', '.join(parts)}"

    def hash(self) -> str:
        return hash_stats((file.path, file.size, file.mtime) for file in self.files)

    def read(self, is_done: Done) -> ray.data.Dataset:
        pieces = list(self._pieces(is_done))
        # A block is read by one task.
        size = -(-len(pieces) // MAX_READ_TASKS)
        blocks = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        return ray.data.from_arrow(
            [pa.Table.from_pylist(block, schema=_PIECE) for block in blocks]
        ).map_batches(
            _read_pieces,
            fn_kwargs={"store": self.store, "columns": self.columns, "kept": self.kept},
            batch_size=None,
            batch_format="pyarrow",
        )

    def _pieces(self, is_done: Done) -> Iterator[dict[str, Any]]:
        """The row groups in which a row is not done yet."""
        first_row = 0
        for file in self.files:
            for number, count in enumerate(file.row_groups):
                skipped = is_done[first_row : first_row + count]
                if not skipped.all():
                    yield {
                        "path": os.fsencode(file.path),
                        "name": file.name,
                        "row_group": number,
                        "first_row": first_row,
                        "is_done": np.packbits(skipped).tobytes(),
                        "partition": list(file.partition.items()),
                    }
                first_row += count


_PIECE = pa.schema(
    [
        ("path", pa.binary()),
        ("name", pa.string()),
        ("row_group", pa.int64()),
        ("first_row", pa.int64()),
        ("is_done", pa.binary()),
        ("partition", pa.map_(pa.string(), pa.string())),
    ]
)


def _read_pieces(
    pieces: pa.Table, *, store: AbstractFileSystem, columns: ImageColumns, kept: pa.Schema
) -> Iterator[pa.Table]:
    """The rows of some row groups that are not done, a few at a time."""
    for piece in pieces.to_pylist():
        is_done = np.unpackbits(np.frombuffer(piece["is_done"], np.uint8)).astype(bool)
        partition = dict(piece["partition"])
        path = os.fsdecode(piece["path"])
        start = 0
        with Location(store, path).open() as opened, pq.ParquetFile(opened) as file:
            batches = file.iter_batches(
                batch_size=_rows_at_once(file, piece["row_group"]),
                row_groups=[piece["row_group"]],
                columns=[name for name in columns.names if name not in partition],
            )
            for batch in batches:
                places = np.arange(start, start + batch.num_rows)
                start += batch.num_rows
                table = pa.Table.from_batches([batch])
                for name, value in partition.items():
                    if name in columns.names:
                        table = table.append_column(
                            name, pa.array([value] * batch.num_rows, pa.string())
                        )
                rows = _as_rows(table, columns, kept, path)
                ids = _make_ids(table, columns.id, f"{piece['name']}:{piece['row_group']}", places)
                rows = rows.add_column(0, "id", ids).add_column(
                    1, "row", pa.array(piece["first_row"] + places, pa.int64())
                )
                yield rows.filter(pa.array(~is_done[places]))


def _rows_at_once(file: pq.ParquetFile, row_group: int) -> int:
    footer = file.metadata.row_group(row_group)
    bytes_per_row = footer.total_byte_size / max(footer.num_rows, 1)
    return max(min(ROWS_PER_READ, int(BYTES_PER_READ / max(bytes_per_row, 1))), 1)


def _make_ids(
    table: pa.Table, column: str | None, group: str, places: npt.NDArray[np.int64]
) -> pa.ChunkedArray | pa.Array:
    """The column's, as text; made of file, row group and row where there is none."""
    if column is not None:
        return table[column].cast(pa.string())
    return pa.array([f"{group}:{place}" for place in places.tolist()], pa.string())


def _as_rows(table: pa.Table, columns: ImageColumns, kept: pa.Schema, file: str) -> pa.Table:
    """`image`, `path` and what else there is of `Source.read`, but for `id` and `row`."""
    images, paths = _split_images(table[columns.image])
    if not columns.follows_paths:
        paths = [None] * len(paths)
    folder = posixpath.dirname(file)
    found = {
        "image": images,
        "path": pa.array(
            [None if path is None else _resolve(path, folder) for path in paths], pa.binary()
        ),
    }
    if columns.prompt is not None:
        found["prompt"] = table[columns.prompt].cast(pa.string())
    if len(kept):
        parts = [table[field.name].cast(field.type).combine_chunks() for field in kept]
        found["kept"] = pa.StructArray.from_arrays(parts, fields=list(kept))
    return pa.table(found)


def _split_images(images: pa.ChunkedArray) -> tuple[pa.ChunkedArray, list[str | None]]:
    """The encoded bytes, null where there are none; and the paths of those that lie elsewhere."""
    none: list[str | None] = [None] * len(images)
    if pa.types.is_dictionary(images.type):
        images = images.cast(images.type.value_type)
    if pa.types.is_struct(images.type):
        data = pc.struct_field(images, "bytes")
        if images.type.get_field_index("path") >= 0:
            paths = pc.struct_field(images, "path").cast(pa.string())
            none = pc.if_else(pc.is_null(data), paths, None).to_pylist()
        return data.cast(pa.large_binary()), none
    if is_binary(images.type):
        return images.cast(pa.large_binary()), none
    return pa.chunked_array([pa.nulls(len(images), pa.large_binary())]), images.to_pylist()


def _resolve(path: str, folder: str) -> bytes:
    """A path or URI in a table of `folder` -> itself, or a path in the table's own store."""
    return os.fsencode(path if "://" in path else posixpath.join(folder, path))


def read_footers(
    store: AbstractFileSystem, tables: list[tuple[str, dict[str, Any]]]
) -> list[ParquetFile]:
    root = posixpath.commonpath([posixpath.dirname(path) for path, _ in tables])

    def read(table: tuple[str, dict[str, Any]]) -> ParquetFile:
        path, info = table
        try:
            with Location(store, path).open() as opened, pq.ParquetFile(opened) as file:
                footer = file.metadata
                row_groups = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
                schema = file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{path} is not a readable Parquet file ({reason}); replace or remove it"
            ) from None
        partition = {
            name: value for name, value in _partition(path).items() if name not in schema.names
        }
        for name in partition:
            schema = schema.append(pa.field(name, pa.string()))
        return ParquetFile(
            path=path,
            name=os.fsencode(posixpath.relpath(path, root)).decode(errors="replace"),
            size=info["size"],
            mtime=str(info["mtime"]),
            row_groups=row_groups,
            schema=schema,
            partition=partition,
        )

    # A footer is a few small reads: mostly waiting.
    with ThreadPoolExecutor(max_workers=16) as pool:
        return list(pool.map(read, tables))


def _partition(path: str) -> dict[str, str | None]:
    """The columns that the names of a file's folders tell, in Hive's way."""
    names = [part.partition("=")[0] for part in path.split("/")[:-1] if "=" in part]
    scheme = ds.HivePartitioning(pa.schema([(name, pa.string()) for name in dict.fromkeys(names)]))
    return ds.get_partition_keys(scheme.parse(path))


def check_alike(files: list[ParquetFile], columns: ImageColumns) -> None:
    """All files have the columns that are read, of one type."""
    first = files[0]
    for file in files:
        found = find_image_columns(
            file.schema,
            source=file.path,
            image=columns.image,
            id=columns.id,
            prompt=columns.prompt,
            kept=columns.kept,
        )
        for name in found.names:
            here, there = file.schema.field(name).type, first.schema.field(name).type
            if here != there:
                raise ConfigError(
                    f"{file.path}: column {name!r} has type {here}, but {there} in {first.path};"
                    " write all files with one schema"
                )
