"""The steps of captioning, each on one batch of rows: encoded image -> tiles -> caption.

A row that cannot go on carries `stage` and `reason` from then on, and is passed through. Any other
error than `DataError` is the machine's and leaves here as it is.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from flashvl.data.features import Tiles, decode_tiles, tiles_from_bytes
from flashvl.data.images import ImageLimits
from flashvl.data.schema import CAPTIONS, DEAD_LETTERS, IMAGE_MARKER
from flashvl.engine import Engine, Request
from flashvl.errors import CheckpointError, DataError
from flashvl.model import FlashVLProcessor
from flashvl.model.loading import load_processor

FAILURE = [DEAD_LETTERS.field("stage"), DEAD_LETTERS.field("reason")]
"""Null in rows that are well."""
KEYS = [CAPTIONS.field("id"), CAPTIONS.field("row")]
TILED = pa.schema([*KEYS, ("tiles", pa.large_binary()), *FAILURE])
"""`tiles`: uint8 (tiles, 3, height, width) in C order, a fraction of what float pixels take."""
CAPTIONED = pa.schema([*CAPTIONS, *FAILURE])


def tile_images(rows: pa.Table, *, model: str, limits: ImageLimits) -> pa.Table:
    """Columns `row`, `id` and `image` or `path` -> `TILED`. The encoded bytes end here."""
    processor = _processor(model)
    columns = zip(rows["row"].to_pylist(), _ids(rows), _images(rows, limits), strict=True)
    tiled = [
        {"row": row} | _tile_row(row_id, image, processor, limits) for row, row_id, image in columns
    ]
    return pa.Table.from_pylist(tiled, schema=TILED)


def _ids(rows: pa.Table) -> list[str | None]:
    return rows["id"].cast(pa.string()).to_pylist()


def _images(rows: pa.Table, limits: ImageLimits) -> Iterator[bytes | DataError | None]:
    """The encoded images in turn, or why one could not be read."""
    if "path" in rows.column_names:
        yield from (_read_file(path.as_py(), limits) for path in rows["path"])
        return
    images = rows["image"]
    if pa.types.is_struct(images.type):
        images = pc.struct_field(images, "bytes")
    yield from (image.as_py() for image in images)


def _read_file(path: bytes, limits: ImageLimits) -> bytes | DataError:
    """The file's bytes; of one that is too large only what shows that it is."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limits.max_image_bytes:
                return DataError(
                    f"file has {size} bytes, more than max_image_bytes={limits.max_image_bytes}; "
                    "compress it or raise the limit"
                )
            return file.read()
    except (FileNotFoundError, PermissionError) as error:
        return DataError(f"file cannot be read ({error.strerror}); restore it or its permissions")


def _tile_row(
    row_id: str | None,
    image: bytes | DataError | None,
    processor: FlashVLProcessor,
    limits: ImageLimits,
) -> dict[str, Any]:
    stage = "read"
    try:
        if row_id is None:
            raise DataError("id is null; give every row an id")
        if isinstance(image, DataError):
            raise image
        stage = "decode"
        tiles = decode_tiles([image], processor, limits)
        return {"id": row_id, "tiles": tiles.pixels.tobytes()}
    except DataError as error:
        return {"id": row_id, "stage": stage, "reason": str(error)}


class Captioner:
    """One engine, held by one actor: `TILED` -> `CAPTIONED`."""

    def __init__(self, *, model: str, prompt: str, max_new_tokens: int, num_engines: int):
        # Ray lets a worker use as many threads as it asked for CPUs, here one; the engines of a
        # machine without GPUs are to share all its cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_engines))
        self.messages = [{"role": "user", "content": f"{IMAGE_MARKER}\n{prompt}"}]
        self.max_new_tokens = max_new_tokens
        self.engine: Engine | CheckpointError
        try:
            self.engine = Engine.from_pretrained(model)
        except CheckpointError as error:
            # What an actor raises while it starts reaches the driver only as text; held back until
            # the first batch, it arrives as what it is.
            self.engine = error

    def __call__(self, rows: pa.Table) -> pa.Table:
        if isinstance(self.engine, CheckpointError):
            raise self.engine
        is_well = pc.is_null(rows["stage"])
        dead = rows.filter(pc.invert(is_well)).drop_columns(["tiles"])
        captioned = self._caption(self.engine, rows.filter(is_well))
        return pa.concat_tables(
            [captioned, dead.cast(pa.schema([*KEYS, *FAILURE]))],
            promote_options="default",
        )

    def _caption(self, engine: Engine, rows: pa.Table) -> pa.Table:
        requests = [
            Request(
                messages=self.messages,
                images=_as_tiles(tiles.as_py(), engine.processor),
                max_new_tokens=self.max_new_tokens,
            )
            for tiles in rows["tiles"]
        ]
        completions = engine.generate(requests) if requests else []
        captions = [
            {
                "id": row_id,
                "row": row,
                "caption": completion.text,
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            for row, row_id, completion in zip(
                rows["row"].to_pylist(), _ids(rows), completions, strict=True
            )
        ]
        return pa.Table.from_pylist(captions, schema=CAPTIONED)


def _as_tiles(data: bytes, processor: FlashVLProcessor) -> Tiles:
    pixels = tiles_from_bytes(data, processor)
    return Tiles(pixels, (len(pixels),))


@functools.lru_cache(maxsize=1)
def _processor(model: str) -> FlashVLProcessor:
    """Loaded once a worker process, not once a task."""
    return load_processor(model)
