"""Direct preference optimization (DPO, Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.lora import LoraModel
from torch import nn
from torch.nn import functional as F

from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.train.feed.shares import MicroBatch, Share
from flashvl.train.objectives import Sums
from flashvl.train.packed import Tensors, collate_tokens, model_inputs
from flashvl.train.policy import Policy, log_probs_of

FIGURES = (
    "accuracy",
    "margin",
    "reward_chosen",
    "reward_rejected",
    "log_prob_chosen",
    "log_prob_rejected",
)
"""Means over pairs. An answer's reward is `beta` times how much more probable, as a logarithm, the
policy finds it than the reference; the margin is that of the chosen answer less that of the
rejected one, and the accuracy the share of pairs in which it is positive. Zero counts half."""


class Pairs:
    """Each document is a pair: a prompt, and a chosen and a rejected answer as its branches.

    With p and r the log-probabilities that policy and reference give an answer, summed over its
    tokens, a pair's loss is

        -log sigmoid(beta ((p_chosen - r_chosen) - (p_rejected - r_rejected)))
    """

    def __init__(
        self,
        model: FlashVLForConditionalGeneration,
        processor: FlashVLProcessor,
        adapters: LoraModel | None,
        beta: float,
    ):
        self.module = Policy(model, adapters)
        self.processor = processor
        self._beta = beta
        self._sums = torch.zeros(len(FIGURES))
        self._num_pairs = 0

    def prepare(self, engine: nn.Module, share: Share) -> list[MicroBatch]:
        return share.micro_batches

    def collate(self, micro_batch: MicroBatch) -> Tensors:
        return collate_tokens(micro_batch)

    def count_items(self, micro_batch: MicroBatch) -> npt.NDArray[np.float64]:
        return np.ones(len(micro_batch.lengths))

    def loss(
        self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        targets = batch["targets"]
        logits, reference = engine(targets=targets, **model_inputs(batch, self.processor))
        policy = _sum_by_pair(log_probs_of(logits, targets), batch)
        rewards = self._beta * (policy - _sum_by_pair(reference, batch))
        chosen, rejected = rewards.unbind(1)
        losses = -F.logsigmoid(chosen - rejected)
        self._note(policy.detach(), rewards.detach())
        return losses.sum() / num_items, losses.detach()

    def take_figures(self) -> Sums:
        sums = dict(zip(FIGURES, self._sums.tolist(), strict=True))
        found = {name: (total, float(self._num_pairs)) for name, total in sums.items()}
        self._sums, self._num_pairs = torch.zeros(len(FIGURES)), 0
        return found

    def _note(self, policy: torch.Tensor, rewards: torch.Tensor) -> None:
        """
        Args:
            policy, rewards: (pairs, 2): of the chosen and of the rejected answers.
        """
        margins = rewards[:, 0] - rewards[:, 1]
        right = (torch.sign(margins) + 1) / 2
        columns = torch.stack([right, margins, *rewards.unbind(1), *policy.unbind(1)])
        self._sums = self._sums.to(columns.device) + columns.sum(1)
        self._num_pairs += len(margins)


def _sum_by_pair(log_probs: torch.Tensor, batch: Tensors) -> torch.Tensor:
    """(pairs, 2): log-probabilities of the chosen and of the rejected answers."""
    sums = torch.zeros(int(batch["num_branches"]), device=log_probs.device)
    return sums.index_add(0, batch["branches"], log_probs).view(-1, 2)
