"""The figures of a step: measured on each rank, put together, and shown by rank 0."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed
from torch.utils.tensorboard import SummaryWriter

from flashvl.data.features import IGNORE_INDEX
from flashvl.data.gauges import LastingGauge
from flashvl.data.storage import Location
from flashvl.model import FlashVLConfig
from flashvl.train.branches import number_documents
from flashvl.train.feed.shares import MicroBatch
from flashvl.train.flops import training_flops
from flashvl.train.objectives import Sums
from flashvl.train.plan.gpus import GPUS
from flashvl.train.recipe import AnyRecipe

Record = dict[str, Any]
"""Figures of a step by name, as the log has them."""

TERA = 10**12
BOARDS = "runs"
"""Folder of TensorBoard's files."""


@dataclass(kw_only=True, slots=True)
class Figures:
    """What a rank has measured in a step; sums over ranks are meant unless a field says more."""

    loss: float = 0.0
    """Summed losses of all items."""
    items: float = 0.0
    """Tokens, cells, pairs or completions that take a loss."""
    rows: float = 0.0
    tokens: float = 0.0
    tiles: float = 0.0
    dead: float = 0.0
    """Rows that cannot be used."""
    capacity: float = 0.0
    """Tokens that the micro-batches could have held."""
    flops: float = 0.0
    """Operations of the forward and backward passes."""
    wait_s: float = 0.0
    """Seconds for which the rank waited for its share; the longest wait counts."""
    written: float = 0.0
    """Whether the rank has written its shard of the pending checkpoint."""
    must_stop: float = 0.0
    """Whether rank 0 was told to stop."""
    asks_preemption: float = 0.0
    """Whether rank 0 wants all ranks to ask Ray if a node will be taken away."""


NAMES = tuple(Figures.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """The figures of all ranks together."""

    sums: Figures
    longest_wait_s: float
    imbalance: float
    """Share of their computing time for which ranks wait for the one with most operations."""
    source_losses: npt.NDArray[np.float64]
    """(sources,): summed losses of each."""
    source_items: npt.NDArray[np.float64]
    """(sources,): items of each."""
    means: dict[str, float]
    """Means of the objective's own figures by name, but those of which nothing was summed."""

    @property
    def loss(self) -> float:
        """Mean loss of the step's items; 0 where the step has none."""
        return self.sums.loss / self.sums.items if self.sums.items else 0.0


def gather(
    figures: Figures,
    source_losses: npt.NDArray[np.float64],
    source_items: npt.NDArray[np.float64],
    own_figures: Sums,
    device: torch.device,
) -> Totals:
    """The figures of all ranks, the same on each of them, by one collective."""
    own = [getattr(figures, name) for name in NAMES]
    pairs = [value for pair in own_figures.values() for value in pair]
    row = torch.tensor(
        [*own, *source_losses, *source_items, *pairs], dtype=torch.float64, device=device
    )
    flat = torch.empty(distributed.get_world_size() * len(row), dtype=row.dtype, device=device)
    distributed.all_gather_into_tensor(flat, row)
    table = flat.view(-1, len(row)).cpu().numpy()
    sums = table.sum(axis=0)
    flops = table[:, NAMES.index("flops")]
    num_sources = len(source_losses)
    source_losses, source_items, pair_sums = np.split(
        sums[len(NAMES) :], [num_sources, 2 * num_sources]
    )
    return Totals(
        sums=Figures(**dict(zip(NAMES, sums.tolist(), strict=False))),
        longest_wait_s=float(table[:, NAMES.index("wait_s")].max()),
        imbalance=float(1 - flops.mean() / flops.max()) if flops.max() > 0 else 0.0,
        source_losses=source_losses,
        source_items=source_items,
        means=means_of(own_figures, pair_sums),
    )


def means_of(names: Iterable[str], sums: npt.NDArray[np.float64]) -> dict[str, float]:
    """The means of an objective's figures, of whose sums and counts `sums` has a pair for each."""
    pairs = zip(names, sums.reshape(-1, 2).tolist(), strict=True)
    return {name: total / count for name, (total, count) in pairs if count}


def count_flops(
    micro_batches: Sequence[MicroBatch], config: FlashVLConfig, recipe: AnyRecipe
) -> float:
    """Useful operations of some micro-batches, by the true lengths of their documents."""
    total = 0.0
    for each in micro_batches:
        if not len(each.lengths):
            continue
        labels = each.labels.reshape(len(each.input_ids), -1)
        is_labelled = (labels != IGNORE_INDEX).any(axis=1)
        num_labels = np.bincount(number_documents(each), weights=is_labelled)
        branches = np.split(each.branches, np.cumsum(each.num_branches)[:-1])
        total += sum(
            training_flops(
                config,
                recipe.trainable,
                length,
                num_tiles,
                num_labels=count,
                branches=own.tolist(),
                has_lora=recipe.lora is not None,
                has_reference=recipe.has_reference,
            )
            for length, num_tiles, count, own in zip(
                each.lengths.tolist(),
                each.num_tiles.tolist(),
                num_labels.tolist(),
                branches,
                strict=True,
            )
        )
    return total


def peak_flops(device: torch.device) -> float | None:
    """Peak of the device's dense bf16 products, in operations a second; None: not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    for name, gpu in GPUS.items():
        if name.partition("-")[0] in words:
            return gpu.bf16_tflops * TERA
    return None


@dataclass(kw_only=True, slots=True)
class Meter:
    """Makes the records of the steps, on rank 0 the only ones that are kept."""

    sources: Sequence[str]
    peak_flops: float | None
    seconds: float
    """Time in the training loop, with that of the runs before a resume."""
    _last_s: float = field(default_factory=time.perf_counter)

    def pause(self) -> None:
        """Count the time since the last step, but not to the next one."""
        now_s = time.perf_counter()
        self.seconds += now_s - self._last_s
        self._last_s = now_s

    def record(self, step: int, totals: Totals, rates: Sequence[float], grad_norm: float) -> Record:
        """The record of a step that ends now.

        Args:
            step: number of the step, from 1.
            rates: learning rates with which it was made.
        """
        now_s = time.perf_counter()
        step_s, self._last_s = now_s - self._last_s, now_s
        self.seconds += step_s
        sums, num_ranks = totals.sums, distributed.get_world_size()
        record: Record = {
            "step": step,
            "loss": totals.loss,
            "learning_rate": max(rates),
            "grad_norm": grad_norm,
            **totals.means,
            "samples": int(sums.rows),
            "tokens": int(sums.tokens),
            "seconds": self.seconds,
            "samples_per_s": sums.rows / step_s,
            "tokens_per_s": sums.tokens / step_s,
            "data_wait_share": min(1.0, totals.longest_wait_s / step_s),
            "padding_share": 1 - sums.tokens / sums.capacity,
            "imbalance": totals.imbalance,
        }
        record["tflops"] = sums.flops / step_s / num_ranks / TERA
        if self.peak_flops is not None:
            record["mfu"] = sums.flops / step_s / num_ranks / self.peak_flops
        if len(set(rates)) > 1:
            record["learning_rates"] = list(rates)
        if len(self.sources) > 1:
            record["loss_by_source"] = {
                name: loss / items
                for name, loss, items in zip(
                    self.sources, totals.source_losses, totals.source_items, strict=True
                )
                if items
            }
        return record


class Boards:
    """Shows the records in TensorBoard and, by Ray, to Prometheus."""

    def __init__(self, folder: str, stage: str, first_step: int):
        """
        Args:
            first_step: first step that this run makes; what earlier runs wrote of it and later
                ones is hidden.
        """
        self._folder = Path(folder)
        self._writer = SummaryWriter(folder, purge_step=first_step)
        self._stage = stage
        self._gauges: dict[str, LastingGauge] = {}
        self._checkpoint = LastingGauge(
            "flashvl_train_checkpoint_timestamp_seconds",
            description="Time of the last complete checkpoint, or else of the workers' start.",
            tag_keys=("stage",),
        )
        self.note_checkpoint()

    def show(self, record: Record) -> None:
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, dict):
                for source, part in value.items():
                    self._writer.add_scalar(f"{name}/{source}", part, step)
                    self._gauge(name, "source").set(part, {"stage": self._stage, "source": source})
            elif isinstance(value, int | float):
                self._writer.add_scalar(f"train/{name}", value, step)
                self._gauge(name).set(value, {"stage": self._stage})

    def note_checkpoint(self) -> None:
        """Tell Prometheus that a checkpoint is complete."""
        self._checkpoint.set(time.time(), {"stage": self._stage})

    def close(self) -> None:
        self._writer.close()

    def write_to(self, output: Location) -> None:
        """Write what was shown to `output`, to which TensorBoard writes itself if it is local."""
        self._writer.flush()
        if not output.is_local:
            for path in self._folder.iterdir():
                (output / BOARDS / path.name).write(path.read_bytes())

    def _gauge(self, name: str, *tags: str) -> LastingGauge:
        if name not in self._gauges:
            self._gauges[name] = LastingGauge(
                f"flashvl_train_{name}",
                description=f"{name.replace('_', ' ')} of the last step".capitalize(),
                tag_keys=("stage", *tags),
            )
        return self._gauges[name]
