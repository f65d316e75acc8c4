"""GRPO's objective: sampled completions that are better than their group become likelier."""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.lora import LoraModel
from torch import distributed, nn

from flashvl.data.storage import Location
from flashvl.errors import one_line
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.train.feed.shares import MicroBatch, Share
from flashvl.train.grpo.advantages import Float64s, group_advantages, has_signal
from flashvl.train.grpo.gallery import STEPS_A_WRITE, Gallery
from flashvl.train.grpo.groups import GroupBatch, Prompt, Rollout, build_batches, empty_batch
from flashvl.train.grpo.loss import (
    adjust_logits,
    divergences,
    entropies_of,
    importance_ratios,
    mean_by_completion,
    token_losses,
)
from flashvl.train.grpo.rollouts import Sampler
from flashvl.train.objectives import Sums
from flashvl.train.packed import Tensors, collate_tokens, model_inputs
from flashvl.train.policy import Policy, log_probs_of
from flashvl.train.recipe import GrpoRecipe
from flashvl.train.rewards.scoring import Scorer, total_rewards

logger = logging.getLogger(__name__)


class Groups:
    """The clipped policy loss with a penalty for leaving the reference; an item is a completion.

    A step's completions are sampled with the weights that its update starts from, so that the
    ratio of old and new probabilities is 1.
    """

    def __init__(
        self,
        model: FlashVLForConditionalGeneration,
        processor: FlashVLProcessor,
        recipe: GrpoRecipe,
        adapters: LoraModel | None,
        output: Location,
    ):
        """
        Args:
            model: made for training, before DeepSpeed splits its weights.
            output: folder of the gallery, which rank 0 writes.
        """
        config = model.config
        self.module = Policy(
            model,
            adapters,
            has_reference=recipe.beta > 0,
            adjust=lambda logits: adjust_logits(logits, config.image_token_id, recipe.temperature),
        )
        self.config = config
        self.processor = processor
        self.recipe = recipe
        self.sampler = Sampler(model, processor, recipe)
        self.scorer = Scorer(recipe.rewards)
        self.gallery = Gallery(stage=recipe.stage, reward_names=self.scorer.names)
        self.output = output
        self._prepared_s = 0.0
        self._figures: dict[str, list[float]] = {}
        self._clear_figures()

    def prepare(self, engine: nn.Module, share: Share) -> list[MicroBatch]:
        """Sample and score the completions of a share, with all workers."""
        start_s = time.perf_counter()
        prompts = read_prompts(share)
        rollouts = self.sampler.sample(engine, prompts, share.step)
        sampled_s = time.perf_counter()
        parts = [
            self.scorer.score(
                prompt.messages,
                [rollout.text for rollout in group],
                [rollout.token_ids for rollout in group],
                prompt.columns,
            )
            for prompt, group in zip(prompts, rollouts, strict=True)
        ]
        totals, advantages = self._compare(prompts, parts)
        batches: list[MicroBatch] = []
        batches += build_batches(
            prompts, rollouts, advantages, self.config, self.recipe.token_budget
        )
        batches += [self._empty()] * (_most(len(batches), engine) - len(batches))
        self._show(share.step + 1, prompts, rollouts, parts, totals, advantages)
        self._count_rollouts([each for group in rollouts for each in group])
        self._prepared_s = time.perf_counter()
        self._add("rollout_s", sampled_s - start_s, 1)
        self._add("reward_s", self._prepared_s - sampled_s, 1)
        return batches

    def collate(self, micro_batch: MicroBatch) -> Tensors:
        assert isinstance(micro_batch, GroupBatch)
        batch = collate_tokens(micro_batch)
        documents = np.repeat(np.arange(len(micro_batch.lengths)), micro_batch.num_branches)
        batch["advantages"] = torch.from_numpy(micro_batch.advantages)
        batch["sampled_logprobs"] = torch.from_numpy(micro_batch.sampled_logprobs)
        batch["documents_of_branches"] = torch.from_numpy(documents.astype(np.int64))
        return batch

    def count_items(self, micro_batch: MicroBatch) -> npt.NDArray[np.float64]:
        return micro_batch.num_branches.astype(np.float64)

    def loss(
        self, engine: nn.Module, batch: Tensors, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        recipe, branches = self.recipe, batch["branches"]
        targets = batch["targets"]
        logits, reference = engine(targets=targets, **model_inputs(batch, self.processor))
        logprobs = log_probs_of(logits, targets)
        importance = self._compare_with_engine(logits.detach(), logprobs.detach(), batch)
        losses = token_losses(
            logprobs,
            batch["advantages"][branches],
            epsilon=recipe.epsilon,
            importance=importance if recipe.importance_sampling_correction else None,
        )
        if reference is not None:
            divergence = divergences(logprobs, reference)
            losses = losses + recipe.beta * divergence
            self._add("kl", float(divergence.detach().sum()), len(targets))
        self._add("entropy", float(entropies_of(logits.detach()).sum()), len(targets))
        by_completion = mean_by_completion(losses, branches, int(batch["num_branches"]))
        by_document = torch.zeros(int(batch["num_documents"]), device=losses.device).index_add(
            0, batch["documents_of_branches"], by_completion.detach()
        )
        return by_completion.sum() / num_items, by_document

    def take_figures(self) -> Sums:
        self._add("update_s", time.perf_counter() - self._prepared_s, 1)
        figures = {name: (total, count) for name, (total, count) in self._figures.items()}
        self._clear_figures()
        return figures

    def _compare(
        self, prompts: Sequence[Prompt], parts: Sequence[Float64s]
    ) -> tuple[list[Float64s], list[Float64s]]:
        """The rewards and the advantages of this worker's completions.

        The rewards of all workers are gathered, so that the completions of a prompt are compared
        with all of its group, whichever workers have made them.
        """
        own = [
            (prompt.row, prompt.first_completion, part)
            for prompt, part in zip(prompts, parts, strict=True)
        ]
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, own)
        groups = defaultdict[int, list[tuple[int, Float64s]]](list)
        for each in gathered:
            for row, first, part in each:
                groups[row].append((first, part))
        totals, advantages = [], []
        for prompt in prompts:
            pieces = [part for _, part in sorted(groups[prompt.row], key=lambda pair: pair[0])]
            rewards = total_rewards(np.concatenate(pieces), self.scorer.weights)
            own_completions = slice(
                prompt.first_completion, prompt.first_completion + prompt.num_completions
            )
            totals.append(rewards[own_completions])
            advantages.append(group_advantages(rewards)[own_completions])
            if prompt.first_completion == 0:
                self._count_rewards(np.concatenate(pieces), rewards)
        return totals, advantages

    def _compare_with_engine(
        self, logits: torch.Tensor, logprobs: torch.Tensor, batch: Tensors
    ) -> torch.Tensor:
        """(tokens,): importance ratios, by log-probabilities at temperature 1, as the engine's."""
        sampled = batch["sampled_logprobs"]
        if self.recipe.temperature != 1:
            logprobs = log_probs_of(logits * self.recipe.temperature, batch["targets"])
        self._add("logprob_difference", float((logprobs - sampled).abs().sum()), len(sampled))
        return importance_ratios(logprobs, sampled, self.recipe.importance_sampling_cap)

    def _count_rewards(self, parts: Float64s, totals: Float64s) -> None:
        """Count the rewards of a whole group."""
        is_defined = ~np.isnan(totals)
        self._add("reward", float(totals[is_defined].sum()), int(is_defined.sum()))
        for name, values in zip(self.scorer.names, parts.T, strict=True):
            given = values[np.isfinite(values)]
            self._add(f"reward_{name}", float(given.sum()), len(given))
        self._add("undefined_share", float((~is_defined).sum()), len(totals))
        self._add("no_signal_share", float(not has_signal(totals)), 1)

    def _count_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        lengths = sum(len(each.token_ids) for each in rollouts)
        self._add("completion_length", float(lengths), len(rollouts))
        self._add("cut_share", float(sum(each.is_cut for each in rollouts)), len(rollouts))

    def _show(self, step: int, *group: Any) -> None:
        """Keep a group of a training step for the gallery, and write it every few steps."""
        if distributed.get_rank() != 0 or not self.module.training:
            return
        self.gallery.add(step, *group)
        if step % STEPS_A_WRITE == 0 or step == 1:
            try:
                self.gallery.write(self.output)
            except OSError as error:  # a page to look at is no reason to stop
                logger.warning("the gallery cannot be written: %s", one_line(error))

    def _empty(self) -> GroupBatch:
        return empty_batch(self.processor.image_processor.size["height"])

    def _add(self, name: str, total: float, count: float) -> None:
        sums = self._figures[name]
        sums[0] += total
        sums[1] += count

    def _clear_figures(self) -> None:
        """Begin the figures anew; their names must not depend on what a worker computes."""
        rewards = ["reward", *(f"reward_{name}" for name in self.scorer.names)]
        shares = ["undefined_share", "no_signal_share", "cut_share"]
        others = ["kl", "entropy", "completion_length", "logprob_difference"]
        seconds = ["rollout_s", "reward_s", "update_s"]
        self._figures = {name: [0.0, 0.0] for name in (*rewards, *shares, *others, *seconds)}


def read_prompts(share: Share) -> list[Prompt]:
    """The prompts of a share, with the completions that its worker makes."""
    prompts = []
    extras = iter(share.extras)
    rows = iter(share.rows.tolist())
    for batch in share.micro_batches:
        tokens = np.split(batch.input_ids, np.cumsum(batch.lengths)[:-1])
        tiles = np.split(batch.tiles, np.cumsum(batch.num_tiles)[:-1])
        for place in range(len(batch.lengths)):
            extra = json.loads(next(extras))
            prompts.append(
                Prompt(
                    row=next(rows),
                    source=int(batch.sources[place]),
                    input_ids=tokens[place],
                    tiles=tiles[place],
                    first_completion=extra["first_completion"],
                    num_completions=extra["num_completions"],
                    messages=extra["prompt"],
                    id=str(extra["id"]),
                    # TRL's own reward functions call it `solution`.
                    columns={"answer": extra["answer"], "solution": extra["answer"]},
                )
            )
    return prompts


def _most(count: int, engine: nn.Module) -> int:
    """The greatest count of all workers, at least 1."""
    most = torch.tensor(max(count, 1), device=next(engine.parameters()).device)
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most)
