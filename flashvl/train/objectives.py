"""What a stage trains: the interface of an objective to the loop.

An objective divides the summed loss of a micro-batch by the number of items of the whole global
batch. The sum over all micro-batches of all workers is then the mean over the items, however they
are split.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from flashvl.train.feed.shares import MicroBatch, Share
from flashvl.train.packed import Tensors

Sums = dict[str, tuple[float, float]]
"""A sum and the number of its summands, by the name of the figure that their quotient is."""


class Objective(Protocol):
    """How a stage turns documents into a loss."""

    @property
    def module(self) -> nn.Module:
        """The module that DeepSpeed wraps and trains."""

    def prepare(self, engine: nn.Module, share: Share) -> list[MicroBatch]:
        """What this worker computes of a share: the same number of micro-batches on every worker.

        Every worker calls it once a step, so that it may use collectives.
        """

    def collate(self, micro_batch: MicroBatch) -> Tensors:
        """The tensors of a micro-batch, on the CPU; tiles stay uint8."""

    def count_items(self, micro_batch: MicroBatch) -> npt.NDArray[np.float64]:
        """(documents,): items (tokens, cells, pairs, completions) of each that take a loss."""

    def loss(
        self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch, whose tensors are on the engine's device.

        Args:
            num_items: number of items in the global batch.

        Returns:
            The summed loss divided by `num_items`; and the summed loss of each document, detached.
        """

    def take_figures(self) -> Sums:
        """Figures of what was computed since the last call, on this worker.

        Their names are the same on every worker and at every call.
        """
