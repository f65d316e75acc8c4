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
from flashvl.data.fetching import (
    Fetcher,
    decode_data_url,
    fetch_all,
    is_data_url,
    is_web_url,
)
from flashvl.data.limits import ImageLimits
from flashvl.data.row_files import read_row_file
from flashvl.errors import DataError
from flashvl.model import FlashVLProcessor
from flashvl.model.loading import load_processor

TILED = pa.schema([("tiles", pa.large_binary()), ("counts", pa.list_(pa.int32())), *FAILURE])
"""`tiles`: uint8 (tiles, 3, height, width) in C order, a fraction of what float pixels take;
`counts`: tiles of each image."""


def tile_images(
    rows: pa.Table,
    *,
    model: str,
    image_limits: ImageLimits,
    store: AbstractFileSystem,
    media_hosts: tuple[str, ...] = (),
) -> pa.Table:
    """What a `Source` reads -> the same with `TILED` in place of the images.

    Args:
        store: where paths without a scheme are.
        media_hosts: from which images are fetched, where a row has a URL.
    """
    processor = _processor(model)
    found = without_kept(rows).to_pylist()
    reader = ImageReader(found, image_limits, store, media_hosts)
    tiled = [_tile_row(row, processor, reader) for row in found]
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
    row: dict[str, Any], processor: FlashVLProcessor, reader: "ImageReader"
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


def failure(step: str, error: DataError) -> dict[str, str]:
    """What `FAILURE` is to say: the class is that of the error that it came from, if from any."""
    cause = error.__cause__ or error.__context__ or error
    reason = str(error).encode(errors="backslashreplace").decode()  # a path may be no text
    return {"step": step, "error": type(cause).__name__, "reason": reason}


class ImageReader:
    """The encoded images of rows that a `Source` read; those that have URLs are fetched at once."""

    def __init__(
        self,
        rows: list[dict[str, Any]],
        image_limits: ImageLimits,
        store: AbstractFileSystem,
        media_hosts: tuple[str, ...],
    ):
        self.image_limits, self._store = image_limits, store
        paths = [
            os.fsdecode(image["path"])
            for row in rows
            if row.get("step") is None
            for image in _images(row)
            if image["path"] is not None
        ]
        if urls := [path for path in paths if is_web_url(path)]:
            fetcher = Fetcher(media_hosts, remedy="allow it with --media-host HOST")
            self._fetched = fetch_all(urls, fetcher, image_limits.max_image_bytes)

    def read(self, row: dict[str, Any]) -> Iterator[bytes | None]:
        """A row's images, one at a time: in the row, in files, or from URLs.

        Raises:
            DataError: one cannot be had, or there is none.
        """
        images = _images(row)
        if not images:
            raise DataError("row has no image; give it one")
        for image in images:
            if image["path"] is not None:
                yield self._read(os.fsdecode(image["path"]))
            else:
                yield image["image"]

    def _read(self, path: str) -> bytes:
        if is_data_url(path):
            return decode_data_url(path, self.image_limits.max_image_bytes)
        if not is_web_url(path):
            return read_row_file(path, self._store, self.image_limits.max_image_bytes)
        found = self._fetched[path]
        if isinstance(found, DataError):
            raise found
        return found


def _images(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Of `source.IMAGE`; none where the row is dead, or has a list of none."""
    if "images" in row:
        return row["images"] or []
    return [row]


@functools.lru_cache(maxsize=1)
def _processor(model: str) -> FlashVLProcessor:
    """Loaded once a worker process, not once a task."""
    return load_processor(model)
