"""Turns conversations into training rows, by Ray Data, in an order independent of the cluster.

A row has `row`, `input_ids`, `labels`, `tiles` (uint8 bytes) and, if it is synthetic, `cells`. Each
block holds one micro-batch, and blocks keep their order, so that Ray deals them to the workers in
turn: step k of two workers sees the same rows as step k of one worker that accumulates two.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import pyarrow.parquet as pq
import ray.data
from pydantic import Field, PositiveInt, model_validator

from flashvl.config import StrictModel
from flashvl.data import synthetic
from flashvl.data.features import decode_tiles, encode_conversation
from flashvl.data.schema import CONVERSATIONS
from flashvl.errors import ConfigError, DataError, one_line
from flashvl.model import FlashVLProcessor
from flashvl.model.loading import load_processor

logger = logging.getLogger(__name__)

ROWS_A_TASK = 256
"""Rows that a task makes: of synthetic ones, tens of milliseconds of work and a few megabytes."""


class SyntheticData(StrictModel):
    """Rows of the procedural world, which are drawn as they are read."""

    count: PositiveInt
    """Number of rows."""
    seed: int = 0
    """Random seed of the scenes; different seeds give different scenes."""
    tasks: tuple[synthetic.Task, ...] = synthetic.TASKS
    """Tasks that the questions are about."""
    words_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the rows whose scene is described in words, not shown: 1 pre-trains an LLM alone, a
    smaller share mixes text with pictures, as Infinity-MM does."""


class TrainingData(StrictModel):
    """Source of the rows; exactly one field is set."""

    parquet: str | None = None
    """Folder of Parquet files with the schema `flashvl.data.schema.CONVERSATIONS`; its rows, which
    are read in their order, must be shuffled already."""
    synthetic: SyntheticData | None = None
    """Rows of the procedural world."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.parquet is None) == (self.synthetic is None):
            raise ValueError("give exactly one of data.parquet and data.synthetic")
        return self

    def num_rows(self) -> int:
        """Number of rows in the source.

        Raises:
            ConfigError: the Parquet files do not exist, or have another schema.
        """
        if self.synthetic is not None:
            return self.synthetic.count
        try:
            dataset = pq.ParquetDataset(self.parquet)
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise ConfigError(f"data.parquet={self.parquet}: {reason}") from None
        missing = set(CONVERSATIONS.names) - set(dataset.schema.names)
        if missing or not dataset.fragments:
            raise ConfigError(
                f"data.parquet={self.parquet} has no column {', '.join(sorted(missing))};"
                f" it must hold {', '.join(CONVERSATIONS.names)}"
            )
        return sum(fragment.count_rows() for fragment in dataset.fragments)


def training_rows(
    data: TrainingData, model: str, max_length: int, micro_batch: int
) -> ray.data.Dataset:
    """The rows as a Ray dataset with one micro-batch in each block.

    Args:
        model: folder of the model whose processor encodes the rows.
        max_length: tokens of a row at most; longer rows are left out with a warning.
        micro_batch: rows in a block.
    """
    if data.synthetic is not None:
        num_blocks = -(-data.synthetic.count // ROWS_A_TASK)
        rows = ray.data.range(data.synthetic.count, override_num_blocks=num_blocks)
        encode: Callable[..., dict[str, list[Any]]] = functools.partial(
            _encode_synthetic, data.synthetic
        )
    else:
        rows = ray.data.read_parquet(data.parquet).select_columns(CONVERSATIONS.names)
        encode = _encode_table
    encoded = rows.map_batches(
        functools.partial(encode, model=model, max_length=max_length),
        batch_size=ROWS_A_TASK,
        batch_format="pyarrow",
    )
    return encoded.repartition(target_num_rows_per_block=micro_batch, strict=True)


def _encode_table(table: Any, *, model: str, max_length: int) -> dict[str, list[Any]]:
    return _columns(_encode_rows(table.to_pylist(), model, max_length))


def _encode_synthetic(
    spec: SyntheticData, table: Any, *, model: str, max_length: int
) -> dict[str, list[Any]]:
    drawn = [
        synthetic.sample("train", spec.seed, index, spec.tasks) for index in table["id"].to_pylist()
    ]
    conversations = (
        synthetic.conversation(sample, index, spec.words_share)
        for sample, index in zip(drawn, table["id"].to_pylist(), strict=True)
    )
    columns = _columns(_encode_rows(conversations, model, max_length))
    columns["cells"] = [synthetic.cell_labels(sample.scene).tobytes() for sample in drawn]
    return columns


def _encode_rows(
    rows: Iterable[dict[str, Any]], model: str, max_length: int
) -> Iterator[dict[str, Any]]:
    processor = _processor(model)
    for row in rows:
        try:
            tiles = decode_tiles(row["images"], processor)
            input_ids, labels = encode_conversation(
                row["messages"], tiles.counts, processor, max_length
            )
        except DataError as error:
            logger.warning("row %s is left out: %s", row["row"], error)
            continue
        yield {
            "row": row["row"],
            "input_ids": input_ids,
            "labels": labels,
            "tiles": tiles.pixels.tobytes(),
        }


def _columns(rows: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"row": [], "input_ids": [], "labels": [], "tiles": []}
    for row in rows:
        for name, values in columns.items():
            values.append(row[name])
    return columns


@functools.lru_cache(maxsize=1)
def _processor(model: str) -> FlashVLProcessor:
    """The model's processor, loaded once in each worker process, not for each task."""
    return load_processor(model)
