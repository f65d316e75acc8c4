"""Numbers of the parameters that a stage trains, by part, and as the paper's Table 1 has them."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import nn

from flashvl.model import FlashVLConfig, FlashVLForConditionalGeneration
from flashvl.train.recipe import MODEL_PARTS

PAPER_MILLION = 2**20
"""What the paper's M stands for: its adapter of 91.02M has 95,445,504 parameters."""
NOT_COUNTED = ("embed_tokens", "lm_head", "vision_tower.embeddings", "vision_tower.head")
"""Modules that the paper's numbers leave out: embeddings and heads, of tower and LLM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of a model's parameters."""

    total: dict[str, int]
    """All parameters of each part; a head of its own belongs to the language model."""
    trained: dict[str, int]
    """Parameters of each part that are trained; adapters of low rank count in place of weights."""
    paper_count: int
    """Parameters that are trained, without the embeddings and heads that the paper leaves out."""

    @property
    def num_total(self) -> int:
        return sum(self.total.values())

    @property
    def num_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def paper_millions(self) -> float:
        """The number as the paper prints it: 91.02 for the adapter, 1733.07 for the full model."""
        return self.paper_count / PAPER_MILLION

    def only(self, part: str) -> Self:
        """The same numbers without those of other parts."""
        return replace(
            self, total={part: self.total[part]}, trained={part: self.trained.get(part, 0)}
        )


def count_parameters(
    config: FlashVLConfig, trainable: Collection[str], lora_rank: int | None = None
) -> Parameters:
    """Numbers of parameters of a model, which is built without memory for its weights.

    Args:
        lora_rank: rank of low-rank adapters on the linear layers of the trainable parts, two
            matrices a layer; None trains the parts' own weights.
    """
    with torch.device("meta"):
        model = FlashVLForConditionalGeneration(config)
    model.tie_weights()
    total: dict[str, int] = dict.fromkeys(MODEL_PARTS, 0)
    trained = dict.fromkeys(total, 0)
    paper_count = 0
    for name, weight in model.named_parameters():  # a tied head is not named again
        part = next((part for part in MODEL_PARTS if f"model.{part}." in name), "language_model")
        total[part] += weight.numel()
        if part in trainable and lora_rank is None:
            trained[part] += weight.numel()
            paper_count += weight.numel() * (not any(other in name for other in NOT_COUNTED))
    if lora_rank is not None:
        for part in trainable:
            trained[part] = lora_rank * _widths(model.get_submodule(f"model.{part}"))
        paper_count = sum(trained.values())
    return Parameters(total=total, trained=trained, paper_count=paper_count)


def _widths(module: nn.Module) -> int:
    """Sum of the input and output widths of a module's linear layers."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features + layer.out_features for layer in layers)
