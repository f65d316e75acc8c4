"""What every source of rows offers, whatever its files are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from fsspec import AbstractFileSystem

from flashvl.batch.inputs.listing import ListedFile, Listing
from flashvl.data.schema import DEAD_LETTERS, ImageColumns

Done = npt.NDArray[np.bool_]
"""(rows of the input,): True where the output holds the row."""

KEYS = [pa.field("id", pa.string()), pa.field("row", pa.int64())]
"""Which row it is, for people and for certain."""
IMAGE = [pa.field("image", pa.large_binary()), pa.field("path", pa.binary())]
"""Encoded, or where its file is: a path or a URI, in bytes, as a name need be no text."""
IMAGES = pa.field("images", pa.list_(pa.struct(IMAGE)))
"""Of rows that have several, which are asked about in one prompt."""
FAILURE = [DEAD_LETTERS.field(name) for name in ("step", "error", "reason")]
"""Null in rows that are well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source(ABC):
    """Rows to caption, of the files that were listed."""

    listing: Listing

    @property
    def store(self) -> AbstractFileSystem:
        """Where the paths without a scheme are that it reads."""
        return self.listing.root.store

    @property
    def files(self) -> list[ListedFile]:
        """In the order of their rows."""
        return self.listing.files

    @property
    @abstractmethod
    def num_rows(self) -> int: ...

    @property
    @abstractmethod
    def kept(self) -> pa.Schema:
        """The columns that go through to the output."""

    @abstractmethod
    def describe(self) -> str:
        """What is read, for people; the same however many files there are."""

    @abstractmethod
    def read(self, is_done: Done) -> ray.data.Dataset:
        """The rows that are not done yet.

        `KEYS`, of which `row` is the place in the input, from 0; `IMAGE` or `IMAGES`; perhaps
        `prompt`; perhaps `FAILURE`, of rows that are dead already; and, if any, `kept`, a struct of
        what goes through to the output.
        """


def describe_columns(
    kind: str, columns: ImageColumns, prefix: str, *, made_id: str, images: str | None = None
) -> str:
    """What a source reads from which columns.

    Args:
        kind: of its files.
        prefix: what a column's name is written after: `column `, or a tar member's `.`.
        made_id: what an id is made of where there is no column of ids.
        images: where the images are from, if not from one column.
    """
    parts = [images or f"image from {prefix}{columns.image}"]
    parts.append(f"id from {f'{prefix}{columns.id}' if columns.id else made_id}")
    if columns.prompt:
        parts.append(f"prompt from {prefix}{columns.prompt}")
    if columns.kept:
        parts.append(f"kept {', '.join(columns.kept)}")
    return f"{kind}: {', '.join(parts)}"
