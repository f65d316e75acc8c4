"""Pre-training of a vision tower on the cells of synthetic scenes."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from flashvl.data.features import IGNORE_INDEX, normalize_tiles
from flashvl.data.synthetic import CELL_CLASSES
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.modeling_flashvl import pixel_shuffle
from flashvl.train.branches import number_documents
from flashvl.train.feed.shares import MicroBatch, Share
from flashvl.train.objectives import Sums
from flashvl.train.packed import Tensors, sum_by_document


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
    """The summed cross-entropy of all labels of all cells; each label is an item."""

    def __init__(self, model: FlashVLForConditionalGeneration, processor: FlashVLProcessor):
        self.module = CellReader(model)
        self.processor = processor

    def prepare(self, engine: nn.Module, share: Share) -> list[MicroBatch]:
        return share.micro_batches

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
            "documents": torch.from_numpy(number_documents(micro_batch)),
            "num_documents": torch.tensor(len(lengths)),
        }

    def count_items(self, micro_batch: MicroBatch) -> npt.NDArray[np.float64]:
        return (micro_batch.lengths * len(CELL_CLASSES)).astype(np.float64)

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
        by_document = sum_by_document(losses[: len(batch["documents"])], batch)
        return losses.sum() / num_items, by_document

    def take_figures(self) -> Sums:
        return {}
