"""Next-token loss on the assistant's turns of conversations."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.train.attention import BY_DOCUMENT
from flashvl.train.branches import number_documents
from flashvl.train.feed.shares import MicroBatch, Share
from flashvl.train.objectives import Sums
from flashvl.train.packed import (
    Tensors,
    collate_tokens,
    find_targets,
    model_inputs,
    sum_by_document,
)


class Answers:
    """The summed cross-entropy of all labelled tokens; each of them is an item."""

    def __init__(self, model: FlashVLForConditionalGeneration, processor: FlashVLProcessor):
        model.set_attn_implementation({"text_config": BY_DOCUMENT})
        model.model.always_encodes = True
        self.module = model
        self.processor = processor

    def prepare(self, engine: nn.Module, share: Share) -> list[MicroBatch]:
        return share.micro_batches

    def collate(self, micro_batch: MicroBatch) -> Tensors:
        return collate_tokens(micro_batch)

    def count_items(self, micro_batch: MicroBatch) -> npt.NDArray[np.float64]:
        documents = number_documents(micro_batch)[find_targets(micro_batch)]
        return np.bincount(documents, minlength=len(micro_batch.lengths)).astype(np.float64)

    def loss(
        self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = engine(**model_inputs(batch, self.processor)).logits[0]
        losses = F.cross_entropy(logits.float(), batch["targets"], reduction="none")
        return losses.sum() / num_items, sum_by_document(losses, batch)

    def take_figures(self) -> Sums:
        return {}
