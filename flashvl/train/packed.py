"""Packed rows as tensors: the documents of a micro-batch are one row for the model."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flashvl.data.features import IGNORE_INDEX, normalize_tiles
from flashvl.model import FlashVLProcessor
from flashvl.train.branches import (
    find_predictors,
    list_parts,
    number_branches,
    number_documents,
    place_tokens,
)
from flashvl.train.feed.shares import MicroBatch

Tensors = dict[str, torch.Tensor]
"""Tensors of a micro-batch, by name."""


def collate_tokens(micro_batch: MicroBatch) -> Tensors:
    """The tensors of a micro-batch, on the CPU; tiles stay uint8.

    Returns:
        `input_ids`, `position_ids`: (1, tokens).
        `parts`, `num_parts`: lengths of the prompts and branches; those of each document.
        `kept`: place of the token that predicts each label; several labels may have the same.
        `targets`, `documents`, `branches`: of each label its token, the number of its document, and
            that of its branch among all branches (-1 in a prompt).
        `num_documents`, `num_branches`: numbers of all documents and of all branches.
        `tiles`: (tiles, 3, height, width), if there are any.
    """
    num_documents = len(micro_batch.lengths)
    if not num_documents:  # workers must take the same number of micro-batches
        micro_batch = _one_token(micro_batch)
    predictors = find_predictors(micro_batch)
    is_target = find_targets(micro_batch, predictors)
    parts, num_parts = list_parts(micro_batch)
    arrays: dict[str, npt.NDArray[Any]] = {
        "input_ids": micro_batch.input_ids[None],
        "position_ids": place_tokens(micro_batch)[None],
        "parts": parts,
        "num_parts": num_parts,
        "kept": predictors[is_target],
        "targets": micro_batch.labels[is_target],
        "documents": number_documents(micro_batch)[is_target],
        "branches": number_branches(micro_batch)[is_target],
    }
    batch = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    batch["num_documents"] = torch.tensor(num_documents)
    batch["num_branches"] = torch.tensor(len(micro_batch.branches))
    if len(micro_batch.tiles):
        batch["tiles"] = torch.from_numpy(micro_batch.tiles.copy())
    return batch


def find_targets(
    micro_batch: MicroBatch, predictors: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.bool_]:
    """(tokens,): whether each token has a label, and a token before it that predicts it."""
    if predictors is None:
        predictors = find_predictors(micro_batch)
    return (micro_batch.labels != IGNORE_INDEX) & (predictors >= 0)


def model_inputs(batch: Tensors, processor: FlashVLProcessor) -> dict[str, Any]:
    """Arguments with which the model computes the logits of all labels, (1, labels, vocabulary).

    The text model's attention must be `attention.BY_DOCUMENT`.
    """
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "document_parts": [
            parts.tolist() for parts in batch["parts"].split(batch["num_parts"].tolist())
        ],
        "logits_to_keep": batch["kept"],
        "use_cache": False,
    }
    if "tiles" in batch:
        inputs["pixel_values"] = normalize_tiles(batch["tiles"], processor)
    return inputs


def sum_by_document(losses: torch.Tensor, batch: Tensors) -> torch.Tensor:
    """(documents,): the sums of detached losses of `documents`, in fp32."""
    sums = torch.zeros(int(batch["num_documents"]), device=losses.device)
    return sums.index_add(0, batch["documents"], losses.detach().float())


def _one_token(empty: MicroBatch) -> MicroBatch:
    """A micro-batch of one token without a label."""
    one = np.ones(1, np.int32)
    return MicroBatch(
        input_ids=0 * one,
        labels=IGNORE_INDEX * one,
        lengths=one,
        num_branches=0 * one,
        branches=empty.branches,
        sources=0 * one,
        num_tiles=0 * one,
        tiles=empty.tiles,
    )
