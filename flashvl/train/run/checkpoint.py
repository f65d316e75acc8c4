"""Checkpoints from which a stopped stage resumes, at any number of workers and any ZeRO stage.

    checkpoints/step-00000400/
        shard-0003-1f9a2c.safetensors   fragments of rank 3: see `flashvl.train.run.shards`
        consumed.bin                    rows that are used: see `flashvl.train.run.consumed`
        state.json                      written last: a folder without it is no checkpoint

Each rank copies its fragments to its memory, during which training stands still, and a thread
writes them. When the ranks say that all shards are there, rank 0 completes the checkpoint.
"""

import logging
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from flashvl.config import StrictModel
from flashvl.data.storage import Location
from flashvl.errors import FlashVLError
from flashvl.train.run.shards import write_shard

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
STATE = "state.json"
CONSUMED = "consumed.bin"


class CheckpointState(StrictModel):
    """What a checkpoint holds besides tensors and rows."""

    step: int
    """Steps behind the weights, with those that were skipped."""
    adam_step: int
    """Updates that AdamW has made."""
    shards: tuple[str, ...]
    """Names of the files of fragments."""
    num_trained: int
    """Rows that were trained."""
    num_dead: int
    """Rows that are dead letters."""
    num_skipped: int
    """Steps that the guard has skipped."""
    num_skipped_in_a_row: int
    """How many of the last steps it has skipped."""
    recent_losses: tuple[float, ...]
    """Losses of the last steps, which the guard needs."""
    loss: float
    """Loss of the last step that was made."""
    eval_loss: float | None
    """Loss on the held-out rows; None: it was not measured at this step."""
    seconds: float
    """Time in the training loop so far."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Location
    state: CheckpointState

    @property
    def shards(self) -> list[Location]:
        return [self.folder / name for name in self.state.shards]

    def consumed(self) -> bytes:
        return (self.folder / CONSUMED).read()


def checkpoint_folder(output: Location, step: int) -> Location:
    """The folder of the checkpoint after `step` steps."""
    return output / CHECKPOINTS / f"step-{step:08d}"


def read_checkpoint(folder: Location) -> Checkpoint | None:
    """The checkpoint in `folder`; None where it is not complete, or not readable."""
    try:
        state = CheckpointState.model_validate_json((folder / STATE).read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is not readable (%s): an older checkpoint is used", folder, error)
        return None
    return Checkpoint(folder, state)


def list_checkpoints(output: Location) -> list[Checkpoint]:
    """The complete checkpoints of a stage, the newest one last."""
    folders = [output / CHECKPOINTS / name for name in _names(output)]
    return [found for folder in folders if (found := read_checkpoint(folder)) is not None]


def remove_incomplete(output: Location) -> None:
    """Remove what killed runs have left of checkpoints; nothing else may write there meanwhile."""
    complete = {checkpoint.folder.path for checkpoint in list_checkpoints(output)}
    for name in _names(output):
        folder = output / CHECKPOINTS / name
        if folder.path not in complete:
            remove_folder(folder)


def remove_old(output: Location, num_kept: int) -> None:
    """Remove all checkpoints but the newest `num_kept` and the one with the lowest loss."""
    found = list_checkpoints(output)
    measured = [each for each in found if each.state.eval_loss is not None]
    best = min(measured, key=lambda each: each.state.eval_loss or 0.0, default=None)
    for checkpoint in found[:-num_kept]:
        if checkpoint is not best:
            remove_folder(checkpoint.folder)


def remove_folder(folder: Location) -> None:
    """Remove a checkpoint, first the file that makes it complete."""
    (folder / STATE).remove()
    folder.store.rm(folder.path, recursive=True)


def _names(output: Location) -> list[str]:
    names = (output / CHECKPOINTS).names()
    return [name for name in names if re.fullmatch(r"step-\d{8,}", name)]


class CheckpointWriter:
    """Writes this rank's shards in a thread; on rank 0, completes the checkpoints, too."""

    def __init__(self, output: Location, rank: int, run_id: str):
        """
        Args:
            run_id: differs between runs. A run that died may go on writing for a while; its shards
                are never taken for those of the next one.
        """
        self._output, self._rank, self._run_id = output, rank, run_id
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._completing: Future[None] | None = None
        self._step = 0

    @property
    def pending_step(self) -> int:
        """Step whose checkpoint is being written; 0: none is."""
        return self._step if self._writing is not None else 0

    def shard_name(self, rank: int) -> str:
        return f"shard-{rank:04d}-{self._run_id}.safetensors"

    def start(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Begin to write this rank's shard, which may hold no tensor."""
        folder = checkpoint_folder(self._output, step)
        file = folder / self.shard_name(self._rank)
        self._step = step
        self._writing = self._thread.submit(self._write, folder, file, tensors)

    def written_step(self) -> int:
        """Step of the pending checkpoint, if this rank's shard of it is written, or else 0.

        Raises:
            FlashVLError: the disk is full, or the folder can no longer be written.
        """
        self._check()
        is_written = self._writing is not None and self._writing.done()
        return self._step if is_written else 0

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            FlashVLError: as from `written_step`.
        """
        for future in (self._writing, self._completing):
            if future is not None:
                future.exception()
        self._check()

    def complete(self, work: Callable[[], None] | None) -> None:
        """Note that all ranks have written their shards.

        Args:
            work: on rank 0, what makes the checkpoint complete; done by the thread.
        """
        self._writing = None
        if work is not None:
            self._completing = self._thread.submit(work)

    def _write(self, folder: Location, file: Location, tensors: dict[str, Any]) -> None:
        folder.make_folder()
        write_shard(file, tensors)

    def _check(self) -> None:
        for future in (self._writing, self._completing):
            if future is not None and future.done() and (error := future.exception()) is not None:
                if not isinstance(error, OSError):
                    raise error
                kept = [str(each.state.step) for each in list_checkpoints(self._output)]
                raise FlashVLError(
                    f"the checkpoint of step {self._step} cannot be written to {self._output}"
                    f" ({error.strerror or error}); complete are those of step"
                    f" {', '.join(kept) or 'none'}: make room, and run the same command again"
                ) from None
