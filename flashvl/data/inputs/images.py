"""Image files, each of which is a row."""

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray.data

from flashvl.data.inputs.source import Done, Source

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx"),
)
"""Endings of the names of image files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFiles(Source):
    """Image files; a row's id is the file's path from the input's folder."""

    @property
    def num_rows(self) -> int:
        return len(self.files)

    @property
    def kept(self) -> pa.Schema:
        return pa.schema([])

    def describe(self) -> str:
        return f"image files below {self.listing.root}: id is the path from there"

    def read(self, is_done: Done) -> ray.data.Dataset:
        rows = np.flatnonzero(~is_done)
        files = [self.files[row] for row in rows]
        # A file's name need not be valid text: the path keeps its bytes, the id is made readable.
        names = [os.fsencode(self.listing.name(file)) for file in files]
        table = pa.table(
            {
                "id": pa.array([name.decode(errors="replace") for name in names], pa.string()),
                "row": pa.array(rows, pa.int64()),
                "image": pa.nulls(len(rows), pa.large_binary()),
                "path": [os.fsencode(file.path) for file in files],
            }
        )
        return ray.data.from_arrow(table)
