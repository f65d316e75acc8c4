"""Objectives: the module that a stage trains, its batches, and its loss.

An objective divides the summed loss of a micro-batch by `num_items`, the mean number of items in
the micro-batches of the global batch. The mean over micro-batches and workers, which DeepSpeed
takes, is then the mean over all items of the global batch, however it is split.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from flashvl.data.features import IGNORE_INDEX, normalize_tiles, pad, tiles_from_bytes
from flashvl.data.synthetic import CELL_CLASSES
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.modeling_flashvl import pixel_shuffle

Columns = dict[str, npt.NDArray[Any]]
"""Columns of training rows, by name."""
Tensors = dict[str, torch.Tensor]
"""Tensors of a micro-batch, by name."""


class Objective(Protocol):
    """How a stage turns training rows into a loss."""

    @property
    def module(self) -> nn.Module:
        """The module that DeepSpeed wraps and trains."""

    def collate(self, columns: Columns) -> Tensors:
        """The tensors of a micro-batch of rows."""

    def num_items(self, batch: Tensors) -> int:
        """Number of items (tokens, cells) in a micro-batch that take a loss."""

    def loss(self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor) -> torch.Tensor:
        """The summed loss of a micro-batch, divided by `num_items`."""


class Answers:
    """Next-token loss on the assistant's turns."""

    def __init__(self, model: FlashVLForConditionalGeneration, processor: FlashVLProcessor):
        self.module = model
        self.processor = processor

    def collate(self, columns: Columns) -> Tensors:
        batch = {
            "input_ids": pad(columns["input_ids"], self.processor.tokenizer.pad_token_id),
            "labels": pad(columns["labels"], IGNORE_INDEX),
            "attention_mask": pad([np.ones(len(ids)) for ids in columns["input_ids"]], 0),
        }
        tiles = _tiles(columns["tiles"], self.processor)
        if len(tiles):
            batch["pixel_values"] = tiles
        return batch

    def num_items(self, batch: Tensors) -> int:
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def loss(self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor) -> torch.Tensor:
        return engine(**batch, num_items_in_batch=num_items, use_cache=False).loss


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

    def collate(self, columns: Columns) -> Tensors:
        cells = [np.frombuffer(cells, np.int64) for cells in columns["cells"]]
        return {
            "pixel_values": _tiles(columns["tiles"], self.processor),
            "cells": torch.from_numpy(np.stack(cells)).unflatten(1, (-1, len(CELL_CLASSES))),
        }

    def num_items(self, batch: Tensors) -> int:
        return batch["cells"].numel()

    def loss(self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor) -> torch.Tensor:
        logits = engine(batch["pixel_values"]).float()
        parts = logits.split([len(classes) for classes in CELL_CLASSES], dim=-1)
        summed = sum(
            F.cross_entropy(part.flatten(0, 1), cells.flatten(), reduction="sum")
            for part, cells in zip(parts, batch["cells"].unbind(-1), strict=True)
        )
        return summed / num_items


OBJECTIVES: dict[str, type[Answers] | type[Cells]] = {"supervised": Answers, "cells": Cells}
"""Objectives by the `kind` of the recipe."""


def _tiles(column: npt.NDArray[Any], processor: FlashVLProcessor) -> torch.Tensor:
    """The `tiles` column of rows -> normalised (tiles, 3, height, width)."""
    tiles = tiles_from_bytes(b"".join(column), processor)
    return normalize_tiles(torch.from_numpy(tiles.copy()), processor)
