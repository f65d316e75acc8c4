"""Encoded images -> the tiles that the model takes, in CPU tasks. The encoded bytes end here.

A row that cannot go on carries `FAILURE` from then on, and is passed through. Any other error than
`DataError` is the machine's and leaves here as it is.
"""

import functools
import os
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

from flashvl.data.features import decode_tiles
from flashvl.data.images import ImageLimits
from flashvl.data.schema import DEAD_LETTERS
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError, DataError
from flashvl.model import FlashVLProcessor
from flashvl.model.loading import load_processor

FAILURE = [DEAD_LETTERS.field(name) for name in ("stage", "error", "reason")]
"""Null in rows that are well."""
TILED = pa.schema([("tiles", pa.large_binary()), *FAILURE])
"""`tiles`: uint8 (tiles, 3, height, width) in C order, a fraction of what float pixels take."""


def tile_images(
    rows: pa.Table, *, model: str, limits: ImageLimits, store: AbstractFileSystem
) -> pa.Table:
    """What a `Source` reads -> the same with `TILED` in place of `image` and `path`.

    Args:
        store: where paths without a scheme are.
    """
    processor = _processor(model)
    tiled = [_tile_row(row, processor, limits, store) for row in without_kept(rows).to_pylist()]
    keys = rows.drop_columns(["image", "path"])
    return append_columns(keys, pa.Table.from_pylist(tiled, schema=TILED))


def without_kept(rows: pa.Table) -> pa.Table:
    """But for what only goes through, which need not become Python objects."""
    return rows.drop_columns(["kept"]) if "kept" in rows.column_names else rows


def append_columns(rows: pa.Table, others: pa.Table) -> pa.Table:
    """The columns of both, side by side."""
    for field in others.schema:
        rows = rows.append_column(field, others[field.name])
    return rows


def _tile_row(
    row: dict[str, Any],
    processor: FlashVLProcessor,
    limits: ImageLimits,
    store: AbstractFileSystem,
) -> dict[str, Any]:
    stage = "read"
    try:
        if row["id"] is None:
            raise DataError("id is null; give every row an id")
        if "prompt" in row and row["prompt"] is None:
            raise DataError("prompt is null; give every row a prompt")
        image = read_image_row(row, limits, store)
        stage = "decode"
        return {"tiles": decode_tiles([image], processor, limits).pixels.tobytes()}
    except DataError as error:
        return failure(stage, error)


def failure(stage: str, error: DataError) -> dict[str, str]:
    """What `FAILURE` is to say: the class is that of the error that it came from, if from any."""
    cause = error.__cause__ or error.__context__ or error
    return {"stage": stage, "error": type(cause).__name__, "reason": str(error)}


def read_image_row(
    row: dict[str, Any], limits: ImageLimits, store: AbstractFileSystem
) -> bytes | None:
    """The encoded image of a row that a `Source` read: its own bytes, or those of its file.

    Raises:
        DataError: see `read_file`.
    """
    path: bytes | None = row["path"]
    return row["image"] if path is None else read_file(os.fsdecode(path), limits, store)


def read_file(path: str, limits: ImageLimits, store: AbstractFileSystem) -> bytes:
    """An image file's bytes.

    Args:
        path: in `store`, or a URI.

    Raises:
        DataError: there is no such file, or it is too large, of which no more is read.
    """
    try:
        file = locate(path) if "://" in path else Location(store, path)
        size = file.store.info(file.path)["size"]
        if size > limits.max_image_bytes:
            raise DataError(
                f"file has {size} bytes, more than max_image_bytes={limits.max_image_bytes}; "
                "compress it or raise the limit"
            )
        return file.read()
    except ConfigError as error:
        raise DataError(str(error)) from error
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"file {path!r} cannot be read ({error.strerror or error});"
            " restore it or its permissions"
        ) from error


@functools.lru_cache(maxsize=1)
def _processor(model: str) -> FlashVLProcessor:
    """Loaded once a worker process, not once a task."""
    return load_processor(model)
