"""Samples in tars, each a row: the JSON member of a key, and the key's images.

    0001.json  0001.jpg  0002.json  0003.left.jpg  0003.right.jpg  0003.json  ...

A captioning job reads the same tars by `flashvl.data.inputs.tar`, where each image is a row.
"""

import itertools
import os
import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from fsspec import AbstractFileSystem

from flashvl.data.inputs.compressed import open_plain
from flashvl.data.inputs.listing import ListedFile, Listing
from flashvl.data.inputs.rows import BYTES_PER_READ, ROWS_PER_READ, as_blocks, as_name
from flashvl.data.inputs.source import FAILURE, IMAGES, KEYS, Done, Source
from flashvl.data.inputs.tar import (
    MAX_TEXT_BYTES,
    ROWS_PER_TASK,
    index_tar,
    read_content,
    read_spans,
)
from flashvl.data.limits import ImageLimits
from flashvl.data.storage import Location
from flashvl.errors import ConfigError, DataError

RECORD = pa.field("record", pa.large_binary())
"""Column of a row's JSON text, as the file has it."""
SAMPLES = pa.schema([*KEYS, RECORD, IMAGES, *FAILURE])

_MEMBERS = pa.list_(
    pa.struct([("offset", pa.int64()), ("size", pa.int64()), ("problem", pa.string())])
)
_SAMPLE = pa.schema(
    [("id", pa.string()), ("texts", _MEMBERS), ("images", _MEMBERS), ("problem", pa.string())]
)
_PIECE = pa.schema([*_SAMPLE, ("row", pa.int64()), ("file", pa.int32())])


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTars(Source):
    """Tars of samples; `read` gives the columns `SAMPLES`."""

    tars: list[tuple[pa.Table, bool]]
    """The rows of each tar, and whether it is compressed and so can only be read from its start."""
    image_limits: ImageLimits

    @property
    def num_rows(self) -> int:
        return sum(rows.num_rows for rows, _ in self.tars)

    @property
    def kept(self) -> pa.Schema:
        return pa.schema([])

    def describe(self) -> str:
        return "tars: a row for each key, with the member .json and the key's images"

    def read(self, is_done: Done) -> ray.data.Dataset:
        return ray.data.from_arrow(as_blocks(list(self._pieces(is_done)), _PIECE)).map_batches(
            _read_samples,
            fn_kwargs={
                "store": self.store,
                "paths": [os.fsencode(file.path) for file in self.files],
                "image_limits": self.image_limits,
            },
            batch_size=None,
            batch_format="pyarrow",
        )

    def _pieces(self, is_done: Done) -> Iterator[pa.Table]:
        first_row = 0
        for number, (samples, is_compressed) in enumerate(self.tars):
            rows = np.flatnonzero(~is_done[first_row : first_row + samples.num_rows])
            left = samples.take(pa.array(rows))
            left = left.append_column("row", pa.array(first_row + rows, pa.int64()))
            left = left.append_column("file", pa.array(np.full(len(rows), number), pa.int32()))
            size = len(rows) if is_compressed else ROWS_PER_TASK
            for start in range(0, len(rows), size or 1):
                yield left.slice(start, size)
            first_row += samples.num_rows


def find_samples(listing: Listing, image_limits: ImageLimits) -> SampleTars:
    """The samples in a listing's tars.

    Raises:
        ConfigError: a tar is not readable, or none holds a JSON member.
    """

    def read(file: ListedFile) -> tuple[pa.Table, bool]:
        index, problem, is_compressed = index_tar(
            Location(listing.root.store, file.path), None, frozenset({"json"})
        )
        rows = index.samples()
        if problem is not None:
            name = as_name(posixpath.basename(file.path))
            rows.append({"id": name, "texts": [], "images": [], "problem": problem})
        return pa.Table.from_pylist(rows, schema=_SAMPLE), is_compressed

    # A header is a small read: in a store, mostly waiting.
    with ThreadPoolExecutor(max_workers=16) as pool:
        tars = list(pool.map(read, listing.files))
    if not any(len(texts) for rows, _ in tars for texts in rows["texts"]):
        raise ConfigError(
            f"{listing.root}: no member of the {len(tars)} tars is called KEY.json; name tars of"
            " samples, each with its conversation in a JSON member"
        )
    return SampleTars(listing=listing, tars=tars, image_limits=image_limits)


def _read_samples(
    pieces: pa.Table, *, store: AbstractFileSystem, paths: list[bytes], image_limits: ImageLimits
) -> Iterator[pa.Table]:
    """The rows of some pieces, a few at a time."""
    for number, samples in itertools.groupby(pieces.to_pylist(), key=lambda row: row["file"]):
        with open_plain(Location(store, os.fsdecode(paths[number]))) as (stream, _):
            for chunk in _chunks(samples):
                contents = read_spans(
                    stream,
                    {
                        (member["offset"], member["size"])
                        for sample in chunk
                        for member in (*sample["texts"], *sample["images"])
                        if _problem(member, image_limits) is None
                    },
                )
                rows = [_as_row(sample, contents, image_limits) for sample in chunk]
                yield pa.Table.from_pylist(rows, schema=SAMPLES)


def _chunks(samples: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    num_bytes = 0
    for sample in samples:
        size = sum(member["size"] for member in (*sample["texts"], *sample["images"]))
        if chunk and (len(chunk) == ROWS_PER_READ or num_bytes + size > BYTES_PER_READ):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(sample)
        num_bytes += size
    if chunk:
        yield chunk


def _as_row(
    sample: dict[str, Any], contents: dict[tuple[int, int], bytes], image_limits: ImageLimits
) -> dict[str, Any]:
    """A row of `SAMPLES`."""
    row = {"id": sample["id"], "row": sample["row"]}
    try:
        if sample["problem"] is not None:
            raise DataError(sample["problem"])
        if not sample["texts"]:
            raise DataError(f"sample {sample['id']} has an image and no JSON member; add it")
        for member in (*sample["texts"], *sample["images"]):
            if (problem := _problem(member, image_limits)) is not None:
                raise DataError(problem)
        found = [
            read_content((member["offset"], member["size"]), contents)
            for member in (sample["texts"][0], *sample["images"])
        ]
    except DataError as error:
        return row | {"step": "read", "error": "DataError", "reason": str(error)}
    return row | {"record": found[0], "images": [{"image": image} for image in found[1:]]}


def _problem(member: dict[str, Any], image_limits: ImageLimits) -> str | None:
    """Reason why a member is not read; None: it is."""
    if member["problem"] is not None:
        return str(member["problem"])
    most = max(image_limits.max_image_bytes, MAX_TEXT_BYTES)
    if member["size"] > most:
        return f"member has {member['size']} bytes, more than max_image_bytes={most}; compress it"
    return None
