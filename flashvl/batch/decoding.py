"""Encoded images -> the tiles that the model takes, in CPU tasks; no later step has the bytes.

A row that cannot be captioned carries `FAILURE` and is passed through. An error other than
`DataError` is the machine's and is raised as it is.
"""

import functools
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

from flashvl.data.features import decode_tiles
from flashvl.data.inputs.image_reader import ImageReader, append_columns, failure, without_kept
from flashvl.data.inputs.source import FAILURE
from flashvl.data.limits import ImageLimits
from flashvl.errors import DataError
from flashvl.model import FlashVLProcessor
from flashvl.model.loading import load_processor

TILED = pa.schema([("tiles", pa.large_binary()), ("counts", pa.list_(pa.int32())), *FAILURE])
"""Columns of a tiled row. `tiles`: uint8 (tiles, 3, height, width) in C order, which takes a
fraction of the memory of float pixels; `counts`: number of tiles of each image."""


def tile_images(
    rows: pa.Table,
    *,
    model: str,
    image_limits: ImageLimits,
    store: AbstractFileSystem,
    media_hosts: tuple[str, ...] = (),
) -> pa.Table:
    """Rows that a `Source` has read -> the same rows with `TILED` in place of the images.

    Args:
        store: file system of paths without a scheme.
        media_hosts: hosts from which images may be fetched where a row has a URL.
    """
    processor = _processor(model)
    found = without_kept(rows).to_pylist()
    reader = ImageReader(found, image_limits, store, media_hosts)
    tiled = [_tile_row(row, processor, reader) for row in found]
    keys = [name for name in ("id", "row", "prompt", "kept") if name in rows.column_names]
    return append_columns(rows.select(keys), pa.Table.from_pylist(tiled, schema=TILED))


def _tile_row(
    row: dict[str, Any], processor: FlashVLProcessor, reader: ImageReader
) -> dict[str, Any]:
    if row.get("step") is not None:
        return row
    step = "read"
    try:
        if row["id"] is None:
            raise DataError("id is null; give every row an id")
        if "prompt" in row and row["prompt"] is None:
            raise DataError("prompt is null; give every row a prompt")
        tiles = []
        for image in reader.read(row):
            step = "decode"
            tiles.append(decode_tiles([image], processor, reader.image_limits))
            step = "read"
    except DataError as error:
        return failure(step, error)
    return {
        "tiles": b"".join(each.pixels.tobytes() for each in tiles),
        "counts": [count for each in tiles for count in each.counts],
    }


@functools.lru_cache(maxsize=1)
def _processor(model: str) -> FlashVLProcessor:
    """The model's processor, loaded once in each worker process, not once in each task."""
    return load_processor(model)
