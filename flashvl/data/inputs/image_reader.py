"""The encoded images of rows that a `Source` has read, wherever they are."""

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

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


def without_kept(rows: pa.Table) -> pa.Table:
    """The rows without `kept`, whose values need not become Python objects."""
    return rows.drop_columns(["kept"]) if "kept" in rows.column_names else rows


def append_columns(rows: pa.Table, others: pa.Table) -> pa.Table:
    """The columns of both, side by side."""
    for field in others.schema:
        rows = rows.append_column(field, others[field.name])
    return rows


def failure(step: str, error: DataError) -> dict[str, str]:
    """The values of `source.FAILURE`; its `error` names the class of the cause, if there is one."""
    cause = error.__cause__ or error.__context__ or error
    reason = str(error).encode(errors="backslashreplace").decode()  # a path need not be text
    return {"step": step, "error": type(cause).__name__, "reason": reason}


class ImageReader:
    """The encoded images of rows that a `Source` has read.

    Images at URLs are fetched at once, when the reader is made.
    """

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
        """A row's images, one at a time, wherever they are: in the row, in files or at URLs.

        Raises:
            DataError: an image cannot be read, or the row has none.
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
    """A row's images, each with `source.IMAGE`; none for a dead row, or one with an empty list."""
    if "images" in row:
        return row["images"] or []
    return [row]
