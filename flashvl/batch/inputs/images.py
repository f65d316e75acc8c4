"""Folders of image files."""

import os
import posixpath
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray.data
from fsspec import AbstractFileSystem

from flashvl.batch.inputs.source import Done
from flashvl.data.storage import Location

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp"),
        *(".tif", ".tiff", ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx"),
    )
)
"""Files of a folder with one of these suffixes are its images; what is in them is read later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFolder:
    """Image files below a folder; the id is the path from there."""

    folder: Location
    files: list[str]
    file_hash: str

    @property
    def store(self) -> AbstractFileSystem:
        return self.folder.store

    @property
    def num_rows(self) -> int:
        return len(self.files)

    @property
    def kept(self) -> pa.Schema:
        return pa.schema([])

    def describe(self) -> str:
        return f"image files below {self.folder}: id is the path from there"

    def hash(self) -> str:
        return self.file_hash

    def read(self, is_done: Done) -> ray.data.Dataset:
        rows = np.flatnonzero(~is_done)
        # A file's name may be no valid text: the path keeps its bytes, the id is made readable.
        names = [os.fsencode(posixpath.relpath(self.files[row], self.folder.path)) for row in rows]
        table = pa.table(
            {
                "id": pa.array([name.decode(errors="replace") for name in names], pa.string()),
                "row": pa.array(rows, pa.int64()),
                "image": pa.nulls(len(rows), pa.large_binary()),
                "path": [os.fsencode(self.files[row]) for row in rows],
            }
        )
        return ray.data.from_arrow(table)
