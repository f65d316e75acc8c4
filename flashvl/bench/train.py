"""Samples a second of training on ragged rows: packed beside padded, fed by Ray Data beside ready.

    flashvl bench train

All ways train the same rows of a table, of texts, short and long dialogues, and dialogues about
several pictures, with the same memory: no more tokens at once than the budget, those of padding
included. Padded batches have no tokens of padding in the head, and so differ by packing alone.
"""

import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from torch.nn import functional as F

from flashvl.data import synthetic
from flashvl.data.features import IGNORE_INDEX, normalize_tiles, pad
from flashvl.data.schema import CONVERSATIONS
from flashvl.model import FlashVLForConditionalGeneration
from flashvl.model.loading import load_model, load_processor
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.train.answers import Answers
from flashvl.train.feed.feed import Feed, build_feed, read_shares
from flashvl.train.feed.mixture import TrainingData
from flashvl.train.feed.packing import pack
from flashvl.train.feed.shares import MicroBatch, Share
from flashvl.train.flops import row_flops
from flashvl.train.packed import Tensors

GLOBAL_BATCH = 128
"""Rows in a step of one worker."""
TOKEN_BUDGET = 2048
MAX_LENGTH = 1024

MANY_WORKERS = 8
"""Workers for which the packing is told as well; each has a step's rows of one worker."""
ROWS_PER_GROUP = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How full and how even the micro-batches of all steps are."""

    num_workers: int
    filled: float
    """Tokens of the rows as a share of the token budget of all micro-batches."""
    balance: float
    """Work as a share of what could be done in the time, if workers wait for the slowest after each
    micro-batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpeed:
    """Samples a second, medians over the rounds."""

    padded: float
    """Padded batches, from tensors in memory."""
    packed: float
    """Packed micro-batches, from tensors in memory."""
    fed: float
    """Packed micro-batches, read, decoded and packed by Ray Data meanwhile."""
    times_padded: float
    """`packed / padded`, the median of the rounds' own ratios."""
    of_ready: float
    """`fed / packed`, likewise."""
    tokens_per_row: float
    """Mean tokens of a row."""
    packing: list[Packing]
    """For one worker, and for several."""


def ragged_rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversations of the procedural world: a quarter in words alone; of the others most are short
    and about one picture, some long, some about two to four pictures."""
    chance = random.Random(seed)
    index = itertools.count()

    def conversation(words_share: float) -> dict[str, Any]:
        number = next(index)
        drawn = synthetic.sample("train", seed, number)
        return synthetic.conversation(drawn, number, words_share)

    for row in range(count):
        kind = chance.choices(("words", "short", "long", "pictures"), (25, 45, 20, 10))[0]
        num_pictures = {"words": 0, "pictures": chance.randint(2, 4)}.get(kind, 1)
        mean = {"words": 5, "long": 9}.get(kind)
        num_texts = min(20, round(chance.expovariate(1 / mean)) + 1) if mean else 0
        parts = [conversation(0.0) for _ in range(num_pictures)]
        parts += [conversation(1.0) for _ in range(num_texts)]
        yield {
            "row": row,
            "images": [image for part in parts for image in part["images"]],
            "messages": [message for part in parts for message in part["messages"]],
        }


def measure_training(
    model: str,
    num_steps: int,
    rounds: int,
    on_progress: ShowProgress = ignore_progress,
) -> TrainSpeed:
    """Time all ways in turn, `rounds` times, on one thread; Ray must be started already."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "rows.parquet"
        rows = ragged_rows((num_steps + 1) * GLOBAL_BATCH)
        pq.write_table(
            pa.Table.from_pylist(list(rows), schema=CONVERSATIONS),
            table,
            row_group_size=ROWS_PER_GROUP,
        )
        feed = build_feed(
            TrainingData(parquet=str(table)),
            model=model,
            global_batch_size=GLOBAL_BATCH,
            max_length=MAX_LENGTH,
            token_budget=TOKEN_BUDGET,
            seed=0,
        )
        trainer = _Trainer(model)
        first, *shares = _shares(feed)
        trainer.train([first])
        trainer.train_padded([first])
        ways: dict[str, Callable[[], float]] = {
            "padded": lambda: trainer.train_padded(shares),
            "packed": lambda: trainer.train(shares),
            "fed": lambda: trainer.train(itertools.islice(_shares(feed), 1, None)),
        }
        found: list[dict[str, float]] = []
        for number in range(rounds):
            rates = {}
            for name, run in ways.items():
                on_progress(number, rounds, name)
                rates[name] = run()
            rates["times_padded"] = rates["packed"] / rates["padded"]
            rates["of_ready"] = rates["fed"] / rates["packed"]
            found.append(rates)
    medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
    lengths = [each.lengths for share in shares for each in share.micro_batches]
    return TrainSpeed(
        tokens_per_row=float(np.concatenate(lengths).mean()),
        packing=[_judge(trainer, shares, workers) for workers in (1, MANY_WORKERS)],
        **medians,
    )


def _shares(feed: Feed) -> Iterator[Share]:
    """The shares of one worker, for which Ray Data has all cores but one."""
    dataset = feed.dataset(0, 1)
    options = dataset.context.execution_options
    options.preserve_order = True
    cores = len(os.sched_getaffinity(0))
    options.resource_limits = ray.data.ExecutionResources(cpu=max(1, cores - 1))
    (shard,) = dataset.streaming_split(1, equal=True)
    return read_shares(shard, rank=0, first_step=0)


class _Trainer:
    """A training loop without DeepSpeed."""

    def __init__(self, model: str):
        self.model: FlashVLForConditionalGeneration = load_model(model).train()
        self.processor = load_processor(model)
        self.objective = Answers(self.model, self.processor)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.plain: FlashVLForConditionalGeneration = load_model(model).train()
        """The model with the library's usual attention, for padded batches."""
        self.plain_optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-5)

    def train(self, shares: Iterable[Share]) -> float:
        """Train on packed micro-batches; returns samples a second from the first share on."""
        return self._run(
            shares, lambda share: share.micro_batches, self._packed_loss, self.optimizer
        )

    def train_padded(self, shares: Iterable[Share]) -> float:
        """Train on the same rows in padded batches; returns samples a second."""
        return self._run(shares, _pad_batches, self._padded_loss, self.plain_optimizer)

    def _run(
        self,
        shares: Iterable[Share],
        cut: Callable[[Share], Sequence[MicroBatch]],
        loss_of: Callable[[MicroBatch, torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> float:
        num_rows, start_s = 0, 0.0
        for share in shares:
            start_s = start_s or time.perf_counter()
            batches = cut(share)
            counts = [self.objective.count_items(batch).sum() for batch in batches]
            num_items = torch.tensor(float(sum(counts)))
            for batch in batches:
                loss_of(batch, num_items).backward()
            optimizer.step()
            optimizer.zero_grad()
            num_rows += len(share.rows)
        return num_rows / (time.perf_counter() - start_s)

    def _packed_loss(self, batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
        return self.objective.loss(self.model, self.objective.collate(batch), num_items)[0]

    def _padded_loss(self, batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
        tensors = _pad_tensors(batch)
        pixels = {}
        if len(batch.tiles):
            tiles = torch.from_numpy(batch.tiles.copy())
            pixels = {"pixel_values": normalize_tiles(tiles, self.processor)}
        hidden = self.plain.model(
            input_ids=tensors["input_ids"],
            attention_mask=tensors["attention_mask"],
            use_cache=False,
            **pixels,
        ).last_hidden_state
        targets = tensors["labels"][:, 1:]
        is_learnt = targets != IGNORE_INDEX
        logits = self.plain.lm_head(hidden[:, :-1][is_learnt])
        return F.cross_entropy(logits.float(), targets[is_learnt], reduction="sum") / num_items


def _pad_batches(share: Share) -> list[MicroBatch]:
    """The rows of a share in their order, as many in a batch as padding leaves room for."""
    rows = sorted(_rows(share), key=lambda pair: pair[0])
    batches: list[list[MicroBatch]] = [[]]
    for _, row in rows:
        longest = max(len(each.input_ids) for each in [*batches[-1], row])
        if longest * (len(batches[-1]) + 1) > TOKEN_BUDGET:
            batches.append([])
        batches[-1].append(row)
    return [_join(batch) for batch in batches]


def _rows(share: Share) -> Iterator[tuple[int, MicroBatch]]:
    """Each row of a share, by its number, as a micro-batch of its own."""
    numbers = iter(share.rows.tolist())
    for batch in share.micro_batches:
        token = tile = 0
        for length, source, num_tiles in zip(
            batch.lengths, batch.sources, batch.num_tiles, strict=True
        ):
            yield (
                next(numbers),
                MicroBatch(
                    input_ids=batch.input_ids[token : token + length],
                    labels=batch.labels[token : token + length],
                    lengths=np.array([length]),
                    num_branches=np.zeros(1, np.int32),
                    branches=batch.branches,
                    sources=np.array([source]),
                    num_tiles=np.array([num_tiles]),
                    tiles=batch.tiles[tile : tile + num_tiles],
                ),
            )
            token, tile = token + length, tile + num_tiles


def _join(batches: Sequence[MicroBatch]) -> MicroBatch:
    return MicroBatch(
        input_ids=np.concatenate([each.input_ids for each in batches]),
        labels=np.concatenate([each.labels for each in batches]),
        lengths=np.concatenate([each.lengths for each in batches]),
        num_branches=np.concatenate([each.num_branches for each in batches]),
        branches=np.concatenate([each.branches for each in batches]),
        sources=np.concatenate([each.sources for each in batches]),
        num_tiles=np.concatenate([each.num_tiles for each in batches]),
        tiles=np.concatenate([each.tiles for each in batches]),
    )


def _pad_tensors(batch: MicroBatch) -> Tensors:
    ends = np.cumsum(batch.lengths)[:-1]
    return {
        "input_ids": pad(np.split(batch.input_ids, ends), 0),
        "labels": pad(np.split(batch.labels, ends), IGNORE_INDEX),
        "attention_mask": pad([np.ones(length) for length in batch.lengths], 0),
    }


def _judge(trainer: _Trainer, shares: Sequence[Share], num_workers: int) -> Packing:
    """Pack the rows again, those of `num_workers` steps at once."""
    config = trainer.model.config
    tokens, work, possible, capacity = 0, 0.0, 0.0, 0
    for start in range(0, len(shares) - num_workers + 1, num_workers):
        step = shares[start : start + num_workers]
        rows = [batch for share in step for _, batch in _rows(share)]
        lengths = [len(each.input_ids) for each in rows]
        costs = [row_flops(config, len(each.input_ids), len(each.tiles)) for each in rows]
        packed = pack(lengths, costs, num_workers, TOKEN_BUDGET)
        loads = np.array([[sum(costs[n] for n in micro) for micro in each] for each in packed])
        tokens += sum(lengths)
        capacity += loads.size * TOKEN_BUDGET
        work += loads.sum()
        possible += loads.max(axis=0).sum() * num_workers
    return Packing(
        num_workers=num_workers, filled=tokens / capacity, balance=float(work / possible)
    )
