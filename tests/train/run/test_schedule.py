"""Which parameters are trained, and at what rate: compared with transformers, and counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from flashvl.errors import ConfigError
from flashvl.model.loading import load_model
from flashvl.train.recipe import RECIPES, AnyRecipe
from flashvl.train.run.schedule import (
    check_count,
    count_trained,
    freeze_all_but,
    group_by_rate,
    rate_share,
)


def make_recipe(**changes: Any) -> AnyRecipe:
    recipe = {
        "kind": "supervised",
        "stage": "test",
        "init_from": "model",
        "output_dir": "output",
        "data": {"synthetic": {"count": 1}},
        "learning_rate": 1e-3,
    }
    return RECIPES["supervised"].model_validate(recipe | changes)


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (7, 2e-5), (400, 1e-4)])
def test_the_rate_of_each_step_is_that_of_transformers(warmup: int, floor: float) -> None:
    num_steps = 50
    recipe = make_recipe(warmup_steps=warmup, min_learning_rate=floor)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, num_steps, min_lr=floor
    )
    for step in range(num_steps):
        expected = schedule.get_last_lr()[0]
        assert 1e-3 * rate_share(recipe, step, num_steps) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        schedule.step()


def test_parts_have_the_rates_that_the_recipe_gives_them(tiny_random: Path) -> None:
    model = load_model(tiny_random)
    recipe = make_recipe(
        learning_rates={"vision_tower": 1e-5, "language_model": 2e-5},
        trainable=["vision_tower", "multi_modal_projector", "language_model"],
    )
    freeze_all_but(model, recipe.trainable)
    groups = group_by_rate(model, model, recipe)
    found = {group["lr"]: sum(weight.numel() for weight in group["params"]) for group in groups}
    part = model.model
    assert found == {
        1e-5: count_trained(part.vision_tower),
        2e-5: count_trained(part.language_model)
        + sum(
            weight.numel()
            for name, weight in model.named_parameters()
            if name.startswith("lm_head")
        ),
        1e-3: count_trained(part.multi_modal_projector),
    }
    assert sum(found.values()) == count_trained(model)


def test_another_number_of_trained_parameters_is_refused(tiny_random: Path) -> None:
    model = load_model(tiny_random)
    freeze_all_but(model, ["multi_modal_projector"])
    counted = count_trained(model)
    assert counted == sum(w.numel() for w in model.model.multi_modal_projector.parameters())
    check_count(counted, make_recipe())
    check_count(counted, make_recipe(num_trainable_params=counted))
    with pytest.raises(ConfigError, match=f"have {counted:,} parameters to train") as raised:
        check_count(counted, make_recipe(num_trainable_params=counted + 1))
    assert "\n" not in str(raised.value)
