"""A policy and its reference in one forward pass, which share the vision tower's output."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from flashvl.model import FlashVLForConditionalGeneration
from flashvl.train.attention import BY_DOCUMENT
from flashvl.train.run.lora import turned_off

Adjust = Callable[[torch.Tensor], torch.Tensor]
"""Logits of the model -> logits of the distribution that is meant, (labels, vocabulary) in fp32."""


class Policy(nn.Module):
    """The model that learns, and its reference: the model that it began as.

    The reference is the model with its adapters turned off. Where weights are trained themselves,
    it is a frozen copy of them, which DeepSpeed knows nothing of. Both see the images; a tower that
    is not trained runs once for both.
    """

    def __init__(
        self,
        model: FlashVLForConditionalGeneration,
        adapters: LoraModel | None,
        *,
        has_reference: bool = True,
        adjust: Adjust = torch.Tensor.float,
    ):
        """
        Args:
            model: model with the weights that the stage starts from.
            adapters: the adapters that are trained; None: weights are trained themselves.
        """
        super().__init__()
        model.set_attn_implementation({"text_config": BY_DOCUMENT})
        self.model = model
        self._adapters = [adapters]  # in lists, so that they are no modules of this one
        self._frozen: list[FlashVLForConditionalGeneration] = []
        self._adjust = adjust
        self._has_reference = has_reference
        tower = model.model.vision_tower
        self._shares_tower = not any(weight.requires_grad for weight in tower.parameters())
        if has_reference and adapters is None:
            shared = {id(tower): tower} if self._shares_tower else {}
            self._frozen = [copy.deepcopy(model, shared).requires_grad_(False).eval()]

    def forward(
        self, targets: torch.Tensor, pixel_values: torch.Tensor | None = None, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score the labels of a batch.

        Args:
            targets: (labels,): the tokens whose logits are asked for.
            inputs: what `packed.model_inputs` gives besides.

        Returns:
            The policy's logits, (labels, vocabulary) in fp32, and the reference's log-probabilities
            of `targets`, (labels,), or None without one.
        """
        is_text = pixel_values is None
        if pixel_values is None:
            side = self.model.config.vision_config.image_size
            pixel_values = torch.zeros((1, 3, side, side), device=targets.device)
        tokens = self.model.model.encode_tiles(pixel_values)[1] if self._shares_tower else None
        images = _Images(pixel_values, tokens, is_text)
        reference = None
        if self._has_reference:
            with torch.no_grad():
                logits = self._reference_logits(images, inputs)
                reference = log_probs_of(logits, targets)
        return self._logits(self.model, images, inputs), reference

    def _reference_logits(self, images: "_Images", inputs: dict[str, Any]) -> torch.Tensor:
        (adapters,) = self._adapters
        if adapters is None:
            (frozen,) = self._frozen
            weight = self.model.lm_head.weight
            frozen.to(device=weight.device, dtype=weight.dtype)
            return self._logits(frozen, images, inputs)
        with turned_off(adapters):
            return self._logits(self.model, images, inputs)

    def _logits(
        self, model: FlashVLForConditionalGeneration, images: "_Images", inputs: dict[str, Any]
    ) -> torch.Tensor:
        tokens = images.tokens
        if tokens is None:
            _, tokens = model.model.encode_tiles(images.pixel_values)
        features = model.model.multi_modal_projector(tokens)
        if images.is_text:
            features = features[:, :0]
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        return self._adjust(model(**inputs, mm_encoder_outputs=encoded).logits[0])


@dataclass(frozen=True, slots=True)
class _Images:
    """The images of a batch, on their way into policy and reference."""

    pixel_values: torch.Tensor
    tokens: torch.Tensor | None
    """Input of the adapter, if policy and reference share it."""
    is_text: bool
    """Whether the batch has no images. A black tile stands for them, of which no token is used, so
    that all ranks of ZeRO 3 pass through the same modules in the same order."""


def log_probs_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(labels,): log-probability of each target."""
    return -F.cross_entropy(logits, targets, reduction="none")
