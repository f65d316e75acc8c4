"""The parameters that are trained, their groups, and the learning rate of each step."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from flashvl.errors import ConfigError
from flashvl.train.recipe import ModelPart, Recipe


def freeze_all_but(model: nn.Module, trainable: Iterable[ModelPart]) -> None:
    """Let only the parts `trainable` of the model learn; the head is part of the language model."""
    model.requires_grad_(False)
    for part in trainable:
        model.get_submodule(f"model.{part}").requires_grad_(True)
        if part == "language_model":
            model.get_submodule("lm_head").requires_grad_(True)


def count_trained(module: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad)


def check_count(counted: int, recipe: Recipe) -> None:
    """Refuse a model of which another number of parameters would be trained than the recipe says.

    Raises:
        ConfigError: the numbers differ.
    """
    if recipe.num_trainable_params not in (None, counted):
        raise ConfigError(
            f"{', '.join(recipe.trainable)} of {recipe.init_from} have {counted:,} parameters to"
            f" train, and num_trainable_params is {recipe.num_trainable_params:,}; correct it, or"
            " the model or trainable"
        )


def group_by_rate(module: nn.Module, model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW's groups of the parameters that are trained: one for each peak learning rate.

    Args:
        module: module that is trained; what does not belong to `model` has the recipe's rate.
        model: model that the module's parts come from.
    """
    rates = {
        id(weight): rate
        for part, rate in recipe.learning_rates.items()
        for weight in _weights_of(model, part)
    }
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for weight in module.parameters():
        if weight.requires_grad:
            groups[rates.get(id(weight), recipe.learning_rate)].append(weight)
    return [{"params": weights, "lr": rate} for rate, weights in groups.items()]


def _weights_of(model: nn.Module, part: ModelPart) -> Iterable[nn.Parameter]:
    yield from model.get_submodule(f"model.{part}").parameters()
    if part == "language_model":
        yield from model.get_submodule("lm_head").parameters()


def rate_share(recipe: Recipe, step: int, num_steps: int) -> float:
    """Share of the peak learning rate with which a step, numbered from 0, is made.

    Linear warm-up, then half a cosine down to the floor, as transformers'
    `get_cosine_with_min_lr_schedule_with_warmup`.
    """
    if step < recipe.warmup_steps:
        return step / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, num_steps - recipe.warmup_steps)
    floor = recipe.min_learning_rate / recipe.learning_rate
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(engine: Any, peaks: Sequence[float], share: float) -> None:
    """Give each of AdamW's groups its peak learning rate times `share`."""
    for group, peak in zip(engine.basic_optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share
