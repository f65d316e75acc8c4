"""What every source of rows offers, whatever kind of files it reads."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from fsspec import AbstractFileSystem

from flashvl.data.inputs.listing import ListedFile, Listing
from flashvl.data.schema import DEAD_LETTERS, ImageColumns

Done = npt.NDArray[np.bool_]
"""(rows of the input,): True where the output holds the row."""

KEYS = [pa.field("id", pa.string()), pa.field("row", pa.int64())]
"""Columns that name a row: its id, for people, and its number in the input, which is unique."""
IMAGE = [pa.field("image", pa.large_binary()), pa.field("path", pa.binary())]
"""Columns of an image: its bytes, or the path or URI of its file, as a name need not be text."""
IMAGES = pa.field("images", pa.list_(pa.struct(IMAGE)))
"""Column in place of `IMAGE` where rows have several images, which share one prompt."""
FAILURE = [DEAD_LETTERS.field(name) for name in ("step", "error", "reason")]
"""Columns that say why a row is a dead letter; null in other rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source(ABC):
    """The rows of an input's files."""

    listing: Listing

    @property
    def store(self) -> AbstractFileSystem:
        """File system of paths without a scheme."""
        return self.listing.root.store

    @property
    def files(self) -> list[ListedFile]:
        """The input's files, in the order of their rows."""
        return self.listing.files

    @property
    @abstractmethod
    def num_rows(self) -> int: ...

    @property
    @abstractmethod
    def kept(self) -> pa.Schema:
        """Columns that are copied to the output."""

    @abstractmethod
    def describe(self) -> str:
        """What is read, for people; it does not depend on the number of files."""

    @abstractmethod
    def read(self, is_done: Done) -> ray.data.Dataset:
        """The rows that are not done yet.

        Their columns are `KEYS`, where `row` counts from 0; `IMAGE` or `IMAGES`; `prompt`, where
        rows have prompts of their own; `FAILURE`, where rows may be dead letters; and `kept`, a
        struct of the columns to copy, where there are any.
        """


def describe_columns(
    kind: str, columns: ImageColumns, prefix: str, *, made_id: str, images: str | None = None
) -> str:
    """A line, for people, on the columns from which a source reads.

    Args:
        kind: kind of the source's files.
        prefix: text before a column's name: `column `, or the `.` of a tar's members.
        made_id: parts of an id where there is no column of ids.
        images: origin of the images where it is not a single column.
    """
    parts = [images or f"image from {prefix}{columns.image}"]
    parts.append(f"id from {f'{prefix}{columns.id}' if columns.id else made_id}")
    if columns.prompt:
        parts.append(f"prompt from {prefix}{columns.prompt}")
    if columns.kept:
        parts.append(f"kept {', '.join(columns.kept)}")
    return f"{kind}: {', '.join(parts)}"
