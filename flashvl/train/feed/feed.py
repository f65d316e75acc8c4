"""Feeds a stage's workers by Ray Data: each gets its share of each step, packed.

One task reads the rows of a window of steps, decodes, tiles and tokenises them, and yields the
shares of all workers, step by step, in the order of their ranks: a block for each, which Ray Train
deals to them in turn. A row that cannot be used leaves a hole in its step and becomes a dead
letter; nothing takes its place. So the rows of a step depend on the order alone, and a run that
resumes at a step reads no row of those before.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from flashvl.data.ledger.manifest import hash_listed
from flashvl.errors import FlashVLError
from flashvl.model import FlashVLProcessor
from flashvl.model.configuration_flashvl import FlashVLConfig
from flashvl.model.loading import load_processor, resolve_checkpoint
from flashvl.train.feed.documents import (
    CellsEncoder,
    ConversationEncoder,
    Encoder,
    PairEncoder,
    PromptEncoder,
    Raw,
    UnusableError,
    draw,
)
from flashvl.train.feed.groups import share_groups
from flashvl.train.feed.mixture import SyntheticData, TrainingData, count_taken, load_tables
from flashvl.train.feed.order import Int64s, Order, keep_order, shuffle_tables
from flashvl.train.feed.packing import pack
from flashvl.train.feed.shares import Document, Share, decode_share, encode_share
from flashvl.train.feed.tables import Kind, Table, open_table
from flashvl.train.flops import row_flops

WINDOWS_A_BLOCK = 256
"""Numbers of windows that a block of Ray holds before each goes to a task."""
SYNTHETIC = "synthetic"
"""Name of the procedural world as a source of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """The rows of a stage: their order, where they are, and how they are packed."""

    order: Order
    source: SyntheticData | tuple[Table, ...]
    kind: Kind
    model: str
    """Folder or shipped name of the model whose processor encodes the rows."""
    max_length: int
    token_budget: int
    num_generations: int = 1
    """Completions of each prompt, which are divided among the workers (kind `grpo`)."""

    @property
    def num_rows(self) -> int:
        return self.order.num_rows

    @property
    def num_numbers(self) -> int:
        """Numbers that rows may have: rows of all tables, of which a mixture may take some."""
        if isinstance(self.source, SyntheticData):
            return self.num_rows
        return self.source[-1].first_row + self.source[-1].num_rows

    @property
    def num_steps(self) -> int:
        return self.order.num_steps

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the tables, by the numbers in `Share.sources`."""
        if isinstance(self.source, SyntheticData):
            return (SYNTHETIC,)
        return tuple(table.name for table in self.source)

    def rows_of_steps(self, start: int, stop: int) -> Int64s:
        """The numbers of the rows of the steps from `start` up to, not including, `stop`."""
        return self.order.rows_of_steps(start, stop)

    def id_of(self, row: int, source: int) -> str:
        """What a person finds the row by: its table, and its place there."""
        if isinstance(self.source, SyntheticData):
            return f"{SYNTHETIC}:{row}"
        table = self.source[source]
        return f"{table.name}:{row - table.first_row}"

    def fingerprint(self) -> dict[str, str | int]:
        """What decides the rows of each step, by name, for a manifest."""
        order = hashlib.blake2b(self.order.starts.tobytes(), digest_size=16)
        order.update(self.order.ends.tobytes())
        if isinstance(self.source, SyntheticData):
            # A setting that is not there leaves no trace, so that older runs are still known.
            files = self.source.model_dump_json(exclude_none=True)
        else:
            files = " ".join(f"{table.name}@{hash_listed(table.files)}" for table in self.source)
        return {"data": files, "num_rows": self.num_rows, "order": order.hexdigest()}

    def dataset(self, first_step: int, num_workers: int) -> ray.data.Dataset:
        """The shares of the steps from `first_step` on, in the order of steps and ranks, each in a
        block of its own; `read_shares` reads a worker's."""
        first_window = first_step // self.order.steps_per_window
        num_windows = max(0, self.order.num_windows - first_window)
        windows = ray.data.range(
            num_windows, override_num_blocks=max(1, -(-num_windows // WINDOWS_A_BLOCK))
        ).repartition(target_num_rows_per_block=1, strict=True)
        shares = windows.map_batches(
            functools.partial(
                _read_windows,
                feed=self,
                first_window=first_window,
                first_step=first_step,
                num_workers=num_workers,
            ),
            batch_size=1,
            batch_format="pyarrow",
        ).repartition(target_num_rows_per_block=1, strict=True)
        shares.context.enable_progress_bars = False
        shares.context.execution_options.preserve_order = True
        return shares


def build_feed(
    data: TrainingData,
    *,
    model: str,
    global_batch_size: int,
    max_length: int,
    token_budget: int,
    seed: int,
    kind: Kind = "supervised",
    num_generations: int = 1,
) -> Feed:
    """The feed of a stage, whose tables are opened and counted.

    Raises:
        ConfigError: a table or the mixture's file is missing, empty or of another schema.
    """
    source: SyntheticData | tuple[Table, ...]
    if data.synthetic is not None:
        source = data.synthetic
        order = keep_order(source.count, global_batch_size)
    else:
        named = load_tables(data)
        tables: list[Table] = []
        groups = []
        for each in named:
            first_row = tables[-1].first_row + tables[-1].num_rows if tables else 0
            table, sizes = open_table(each.path, first_row, kind)
            tables.append(table)
            groups.append(np.array(sizes, np.int64))
        counts = count_taken(named, [table.num_rows for table in tables])
        source = tuple(tables)
        order = shuffle_tables(groups, counts, global_batch_size, seed)
    return Feed(
        order=order,
        source=source,
        kind=kind,
        model=model,
        max_length=max_length,
        token_budget=token_budget,
        num_generations=num_generations,
    )


def read_shares(shard: ray.data.DataIterator, rank: int, first_step: int) -> Iterator[Share]:
    """The shares of a worker, from the step `first_step` on, one a step.

    Raises:
        FlashVLError: a share of another worker or step arrived.
    """
    tables = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2)
    for step, table in enumerate(tables, first_step):
        share = decode_share(table)
        if (share.rank, share.step) != (rank, step):
            raise FlashVLError(
                f"worker {rank} got the share of worker {share.rank} in step {share.step} in step"
                f" {step}; run the same command again, and report this fault of the feed"
            )
        yield share


def _read_windows(
    windows: pa.Table, *, feed: Feed, first_window: int, first_step: int, num_workers: int
) -> Iterator[pa.Table]:
    """The shares of the steps of some windows."""
    for number in windows["id"].to_pylist():
        steps = feed.order.steps_of_window(first_window + number)
        steps = range(max(first_step, steps.start), steps.stop)
        yield from read_steps(feed, steps, num_workers)


def read_steps(feed: Feed, steps: range, num_workers: int) -> Iterator[pa.Table]:
    """The shares of some steps for each worker, as tables of one row."""
    processor = _processor(feed.model)
    encoder = _build_encoder(feed, processor)
    raw_of = _read_rows(feed, feed.rows_of_steps(steps.start, steps.stop))
    for step in steps:
        documents: list[Document] = []
        dead: list[dict[str, Any]] = []
        for row in feed.rows_of_steps(step, step + 1).tolist():
            source, raw = raw_of(row)
            try:
                documents.append(encoder.encode(row, source, raw))
            except UnusableError as error:
                dead.append(error.dead_letter(row, feed.id_of(row, source)))
        for rank, micro_batches in enumerate(_divide(documents, feed, num_workers)):
            yield encode_share(
                step,
                rank,
                micro_batches,
                dead[rank::num_workers],
                processor.image_processor.size["height"],
            )


def _divide(documents: list[Document], feed: Feed, num_workers: int) -> list[list[list[Document]]]:
    """The documents of each worker, by its micro-batches."""
    if feed.kind == "grpo":
        return [[own] for own in share_groups(documents, feed.num_generations, num_workers)]
    config = _config(feed.model)
    packed = pack(
        [len(document.input_ids) for document in documents],
        [
            row_flops(config, len(each.input_ids), len(each.tiles), each.branches)
            for each in documents
        ],
        num_workers,
        feed.token_budget,
    )
    return [[[documents[place] for place in places] for places in bins] for bins in packed]


def _read_rows(feed: Feed, rows: Int64s) -> Callable[[int], tuple[int, Raw]]:
    """A function that gives each row once: the number of its table, and what is in it."""
    if isinstance(feed.source, SyntheticData):
        data = feed.source
        return lambda row: (0, draw(data, row, feed.kind))
    found: dict[int, tuple[int, Raw]] = {}
    rows = np.sort(rows)
    for number, table in enumerate(feed.source):
        low, high = np.searchsorted(rows, [table.first_row, table.first_row + table.num_rows])
        found |= {row: (number, raw) for row, raw in table.read(rows[low:high])}
    return found.pop


def _build_encoder(feed: Feed, processor: FlashVLProcessor) -> Encoder:
    if feed.kind == "cells":
        return CellsEncoder(processor=processor)
    encoders: dict[str, Callable[..., Encoder]] = {
        "supervised": ConversationEncoder,
        "dpo": PairEncoder,
        "grpo": PromptEncoder,
    }
    return encoders[feed.kind](processor=processor, max_length=feed.max_length)


@functools.lru_cache(maxsize=1)
def _processor(model: str) -> FlashVLProcessor:
    """The model's processor, loaded once in each worker process, not for each task."""
    return load_processor(model)


@functools.lru_cache(maxsize=1)
def _config(model: str) -> FlashVLConfig:
    return FlashVLConfig.from_pretrained(resolve_checkpoint(model))
