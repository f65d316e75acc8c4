"""The loop of a worker over the steps of a stage, from the step where the last run stopped."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.train
import torch
from torch import distributed

from flashvl.data.ledger.work import MIN_ROWS_OF_RATE
from flashvl.data.storage import Location
from flashvl.errors import FlashVLError
from flashvl.model import FlashVLConfig
from flashvl.train.feed.feed import Feed, read_shares
from flashvl.train.feed.shares import MicroBatch, Share
from flashvl.train.objectives import Objective
from flashvl.train.packed import Tensors
from flashvl.train.recipe import AnyRecipe
from flashvl.train.run.checkpoint import (
    CONSUMED,
    STATE,
    CheckpointState,
    CheckpointWriter,
    checkpoint_folder,
    remove_old,
)
from flashvl.train.run.consumed import Consumed
from flashvl.train.run.guard import Guard
from flashvl.train.run.metrics import (
    Boards,
    Figures,
    Meter,
    Record,
    Totals,
    count_flops,
    gather,
    means_of,
)
from flashvl.train.run.monitor import Pulse
from flashvl.train.run.parts import write_dead, write_steps
from flashvl.train.run.schedule import rate_share, set_rates
from flashvl.train.run.shards import copy_to_host
from flashvl.train.run.zero import (
    adam_step,
    drop_gradients,
    is_replicated,
    read_fragments,
    update_weights,
)

PREEMPTION_INTERVAL_S = 10.0
"""Seconds between two questions to Ray whether a node will be taken away; all ranks ask at once,
and wait for each other."""


@dataclass(kw_only=True, slots=True)
class Loop:
    """The state of a worker between two steps."""

    engine: Any
    objective: Objective
    config: FlashVLConfig
    recipe: AnyRecipe
    feed: Feed
    eval_feed: Feed | None
    output: Location
    pulse: Pulse
    writer: CheckpointWriter
    guard: Guard
    meter: Meter
    peaks: list[float]
    """Peak learning rate of each of AdamW's groups."""
    consumed: Consumed | None
    """Rows that are used, on rank 0."""
    boards: Boards | None
    """What shows the records, on rank 0."""
    step: int
    """Steps that are made, or skipped."""
    num_trained: int
    num_dead: int
    loss: float
    """Loss of the last step that was made."""
    eval_loss: float | None
    """Loss on the held-out rows, if it was measured after the last step."""
    rank: int = field(default_factory=lambda: distributed.get_rank())
    _rows: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Rows of this rank's shares since the last checkpoint, dead letters included."""
    _dead: list[dict[str, Any]] = field(default_factory=list)
    _records: list[Record] = field(default_factory=list)
    _saved_step: int = 0
    _must_stop: bool = False
    _asked_preemption_s: float = field(default_factory=time.monotonic)
    _preemption: ray.train.PreemptionInfo | None = None
    """The last notice that nodes will be taken away."""
    _pending: "_Pending | None" = None
    """On rank 0, what completes the checkpoint that is being written."""

    def run(self) -> bool:
        """Make the steps that are left.

        Returns:
            Whether the stage is finished; otherwise the run was told to stop, and has written a
            checkpoint.

        Raises:
            FlashVLError: the run cannot go on; the error says why.
        """
        for wait_s, share in self._shares():
            self._make_step(share, wait_s)
            is_last = self.step == self.feed.num_steps
            every = self.recipe.eval_steps
            if is_last or (every is not None and self.step % every == 0):
                self._evaluate()
            has_too_many_dead = self._has_too_many_dead()
            is_due = self.step % self.recipe.save_steps == 0
            if is_last or is_due or self._must_stop or has_too_many_dead:
                self._save()
            if has_too_many_dead:
                self._finish_saving()
                raise FlashVLError(self._tell_of_dead())
            if self._must_stop and not is_last:
                self._finish_saving()
                return False
        if self.step < self.feed.num_steps:
            raise FlashVLError(
                f"the feed ended after step {self.step} of {self.feed.num_steps}; run the same"
                " command again, and report this fault of the feed"
            )
        self._finish_saving()
        return True

    def _shares(self) -> Iterator[tuple[float, Share]]:
        """This rank's shares, each with the seconds that it was waited for."""
        if self.step == self.feed.num_steps:
            return
        shard = ray.train.get_dataset_shard("train")
        self.pulse.beat(self.step + 1, "data")
        before_s = time.perf_counter()
        for share in read_shares(shard, self.rank, self.step):
            yield time.perf_counter() - before_s, share
            self.pulse.beat(self.step + 1, "data")
            before_s = time.perf_counter()

    def _make_step(self, share: Share, wait_s: float) -> None:
        """Make one update of the weights, or skip it."""
        self.pulse.beat(self.step + 1, "compute")
        if self.rank == 0:
            self.pulse.ask_whether_to_stop()
        torch.manual_seed(hash((self.recipe.seed, share.step, self.rank)))  # for dropout
        totals = self._compute(share, wait_s)
        self.pulse.beat(self.step + 1, "update")
        self.step += 1
        self.eval_loss = None
        self.num_trained += int(totals.sums.rows)
        self.num_dead += int(totals.sums.dead)
        share_of_peak = rate_share(self.recipe, share.step, self.feed.num_steps)
        set_rates(self.engine, self.peaks, share_of_peak)
        norm, fault = self._update(totals)
        self._note(share, totals, share_of_peak, norm, fault)
        self._heed(totals)

    def _compute(self, share: Share, wait_s: float) -> Totals:
        """Compute the step's loss and its gradients."""
        micro_batches = self.objective.prepare(self.engine, share)
        num_ranks, device = distributed.get_world_size(), self.engine.device
        document_items = np.concatenate(list(map(self.objective.count_items, micro_batches)))
        num_items = torch.tensor(float(document_items.sum()), device=device)
        distributed.all_reduce(num_items)
        num_items.clamp_(min=1.0)
        losses = []
        for number, micro_batch in enumerate(micro_batches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            batch = self._on_device(micro_batch)
            loss, by_document = self.objective.loss(self.engine, batch, num_items)
            self.engine.backward(loss * num_ranks)  # DeepSpeed takes the mean over the ranks
            losses.append(by_document)
        document_losses = torch.cat(losses).double().cpu().numpy()
        num_sources = len(self.feed.sources)
        figures = Figures(
            loss=float(document_losses.sum()),
            items=float(document_items.sum()),
            rows=len(share.own_rows),
            tokens=sum(len(each.input_ids) for each in micro_batches),
            tiles=sum(len(each.tiles) for each in micro_batches),
            dead=len(share.dead),
            capacity=len(micro_batches) * self.recipe.token_budget,
            flops=count_flops(micro_batches, self.config, self.recipe),
            wait_s=wait_s,
            written=self.writer.written_step() > 0,
            must_stop=self.rank == 0 and self.pulse.must_stop(),
            asks_preemption=self.rank == 0 and self._is_preemption_due(),
        )
        sources = np.concatenate([each.sources for each in micro_batches])
        source_losses, source_items = (
            np.bincount(sources, weights=values, minlength=num_sources).astype(np.float64)
            for values in (document_losses, document_items)
        )
        own_figures = self.objective.take_figures()
        return gather(figures, source_losses, source_items, own_figures, device)

    def _on_device(self, micro_batch: MicroBatch) -> Tensors:
        batch = self.objective.collate(micro_batch)
        return {name: tensor.to(self.engine.device) for name, tensor in batch.items()}

    def _update(self, totals: Totals) -> tuple[float, str | None]:
        """Update the weights, unless something is wrong with the step.

        Returns:
            The norm of the gradient, and why the step was skipped.
        """
        if not totals.sums.items:  # all its rows are dead letters
            drop_gradients(self.engine)
            return 0.0, None
        fault, norm = self.guard.fault_of(totals.loss), None
        if fault is not None:
            drop_gradients(self.engine)
        elif (norm := update_weights(self.engine)) is None:
            fault = "its gradient is not finite"
        if norm is None or fault is not None:
            self.guard.skip(self.step, fault or "")
            return 0.0, fault
        self.loss = totals.loss
        self.guard.take(totals.loss)
        return norm, None

    def _note(
        self, share: Share, totals: Totals, share_of_peak: float, norm: float, fault: str | None
    ) -> None:
        """Keep the step's rows, its dead letters and its record until the next checkpoint."""
        dead_rows = np.array([row["row"] for row in share.dead], np.int64)
        self._rows += [share.own_rows, dead_rows]
        self._dead += share.dead
        rates = [peak * share_of_peak for peak in self.peaks]
        record = self.meter.record(self.step, totals, rates, norm)
        if fault is not None:
            record["skipped"] = fault
        if self.rank == 0 and self.boards is not None:
            self._records.append(record)
            self.boards.show(record)
            self.pulse.beat(self.step, "update", record)

    def _heed(self, totals: Totals) -> None:
        """Do what the ranks have told each other."""
        if self.writer.pending_step and totals.sums.written == distributed.get_world_size():
            self._complete()
        self._must_stop = totals.sums.must_stop > 0
        if totals.sums.asks_preemption:
            self._asked_preemption_s = time.monotonic()
            info = ray.train.get_preemption_info()
            if info is not None and info != self._preemption:
                self._preemption = info
                self._save()  # training goes on until the node is lost

    def _is_preemption_due(self) -> bool:
        return time.monotonic() - self._asked_preemption_s > PREEMPTION_INTERVAL_S

    def _evaluate(self) -> None:
        """Measure loss and figures on the held-out rows, on all ranks together."""
        if self.eval_feed is None:
            return
        self.pulse.beat(self.step, "evaluation")
        device = self.engine.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        one = torch.ones((), device=device)
        self.engine.eval()
        with torch.no_grad():
            for share in read_shares(ray.train.get_dataset_shard("eval"), self.rank, 0):
                self.pulse.beat(self.step, "evaluation")
                for micro_batch in self.objective.prepare(self.engine, share):
                    batch = self._on_device(micro_batch)
                    _, losses = self.objective.loss(self.engine, batch, one)
                    total[0] += losses.sum()
                    total[1] += float(self.objective.count_items(micro_batch).sum())
        self.engine.train()
        own_figures = self.objective.take_figures()
        pairs = [value for pair in own_figures.values() for value in pair]
        sums = torch.cat([total, torch.tensor(pairs, dtype=total.dtype, device=device)])
        distributed.all_reduce(sums)
        self.eval_loss = float(sums[0] / sums[1].clamp(min=1))
        means = means_of(own_figures, sums[2:].cpu().numpy())
        found = {"eval_loss": self.eval_loss, **{f"eval_{name}": means[name] for name in means}}
        if self._records:
            self._records[-1].update(found)
        if self.boards is not None:
            self.boards.show({"step": self.step, **found})
        self.meter.pause()

    def _has_too_many_dead(self) -> bool:
        seen = max(self.num_trained + self.num_dead, MIN_ROWS_OF_RATE)
        return self.num_dead > self.recipe.max_error_rate * seen

    def _tell_of_dead(self) -> str:
        return (
            f"{self.num_dead} of {self.num_trained + self.num_dead} rows are dead letters, and"
            f" max_error_rate is {self.recipe.max_error_rate:g}; see {self.output}/dead_letters for"
            " the reasons, then raise it, or correct the data and begin anew"
        )

    def _save(self) -> None:
        """Begin a checkpoint: copy this rank's fragments, and what only rank 0 keeps."""
        if self._saved_step == self.step:
            return
        self._finish_saving()
        self.pulse.beat(self.step, "checkpoint")
        start_s = time.perf_counter()
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, (np.concatenate(self._rows), self._dead))
        self._rows, self._dead = [], []
        is_mine = self.rank == 0 or not is_replicated(self.engine)
        self.writer.start(self.step, copy_to_host(read_fragments(self.engine)) if is_mine else {})
        self._saved_step = self.step
        if self.consumed is not None:
            self.consumed.mark(np.concatenate([rows for rows, _ in gathered]))
            self._pending = _Pending(
                state=self._state(),
                consumed=self.consumed.to_bytes(),
                records=self._records,
                dead=[row for _, dead in gathered for row in dead],
            )
            if self._records:
                self._records[-1]["checkpoint_stall_s"] = time.perf_counter() - start_s
            self._records = []
        self.meter.pause()

    def _state(self) -> CheckpointState:
        num_shards = 1 if is_replicated(self.engine) else distributed.get_world_size()
        return CheckpointState(
            step=self.step,
            adam_step=adam_step(self.engine),
            shards=tuple(map(self.writer.shard_name, range(num_shards))),
            num_trained=self.num_trained,
            num_dead=self.num_dead,
            num_skipped=self.guard.num_skipped,
            num_skipped_in_a_row=self.guard.num_in_a_row,
            recent_losses=tuple(self.guard.recent),
            loss=self.loss,
            eval_loss=self.eval_loss,
            seconds=self.meter.seconds,
        )

    def _finish_saving(self) -> None:
        """Wait until the pending checkpoint is complete."""
        self.writer.wait()
        if self.writer.pending_step:
            distributed.barrier()
            self._complete()
        self.writer.wait()

    def _complete(self) -> None:
        """Complete the pending checkpoint, whose shards are all written."""
        pending, self._pending = self._pending, None
        if pending is None:
            self.writer.complete(None)
            return
        boards, keep = self.boards, self.recipe.save_total_limit
        if boards is not None:
            boards.write_to(self.output)

        def complete() -> None:
            pending.write(self.output, keep)
            if boards is not None:
                boards.note_checkpoint()

        self.writer.complete(complete)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """What makes a checkpoint complete when its shards are there."""

    state: CheckpointState
    consumed: bytes
    records: list[Record]
    dead: list[dict[str, Any]]

    def write(self, output: Location, num_kept: int) -> None:
        """
        Raises:
            OSError: the output cannot be written.
        """
        step = self.state.step
        folder = checkpoint_folder(output, step)
        write_steps(output, step, self.records)
        write_dead(output, step, self.dead)
        (folder / CONSUMED).write(self.consumed)
        (folder / STATE).write((self.state.model_dump_json(indent=1) + "\n").encode())
        remove_old(output, num_kept)
