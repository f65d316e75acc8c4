"""Encoded images -> the tiles that the model takes, in CPU tasks. The encoded bytes end here.

A row that cannot go on carries `FAILURE` from then on, and is passed through. Any other error than
`DataError` is the machine's and leaves here as it is.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

from flashvl.batch.inputs.source import FAILURE
from flashvl.data.features import decode_tiles
from flashvl.data.images import ImageLimits
from flashvl.data.row_files import read_row_file
from flashvl.errors import DataError
from flashvl.model import FlashVLProcessor
from flashvl.model.loading import load_processor

TILED = pa.schema([("tiles", pa.large_binary()), ("counts", pa.list_(pa.int32())), *FAILURE])
"""`tiles`: uint8 (tiles, 3, height, width) in C order, a fraction of what float pixels take;
`counts`: tiles of each image."""


def tile_images(
    rows: pa.Table, *, model: str, limits: ImageLimits, store: AbstractFileSystem
) -> pa.Table:
    """What a `Source` reads -> the same with `TILED` in place of the images.

    Args:
        store: where paths without a scheme are.
    """
    processor = _processor(model)
    tiled = [_tile_row(row, processor, limits, store) for row in without_kept(rows).to_pylist()]
    keys = [name for name in ("id", "row", "prompt", "kept") if name in rows.column_names]
    return append_columns(rows.select(keys), pa.Table.from_pylist(tiled, schema=TILED))


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
    if row.get("stage") is not None:
        return row
    stage = "read"
    try:
        if row["id"] is None:
            raise DataError("id is null; give every row an id")
        if "prompt" in row and row["prompt"] is None:
            raise DataError("prompt is null; give every row a prompt")
        tiles = []
        for image in read_images(row, limits, store):
            stage = "decode"
            tiles.append(decode_tiles([image], processor, limits))
            stage = "read"
    except DataError as error:
        return failure(stage, error)
    return {
        "tiles": b"".join(each.pixels.tobytes() for each in tiles),
        "counts": [count for each in tiles for count in each.counts],
    }


def failure(stage: str, error: DataError) -> dict[str, str]:
    """What `FAILURE` is to say: the class is that of the error that it came from, if from any."""
    cause = error.__cause__ or error.__context__ or error
    reason = str(error).encode(errors="backslashreplace").decode()  # a path may be no text
    return {"stage": stage, "error": type(cause).__name__, "reason": reason}


def read_images(
    row: dict[str, Any], limits: ImageLimits, store: AbstractFileSystem
) -> Iterator[bytes | None]:
    """The encoded images of a row that a `Source` read, one at a time: in the row, or in files.

    Raises:
        DataError: a file cannot be read, or there is no image.
    """
    images = row["images"] if "images" in row else [row]
    if not images:
        raise DataError("row has no image; give it one")
    for image in images:
        if image["path"] is not None:
            yield read_row_file(os.fsdecode(image["path"]), store, limits.max_image_bytes)
        else:
            yield image["image"]


@functools.lru_cache(maxsize=1)
def _processor(model: str) -> FlashVLProcessor:
    """Loaded once a worker process, not once a task."""
    return load_processor(model)
