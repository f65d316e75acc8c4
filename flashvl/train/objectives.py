"""Objectives: the module that a stage trains, the tensors of its micro-batches, and its loss.

An objective divides the summed loss of a micro-batch by the number of items of the whole global
batch. The sum over all micro-batches of all workers is then the mean over the items, however they
are split.
"""

from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from flashvl.data.features import IGNORE_INDEX, normalize_tiles
from flashvl.data.synthetic import CELL_CLASSES
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.modeling_flashvl import pixel_shuffle
from flashvl.train.attention import BY_DOCUMENT
from flashvl.train.feed.shares import Int32s, MicroBatch

Tensors = dict[str, torch.Tensor]
"""Tensors of a micro-batch, by name."""


class Objective(Protocol):
    """How a stage turns documents into a loss."""

    @property
    def module(self) -> nn.Module:
        """The module that DeepSpeed wraps and trains."""

    def collate(self, micro_batch: MicroBatch) -> Tensors:
        """The tensors of a micro-batch, on the CPU; tiles stay uint8."""

    def num_items(self, micro_batch: MicroBatch) -> int:
        """Number of items (tokens, cells) in a micro-batch that take a loss."""

    def loss(
        self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch, whose tensors are on the engine's device.

        Args:
            num_items: number of items in the global batch.

        Returns:
            The summed loss divided by `num_items`; and the summed loss of each document, detached.
        """


class Answers:
    """Next-token loss on the assistant's turns.

    The documents of a micro-batch are one row for the model. Their positions begin at 0 each, and
    no token attends to another document.
    """

    def __init__(self, model: FlashVLForConditionalGeneration, processor: FlashVLProcessor):
        model.set_attn_implementation({"text_config": BY_DOCUMENT})
        self.module = model
        self.processor = processor

    def collate(self, micro_batch: MicroBatch) -> Tensors:
        input_ids, lengths = micro_batch.input_ids, micro_batch.lengths
        if not len(input_ids):  # workers must take the same number of micro-batches
            input_ids, lengths = np.zeros(1, np.int32), np.ones(1, np.int32)
        targets = _targets(micro_batch)
        (kept,) = np.nonzero(targets != IGNORE_INDEX)
        documents = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(len(input_ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        batch = {
            "input_ids": torch.from_numpy(input_ids.astype(np.int64))[None],
            "position_ids": torch.from_numpy(positions)[None],
            "lengths": torch.from_numpy(lengths.astype(np.int64)),
            "kept": torch.from_numpy(kept),
            "targets": torch.from_numpy(targets[kept].astype(np.int64)),
            "documents": torch.from_numpy(documents[kept]),
            "num_documents": torch.tensor(len(micro_batch.lengths)),
        }
        if len(micro_batch.tiles):
            batch["tiles"] = torch.from_numpy(micro_batch.tiles.copy())
        return batch

    def num_items(self, micro_batch: MicroBatch) -> int:
        return int((_targets(micro_batch) != IGNORE_INDEX).sum())

    def loss(
        self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = {}
        if "tiles" in batch:
            pixels = {"pixel_values": normalize_tiles(batch["tiles"], self.processor)}
        logits = engine(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            document_lengths=batch["lengths"].tolist(),
            logits_to_keep=batch["kept"],
            use_cache=False,
            **pixels,
        ).logits[0]
        losses = F.cross_entropy(logits.float(), batch["targets"], reduction="none")
        return losses.sum() / num_items, _sum_by_document(losses, batch)


def _targets(micro_batch: MicroBatch) -> Int32s:
    """(tokens,): the label of the token after each one, of the same document."""
    targets = np.full_like(micro_batch.labels, IGNORE_INDEX)
    targets[:-1] = micro_batch.labels[1:]
    targets[np.cumsum(micro_batch.lengths) - 1] = IGNORE_INDEX
    return targets


def _sum_by_document(losses: torch.Tensor, batch: Tensors) -> torch.Tensor:
    """(documents,): the sums of detached losses of `documents`, in fp32."""
    sums = torch.zeros(int(batch["num_documents"]), device=losses.device)
    return sums.index_add(0, batch["documents"], losses.detach().float())


class CellReader(nn.Module):
    """A tower with a linear layer that tells what lies in each cell; only the tower is kept."""

    def __init__(self, model: FlashVLForConditionalGeneration):
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.downsample_ratio = model.config.downsample_ratio
        num_classes = sum(len(classes) for classes in CELL_CLASSES)
        self.read_out = nn.Linear(model.config.projector_input_size, num_classes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, H, W) -> (images, cells, classes of all three labels)."""
        dtype = self.read_out.weight.dtype
        patches = self.vision_tower(pixel_values=pixel_values.to(dtype)).last_hidden_state
        side = round(patches.shape[1] ** 0.5)
        grid = patches.unflatten(1, (side, side))
        return self.read_out(pixel_shuffle(grid, self.downsample_ratio))


class Cells:
    """Cross-entropy loss on the labels of each cell of a synthetic scene."""

    def __init__(self, model: FlashVLForConditionalGeneration, processor: FlashVLProcessor):
        self.module = CellReader(model)
        self.processor = processor

    def collate(self, micro_batch: MicroBatch) -> Tensors:
        tiles, lengths = micro_batch.tiles, micro_batch.lengths
        cells = micro_batch.labels.astype(np.int64).reshape(-1, len(CELL_CLASSES))
        if not len(tiles):  # workers must take the same number of micro-batches
            side = self.processor.image_processor.size["height"]
            tiles = np.zeros((1, 3, side, side), np.uint8)
            cells = np.full((self.processor.image_seq_length, cells.shape[1]), IGNORE_INDEX)
        return {
            "tiles": torch.from_numpy(tiles.copy()),
            "cells": torch.from_numpy(cells),
            "documents": torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
            "num_documents": torch.tensor(len(lengths)),
        }

    def num_items(self, micro_batch: MicroBatch) -> int:
        return len(micro_batch.labels)

    def loss(
        self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = engine(normalize_tiles(batch["tiles"], self.processor)).float()
        parts = logits.flatten(0, 1).split([len(classes) for classes in CELL_CLASSES], dim=-1)
        losses = sum(
            (
                F.cross_entropy(part, cells, reduction="none", ignore_index=IGNORE_INDEX)
                for part, cells in zip(parts, batch["cells"].unbind(-1), strict=True)
            ),
            torch.zeros((), device=logits.device),
        )
        by_document = _sum_by_document(losses[: len(batch["documents"])], batch)
        return losses.sum() / num_items, by_document


OBJECTIVES: dict[str, type[Answers] | type[Cells]] = {"supervised": Answers, "cells": Cells}
"""Objectives by the `kind` of the recipe."""
