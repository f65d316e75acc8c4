"""What a worker computes in a step, and its form in a Ray block.

Arrays stay flat, and those that come from a block are views of it: a share of many tiles is copied
by nobody until its tensors are made.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flashvl.data.schema import DEAD_LETTERS

Int32s = npt.NDArray[np.int32]
Tiles = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A row, ready for the model."""

    row: int
    source: int
    """Number of the table that the row comes from."""
    input_ids: Int32s
    """(tokens,)."""
    labels: Int32s
    """(tokens,): `IGNORE_INDEX` where no loss is taken; with several labels a token, (tokens x
    labels,), those of a token side by side."""
    tiles: Tiles
    """(tiles, 3, height, width), not normalised."""
    branches: tuple[int, ...] = ()
    """Tokens of each branch at the document's end. A branch sees the tokens before the first branch
    and its own, not those of other branches."""
    extra: str = ""
    """What the objective needs besides, as JSON."""
    is_owned: bool = True
    """Whether the row counts as this worker's: a row that several workers compute counts once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Documents that are computed at once, one after the other; perhaps none."""

    input_ids: Int32s
    """(tokens of all documents,)."""
    labels: Int32s
    """(tokens of all documents x labels of a token,)."""
    lengths: Int32s
    """(documents,): tokens of each, with those of its branches."""
    num_branches: Int32s
    """(documents,): branches of each."""
    branches: Int32s
    """(branches of all documents,): tokens of each branch."""
    sources: Int32s
    """(documents,): number of the table that each comes from."""
    num_tiles: Int32s
    """(documents,): tiles of each."""
    tiles: Tiles
    """(tiles of all documents, 3, height, width), not normalised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A worker's part of a step."""

    step: int
    """Number of the step, from 0."""
    rank: int
    rows: npt.NDArray[np.int64]
    """(documents,): their rows in the stage, in the order of the micro-batches."""
    is_owned: npt.NDArray[np.bool_]
    """(documents,): whether the row counts as this worker's."""
    extras: list[str]
    """(documents,): what the objective needs besides, as JSON; an empty text stands for nothing."""
    micro_batches: list[MicroBatch]
    """The same number of micro-batches for every worker, at least one."""
    dead: list[dict[str, Any]]
    """Rows of the step that cannot be used, by the columns of `schema.DEAD_LETTERS`; each is in
    the share of one worker."""

    @property
    def own_rows(self) -> npt.NDArray[np.int64]:
        """The rows that count as this worker's."""
        return self.rows[self.is_owned]


FLAT = {
    "rows": pa.int64(),
    "is_owned": pa.bool_(),
    "sources": pa.int32(),
    "lengths": pa.int32(),
    "num_branches": pa.int32(),
    "branches": pa.int32(),
    "num_tiles": pa.int32(),
    "num_documents": pa.int32(),
    "input_ids": pa.int32(),
    "labels": pa.int32(),
}
"""Columns of a share's arrays; `num_documents` is that of each micro-batch."""
SHARES = pa.schema(
    [
        ("step", pa.int64()),
        ("rank", pa.int64()),
        *((name, pa.list_(value_type)) for name, value_type in FLAT.items()),
        ("extras", pa.list_(pa.string())),
        ("tiles", pa.large_binary()),
        ("tile_side", pa.int32()),
        ("dead", pa.list_(pa.struct(list(DEAD_LETTERS)))),
    ]
)
"""A row for the share of a worker in a step."""


def encode_share(
    step: int,
    rank: int,
    micro_batches: Sequence[Sequence[Document]],
    dead: list[dict[str, Any]],
    tile_side: int,
) -> pa.Table:
    """A table of `SHARES` with one row."""
    documents = list(itertools.chain.from_iterable(micro_batches))
    arrays = {
        "rows": [document.row for document in documents],
        "is_owned": [document.is_owned for document in documents],
        "sources": [document.source for document in documents],
        "lengths": [len(document.input_ids) for document in documents],
        "num_branches": [len(document.branches) for document in documents],
        "branches": [length for document in documents for length in document.branches],
        "num_tiles": [len(document.tiles) for document in documents],
        "num_documents": [len(micro_batch) for micro_batch in micro_batches],
        "input_ids": _join([document.input_ids for document in documents]),
        "labels": _join([document.labels for document in documents]),
    }
    columns = {
        "step": pa.array([step]),
        "rank": pa.array([rank]),
        **{name: _one_list(pa.array(arrays[name], FLAT[name])) for name in FLAT},
        "extras": pa.array(
            [[document.extra for document in documents]], SHARES.field("extras").type
        ),
        "tiles": _one_binary([document.tiles for document in documents]),
        "tile_side": pa.array([tile_side], pa.int32()),
        "dead": pa.array([dead], SHARES.field("dead").type),
    }
    return pa.table(columns, schema=SHARES)


def decode_share(table: pa.Table) -> Share:
    """The share in a table of one row."""
    arrays = {name: _values(table[name]) for name in FLAT}
    side = table["tile_side"][0].as_py()
    pixels = np.frombuffer(table["tiles"][0].as_buffer(), np.uint8).reshape(-1, 3, side, side)
    return Share(
        step=table["step"][0].as_py(),
        rank=table["rank"][0].as_py(),
        rows=arrays["rows"],
        is_owned=arrays["is_owned"],
        extras=table["extras"][0].as_py(),
        micro_batches=list(_cut(arrays, pixels)),
        dead=table["dead"][0].as_py(),
    )


def _cut(arrays: dict[str, npt.NDArray[Any]], pixels: Tiles) -> Iterator[MicroBatch]:
    """The micro-batches of a share's arrays."""
    num_labels = len(arrays["labels"]) // max(1, len(arrays["input_ids"]))
    document = branch = token = tile = 0
    for count in arrays["num_documents"].tolist():
        lengths, num_branches, sources, num_tiles = (
            arrays[name][document : document + count]
            for name in ("lengths", "num_branches", "sources", "num_tiles")
        )
        last_branch = branch + int(num_branches.sum())
        last_token, last_tile = token + int(lengths.sum()), tile + int(num_tiles.sum())
        yield MicroBatch(
            input_ids=arrays["input_ids"][token:last_token],
            labels=arrays["labels"][token * num_labels : last_token * num_labels],
            lengths=lengths,
            num_branches=num_branches,
            branches=arrays["branches"][branch:last_branch],
            sources=sources,
            num_tiles=num_tiles,
            tiles=pixels[tile:last_tile],
        )
        document, branch = document + count, last_branch
        token, tile = last_token, last_tile


def _join(arrays: Sequence[Int32s]) -> Int32s:
    return np.concatenate([np.empty(0, np.int32), *arrays])


def _one_list(values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _one_binary(tiles: Sequence[Tiles]) -> pa.LargeBinaryArray:
    """One value: the bytes of all tiles, copied once."""
    pixels = np.concatenate([np.empty(0, np.uint8), *(part.reshape(-1) for part in tiles)])
    offsets = np.array([0, pixels.nbytes], np.int64)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(pixels)]
    )


def _values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of a list column's only row."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
